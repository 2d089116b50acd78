"""Visual entailment: does a picture entail a statement? Your own rows, and SNLI-VE's files."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from vlbeit.data.prepare.blind import LabelSummary
from vlbeit.data.prepare.locate import Pictures
from vlbeit.data.prepare.plan import SPLITS, Item, Options, Picture, Plan, require
from vlbeit.data.prepare.rows import json_lines
from vlbeit.data.prepare.task_rows import (
    BadRow,
    Columns,
    TaskRow,
    class_of,
    each_row,
    use_rows,
)
from vlbeit.errors import InputError

LABELS: Final = ("entailment", "neutral", "contradiction")
"""Their place is the label of a record."""
IMAGE: Columns = ("image",)
HYPOTHESIS: Columns = ("hypothesis", "statement", "sentence2")
LABEL: Columns = ("label", "gold_label")
ID: Columns = ("id", "pair_id", "pairID")

FLICKR_FOLDERS: Final = ("flickr30k-images", "flickr30k_images", "images")
SNLI_VE_LICENCE: Final = (
    "statements and labels (SNLI) CC BY-SA 4.0; Flickr30k photos for non-commercial research and "
    "education"
)


def _new_plan() -> Plan:
    plan = Plan("task:entailment")
    plan.summary = LabelSummary("entailment", "label", {"classes": list(LABELS)})
    return plan


def plan_entailment(
    sources: Sequence[str],
    images: Sequence[Path],
    options: Options,
    *,
    image: Columns = IMAGE,
    hypothesis: Columns = HYPOTHESIS,
    label: Columns = LABEL,
) -> Plan:
    """Rows {"image", "hypothesis", "label", "id"?, "split"?, "shard"?}; the label is one of
    LABELS or its number.

    Args:
        image, hypothesis, label: names of these columns.
    """
    plan = _new_plan()

    def use(row: TaskRow, split: str) -> None:
        place = row.take_place(image, row.take_shard("shard", "image_shard"))
        said = {"hypothesis": row.take_text(hypothesis, "no_hypothesis")}
        fields = said | {"label": class_of(row.take(label), LABELS)}
        if (number := row.take(ID)) is not None:
            fields |= {"id": number}
        plan.items.append(Item(split, row.name, row.where, (Picture(place),), fields | row.rest))

    each_row(plan, sources, images, options, use)
    return plan


def plan_snli_ve(
    root: Path, *, annotations: Sequence[Path], images: Sequence[Path], options: Options
) -> Plan:
    """SNLI-VE from its folder: snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl.

    Args:
        annotations: the JSONL files; without any, those in `root`. dev is val.
        images: where Flickr30k's photos are; without any, `root` and flickr30k-images in it.

    Raises:
        InputError: no file of annotations, or one that names no split.
    """
    require(root, "SNLI-VE's folder (snli_ve_train.jsonl, ...)")
    paths = list(annotations) or sorted(root.glob("snli_ve_*.jsonl"))
    if not paths:
        raise InputError(f"{root}: no snli_ve_*.jsonl; name the files with --annotations")
    places = list(images) or [*(root / f for f in FLICKR_FOLDERS if (root / f).is_dir()), root]
    pictures = Pictures(places, allow_absolute=options.allow_absolute)
    plan = _new_plan()
    plan.facts["licence"] = SNLI_VE_LICENCE
    for path in paths:
        words = require(path, "SNLI-VE's annotations").stem.split("_")
        named = next((word for word in words if word in SPLITS), None)
        use_rows(plan, json_lines(path), pictures, options, partial(_add_snli_ve, plan), named)
    if not plan.items and not plan.bad:
        raise InputError(f"no row found in {', '.join(map(str, paths))}")
    return plan


def _add_snli_ve(plan: Plan, row: TaskRow, split: str) -> None:
    photo = row.take(("Flickr30K_ID", "Flikr30kID"))
    if photo is None:
        found = ", ".join(row.rest)
        raise BadRow("no_image", f"no 'Flickr30K_ID' (found: {found}); is this SNLI-VE?")
    row.rest["image"] = str(photo).removesuffix(".jpg") + ".jpg"
    place = row.take_place(("image",), None)
    fields = {
        "hypothesis": row.take_text(("sentence2",), "no_hypothesis"),
        "label": class_of(row.take(("gold_label",)), LABELS, "gold_label"),
    }
    if (number := row.take(ID)) is not None:
        fields |= {"id": number}
    plan.items.append(Item(split, row.name, row.where, (Picture(place),), fields))
