"""Is a statement about two pictures true? NLVR2 (docs/paper.md 5).

The statement goes through the backbone with the left picture and again with the right one; the two
[T_CLS], side by side, go to a classifier. Records: left.EXT, right.EXT and json {"statement",
"truth", "kind"?, "identifier"? or "id"?}. Figures: accuracy, by kind, and NLVR2's consistency,
beside what is most often the truth in training.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlbeit.config import FinetuneConfig
from vlbeit.data.manifest import IMAGE_EXTENSIONS
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.task_stream import Example, Items, Pictures, read_field
from vlbeit.draws import Draws
from vlbeit.errors import InputError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tasks import Figure, Path
from vlbeit.types import Score, TaskBatch

FACTS = ("prior", "most_frequent")
"""What `learn_facts` returns."""
SIDES = ("left", "right")
KINDS_SHOWN = 12
"""Kinds that get a figure of their own: the most frequent ones."""


class PairHead(nn.Module):
    """(B, 2 D), [T_CLS] with the left and with the right picture, to (B, 2) logits.

    VLMo's classifier. Its tanh pooler before it is left out: the paper speaks of the vectors
    themselves (section 3.2).
    """

    def __init__(self, width: int, norm_eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=norm_eps)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.norm(self.fc1(x))))
        return out


def learn_facts(config: FinetuneConfig, sources: Sequence[RecordSource]) -> dict[str, Any]:
    """{"prior": {kind: truth}, "most_frequent": truth}.

    Raises:
        InputError: no record says whether its statement is true.
    """
    by_kind: dict[str, Counter[bool]] = {}
    for source in sources:
        for index in range(len(source)):
            try:
                record = source.read(index, only=("json",))
                truth = read_field(record, "truth", bool)
                by_kind.setdefault(kind_of(record), Counter())[truth] += 1
            except BadSample:
                continue  # named and counted when the loader meets it
    if not by_kind:
        raise InputError(
            f'no record of {", ".join(s.name for s in sources)} has a "truth" of true or false; '
            "prepare the folder again"
        )
    return {
        "prior": {kind: _majority(counts) for kind, counts in sorted(by_kind.items())},
        "most_frequent": _majority(sum(by_kind.values(), Counter())),
    }


def _majority(counts: Counter[bool]) -> bool:
    """False where both are as frequent."""
    return counts[True] > counts[False]


def kind_of(record: Record) -> str:
    """The kind that the data names, else nothing."""
    kind = read_field(record, "kind", (str, type(None)))
    return kind or ""


def sentence_of(identifier: str) -> str:
    """What the records of one sentence share: PART-SET-PAIR-SENTENCE without PAIR, the rule of
    NLVR2's own evaluation. Empty for identifiers of another form."""
    parts = identifier.split("-")
    return "-".join((*parts[:2], "", *parts[3:])) if len(parts) == 4 else ""


def build(config: FinetuneConfig, facts: dict[str, Any]) -> "Statements":
    return Statements(facts)


