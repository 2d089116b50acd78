"""COCO captions and Flickr30k: official files, and Karpathy's splits of both.

Karpathy's JSON (`dataset_coco.json`, `dataset_flickr30k.json`) has the captions and decides the
split; its train and restval are training, as in VLMo (docs/paper.md 4).
"""

from pathlib import Path
from typing import Any

from vlbeit.data.prepare.blind import CaptionSummary
from vlbeit.data.prepare.captions import CaptionTable, ImageId
from vlbeit.data.prepare.locate import Pictures
from vlbeit.data.prepare.plan import Options, Plan, require
from vlbeit.data.prepare.rows import Bad, delimited, json_list, lines
from vlbeit.errors import ConfigError, InputError

COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017", "images")
FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


def plan_coco(
    root: Path,
    *,
    captions: list[Path],
    karpathy: Path | None,
    images: list[Path],
    options: Options,
) -> Plan:
    """COCO from its root folder.

    Args:
        captions: captions_*.json; without any, those in `root/annotations` or `root`.
        karpathy: dataset_coco.json; without it, one that lies in `root`, else the official
            split by file name (captions_train2017.json is train).
        images: folders or archives; without any, `root` and its train2014, val2017, ...
    """
    require(root, "COCO's folder (annotations/, train2014/, ...)")
    places = images or [root, *(root / f for f in COCO_FOLDERS if (root / f).is_dir())]
    pictures = Pictures(places, allow_absolute=options.allow_absolute)
    plan = Plan("pair", serves="retrieval", summary=CaptionSummary())
    table = CaptionTable(plan, options)
    if karpathy is None and not captions:
        karpathy = _first(root, "dataset_coco.json")
    if karpathy is not None:
        plan.notes.append(f"captions and splits from {karpathy}")
        for where, row in _karpathy(plan, karpathy):
            name = _coco_name(pictures, row)
            _add_karpathy(table, where, row, name)
        table.finish(pictures)
        return plan
    captions = captions or sorted(
        [*root.glob("annotations/captions_*.json"), *root.glob("captions_*.json")]
    )
    if not captions:
        raise InputError(
            f"{root}: neither dataset_coco.json nor annotations/captions_*.json; name the files "
            "with --karpathy or --captions"
        )
    years = {year for path in captions for year in ("2014", "2017") if year in path.stem}
    if len(years) > 1:
        raise ConfigError(
            f"{root}: captions of 2014 and of 2017, which are the same photos split differently; "
            "name the files of one year with --captions"
        )
    for path in captions:
        _official(plan, table, require(path, "a captions_*.json of COCO"))
        table.finish(pictures)
    return plan


def _official(plan: Plan, table: CaptionTable, path: Path) -> None:
    """One captions_*.json: `images` has the file names, `annotations` the captions."""
    split = next((s for s in ("train", "val", "test") if s in path.stem), None)
    names: dict[object, str] = {}
    for where, row in json_list(path, "images"):
        if isinstance(row, dict) and isinstance(row.get("file_name"), str) and "id" in row:
            names[row["id"]] = row["file_name"]
        else:
            plan.bad.append(Bad(where, "", "bad_json", "an image without id or file_name"))
    said: set[object] = set()
    for where, row in json_list(path, "annotations"):
        image = row.get("image_id") if isinstance(row, dict) else None
        if image not in names:
            detail = f"a caption of image {image!r}, which `images` does not list"
            plan.bad.append(Bad(where, str(image), "no_image", detail))
            continue
        said.add(image)
        fields = {"coco_id": image}
        table.add(ImageId(names[image]), [row.get("caption")], where, split, fields)
    for image in names.keys() - said:
        plan.bad.append(Bad(str(path), names[image], "no_text", "no caption names this image"))


def _karpathy(plan: Plan, path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for where, row in json_list(require(path, "Karpathy's split file"), "images"):
        if isinstance(row, dict) and isinstance(row.get("filename"), str):
            rows.append((where, row))
        else:
            plan.bad.append(Bad(where, "", "bad_json", "an image without filename"))
    return rows


def _add_karpathy(table: CaptionTable, where: str, row: dict[str, Any], name: str) -> None:
    sentences = row.get("sentences")
    sentences = sentences if isinstance(sentences, list) else []
    captions = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
    fields = {"coco_id": row["cocoid"]} if "cocoid" in row else {}
    table.add(ImageId(name), captions, where, row.get("split"), fields)


def _coco_name(pictures: Pictures, row: dict[str, Any]) -> str:
    """The name under which a Karpathy row's image lies: by 2014's folders and names, or 2017's,
    which have the same photos named by their number alone."""
    name = str(row["filename"])
    names = [f"{row['filepath']}/{name}"] if row.get("filepath") else []
    names.append(name)
    if isinstance(number := row.get("cocoid"), int):
        names.append(f"{number:012d}.jpg")
    return next((n for n in names if pictures.has(n)), names[0])


def plan_flickr30k(
    root: Path,
    *,
    karpathy: Path | None,
    captions: Path | None,
    images: list[Path],
    options: Options,
) -> Plan:
    """Flickr30k from its root folder.

    Args:
        karpathy: dataset_flickr30k.json (captions and splits), looked for in `root` too.
        captions: results.csv (`image_name| comment_number| comment`) or
            results_20130124.token (`name#n<TAB>caption`); they name no split.
        images: folders or archives; without any, `root` and flickr30k-images in it.
    """
    require(root, "Flickr30k's folder (flickr30k-images/, dataset_flickr30k.json)")
    places = images or [*(root / f for f in FLICKR_FOLDERS if (root / f).is_dir()), root]
    plan = Plan("pair", serves="retrieval", summary=CaptionSummary())
    table = CaptionTable(plan, options)
    if captions is None:
        karpathy = karpathy or _first(root, "dataset_flickr30k.json")
        captions = _first(root, "results.csv", "results_20130124.token")
    if karpathy is not None:
        plan.notes.append(f"captions and splits from {karpathy}")
        for where, row in _karpathy(plan, karpathy):
            _add_karpathy(table, where, row, str(row["filename"]))
    elif captions is None:
        raise InputError(
            f"{root}: neither dataset_flickr30k.json, results.csv nor results_20130124.token; "
            "name the file with --karpathy or --captions"
        )
    elif captions.suffix == ".csv":
        for found in delimited(captions, delimiter="|"):
            if isinstance(found, Bad):
                plan.bad.append(found)
            else:
                name, said = found.values.get("image_name"), found.values.get("comment")
                _add_named(plan, table, found.where, name, said)
    else:
        for where, line in lines(captions):
            name, tab, said = line.partition("\t")
            _add_named(plan, table, where, name.partition("#")[0], said if tab else None)
    table.finish(Pictures(places, allow_absolute=options.allow_absolute))
    return plan


def _add_named(
    plan: Plan, table: CaptionTable, where: str, name: str | None, said: str | None
) -> None:
    if not name or said is None:
        plan.bad.append(Bad(where, name or "", "bad_row", "no image name or no caption"))
    else:
        table.add(ImageId(name.strip()), [said], where)


def _first(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)
