"""Images without captions: folders, tar archives, and JSONL rows that name images and labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlbeit.data.prepare.locate import (
    BadPlace,
    Member,
    Pictures,
    is_image_name,
    suffix_of,
    walk_archive,
    walk_images,
)
from vlbeit.data.prepare.plan import SPLITS, Item, Options, Picture, Plan, require, split_of_file
from vlbeit.data.prepare.rows import Bad, json_lines
from vlbeit.errors import InputError


def plan_images(
    sources: Sequence[str],
    labels: Sequence[str],
    options: Options,
    *,
    image_column: str = "image",
    label_column: str = "label",
) -> Plan:
    """Images of folders and tar archives, or those that JSONL rows name in them.

    Args:
        sources: folders, archives and JSONL files.
        labels: further JSONL files; with rows from either, only the images they name are taken,
            from the folders and archives or, without any, from beside the file.
        image_column, label_column: names of these columns.

    A folder whose top folders are train, val or test gives the splits; folders below that hold
    all images give the classes.
    """
    tables = [Path(name) for name in [*sources, *labels] if Path(name).suffix == ".jsonl"]
    places = [Path(name) for name in sources if Path(name).suffix != ".jsonl"]
    for path in [*tables, *places]:
        require(path, "a folder of images, a tar archive of images, or a JSONL file")
    plan = Plan("image")
    if tables:
        classes: dict[int, str] = {}
        for table in tables:
            columns = (image_column, label_column)
            _rows(plan, table, places or [table.parent], classes, options, columns)
        if classes:
            plan.facts["classes"] = name_list(classes, max(classes) + 1)
    else:
        _walk(plan, places, options)
    if not plan.items and not plan.bad:
        raise InputError(f"no image found in {', '.join(map(str, [*tables, *places]))}")
    return plan


def name_list(names: Mapping[int, str], count: int) -> list[str]:
    """Names by number as a list; a number without a name is called by itself."""
    return [names.get(number, str(number)) for number in range(count)]


def _rows(
    plan: Plan,
    table: Path,
    places: list[Path],
    classes: dict[int, str],
    options: Options,
    columns: tuple[str, str],
) -> None:
    pictures = Pictures(places, shards=table.parent, allow_absolute=options.allow_absolute)
    named = split_of_file(table)
    for row in json_lines(table):
        if isinstance(row, Bad):
            plan.bad.append(row)
            continue
        values = row.values
        name = values.pop(columns[0], None)
        if not isinstance(name, str):
            plan.bad.append(Bad(row.where, "", "no_image", f"no {columns[0]!r} that names a file"))
            continue
        label, shard = values.pop(columns[1], None), values.pop("shard", None)
        if label is not None:
            values["label"] = label
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            detail = f"label {label!r} is not an integer"
            plan.bad.append(Bad(row.where, name, "bad_label", detail))
            continue
        split = plan.split_of(values.pop("split", None) or named, row.where, name, options)
        if split is None:
            continue
        try:
            place = pictures.find(name, None if shard is None else str(shard))
        except BadPlace as error:
            plan.bad.append(Bad(row.where, name, error.reason, error.detail))
            continue
        if label is not None and "class" in values:
            classes.setdefault(label, str(values["class"]))
        plan.items.append(Item(split, name, row.where, (Picture(place),), values))


def _walk(plan: Plan, places: list[Path], options: Options) -> None:
    members: list[Member] = []
    for place in places:
        if place.is_dir():
            found, others = walk_images(place)
            if others:
                kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
                plan.notes.append(f"{place}: files not taken for images: {kinds}")
        else:
            entries, bad = walk_archive(place)
            plan.bad += bad
            found = [member for member in entries if is_image_name(member.name)]
            if len(found) < len(entries):
                left = sorted(
                    {suffix_of(m.name) for m in entries} - {suffix_of(m.name) for m in found}
                )
                plan.notes.append(
                    f"{place}: {len(entries) - len(found)} members not taken for images "
                    f"({', '.join(left)})"
                )
        members += found
    parts = [member.name.split("/") for member in members]
    tops = {names[0] for names in parts if len(names) > 1}
    in_splits = bool(tops) and all(len(n) > 1 for n in parts) and all(t in SPLITS for t in tops)
    depth = 1 if in_splits else 0
    names_of_classes = {names[depth] for names in parts if len(names) > depth + 1}
    in_classes = len(names_of_classes) > 1 and all(len(n) > depth + 1 for n in parts)
    classes = sorted(names_of_classes) if in_classes else []
    label_of = {name: label for label, name in enumerate(classes)}
    if in_splits:
        plan.notes.append(f"splits from the top folders: {', '.join(sorted(tops))}")
    if classes:
        plan.facts["classes"] = classes
        plan.notes.append(f"{len(classes)} classes from the folders: {_shorten(classes)}")
    shared: dict[str, dict[str, Any]] = {n: {"label": i, "class": n} for n, i in label_of.items()}
    for member, names in zip(members, parts, strict=True):
        where = member.place.path
        split = plan.split_of(names[0] if in_splits else None, where, member.name, options)
        fields = shared[names[depth]] if classes else {}
        if split is not None:
            plan.items.append(Item(split, member.name, where, (Picture(member.place),), fields))


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
