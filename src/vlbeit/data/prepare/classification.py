"""Images with one label each: an image source that is also the source of a task."""

from collections.abc import Sequence
from pathlib import Path

from vlbeit.data.prepare.blind import LabelSummary
from vlbeit.data.prepare.images import name_list, plan_images
from vlbeit.data.prepare.plan import Item, Options, Plan
from vlbeit.data.prepare.rows import Bad
from vlbeit.data.prepare.segmentation import read_classes
from vlbeit.errors import InputError


def plan_classification(
    sources: Sequence[str],
    images: Sequence[str],
    options: Options,
    *,
    classes: Path | None,
    image_column: str = "image",
    label_column: str = "label",
) -> Plan:
    """Rows {"image", "label", "class"?, "split"?, "shard"?}, or a folder with a folder a class.

    Args:
        sources: JSONL files, or folders as `plan_images` takes them.
        images: folders and archives of the rows' images; without any, beside the file.
        classes: names by number (`segmentation.read_classes`); a label that is not among them
            is refused. Without it the rows' "class" names them, and the highest label is the last.

    Raises:
        InputError: no label at all.
    """
    plan = plan_images(
        [*sources, *images], [], options, image_column=image_column, label_column=label_column
    )
    plan.serves = "classification"
    names = read_classes(classes).names if classes else None
    said: dict[int, tuple[str, str]] = {}
    items, plan.items = plan.items, []
    for item in items:
        if (bad := _wrong_label(item, names, said)) is not None:
            plan.bad.append(bad)
        else:
            plan.items.append(item)
    if not plan.items and all(bad.reason == "no_label" for bad in plan.bad):
        raise InputError(
            f"{', '.join(sources)}: no image has a label; rows need {label_column!r}, a folder "
            "needs a folder a class"
        )
    if names is None:
        top = max((item.fields["label"] for item in plan.items), default=-1)
        names = name_list({label: name for label, (name, _) in said.items()}, top + 1)
    plan.facts["classes"] = names
    plan.summary = LabelSummary("classification", "label")
    return plan


def _wrong_label(
    item: Item, names: Sequence[str] | None, said: dict[int, tuple[str, str]]
) -> Bad | None:
    """What is wrong with the label of an item. `said`: names the rows gave, and which row did."""
    label = item.fields.get("label")
    if label is None:
        there = ", ".join(item.fields) or "nothing else"
        return Bad(item.where, item.name, "no_label", f"no label (found: {there})")
    if label < 0 or (names is not None and label >= len(names)):
        limit = f"{len(names) - 1}" if names is not None else "..."
        return Bad(item.where, item.name, "bad_label", f"label {label}; they are 0 to {limit}")
    name = item.fields.get("class")
    if name is None:
        if names is not None:
            item.fields["class"] = names[label]
        return None
    other, where = (names[label], "the file of classes") if names is not None else said.get(
        label, (str(name), "")
    )  # fmt: skip
    if str(name) != other:
        detail = f"label {label} is {name!r} here and {other!r} in {where}"
        return Bad(item.where, item.name, "bad_label", detail)
    said.setdefault(label, (str(name), item.where))
    return None
