"""CC3M and SBU: lists of URLs and captions, and the images somebody downloaded from them.

Many links are dead, so a row without a file is the normal case: it is counted and listed as
`no_image`, and is no fault of the data. img2dataset's tar shards need none of this
(`vlbeit prepare cc3m 'shards/{00000..00331}.tar'`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from vlbeit.data.prepare.captions import CaptionTable, ImageId
from vlbeit.data.prepare.locate import Pictures, is_image_name, walk_archive, walk_images
from vlbeit.data.prepare.pairs import rows_of
from vlbeit.data.prepare.plan import Options, Plan, require
from vlbeit.data.prepare.rows import Bad, json_lines, json_list, lines
from vlbeit.errors import InputError

CC3M_FILES = {
    "Train_GCC-training.tsv": "train",
    "Train-GCC-training.tsv": "train",
    "train.tsv": "train",
    "Validation_GCC-1.1.0-Validation.tsv": "val",
    "val.tsv": "val",
}
INDEX_FILES = ("index.tsv", "index.csv", "index.jsonl")
ANNOTATION_FILES = {"train_annot.json": "train", "val_annot.json": "val", "annot.json": None}
"""ViLT's and VLMo's layout: lists of [file, caption] beside images_train/ and images_val/."""


class Link:
    """A row of the published list."""

    __slots__ = ("caption", "split", "url", "where")

    def __init__(self, where: str, url: str, caption: str, split: str | None) -> None:
        self.where = where
        self.url = url
        self.caption = caption
        self.split = split


def plan_cc3m(root: Path, *, index: Path | None, images: list[Path], options: Options) -> Plan:
    """CC3M: Train_GCC-training.tsv and Validation_GCC-*.tsv (caption<TAB>url) in `root`."""
    require(root, "the folder of CC3M's TSV files and downloaded images")
    plan = Plan("pair")
    if (rows := _annotated(root)) and index is None:
        return _plan_annotated(plan, root, rows, images, options)
    files = [(root / name, split) for name, split in CC3M_FILES.items() if (root / name).is_file()]
    if not files:
        raise InputError(
            f"{root}: none of {', '.join(CC3M_FILES)}; for img2dataset's output give its tar "
            "shards instead of a folder"
        )

    def links() -> Iterator[Link | Bad]:
        for path, split in files:
            for where, line in lines(path):
                caption, tab, url = line.rpartition("\t")
                if tab:
                    yield Link(where, url.strip(), caption, split)
                elif line.strip():
                    yield Bad(where, "", "bad_row", "expected caption<TAB>url")

    return _plan_links(plan, root, links(), index, images, options)


def plan_sbu(root: Path, *, index: Path | None, images: list[Path], options: Options) -> Plan:
    """SBU: SBU_captioned_photo_dataset_urls.txt and ..._captions.txt, line by line the same
    photo, or sbu-captions-all.json (lists "image_urls" and "captions"), in `root`."""
    require(root, "the folder of SBU's lists and downloaded images")
    plan = Plan("pair")
    if (rows := _annotated(root)) and index is None:
        return _plan_annotated(plan, root, rows, images, options)
    urls = root / "SBU_captioned_photo_dataset_urls.txt"
    captions = root / "SBU_captioned_photo_dataset_captions.txt"
    both = root / "sbu-captions-all.json"
    if urls.is_file() and captions.is_file():
        one, other = lines(urls), lines(captions)
    elif both.is_file():
        one, other = _texts(both, "image_urls"), _texts(both, "captions")
    else:
        raise InputError(
            f"{root}: neither {urls.name} with {captions.name} nor {both.name}; for img2dataset's "
            "output give its tar shards instead of a folder"
        )

    def links() -> Iterator[Link]:
        try:
            for (where, url), (_, caption) in zip(one, other, strict=True):
                yield Link(where, url.strip(), caption, None)
        except ValueError:
            raise InputError(
                f"{root}: the lists of URLs and captions differ in length; fetch both again"
            ) from None

    return _plan_links(plan, root, links(), index, images, options)


def _texts(path: Path, key: str) -> Iterator[tuple[str, str]]:
    for where, value in json_list(path, key):
        yield where, str(value)


def _annotated(root: Path) -> list[tuple[Path, str | None]]:
    return [(root / n, split) for n, split in ANNOTATION_FILES.items() if (root / n).is_file()]


def _plan_annotated(
    plan: Plan,
    root: Path,
    files: list[tuple[Path, str | None]],
    images: list[Path],
    options: Options,
) -> Plan:
    places = images or [root, *(p for p in sorted(root.glob("images*")) if p.is_dir())]
    names = _Files(places)
    table = CaptionTable(plan, options)
    for path, split in files:
        for row in rows_of(path):
            if isinstance(row, Bad):
                plan.bad.append(row)
                continue
            name = str(row.values.get("image", ""))
            found = names.by_base.get(name.rpartition("/")[2], name)
            table.add(ImageId(found), [row.values.get("caption")], row.where, split)
    table.finish(Pictures(places, allow_absolute=options.allow_absolute), absent_is_bad=False)
    return plan


class _Files:
    """Image files of some folders and archives by their base name; a name used twice by none."""

    def __init__(self, places: list[Path]) -> None:
        self.by_base: dict[str, str] = {}
        twice: set[str] = set()
        for place in places:
            members = walk_images(place)[0] if place.is_dir() else walk_archive(place)[0]
            for member in members:
                base = member.name.rpartition("/")[2]
                known = self.by_base.setdefault(base, member.name)
                if known != member.name and not known.endswith("/" + member.name):
                    twice.add(base)
        for base in twice:
            del self.by_base[base]


def _plan_links(
    plan: Plan,
    root: Path,
    links: Iterator[Link | Bad] | Iterator[Link],
    index: Path | None,
    images: list[Path],
    options: Options,
) -> Plan:
    """Joins the published list with the files.

    Which file belongs to a URL is said by an index (columns url and file, or two columns without
    a header), else by the .json that img2dataset writes beside each file, else by the last part
    of the URL.
    """
    places = images or [root]
    if index is None:
        index = next((root / name for name in INDEX_FILES if (root / name).is_file()), None)
    if index is not None:
        file_of = _read_index(plan, index)
        how = f"by {index}"
    elif beside := _sidecars(plan, places):
        file_of = beside
        how = "by the .json files of img2dataset"
    else:
        by_base = _Files(places).by_base
        file_of, how = {}, "by the last part of each URL"
    table = CaptionTable(plan, options)
    for link in links:
        if isinstance(link, Bad):
            plan.bad.append(link)
            continue
        name = file_of.get(link.url)
        if name is None and not file_of:
            name = by_base.get(urlsplit(link.url).path.rpartition("/")[2])
        if name is None:
            plan.absent.append(Bad(link.where, link.url, "no_image", "not downloaded"))
        else:
            table.add(ImageId(name), [link.caption], link.where, link.split, {"url": link.url})
    plan.notes.append(f"files found {how}")
    table.finish(Pictures(places, allow_absolute=options.allow_absolute), absent_is_bad=False)
    return plan


def _read_index(plan: Plan, index: Path) -> dict[str, str]:
    """URL -> file."""
    file_of: dict[str, str] = {}
    if index.suffix == ".jsonl":
        for row in json_lines(index):
            if isinstance(row, Bad):
                plan.bad.append(row)
            else:
                file_of[str(row.values.get("url"))] = str(row.values.get("file", ""))
        return file_of
    separator = "," if index.suffix == ".csv" else "\t"
    for where, line in lines(index):
        cells = [cell.strip() for cell in line.split(separator)]
        urls = [cell for cell in cells if "://" in cell]
        files = [cell for cell in cells if "://" not in cell and is_image_name(cell)]
        if len(urls) == 1 and len(files) == 1:
            file_of[urls[0]] = files[0]
        elif line.strip() and not {"url", "file"} <= set(cells):
            plan.bad.append(Bad(where, "", "bad_row", "expected one URL and one image file"))
    return file_of


def _sidecars(plan: Plan, places: list[Path]) -> dict[str, str]:
    """URL -> file from `000000012.json` beside `000000012.jpg` (img2dataset's `files` output)."""
    file_of: dict[str, str] = {}
    for place in places:
        if not place.is_dir():
            continue
        for member in walk_images(place)[0]:
            sidecar = Path(member.place.path).with_suffix(".json")
            if not sidecar.is_file():
                continue
            try:
                values = json.loads(sidecar.read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                plan.bad.append(Bad(str(sidecar), member.name, "bad_json", str(error)))
                continue
            if isinstance(values, dict) and isinstance(url := values.get("url"), str):
                file_of[url] = member.name
    return file_of
