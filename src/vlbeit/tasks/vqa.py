"""Visual question answering as classification over a list of answers (docs/paper.md 5).

Text and picture go through the backbone together; [T_CLS] -> pooler -> two layers. Records: an
image and json {"questions": [{"question", "answer", "kind"?, "answers"?: [10 strings],
"question_id"?, "answer_type"?, "question_type"?}]}. One sample is one question. Figures: accuracy
over all questions, then by their types or kind, beside the most frequent answer of the kind in
training (the question alone).

List, targets and what is said are compared in one form (`answer_form`). Questions of a test set
have no answer: they are refused by name, except for a submission.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.config import FinetuneConfig, VqaConfig, VqaRun
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.task_stream import Example, Items, Pictures, facts_of, read_field
from vlbeit.data.transforms import BadText
from vlbeit.data.vqa_answers import answer_accuracy, answer_form, form_or_nothing, score_of
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tasks import Figure
from vlbeit.tasks import Path as Way
from vlbeit.types import Score, TaskBatch

FACTS = ("answers", "log_odds", "prior", "most_frequent")
"""What `learn_facts` returns."""
KINDS_SHOWN = 12
"""Kinds that get a figure of their own: the most frequent ones."""


class AnswerHead(nn.Module):
    """(B, D), the final vector of [T_CLS], to (B, answers) logits: VLMo's pooler and classifier."""

    def __init__(self, width: int, answers: int, norm_eps: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=norm_eps)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, answers)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.tanh(self.pooler(x))
        out: Tensor = self.fc2(self.act(self.norm(self.fc1(pooled))))
        return out


def learn_facts(config: FinetuneConfig, sources: Sequence[RecordSource]) -> dict[str, Any]:
    """{"answers": the list, "log_odds": of each in training, "prior": {kind: answer},
    "most_frequent": answer}.

    Raises:
        InputError: no list, an empty one, or one that no training question is answered by.
    """
    assert isinstance(config, VqaRun)
    main: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {}
    for source in sources:
        for question in questions_of(source):
            if not is_answered(question):
                continue  # named and counted when the loader meets it
            answer = answer_form(question["answer"])
            main[answer] += 1
            by_kind.setdefault(kind_of(question), Counter())[answer] += 1
    answers = answer_list(config, main)
    if not any(answer in main for answer in answers):
        raise InputError(
            f"none of the {len(answers)} answers in the list answers a question of "
            f"{', '.join(s.name for s in sources)}: another list (vqa.answers) or lower "
            f"vqa.min_count (now {config.vqa.min_count})"
        )
    return {
        "answers": answers,
        "log_odds": log_odds([main[answer] for answer in answers], main.total()),
        "prior": {kind: most_frequent(counts) for kind, counts in sorted(by_kind.items())},
        "most_frequent": most_frequent(main),
    }


def log_odds(counts: Sequence[int], total: int) -> list[float]:
    """log(p / (1 - p)) of shares p = count / total, kept half a question from 0 and 1.

    >>> [round(value, 2) for value in log_odds([1, 2, 0, 4], 4)]
    [-1.1, 0.0, -1.95, 1.95]
    """
    kept = (min(max(count, 0.5), total - 0.5) for count in counts)
    return [math.log(count / (total - count)) for count in kept]


def answer_list(config: VqaRun, main: Counter[str]) -> list[str]:
    """The answers in the order of the classes: from a file, from dataset.json, else by frequency.

    Args:
        main: how many training questions have each main answer.
    """
    if config.vqa.answers:
        return read_answers(Path(config.vqa.answers))
    listed = facts_of(config.data, "answers")
    if listed:
        return list(dict.fromkeys(answer_form(answer) for answer in listed))
    found = [a for a, count in main.items() if count >= config.vqa.min_count]
    if not found:
        raise InputError(
            f"no answer is the main one of {config.vqa.min_count} questions or more "
            f"(vqa.min_count) in {', '.join(config.data)}; lower it or give a list (vqa.answers)"
        )
    return sorted(found, key=lambda answer: (-main[answer], answer))


