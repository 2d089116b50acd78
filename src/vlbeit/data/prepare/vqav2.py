"""VQA v2 from its official files: questions, annotations (ten answers each) and COCO's photos."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from vlbeit.data.prepare.blind import QuestionSummary
from vlbeit.data.prepare.locate import BadPlace, Pictures
from vlbeit.data.prepare.plan import Options, Plan, require
from vlbeit.data.prepare.questions import (
    QuestionTable,
    answers_of_people,
    clean_answer,
    read_answers,
)
from vlbeit.data.prepare.rows import Bad, json_head, json_list
from vlbeit.data.prepare.task_rows import BadRow
from vlbeit.data.transforms import BadText, clean_text
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError

SUBTYPES: Final = {
    "train": "train2014",
    "val": "val2014",
    "test": "test2015",
    "test-dev": "test-dev2015",
}
"""What the files of each part call it (`data_subtype`)."""
FOLDERS: Final = ("train2014", "val2014", "test2015", "images")
LICENCE: Final = "questions and answers CC BY 4.0; COCO photos under their Flickr authors' terms"


class _Question(NamedTuple):
    where: str
    image: int
    text: str


def plan_vqav2(
    root: Path,
    *,
    parts: Sequence[str],
    questions: Sequence[Path],
    annotations: Sequence[Path],
    images: Sequence[Path],
    trainval: bool,
    val_images: int,
    answers: Path | None,
    min_answers: int,
    options: Options,
) -> Plan:
    """VQA v2 from its root folder.

    Args:
        parts: of train, val, test, test-dev; none: those of train and val that are there.
        questions: v2_OpenEnded_mscoco_*_questions.json; without any, those below `root`.
        annotations: v2_mscoco_*_annotations.json, likewise; test has none.
        trainval: val is training too but for `val_images` images drawn from it, as the peers
            train for the test server (docs/paper.md 5).
        answers, min_answers: see `QuestionSummary`; counted in train and val, as in VLMo.

    Raises:
        InputError: a file is missing or is not what its place says.
        ConfigError: parts that cannot go together.
    """
    require(root, "VQA v2's folder (v2_OpenEnded_mscoco_train2014_questions.json, ...)")
    if "test" in parts and "test-dev" in parts:
        raise ConfigError("--parts test test-dev: test-dev is a part of test; name one of them")
    asked = _by_part(root, "questions", questions)
    parts = parts or [part for part in ("train", "val") if part in asked]
    missing = [part for part in parts if part not in asked]
    if missing or not parts:
        part = missing[0] if missing else "train"
        raise InputError(
            f"{root}: no v2_OpenEnded_mscoco_{SUBTYPES[part]}_questions.json below it; name the "
            "file with --questions"
        )
    answered = _by_part(root, "annotations", annotations)
    if trainval and not {"train", "val"} <= set(parts):
        raise ConfigError("--trainval: needs the parts train and val")
    places = list(images) or [root, *(root / f for f in FOLDERS if (root / f).is_dir())]
    pictures = Pictures(places, allow_absolute=options.allow_absolute)
    plan = Plan("task:vqa")
    plan.facts["licence"] = LICENCE
    plan.summary = QuestionSummary(
        read_answers(answers) if answers else None, min_answers, count_val=True
    )
    table = QuestionTable(plan)
    for part in parts:
        if part in answered:
            split_of = _splits(part, asked[part], trainval, val_images)
            _add_part(plan, table, pictures, part, asked[part], answered[part], split_of)
        elif part in ("train", "val"):
            raise InputError(
                f"{root}: no v2_mscoco_{SUBTYPES[part]}_annotations.json below it; name the file "
                "with --annotations"
            )
        else:
            _add_part(plan, table, pictures, part, asked[part], None, {})
    table.finish()
    return plan


def _by_part(root: Path, kind: str, named: Sequence[Path]) -> dict[str, Path]:
    """Part -> its file of questions or annotations, by what the file says about itself."""
    paths = list(named) or sorted(
        path
        for pattern in (f"*_{kind}.json", f"*/*_{kind}.json")
        for path in root.glob(pattern)
        if not path.name.startswith(("v2_OpenEnded_abstract", "v2_abstract"))
    )
    found: dict[str, Path] = {}
    for path in paths:
        require(path, f"a file of VQA v2's {kind}")
        part = _part_of(path, kind)
        if part in found:
            raise InputError(f"{found[part]} and {path}: both are the {kind} of {part}; name one")
        found[part] = path
    return found


def _part_of(path: Path, kind: str) -> str:
    """The part of a file; by its name and what stands before its list, which must agree.

    Raises:
        InputError: they do not, or questions were given as annotations or the reverse.
    """
    other = "annotations" if kind == "questions" else "questions"
    head, key = json_head(path, (kind, other))
    if key != kind:
        what = f"is a file of {other}" if key else f"has no {kind!r}; is this VQA v2's own file"
        raise InputError(f"{path}: {what}, given as one of {kind}")
    inside = str(head.get("data_subtype", ""))
    match = re.search(r"(train2014|val2014|test-dev2015|test2015)", path.name)
    outside = match[1] if match else ""
    if inside and outside and inside != outside:
        raise InputError(
            f"{path}: data_subtype {inside!r} in a file that is named after {outside!r}"
        )
    for part, subtype in SUBTYPES.items():
        if subtype == (inside or outside):
            return part
    raise InputError(
        f"{path}: neither its name nor data_subtype says which of {', '.join(SUBTYPES.values())} "
        f"it belongs to (found {inside or 'nothing'!r})"
    )


def _splits(part: str, path: Path, trainval: bool, val_images: int) -> dict[int, str]:
    """Image -> split where that is not the part's own: most of val with `trainval`."""
    if part != "val" or not trainval:
        return {}
    numbers = {row.get("image_id") for _, row in json_list(path, "questions")}
    images = sorted(number for number in numbers if isinstance(number, int))
    if val_images >= len(images):
        raise ConfigError(f"--val-images {val_images}: val has {len(images)} images")
    drawn = Draws("vqav2", "val images").permutation(len(images))
    return {images[int(index)]: "train" for index in drawn[val_images:]}