class Statements:
    """The task; holds no tensor."""

    stream = "task:statements"
    weights: Mapping[str, float] = {"statements": 1.0}
    paths: tuple[Path, ...] = ("pair", "pair")

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    # ---- data

    def items(self, source: RecordSource, training: bool) -> Items:
        return Items.of_text(source, "statement")

    def example(
        self, source: RecordSource, record: int, number: int, pictures: Pictures, draws: Draws
    ) -> Example:
        """Target: `truth` (), 0 or 1."""
        found = source.read(record)
        statement = read_field(found, "statement", str)
        truth = read_field(found, "truth", bool)
        pixels = [pictures.pixels(picture(found, side), draws) for side in SIDES]
        return Example(
            pixels=np.stack(pixels), text=statement, targets={"truth": np.array(int(truth))}
        )

    def about(self, record: Record, number: int) -> dict[str, Any]:
        identifier = read_field(record, "identifier", (str, type(None)))
        return {
            "statement": read_field(record, "statement", str),
            "truth": read_field(record, "truth", bool),
            "kind": kind_of(record),
            "identifier": identifier or read_field(record, "id", (str, int, type(None))),
        }

    # ---- model

    def head(self, model: VLBeit, seed: int) -> PairHead:
        head = PairHead(model.config.width, model.config.norm_eps)
        initialise(head, seed, model.config.init_std)
        return head

    def frozen(self, name: str) -> bool:
        return False

    def count(self, batch: TaskBatch) -> dict[str, int]:
        return {"statements": len(batch)}

    def logits(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> Tensor:
        """(B, 2) float32, false and true. Both pictures go through the model as one micro-batch of
        2 B pairs: the left ones first."""
        if batch.words is None or batch.word_valid is None:
            raise ValueError("a statements batch without words")
        draws = [batch.draws(side) for side in range(2)]
        states = model.embed_pair(
            batch.words.repeat(2, 1),
            batch.word_valid.repeat(2, 1),
            torch.cat([batch.image(side) for side in range(2)]),
            depth_draws=None if draws[0] is None else torch.cat(draws),  # type: ignore[arg-type]
        )
        left, right = model.backbone.first(states).unflatten(0, (2, -1))
        logits: Tensor = head(torch.cat((left, right), dim=1))
        return logits.float()

    def score(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> dict[str, Score]:
        logits = self.logits(model, head, batch)
        return {"statements": Score.of_logits(logits, batch.targets["truth"])}

    def predict(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> list[dict[str, Any]]:
        """Rows {"answer": true or false, "probability": that it is true}."""
        shares = self.logits(model, head, batch).softmax(dim=-1)[:, 1].tolist()
        return [{"answer": share > 0.5, "probability": share} for share in shares]

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """accuracy; by kind, where the data names kinds; consistency, where several records have
        the same sentence."""
        right = np.array([row["answer"] == row["truth"] for row in rows], dtype=np.float64)
        guess = np.array(
            [self.guess(row["kind"]) == row["truth"] for row in rows], dtype=np.float64
        )
        found = {"accuracy": Figure.share(right.tolist(), guess.tolist())}
        sentences = [sentence_of(str(row["identifier"])) for row in rows]
        named = [sentence for sentence in sentences if sentence]
        if len(set(named)) < len(named):
            found["consistency"] = consistency(sentences, right, guess)
        kinds = np.array([row["kind"] for row in rows])
        for kind, _ in Counter(kinds[kinds != ""].tolist()).most_common(KINDS_SHOWN):
            here = (kinds == kind).astype(np.float64)
            found[f"accuracy/{kind}"] = Figure(
                numerator=right * here, denominator=here, baseline=(guess * here, here)
            )
        return found

    def guess(self, kind: str) -> bool:
        """What is said of a statement that is not looked at."""
        found: bool = self.facts["prior"].get(kind, self.facts["most_frequent"])
        return found


def consistency(sentences: Sequence[str], right: np.ndarray, guess: np.ndarray) -> Figure:
    """The share of sentences that are judged rightly in all their records (NLVR2).

    A sentence counts at its first record, so the interval takes sentences for independent.

    Shapes: sentences, right, guess (S,); the empty sentence counts nowhere.
    """
    names, first, place = np.unique(np.array(sentences), return_index=True, return_inverse=True)
    there = np.zeros(len(right))
    there[first[names != ""]] = 1.0

    def all_right(values: np.ndarray) -> np.ndarray:
        lowest = np.ones(len(names))
        np.minimum.at(lowest, place, values)
        both: np.ndarray = lowest[place] * there
        return both

    return Figure(numerator=all_right(right), denominator=there, baseline=(all_right(guess), there))


def picture(record: Record, side: str) -> bytes:
    """The bytes of the left or the right picture.

    Raises:
        BadSample: no_image.
    """
    for extension in IMAGE_EXTENSIONS:
        if f"{side}.{extension}" in record.members:
            return record.members[f"{side}.{extension}"]
    found = ", ".join(record.members) or "nothing"
    raise BadSample(record.shard, record.key, "no_image", f"no {side} picture; it has {found}")
