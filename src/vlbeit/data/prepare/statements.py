"""Statements about two pictures: your own rows, and NLVR2's official files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vlbeit.data.prepare.blind import LabelSummary
from vlbeit.data.prepare.locate import Pictures
from vlbeit.data.prepare.plan import Item, Options, Picture, Plan, require
from vlbeit.data.prepare.rows import json_lines
from vlbeit.data.prepare.task_rows import BadRow, Columns, TaskRow, each_row, use_rows
from vlbeit.errors import ConfigError, InputError

Box = tuple[int, int, int, int]

LEFT: Columns = ("left",)
RIGHT: Columns = ("right",)
STATEMENT: Columns = ("statement", "sentence")
TRUTH: Columns = ("truth", "label")

NLVR2_FOLDERS: Final = ("images", "train", "dev", "test1", "test2")
NLVR2_SPLITS: Final = {"train": "train", "dev": "val", "test1": "test", "test2": "test"}
NLVR2_LICENCE: Final = "statements and labels CC BY 4.0; photos under their owners' terms"
_IDENTIFIER = re.compile(r"(train|dev|test1|test2)-(\d+-\d+)-\d+")


def plan_statements(
    sources: Sequence[str],
    images: Sequence[Path],
    options: Options,
    *,
    left_box: Box | None,
    right_box: Box | None,
    left: Columns = LEFT,
    right: Columns = RIGHT,
    statement: Columns = STATEMENT,
    truth: Columns = TRUTH,
) -> Plan:
    """Rows {"left", "right", "statement", "truth", "identifier"?, "kind"?, "split"?, "shard"?}.

    Args:
        left_box, right_box: left, top, right and bottom in pixels of what is cut out as the left
            and the right picture. With both, a row may have one picture, as "image".
        left, right, statement, truth: names of these columns.

    Raises:
        ConfigError: one box without the other.
    """
    if (left_box is None) != (right_box is None):
        raise ConfigError("--left-box and --right-box: only together")
    plan = Plan("task:statements")
    plan.summary = LabelSummary("statements", "truth")

    def use(row: TaskRow, split: str) -> None:
        shard = row.take_shard("shard", "image_shard")
        boxes = (left_box, right_box)
        if "image" in row.rest and not any(name in row.rest for name in left):
            if left_box is None:
                raise BadRow(
                    "no_image",
                    "one picture and no 'left' and 'right'; --left-box and --right-box say which "
                    "parts of it are the two",
                )
            place = row.take_place(("image",), shard)
            places = (place, place)
        else:
            first = row.take_place(left, row.take_shard("left_shard") or shard)
            places = (first, row.take_place(right, row.take_shard("right_shard") or shard))
        pictures = tuple(
            Picture(place, member, box)
            for place, member, box in zip(places, ("left", "right"), boxes, strict=True)
        )
        said: dict[str, Any] = {"statement": row.take_text(statement, "no_statement")}
        said["truth"] = truth_of(row.take(truth))
        plan.items.append(Item(split, row.name, row.where, pictures, said | row.rest))

    each_row(plan, sources, images, options, use)
    return plan


def truth_of(value: object) -> bool:
    """True and false as JSON, as text (NLVR2 has "True") or as 1 and 0. Raises BadRow."""
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).lower())
    if found is None:
        reason = "no_label" if value is None else "bad_label"
        raise BadRow(reason, f"truth {value!r} is neither true nor false")
    return found


def plan_nlvr2(
    root: Path, *, annotations: Sequence[Path], images: Sequence[Path], options: Options
) -> Plan:
    """NLVR2 from its root folder: train.json, dev.json, test1.json (JSON lines) and the pictures,
    PART-SET-PAIR-img0.png and -img1.png, in train/DIRECTORY/, dev/, test1/ or images/ of those.

    Args:
        annotations: the JSON files; without any, those in `root`, `root/data` and
            `root/nlvr2/data`. dev is val, test1 (test-P) is test.
        images: folders or archives; without any, those of `root`.

    Raises:
        InputError: no file of annotations, or none of the pictures' folders.
    """
    require(root, "NLVR2's folder (train.json, dev.json, test1.json, train/, dev/, test1/)")
    names = ("train.json", "dev.json", "test1.json")
    found = list(annotations) or [
        path
        for name in names
        for folder in (root, root / "data", root / "nlvr2" / "data")
        if (path := folder / name).is_file()
    ]
    if not found:
        raise InputError(f"{root}: none of {', '.join(names)}; name the files with --annotations")
    places = list(images) or [root, *(root / f for f in NLVR2_FOLDERS if (root / f).is_dir())]
    pictures = Pictures(places, allow_absolute=options.allow_absolute)
    plan = Plan("task:statements")
    plan.facts["licence"] = NLVR2_LICENCE
    plan.summary = LabelSummary("statements", "truth")
    seen: dict[str, str] = {}
    for path in found:
        part = next((part for part in NLVR2_SPLITS if part in re.split(r"\W|_", path.stem)), None)
        _plan_nlvr2_file(plan, require(path, "NLVR2's annotations"), part, pictures, options, seen)
    if not plan.items and not plan.bad:
        raise InputError(f"no row found in {', '.join(map(str, found))}")
    return plan


def _plan_nlvr2_file(
    plan: Plan,
    path: Path,
    part: str | None,
    pictures: Pictures,
    options: Options,
    seen: dict[str, str],
) -> None:
    """`part`: what the file's name says it holds; a row of another part is a bad one."""

    def use(row: TaskRow, _: str) -> None:
        identifier = row.take(("identifier",))
        match = _IDENTIFIER.fullmatch(str(identifier))
        row.name = str(identifier)
        if match is None:
            detail = f"identifier {identifier!r}; NLVR2's are like dev-850-0-0"
            raise BadRow("bad_identifier", detail)
        if part is not None and match[1] != part:
            raise BadRow("mixed_parts", f"{identifier} in a file of {part}")
        if row.name in seen:
            raise BadRow("duplicate_id", f"{identifier} is that of {seen[row.name]} too")
        statement = row.take_text(("sentence",), "no_statement")
        truth = truth_of(row.take(("label",)))
        directory = row.take(("directory",))
        names = [f"{match[1]}-{match[2]}-img{number}.png" for number in (0, 1)]
        found = tuple(
            Picture(pictures.find(_nlvr2_name(pictures, name, match[1], directory)), member)
            for name, member in zip(names, ("left", "right"), strict=True)
        )
        seen[row.name] = row.where
        fields = {"statement": statement, "truth": truth, "identifier": identifier}
        plan.items.append(
            Item(NLVR2_SPLITS[match[1]], names[0], row.where, found, fields | _kept(row.rest))
        )

    use_rows(plan, json_lines(path), pictures, options, use, None)


def _kept(rest: dict[str, Any]) -> dict[str, Any]:
    """What of the other columns is worth keeping: where the pictures came from."""
    return {key: rest[key] for key in ("left_url", "right_url", "synset") if key in rest}


def _nlvr2_name(pictures: Pictures, name: str, part: str, directory: object) -> str:
    """The name under which a picture lies; the training pictures lie in numbered folders."""
    inner = [f"{directory}/{name}"] if directory is not None else []
    for candidate in (*inner, name):
        for folder in ("", f"{part}/", f"images/{part}/"):
            if pictures.has(folder + candidate):
                return folder + candidate
    return f"{part}/{(*inner, name)[0]}"
