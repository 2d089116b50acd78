"""ImageNet in the layouts it is handed out in: ILSVRC2012 (1K) and the full release (22K).

train/n01440764/*.JPEG    or train/n01440764.tar, or either directly in the root (22K)
val/n01440764/*.JPEG      or val/*.JPEG with a file that names their classes
"""

import re
from pathlib import Path
from typing import Any

from vlbeit.data.prepare.blind import LabelSummary
from vlbeit.data.prepare.locate import Member, is_image_name, walk_archive, walk_images
from vlbeit.data.prepare.plan import Item, Options, Picture, Plan, require
from vlbeit.data.prepare.rows import Bad, lines
from vlbeit.errors import ConfigError, InputError

WNID = re.compile(r"n\d{8}")
NAME_FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
TRUTH_FILES = ("LOC_val_solution.csv", "val.txt", "ILSVRC2012_validation_ground_truth.txt")


def plan_imagenet(
    root: Path, *, val_labels: Path | None, synsets: Path | None, options: Options
) -> Plan:
    """ImageNet from its root folder; the label of a class is its place among the sorted wnids.

    Args:
        val_labels: classes of a flat val folder: Kaggle's LOC_val_solution.csv, Caffe's val.txt
            (`name index`, in the order of the wnids), `name wnid` lines, or the official
            ILSVRC2012_validation_ground_truth.txt. Looked for in `root` too.
        synsets: for the official file, whose numbers are ILSVRC2012_IDs: a text file with the
            wnid of id 1, 2, ... a line (they are in the development kit's meta.mat).
    """
    require(root, "ImageNet's folder (train/n01440764/..., val/...)")
    plan = Plan("image", serves="classification")
    plan.summary = LabelSummary("classification", "label")
    train = root / "train" if (root / "train").is_dir() else root
    classes = sorted({path.stem for path in train.iterdir() if WNID.fullmatch(path.stem)})
    if not classes:
        raise InputError(f"{train}: no folder or archive named like n01440764; is it ImageNet's?")
    fields = _fields(root, classes)
    plan.facts["classes"] = [f["class"] for f in fields.values()]
    plan.facts["wnids"] = classes
    for wnid in classes:
        default = "train" if train != root else None
        for member in _members(plan, train, wnid):
            _add(plan, member, f"{wnid}/{member.name}", default, fields[wnid], options)
    if (val := root / "val").is_dir():
        _plan_val(plan, root, val, fields, val_labels, synsets, options)
    plan.notes.append(f"{len(classes):,} classes")
    return plan


def _members(plan: Plan, folder: Path, wnid: str) -> list[Member]:
    if (folder / wnid).is_dir():
        return walk_images(folder / wnid)[0]
    members, bad = walk_archive(folder / f"{wnid}.tar")
    plan.bad += bad
    return [member for member in members if is_image_name(member.name)]


def _add(
    plan: Plan,
    member: Member,
    name: str,
    split: str | None,
    fields: dict[str, Any],
    options: Options,
) -> None:
    where = member.place.path
    found = plan.split_of(split, where, name, options) or ""
    plan.items.append(Item(found, name, where, (Picture(member.place),), fields))


def _fields(root: Path, classes: list[str]) -> dict[str, dict[str, Any]]:
    """Label, class name and wnid by wnid; names from `n01440764 tench, Tinca tinca` lines."""
    names: dict[str, str] = {}
    path = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    if path is not None:
        for _, line in lines(path):
            wnid, _, words = line.replace("\t", " ").partition(" ")
            names[wnid] = words.partition(",")[0].strip()
    return {
        wnid: {"label": label, "class": names.get(wnid) or wnid, "wnid": wnid}
        for label, wnid in enumerate(classes)
    }


def _plan_val(
    plan: Plan,
    root: Path,
    val: Path,
    fields: dict[str, dict[str, Any]],
    val_labels: Path | None,
    synsets: Path | None,
    options: Options,
) -> None:
    members, _ = walk_images(val)
    flat = [member for member in members if "/" not in member.name]
    truth: dict[str, str] = {}
    if flat:
        path = val_labels or next(
            (root / name for name in TRUTH_FILES if (root / name).is_file()), None
        )
        if path is None:
            plan.notes.append(
                f"{val}: {len(flat):,} images without a label (--val-labels names it)"
            )
        else:
            names = sorted(member.name for member in flat)
            truth = _truth(path, names, list(fields), synsets)
    for member in members:
        wnid = member.name.split("/")[0] if "/" in member.name else truth.get(member.name)
        if wnid is not None and wnid not in fields:
            detail = f"class {wnid!r} is not among those of train"
            plan.bad.append(Bad(member.place.path, member.name, "bad_label", detail))
        elif wnid is None and truth:
            detail = "the file of labels does not name this image"
            plan.bad.append(Bad(member.place.path, member.name, "no_label", detail))
        else:
            found = fields[wnid] if wnid is not None else {}
            _add(plan, member, f"val/{member.name}", "val", found, options)


def _truth(path: Path, names: list[str], wnids: list[str], synsets: Path | None) -> dict[str, str]:
    """File name -> wnid."""
    rows = [(where, line.split()) for where, line in lines(require(path, "labels of val"))]
    rows = [(where, cells) for where, cells in rows if cells]
    if rows and len(rows[0][1]) == 1 and rows[0][1][0].isdigit():
        if synsets is None:
            raise ConfigError(
                f"{path}: holds ILSVRC2012_IDs; name with --synsets a file with the wnid of id 1, "
                "2, ... a line (from the development kit's meta.mat), or use LOC_val_solution.csv"
            )
        by_id = [line.split()[0] for _, line in lines(synsets) if line.strip()]
        if len(rows) != len(names):
            raise InputError(f"{path}: {len(rows)} labels for {len(names)} images")
        ids = [int(cells[0]) for _, cells in rows]
        if not all(1 <= number <= len(by_id) for number in ids):
            raise InputError(f"{path}: an id is not between 1 and {len(by_id)}, see {synsets}")
        return {name: by_id[number - 1] for name, number in zip(names, ids, strict=True)}
    truth: dict[str, str] = {}
    for where, cells in rows:
        if cells[0].startswith("ImageId"):
            continue
        name, _, first = cells[0].partition(",")
        label = first or (cells[1] if len(cells) > 1 else "")
        if label.isdigit() and int(label) < len(wnids):
            label = wnids[int(label)]
        if not WNID.fullmatch(label):
            raise InputError(
                f"{where}: expected an image name and a class, found {' '.join(cells)!r}"
            )
        truth[name if is_image_name(name) else f"{name}.JPEG"] = label
    return truth
