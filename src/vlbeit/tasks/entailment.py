"""Does a picture entail a sentence, contradict it, or neither? SNLI-VE.

Sentence and picture go through the backbone together; [T_CLS] goes to a linear classifier.
Records: an image and json {"hypothesis", "label": 0, 1 or 2}, the place in CLASSES. Figures:
accuracy, in all and by label, beside the label that training shows most.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from vlbeit.config import FinetuneConfig
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.task_stream import Example, Items, Pictures, read_field
from vlbeit.draws import Draws
from vlbeit.errors import InputError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tasks import Figure, Path
from vlbeit.types import Score, TaskBatch

FACTS = ("most_frequent",)
"""What `learn_facts` returns."""
CLASSES = ("entailment", "neutral", "contradiction")


def learn_facts(config: FinetuneConfig, sources: Sequence[RecordSource]) -> dict[str, Any]:
    """{"most_frequent": label}. Raises InputError when no record has a label."""
    counts: Counter[int] = Counter()
    for source in sources:
        for index in range(len(source)):
            try:
                counts[label_of(source.read(index, only=("json",)))] += 1
            except BadSample:
                continue  # named and counted when the loader meets it
    if not counts:
        names = ", ".join(source.name for source in sources)
        raise InputError(f'no record of {names} has a "label" of 0, 1 or 2; prepare them again')
    return {"most_frequent": min(counts, key=lambda label: (-counts[label], label))}


def label_of(record: Record) -> int:
    """Raises BadSample: bad_json, bad_label."""
    label: int = read_field(record, "label", int)
    if not 0 <= label < len(CLASSES):
        detail = f'"label" is {label}; 0 is {CLASSES[0]}, 1 {CLASSES[1]}, 2 {CLASSES[2]}'
        raise BadSample(record.shard, f"{record.key}.json", "bad_label", detail)
    return label


def build(config: FinetuneConfig, facts: dict[str, Any]) -> "Entailment":
    return Entailment(facts)


class Entailment:
    """The task; holds no tensor."""

    stream = "task:entailment"
    weights: Mapping[str, float] = {"entailment": 1.0}
    paths: tuple[Path, ...] = ("pair",)

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    # ---- data

    def items(self, source: RecordSource, training: bool) -> Items:
        return Items.of_text(source, "hypothesis")

    def example(
        self, source: RecordSource, record: int, number: int, pictures: Pictures, draws: Draws
    ) -> Example:
        """Target: `label` ()."""
        found = source.read(record)
        return Example(
            text=read_field(found, "hypothesis", str),
            targets={"label": np.array(label_of(found))},
            pixels=pictures.pixels(found.image(), draws)[None],
        )

    def about(self, record: Record, number: int) -> dict[str, Any]:
        return {"hypothesis": read_field(record, "hypothesis", str), "label": label_of(record)}

    # ---- model

    def head(self, model: VLBeit, seed: int) -> nn.Linear:
        head = nn.Linear(model.config.width, len(CLASSES))
        initialise(head, seed, model.config.init_std)
        return head

    def frozen(self, name: str) -> bool:
        return False

    def count(self, batch: TaskBatch) -> dict[str, int]:
        return {"entailment": len(batch)}

    def logits(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> Tensor:
        """(B, 3) float32."""
        assert batch.words is not None
        states = model.embed_pair(
            batch.words, batch.word_valid, batch.image(), depth_draws=batch.draws()
        )
        logits: Tensor = head(model.backbone.first(states))
        return logits.float()

    def score(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> dict[str, Score]:
        logits = self.logits(model, head, batch)
        return {"entailment": Score.of_logits(logits, batch.targets["label"])}

    def predict(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> list[dict[str, Any]]:
        """Rows {"answer": label, "probabilities": (3,)}."""
        shares = self.logits(model, head, batch).softmax(dim=-1)
        answers = shares.argmax(dim=-1).tolist()
        return [
            {"answer": answer, "probabilities": row}
            for answer, row in zip(answers, shares.tolist(), strict=True)
        ]

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        labels = np.array([row["label"] for row in rows])
        right = np.array([row["answer"] for row in rows]) == labels
        found = {"accuracy": Figure.share(right, labels == self.facts["most_frequent"])}
        for label in np.unique(labels):
            here = labels == label
            found[f"accuracy/{CLASSES[label]}"] = Figure(numerator=right & here, denominator=here)
        return found
