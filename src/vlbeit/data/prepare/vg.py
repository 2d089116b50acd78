"""Visual Genome: its region descriptions become the captions of an image (as in VLMo)."""

from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from vlbeit.data.prepare.captions import CaptionTable, ImageId
from vlbeit.data.prepare.locate import Pictures
from vlbeit.data.prepare.plan import SPLITS, Options, Overlap, Plan, require
from vlbeit.data.prepare.rows import Bad, json_list

FOLDERS = ("VG_100K", "VG_100K_2", "images")


def plan_vg(root: Path, *, images: list[Path], karpathy: Path | None, options: Options) -> Plan:
    """Visual Genome from its root folder: region_descriptions.json, image_data.json, VG_100K*.

    Half of its photos are COCO's too. With `karpathy` (dataset_coco.json), those that are val or
    test there are left out and listed in overlap.jsonl.
    """
    require(root, "Visual Genome's folder (region_descriptions.json, image_data.json, VG_100K/)")
    regions = require(root / "region_descriptions.json", "Visual Genome's region descriptions")
    data = require(root / "image_data.json", "Visual Genome's image list")
    places = images or [root, *(root / f for f in FOLDERS if (root / f).is_dir())]
    pictures = Pictures(places, allow_absolute=options.allow_absolute)
    held_out = _held_out(karpathy) if karpathy else {}

    plan = Plan("pair")
    table = CaptionTable(plan, options)
    coco_ids: dict[object, object] = {}
    names: dict[object, str] = {}
    for where, row in json_list(data):
        if not isinstance(row, dict) or "image_id" not in row:
            plan.bad.append(Bad(where, "", "bad_json", "an image without image_id"))
            continue
        names[row["image_id"]] = _file_name(pictures, row["image_id"], str(row.get("url", "")))
        coco_ids[row["image_id"]] = row.get("coco_id")
    for where, row in json_list(regions):
        image = row.get("id", row.get("image_id")) if isinstance(row, dict) else None
        if image not in names:
            detail = f"regions of image {image!r}, which image_data.json does not list"
            plan.bad.append(Bad(where, str(image), "no_image", detail))
            continue
        name, coco_id = names[image], coco_ids[image]
        if coco_id is not None and coco_id in held_out:
            same = f"COCO image {coco_id}, {held_out[coco_id]} in {karpathy}"
            plan.held_out.append(Overlap(name, where, "coco_id", same))
            continue
        found = row.get("regions")
        found = found if isinstance(found, list) else []
        phrases = [region.get("phrase") for region in found if isinstance(region, dict)]
        fields = {"vg_id": image} | ({} if coco_id is None else {"coco_id": coco_id})
        table.add(ImageId(name), phrases, where, None, fields)
    table.finish(pictures)
    return plan


def _file_name(pictures: Pictures, image: object, url: str) -> str:
    """`VG_100K_2/1.jpg` as the URL has it, or `1.jpg` where the folders were merged."""
    parts = PurePosixPath(urlsplit(url).path).parts[-2:]
    names = ["/".join(parts)] if len(parts) == 2 else []
    names.append(f"{image}.jpg")
    return next((name for name in names if pictures.has(name)), names[0])


def _held_out(karpathy: Path) -> dict[object, str]:
    """COCO ids of Karpathy's val and test images."""
    found: dict[object, str] = {}
    for _, row in json_list(require(karpathy, "Karpathy's dataset_coco.json"), "images"):
        if isinstance(row, dict) and SPLITS.get(str(row.get("split"))) in ("val", "test"):
            found[row.get("cocoid")] = str(row["split"])
    return found