def _add_part(
    plan: Plan,
    table: QuestionTable,
    pictures: Pictures,
    part: str,
    asked: Path,
    answered: Path | None,
    split_of: dict[int, str],
) -> None:
    questions: dict[object, _Question] = {}
    for where, row in json_list(asked, "questions"):
        try:
            new, question = _question(where, row)
            if new in questions:
                detail = f"question_id {new} is that of {questions[new].where} too"
                raise BadRow("duplicate_id", detail)
            questions[new] = question
        except (BadRow, BadText) as error:
            plan.bad.append(Bad(where, _number(row), error.reason, error.detail))
    answers = {} if answered is None else _annotations(plan, answered, questions)
    split = "test" if part.startswith("test") else part
    for number, question in questions.items():
        entry: dict[str, Any] = {"question": question.text, "question_id": number}
        name = f"COCO_{SUBTYPES[part].replace('test-dev', 'test')}_{question.image:012d}.jpg"
        if answered is not None:
            if (found := answers.get(number)) is None:
                detail = f"{answered} has no usable answers for question {number}"
                plan.bad.append(Bad(question.where, name, "no_answer", detail))
                continue
            entry |= found
        try:
            place = pictures.find(_find(pictures, name, question.image))
            table.add(
                place, name, question.where, split_of.get(question.image, split), entry,
                coco_id=question.image,
            )  # fmt: skip
        except (BadRow, BadPlace) as error:
            plan.bad.append(Bad(question.where, name, error.reason, error.detail))


def _find(pictures: Pictures, name: str, image: int) -> str:
    """The name under which a photo lies: 2014's or 2015's, in its folder or not, or 2017's."""
    folder = name.split("_")[1]
    return next(
        (n for n in (name, f"{folder}/{name}", f"{image:012d}.jpg") if pictures.has(n)), name
    )


def _question(where: str, row: Any) -> tuple[int, _Question]:
    if not isinstance(row, dict):
        raise BadRow("bad_json", f"expected an object, found {str(row)[:80]!r}")
    number, image, text = (row.get(key) for key in ("question_id", "image_id", "question"))
    if not (_is_number(number) and _is_number(image) and isinstance(text, str)):
        detail = f"question_id {number!r}, image_id {image!r}, question {str(text)[:80]!r}"
        raise BadRow("no_question", detail)
    return int(str(number)), _Question(where, int(str(image)), clean_text(text))


def _annotations(
    plan: Plan, path: Path, questions: dict[object, _Question]
) -> dict[object, dict[str, Any]]:
    """Question id -> what the people said; a row that does not fit its question is a bad one."""
    found: dict[object, dict[str, Any]] = {}
    for where, row in json_list(path, "annotations"):
        try:
            number, answers = _annotation(row, questions)
            if number in found:
                raise BadRow("duplicate_id", f"question_id {number} was annotated before")
            found[number] = answers
        except BadRow as error:
            plan.bad.append(Bad(where, _number(row), error.reason, error.detail))
    return found


def _annotation(row: Any, questions: dict[object, _Question]) -> tuple[object, dict[str, Any]]:
    if not isinstance(row, dict):
        raise BadRow("bad_json", f"expected an object, found {str(row)[:80]!r}")
    number = row.get("question_id")
    question = questions.get(number)
    if question is None:
        raise BadRow("no_question", f"question_id {number!r} is in no row of the questions file")
    if row.get("image_id") != question.image:
        detail = f"image_id {row.get('image_id')!r}, its question says {question.image}"
        raise BadRow("ids_differ", f"{detail} ({question.where})")
    people = answers_of_people(row.get("answers"))
    said = clean_answer(row.get("multiple_choice_answer"))
    kinds = {key: row[key] for key in ("answer_type", "question_type") if key in row}
    return number, {"answer": said, "answers": people, **kinds}


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(row: object) -> str:
    return f"question {row.get('question_id')}" if isinstance(row, dict) else ""
