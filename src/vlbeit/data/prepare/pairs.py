"""Image-text pairs of your own: JSONL, CSV, TSV, JSON lists, and tar shards as they are."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlbeit.data.prepare.captions import CaptionTable, ImageId
from vlbeit.data.prepare.locate import Pictures
from vlbeit.data.prepare.plan import Options, Plan, require, split_of_file
from vlbeit.data.prepare.rows import Bad, Row, delimited, json_lines, json_list
from vlbeit.errors import InputError

TABLES = (".jsonl", ".csv", ".tsv", ".json")


def plan_pairs(
    sources: Sequence[str],
    images: Sequence[Path],
    options: Options,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
) -> Plan:
    """Pairs from files of rows; images lie in `images`, or beside the file that names them."""
    plan = Plan("pair")
    for source in sources:
        table = require(Path(source), "a .jsonl, .csv, .tsv or .json file of pairs")
        if table.suffix not in TABLES:
            raise InputError(
                f"{table}: expected one of {', '.join(TABLES)}, or tar shards alone "
                "(a folder of images goes to --images)"
            )
        captions = CaptionTable(plan, options)
        places = list(images) or [table.parent]
        for row in rows_of(table):
            if isinstance(row, Bad):
                plan.bad.append(row)
                continue
            row.values.setdefault("split", split_of_file(table))
            _add(captions, plan, row, image_column, caption_column)
        captions.finish(
            Pictures(places, shards=table.parent, allow_absolute=options.allow_absolute)
        )
    if not plan.items and not plan.bad:
        raise InputError(f"no row found in {', '.join(sources)}")
    return plan


def rows_of(table: Path) -> Iterator[Row | Bad]:
    """Rows of any of the table formats; a JSON list may hold objects or [image, caption] lists
    (ViLT's and VLMo's annotation files for CC3M and SBU)."""
    if table.suffix == ".jsonl":
        yield from json_lines(table)
    elif table.suffix == ".json":
        for where, value in json_list(table):
            if isinstance(value, list) and len(value) == 2:
                value = dict(zip(("image", "caption"), value, strict=True))
            if isinstance(value, dict):
                yield Row(where, value)
            else:
                yield Bad(where, "", "bad_json", f"expected an object, found {str(value)[:80]!r}")
    else:
        yield from delimited(table, delimiter="\t" if table.suffix == ".tsv" else ",")


def _add(
    captions: CaptionTable, plan: Plan, row: Row, image_column: str, caption_column: str
) -> None:
    values: dict[str, Any] = row.values
    name = values.pop(image_column, None)
    if not isinstance(name, str) or not name:
        detail = f"no {image_column!r} that names a file (found: {', '.join(values) or 'nothing'})"
        plan.bad.append(Bad(row.where, "", "no_image", detail))
        return
    said = values.pop("captions", None)
    if said is None:
        said = values.pop(caption_column, None)
    if said is None:
        detail = f"neither 'captions' nor {caption_column!r} (found: {', '.join(values)})"
        plan.bad.append(Bad(row.where, name, "no_text", detail))
        return
    shard, split = values.pop("shard", None), values.pop("split", None)
    captions.add(
        ImageId(name, None if shard is None else str(shard)),
        said if isinstance(said, list) else [said],
        row.where,
        split,
        values,
    )
