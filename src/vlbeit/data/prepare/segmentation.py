"""Semantic segmentation: your own rows of pictures and class maps, and ADE20K's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from vlbeit.data.prepare.blind import MapSummary
from vlbeit.data.prepare.class_maps import IGNORE
from vlbeit.data.prepare.locate import walk_images
from vlbeit.data.prepare.plan import ClassMap, Item, Options, Picture, Plan, require
from vlbeit.data.prepare.rows import Bad, lines, opened
from vlbeit.data.prepare.task_rows import Columns, TaskRow, each_row
from vlbeit.errors import ConfigError, InputError

IMAGE: Columns = ("image",)
MAP: Columns = ("label", "map", "seg", "annotation")

ADE20K_SPLITS: Final = {"training": "train", "validation": "val"}
ADE20K_CLASSES: Final = 150
ADE20K_LICENCE: Final = "annotations BSD-3-Clause; images for non-commercial research and education"


class Classes(NamedTuple):
    """What a file of classes says."""

    names: list[str]
    ignore: int | None
    """The value in a map of pixels that belong to no class."""


def plan_segmentation(
    sources: Sequence[str],
    images: Sequence[Path],
    options: Options,
    *,
    classes: Path | None,
    ignore: int | None,
    image: Columns = IMAGE,
    label: Columns = MAP,
) -> Plan:
    """Rows {"image", "label": class map, "split"?, "image_shard"?, "label_shard"?}.

    Args:
        classes: see `read_classes`; without it the highest value found is the last class.
        ignore: the value of pixels that belong to no class; None: what `classes` says, else 255.
        image, label: names of these columns.
    """
    known = read_classes(classes) if classes else Classes([], None)
    ignore = known.ignore if ignore is None else ignore
    if ignore is not None and not 0 <= ignore <= IGNORE:
        raise ConfigError(f"--ignore-index {ignore}: must lie in [0, 255]")
    names = list(known.names)
    if ignore is not None and ignore < len(names):
        del names[ignore]
    plan = Plan("task:segmentation")
    plan.summary = MapSummary(names or None)

    def use(row: TaskRow, split: str) -> None:
        shard = row.take_shard("image_shard", "shard")
        place = row.take_place(image, shard)
        seg = row.take_place(label, row.take_shard("label_shard", "map_shard") or shard)
        class_map = ClassMap(seg, len(names) or None, ignore)
        pictures = (Picture(place),)
        plan.items.append(Item(split, row.name, row.where, pictures, dict(row.rest), class_map))

    each_row(plan, sources, images, options, use)
    return plan


def read_classes(path: Path) -> Classes:
    """Names of classes in the order of their numbers: a line each, a JSON list, or a JSON object
    with "classes" and perhaps "ignore_index".

    Raises:
        InputError: nothing of the kind, or more than 255.
    """
    found: Any
    if require(path, "the names of the classes").suffix == ".json":
        try:
            with opened(path, "r", encoding="utf-8-sig") as file:
                found = json.load(file)
        except ValueError as error:
            raise InputError(f"{path}: is not JSON ({error})") from None
    else:
        found = [line.strip() for _, line in lines(path) if line.strip()]
    ignore = found.get("ignore_index") if isinstance(found, dict) else None
    names = found.get("classes") if isinstance(found, dict) else found
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InputError(f'{path}: expected names of classes, a line each or as JSON "classes"')
    if ignore is not None and (isinstance(ignore, bool) or not isinstance(ignore, int)):
        raise InputError(f"{path}: ignore_index {ignore!r} is not an integer")
    return Classes(names, ignore)


def plan_ade20k(root: Path, options: Options) -> Plan:
    """ADEChallengeData2016: images/training/*.jpg with annotations/training/*.png, the same for
    validation, and objectInfo150.txt. Value 0 (other) is no class; 1 ... 150 become 0 ... 149.

    Raises:
        InputError: a folder is missing.
    """
    require(root, "ADEChallengeData2016 (images/, annotations/, objectInfo150.txt)")
    plan = Plan("task:segmentation")
    plan.facts["licence"] = ADE20K_LICENCE
    plan.summary = MapSummary(_ade20k_names(plan, root))
    for part, split in ADE20K_SPLITS.items():
        pictures = require(root / "images" / part, f"ADE20K's {part} images")
        maps = require(root / "annotations" / part, f"ADE20K's {part} annotations")
        places = {m.name.rpartition(".")[0]: m.place for m in walk_images(maps)[0]}
        for member in walk_images(pictures)[0]:
            where = member.place.path
            place = places.pop(member.name.rpartition(".")[0], None)
            if place is None:
                detail = f"{maps} has no map of it"
                plan.bad.append(Bad(where, member.name, "no_map", detail))
                continue
            class_map = ClassMap(place, ADE20K_CLASSES, 0)
            plan.items.append(
                Item(split, member.name, where, (Picture(member.place),), {}, class_map)
            )
        for name, place in places.items():
            plan.bad.append(Bad(place.path, name, "no_image", f"{pictures} has no picture of it"))
    if not plan.items and not plan.bad:
        raise InputError(f"{root}: no image below images/")
    return plan


def _ade20k_names(plan: Plan, root: Path) -> list[str]:
    """The names in objectInfo150.txt: a header, then number, shares and names by tabs."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        plan.notes.append(f"{path}: missing; the classes are called by their numbers")
        return [str(number) for number in range(1, ADE20K_CLASSES + 1)]
    names: dict[int, str] = {}
    for where, line in lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) >= 2 and cells[0].isdigit():
            names[int(cells[0])] = cells[-1].partition(",")[0]
        elif names and line.strip():
            raise InputError(f"{where}: expected a number and names between tabs, found {line!r}")
    if sorted(names) != list(range(1, ADE20K_CLASSES + 1)):
        raise InputError(f"{path}: has {len(names)} classes; expected 1 to {ADE20K_CLASSES}")
    return [names[number] for number in range(1, ADE20K_CLASSES + 1)]