def read_answers(path: Path) -> list[str]:
    """A JSON list of strings, or one answer a line.

    Raises:
        InputError: missing, empty, or an answer twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
        answers = [answer_form(str(answer)) for answer in found if str(answer).strip()]
    except (OSError, ValueError, BadText) as error:
        raise InputError(f"vqa.answers {path}: cannot be read as answers ({error})") from None
    twice = [answer for answer, count in Counter(answers).items() if count > 1]
    if twice or not answers:
        what = f"{twice[0]!r} stands there twice" if twice else "it is empty"
        raise InputError(f"vqa.answers {path}: {what}; one answer a line or a JSON list")
    return answers


def questions_of(source: RecordSource) -> Iterator[dict[str, Any]]:
    """Those of every readable record; pictures are not read."""
    for index in range(len(source)):
        try:
            record = source.read(index, only=("json",))
            for number in range(len(read_field(record, "questions", list))):
                yield question_at(record, number)
        except BadSample:
            continue  # named and counted when the loader meets it


def question_at(record: Record, number: int) -> dict[str, Any]:
    """One question of a record, with or without an answer.

    Raises:
        BadSample: bad_json.
    """
    questions = read_field(record, "questions", list)
    found = questions[number] if number < len(questions) else None
    if isinstance(found, dict):
        main, given = found.get("answer"), found.get("answers", [])
        if (
            isinstance(found.get("question"), str)
            and isinstance(main, str if given else str | None)
            and isinstance(given, list)
            and all(isinstance(answer, str) for answer in given)
        ):
            return found
    detail = f'question {number + 1} has no "question" and "answer" as text: {found!r}'[:200]
    raise BadSample(record.shard, f"{record.key}.json", "bad_json", detail)


def is_answered(question: Mapping[str, Any]) -> bool:
    """Whether there is a main answer with something in it."""
    return bool(form_or_nothing(question.get("answer") or ""))


def given_answers(question: Mapping[str, Any]) -> list[str]:
    """What people said, as stored; the one answer where no more is known, [] where none is."""
    if not is_answered(question):
        return []
    return question.get("answers") or [question["answer"]]


def kind_of(question: Mapping[str, Any]) -> str:
    """The kind or question type that the data names, else the question's first two words."""
    kind = question.get("kind") or question.get("question_type")
    return str(kind) if kind else " ".join(str(question["question"]).lower().split()[:2])


def most_frequent(counts: Counter[str]) -> str:
    """Of equals the first by the alphabet; empty when nothing was counted."""
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")


def build(config: FinetuneConfig, facts: dict[str, Any]) -> "Vqa":
    """Raises ConfigError for settings out of range."""
    assert isinstance(config, VqaRun)
    if config.vqa.min_count < 1:
        raise ConfigError(f"vqa.min_count must be at least 1, found {config.vqa.min_count}")
    return Vqa(config.vqa, facts)


