"""What `prepare` counts while it writes the records of a task, and what a guesser reaches on them
who never sees a picture.

The guesser learns the frequencies of answers from the training split and is measured on the
others; a folder without training split has none to learn from, so there it is measured on what it
learned ("learned_on" says so, and the figure is an upper bound).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import comb
from typing import Any, Final

import numpy as np

from vlbeit.data.prepare.class_maps import IGNORE
from vlbeit.data.vqa_answers import answer_accuracy, form_or_nothing, normalise_answer

PREFIX_WORDS: Final = 5
"""Words of a question that stand for its kind."""


class QuestionSummary:
    """Answer list and baselines of a VQA dataset.

    Args:
        answers: the answer list, when it is given; else the normalised answers that at least
            `min_answers` questions of the training and (with `count_val`) val split have, the
            most frequent first.
    """

    def __init__(
        self, answers: Sequence[str] | None, min_answers: int, *, count_val: bool = False
    ) -> None:
        self._answers = answers
        self._min_answers = min_answers
        self._counted = ("train", "val") if count_val else ("train",)
        self._images: Counter[str] = Counter()
        self._asked: dict[str, list[Mapping[str, Any]]] = defaultdict(list)

    def add(self, split: str, fields: Mapping[str, Any], pixels: np.ndarray | None) -> None:
        self._images[split] += 1
        self._asked[split] += fields["questions"]

    def facts(self) -> dict[str, Any]:
        answered = {
            split: [question for question in asked if "answer" in question]
            for split, asked in sorted(self._asked.items())
        }
        answers = self._answers
        if answers is None:
            counts: Counter[str] = Counter()
            for split in self._counted:
                counts.update(normalise_answer(q["answer"]) for q in answered.get(split, []))
            often = {a: n for a, n in counts.items() if a and n >= self._min_answers}
            answers = sorted(often, key=lambda answer: (-often[answer], answer))
        listed = {normalise_answer(answer) for answer in answers}
        found: dict[str, Any] = {
            "answers": list(answers),
            "counts": {
                split: {
                    "images": self._images[split],
                    "questions": len(asked),
                    "answered": len(answered[split]),
                    "answer_listed": sum(
                        normalise_answer(q["answer"]) in listed for q in answered[split]
                    ),
                }
                for split, asked in sorted(self._asked.items())
            },
        }
        baselines = {
            kind: _guesses(answered, known, _answer_of, _share_right)
            for kind, known in (
                ("majority", lambda question: ""),
                ("prefix", lambda question: " ".join(_words(question)[:PREFIX_WORDS])),
                ("question", lambda question: " ".join(_words(question))),
            )
        }
        return found | {"baselines": {"vqa": _by_split(baselines)}}


def _words(question: Mapping[str, Any]) -> list[str]:
    words: list[str] = question["question"].lower().split()
    return words


def _answer_of(question: Mapping[str, Any]) -> str:
    return form_or_nothing(question["answer"])


def _share_right(guess: str, question: Mapping[str, Any]) -> float:
    """As evaluation scores it, in [0, 1]."""
    return answer_accuracy(guess, question.get("answers") or [question["answer"]])


class LabelSummary:
    """Counts and the majority baseline of a task with one label a record.

    Args:
        task: the name of the task.
        entry: the entry of the record that holds the label.
        facts: to be passed on, such as the names of the classes.
    """

    def __init__(self, task: str, entry: str, facts: Mapping[str, Any] | None = None) -> None:
        self._task = task
        self._entry = entry
        self._facts = dict(facts or {})
        self._labels: dict[str, list[Any]] = defaultdict(list)

    def add(self, split: str, fields: Mapping[str, Any], pixels: np.ndarray | None) -> None:
        if self._entry in fields:
            self._labels[split].append(fields[self._entry])

    def facts(self) -> dict[str, Any]:
        found = self._facts | {
            "counts": {
                split: {str(label).lower(): n for label, n in sorted(Counter(labels).items())}
                for split, labels in sorted(self._labels.items())
            }
        }
        guesses = _guesses(
            dict(sorted(self._labels.items())),
            lambda label: "",
            lambda label: label,
            lambda guess, label: float(guess == label),
        )
        return found | {"baselines": {self._task: _by_split({"majority": guesses})}}


class CaptionSummary:
    """Counts and chance of a retrieval dataset."""

    def __init__(self) -> None:
        self._captions: dict[str, list[int]] = defaultdict(list)

    def add(self, split: str, fields: Mapping[str, Any], pixels: np.ndarray | None) -> None:
        self._captions[split].append(len(fields["captions"]))

    def facts(self) -> dict[str, Any]:
        splits = sorted(self._captions.items())
        return {
            "counts": {
                split: {"images": len(numbers), "captions": sum(numbers)}
                for split, numbers in splits
            },
            "baselines": {
                "retrieval": {split: _chance(n) for split, n in splits if split != "train"}
            },
        }


def _chance(captions: Sequence[int]) -> dict[str, float]:
    """Recall of a random ranking; `captions`: how many each image has. An image is right when
    any of its captions is among the first k."""
    total, images = sum(captions), Counter(captions)
    chance = {f"image_r{k}": min(1.0, k / len(captions)) for k in (1, 5, 10)}
    for k in (1, 5, 10):
        missed = sum(n * comb(total - own, k) / max(1, comb(total, k)) for own, n in images.items())
        chance[f"text_r{k}"] = 1 - missed / len(captions)
    return chance


class MapSummary:
    """Pixels of every class, and what a map that is one class everywhere reaches.

    Args:
        classes: names, when they are known; else they are numbers, up to the highest one found.
    """

    def __init__(self, classes: Sequence[str] | None) -> None:
        self._classes = classes
        self._images: Counter[str] = Counter()
        self._pixels: dict[str, np.ndarray] = {}

    def add(self, split: str, fields: Mapping[str, Any], pixels: np.ndarray | None) -> None:
        assert pixels is not None
        self._images[split] += 1
        self._pixels[split] = self._pixels.get(split, 0) + pixels

    def facts(self) -> dict[str, Any]:
        total = sum(self._pixels.values(), np.zeros(256, np.int64))[:IGNORE]
        used = np.flatnonzero(total)
        number = len(self._classes) if self._classes else int(used[-1]) + 1 if len(used) else 0
        learned_on = "train" if "train" in self._pixels else ""
        baselines = {}
        for split, pixels in sorted(self._pixels.items()):
            if split == "train" and len(self._pixels) > 1:
                continue
            source = learned_on or split
            guess = int(self._pixels[source][:IGNORE].argmax())
            share = float(pixels[guess] / max(1, pixels[:IGNORE].sum()))
            baselines[split] = {
                "pixel_accuracy": share,
                "miou": share / max(1, number),
                "learned_on": source,
            }
        return {
            "segmentation_classes": list(self._classes or map(str, range(number))),
            "counts": {
                split: {
                    "images": self._images[split],
                    "pixels": pixels[:number].tolist(),
                    "ignored": int(pixels[IGNORE]),
                }
                for split, pixels in sorted(self._pixels.items())
            },
            "baselines": {"segmentation": baselines},
        }


def _guesses(
    rows: Mapping[str, Sequence[Any]],
    known: Callable[[Any], str],
    answer_of: Callable[[Any], Any],
    share_right: Callable[[Any, Any], float],
) -> dict[str, tuple[float, str]]:
    """Split -> (how much is right, split it was learned on) of giving the most frequent answer
    among training rows of which the same is `known`; of all, where nothing like it was seen."""
    found: dict[str, tuple[float, str]] = {}
    for split, measured in rows.items():
        source = "train" if rows.get("train") else split
        if not measured or (split == "train" and sum(map(bool, rows.values())) > 1):
            continue
        by_kind: dict[str, Counter[Any]] = defaultdict(Counter)
        of_all: Counter[Any] = Counter()
        for row in rows[source]:
            by_kind[known(row)][answer_of(row)] += 1
            of_all[answer_of(row)] += 1
        overall = _most_frequent(of_all, of_all)
        best = {kind: _most_frequent(counts, of_all) for kind, counts in by_kind.items()}
        right = sum(share_right(best.get(known(row), overall), row) for row in measured)
        found[split] = (right / len(measured), source)
    return found


def _most_frequent(counts: Counter[Any], of_all: Counter[Any]) -> Any:
    """Among equals the one that is more frequent everywhere, then the first by alphabet: the order
    of the rows plays no part."""
    return min(counts, key=lambda answer: (-counts[answer], -of_all[answer], str(answer)))


def _by_split(guesses: Mapping[str, Mapping[str, tuple[float, str]]]) -> dict[str, Any]:
    found: dict[str, Any] = defaultdict(dict)
    for kind, splits in guesses.items():
        for split, (right, source) in splits.items():
            found[split][kind] = right
            found[split]["learned_on"] = source
    return dict(found)


def told(facts: Mapping[str, Any]) -> Iterable[str]:
    """The baselines of a dataset in words."""
    if answers := facts.get("answers"):
        yield f"{len(answers):,} answers in the list"
    for task, splits in facts.get("baselines", {}).items():
        for split, values in splits.items():
            source = values.get("learned_on", split)
            learned = f", learned on {source}" if source != split else ""
            figures = ", ".join(
                f"{kind} {value:.1%}" for kind, value in values.items() if kind != "learned_on"
            )
            yield f"without looking, {task} {split}{learned}: {figures}"
