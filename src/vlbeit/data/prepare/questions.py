"""Visual questions of your own, gathered by image."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbeit.data.prepare.blind import QuestionSummary
from vlbeit.data.prepare.locate import Place
from vlbeit.data.prepare.plan import Item, Options, Picture, Plan, require
from vlbeit.data.prepare.rows import opened
from vlbeit.data.prepare.task_rows import BadRow, Columns, TaskRow, each_row
from vlbeit.data.transforms import BadText, clean_text
from vlbeit.data.vqa_answers import normalise_answer
from vlbeit.errors import InputError

IMAGE: Columns = ("image",)
QUESTION: Columns = ("question",)
ANSWER: Columns = ("answer",)
PEOPLE: Columns = ("answers",)


class QuestionTable:
    """Image -> questions; every question is asked once, and an image belongs to one split."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._items: dict[Place, Item] = {}
        self._ids: dict[object, str] = {}

    def add(
        self, place: Place, name: str, where: str, split: str, question: dict[str, Any],
        **fields: object,
    ) -> None:  # fmt: skip
        """A question on the picture at `place`. Raises BadRow (two_splits, duplicate_id)."""
        number = question.get("question_id")
        if number is not None and number in self._ids:
            detail = f"question_id {number!r} is that of {self._ids[number]} too"
            raise BadRow("duplicate_id", detail)
        item = self._items.get(place)
        if item is None:
            item = Item(split, name, where, (Picture(place),), {**fields, "questions": []})
            self._items[place] = item
        elif item.split != split:
            detail = f"this row says split {split!r}, {item.where} said {item.split!r}"
            raise BadRow("two_splits", detail)
        if number is not None:
            self._ids[number] = where
        item.fields["questions"].append(question)

    def finish(self) -> None:
        """Puts the records into the plan."""
        self._plan.items += self._items.values()


def plan_vqa(
    sources: Sequence[str],
    images: Sequence[Path],
    options: Options,
    *,
    answers: Path | None,
    min_answers: int,
    image: Columns = IMAGE,
    question: Columns = QUESTION,
    answer: Columns = ANSWER,
) -> Plan:
    """Rows {"image", "question", "answer" or "answers", "question_id"?, "split"?, "shard"?}.

    Args:
        answers: a file that holds the answer list; None: what `QuestionSummary` counts.
        image, question, answer: names of these columns.
    """
    plan = Plan("task:vqa")
    plan.summary = QuestionSummary(read_answers(answers) if answers else None, min_answers)
    table = QuestionTable(plan)

    def use(row: TaskRow, split: str) -> None:
        place = row.take_place(image, row.take_shard("shard", "image_shard"))
        asked: dict[str, Any] = {"question": row.take_text(question, "no_question")}
        people, said = row.take(PEOPLE), row.take(answer)
        if people is not None:
            asked["answers"] = answers_of_people(people)
        if said is None and people:
            said = most_said(asked["answers"])
        asked["answer"] = clean_answer(said)
        table.add(place, row.name, row.where, split, asked | row.rest)

    each_row(plan, sources, images, options, use)
    table.finish()
    return plan


def clean_answer(said: object) -> str:
    """Raises BadRow (no_answer, bad_answer) for anything but a text with something in it."""
    if said is None:
        raise BadRow("no_answer", "neither an answer nor a list of answers")
    if not isinstance(said, str):
        raise BadRow("bad_answer", f"answer {said!r} is {type(said).__name__}, expected text")
    try:
        return clean_text(said)
    except BadText as error:
        raise BadRow("bad_answer", f"answer {said!r}: {error.reason}") from None


def answers_of_people(people: object) -> list[str]:
    """The answers of several people, as texts or as VQA's {"answer": TEXT}. Raises BadRow."""
    if not isinstance(people, list) or not people:
        raise BadRow("bad_answer", f"answers {str(people)[:80]!r}: expected a list of texts")
    return [clean_answer(p.get("answer") if isinstance(p, dict) else p) for p in people]


def most_said(answers: Sequence[str]) -> str:
    """The answer that most people gave; the first one among equals."""
    counts = Counter(map(normalise_answer, answers))
    return max(answers, key=lambda answer: counts[normalise_answer(answer)])


def read_answers(path: Path) -> list[str]:
    """An answer list, in its order: a line each; a JSON list; a JSON object answer -> number; or
    JSON lines {"answer", "label"} (BEiT-3's answer2label.txt).

    Raises:
        InputError: nothing of the kind, or an answer that is there twice.
    """
    with opened(require(path, "the list of answers"), "r", encoding="utf-8-sig") as file:
        text = file.read()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        if path.suffix == ".json":
            found = json.loads(text)
            if isinstance(found, dict):
                found = found.get("answers", None) or sorted(found, key=found.__getitem__)
        elif lines and lines[0].startswith("{"):
            rows = [json.loads(line) for line in lines]
            found = [row["answer"] for row in sorted(rows, key=lambda row: int(row["label"]))]
        else:
            found = lines
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a list of answers ({error!r})") from None
    if not isinstance(found, list) or not found or not all(isinstance(a, str) for a in found):
        raise InputError(f"{path}: expected a list of answers, one text each")
    twice = [a for a, count in Counter(map(normalise_answer, found)).items() if count > 1]
    if twice:
        raise InputError(
            f"{path}: {twice[0]!r} is in the list twice once normalised; each answer is one class"
        )
    return found