class Vqa:
    """The task; holds no tensor."""

    stream = "task:vqa"
    weights: Mapping[str, float] = {"vqa": 1.0}
    paths: tuple[Way, ...] = ("pair",)

    def __init__(
        self, settings: VqaConfig, facts: dict[str, Any], *, unanswered: bool = False
    ) -> None:
        """
        Args:
            unanswered: questions without an answer are samples too.
        """
        self.settings = settings
        self._unanswered = unanswered
        self.facts = facts
        self.answers: list[str] = facts["answers"]
        self._places = {answer: place for place, answer in enumerate(self.answers)}

    # ---- data

    def items(self, source: RecordSource, training: bool) -> Items:
        """Every question; in training those with a listed answer only (VLMo), beside those without
        any answer, which are skipped by name."""

        def rows() -> Iterator[tuple[int, int, int]]:
            for index in range(len(source)):
                try:
                    record = source.read(index, only=("json",))
                    count = len(read_field(record, "questions", list))
                    found = [question_at(record, number) for number in range(count)]
                except BadSample:
                    yield index, 0, 0
                    continue
                for number, question in enumerate(found):
                    useful = not is_answered(question) or self._target(question).any()
                    if not training or useful:
                        yield index, number, len(question["question"])

        return Items.of(rows())

    def _target(self, question: Mapping[str, Any]) -> np.ndarray:
        """(answers,) float32 in [0, 1]."""
        target = np.zeros(len(self.answers), dtype=np.float32)
        given = given_answers(question)
        # An annotator who said nothing counts as one, but for no answer: the list has no "".
        for answer, count in Counter(map(form_or_nothing, given)).items():
            if answer in self._places:
                target[self._places[answer]] = score_of(count, len(given))
        return target

    def example(
        self, source: RecordSource, record: int, number: int, pictures: Pictures, draws: Draws
    ) -> Example:
        """Target: `answers` (answers,) float32, all 0 without an answer.

        Raises:
            BadSample: also no_answer, where the task needs one.
        """
        found = source.read(record)
        question = question_at(found, number)
        if not (is_answered(question) or self._unanswered):
            detail = (
                f"question {number + 1}, {question['question'][:80]!r}, has no answer; "
                "`vlbeit eval RUN --submission FILE` answers such questions"
            )
            raise BadSample(found.shard, f"{found.key}.json", "no_answer", detail)
        pixels = pictures.pixels(found.image(), draws)
        return Example(
            pixels=pixels[None],
            text=question["question"],
            targets={"answers": self._target(question)},
        )

    def about(self, record: Record, number: int) -> dict[str, Any]:
        question = question_at(record, number)
        return {
            "question": question["question"],
            "question_id": question.get("question_id"),
            "kind": kind_of(question),
            "answer_type": question.get("answer_type"),
            "question_type": question.get("question_type"),
            "answers": given_answers(question),  # as stored: the official rule wants them so
        }

    # ---- submission

    def for_submission(self) -> "Vqa":
        return Vqa(self.settings, self.facts, unanswered=True)

    def check_submission(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every question needs a question_id of its own, an integer (VQA v2's are)."""
        seen: dict[int, str] = {}
        for row in rows:
            number = row["question_id"]
            if not isinstance(number, int) or isinstance(number, bool):
                raise InputError(
                    f"{row['record']}: question {row['question'][:80]!r} has no question_id that "
                    f"is an integer (found {number!r}), by which a submission names it; "
                    "`vlbeit prepare vqav2` keeps them"
                )
            if number in seen:
                raise InputError(
                    f"question_id {number} is that of questions in {seen[number]} and "
                    f"{row['record']}; name one data folder that holds each question once"
                )
            seen[number] = row["record"]

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """The official results file: JSON [{"question_id", "answer"}, ...], by question_id."""
        self.check_submission(rows)
        found = [{"question_id": row["question_id"], "answer": row["answer"]} for row in rows]
        return json.dumps(sorted(found, key=lambda row: row["question_id"]))

    # ---- model

    def head(self, model: VLBeit, seed: int) -> AnswerHead:
        """Fresh; it says how often each answer is the main one in training.

        From logits of 0 the sum over all answers starts at 0.69 times their number, and the first
        steps' gradients say of nearly every answer, whatever is asked, that it is not the one
        (RetinaNet, section 4.1, has the rule for its many background boxes). The paper and VLMo
        do not say how the bias starts.
        """
        head = AnswerHead(model.config.width, len(self.answers), model.config.norm_eps)
        initialise(head, seed, model.config.init_std)
        with torch.no_grad():
            head.fc2.bias.copy_(torch.tensor(self.facts["log_odds"]))
        return head

    def frozen(self, name: str) -> bool:
        return False

    def count(self, batch: TaskBatch) -> dict[str, int]:
        return {"vqa": len(batch)}

    def logits(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> Tensor:
        """(B, answers) float32, from [T_CLS], the first token of [text ; image]."""
        if batch.words is None:
            raise ValueError("a vqa batch without words")
        states = model.embed_pair(
            batch.words, batch.word_valid, batch.image(), depth_draws=batch.draws()
        )
        logits: Tensor = head(model.backbone.first(states))
        return logits.float()

    def score(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> dict[str, Score]:
        """Binary cross-entropy, summed over the answers (VLMo: mean times their number);
        `correct` adds the soft score of the answer that is said."""
        logits = self.logits(model, head, batch)
        target = batch.targets["answers"]
        said = logits.detach().argmax(dim=-1, keepdim=True)
        return {
            "vqa": Score(
                loss_sum=F.binary_cross_entropy_with_logits(logits, target, reduction="sum"),
                count=torch.tensor(len(batch), device=logits.device),
                correct=target.gather(1, said).sum(),
            )
        }

    def predict(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> list[dict[str, Any]]:
        """Rows {"answer", "probability": the sigmoid of its logit}."""
        best = self.logits(model, head, batch).sigmoid().max(dim=-1)
        return [
            {"answer": self.answers[place], "probability": share}
            for place, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """accuracy, then that of each answer type and question type where the data names them
        (VQA v2), else of each kind."""
        right = np.array([answer_accuracy(row["answer"], row["answers"]) for row in rows])
        guess = np.array([answer_accuracy(self.guess(row["kind"]), row["answers"]) for row in rows])
        found = {"accuracy": Figure.share(right.tolist(), guess.tolist())}
        for name, here in groups_of(rows).items():
            found[name] = Figure(
                numerator=right * here, denominator=here, baseline=(guess * here, here)
            )
        return found

    def guess(self, kind: str) -> str:
        """The answer to a question whose picture is not looked at."""
        found: str = self.facts["prior"].get(kind, self.facts["most_frequent"])
        return found


def groups_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Figure name -> (S,) 1.0 where a row belongs to it."""
    found: dict[str, np.ndarray] = {}
    for field in ("answer_type", "question_type"):
        named = np.array([str(row[field] or "") for row in rows])
        for name in np.unique(named[named != ""]):
            found[f"{field}/{name}"] = (named == name).astype(np.float64)
    kinds = np.array(["" if row["kind"] == row["question_type"] else row["kind"] for row in rows])
    names, counts = np.unique(kinds[kinds != ""], return_counts=True)
    if len(names) > KINDS_SHOWN:  # first words of free questions: the most frequent ones
        names = names[np.argsort(-counts, kind="stable")[:KINDS_SHOWN]]
    for name in names:
        found[f"accuracy/{name}"] = (kinds == name).astype(np.float64)
    return found
