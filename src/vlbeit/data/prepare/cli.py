"""Arguments of `vlbeit prepare`. Nothing heavy is imported before a verb is known."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlbeit.data.prepare.arguments import (
    Parser,
    add_verb,
    images_option,
    root_argument,
    shard_options,
)
from vlbeit.data.prepare.task_verbs import TASK_VERBS, add_task_verbs, plan_task
from vlbeit.errors import ConfigError

if TYPE_CHECKING:
    from vlbeit.data.prepare.account import Report
    from vlbeit.data.prepare.plan import Options, Plan

EXAMPLES = """\
examples:
  vlbeit prepare scenes --out data/scenes --count 20000 --seed 0
  vlbeit prepare images photos/ --out data/photos --val-fraction 0.05
  vlbeit prepare pairs captions.jsonl --images photos/ --out data/pairs --check
  vlbeit prepare pairs 'shards/{00000..00331}.tar' --out data/web
  vlbeit prepare text wiki.train.txt wiki.val.txt --out data/wiki
  vlbeit prepare coco COCO/ --karpathy dataset_coco.json --out data/coco
  vlbeit prepare vqa questions.jsonl --images photos/ --out data/questions

Formats, and one row of each: docs/data.md
"""


def main(argv: Sequence[str]) -> int:
    """`vlbeit prepare ARGV`: writes a dataset folder or, with --check, only reports.

    Returns 0. Raises VLBeitError with the exit code: 65 for more bad records than the budget,
    66 for missing files, 78 for wrong settings.
    """
    given = parser().parse_args(list(argv))
    if given.verb == "scenes":
        from vlbeit.data.scenes import prepare_scenes

        prepare_scenes(given.out, given.count, given.seed, given.size)
        return 0
    if given.verb == "remote":
        from vlbeit.data.prepare.remote_folder import name_remote_folder

        print(name_remote_folder(given.url, given.out))
        return 0
    for source in getattr(given, "sources", []):
        if "://" in str(source):
            from vlbeit.data.remote import refuse_secrets

            refuse_secrets(str(source))
    report = _prepare(given, _options(given))
    if given.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print("\n".join(report.lines()))
    if report.failure is not None:
        raise report.failure
    return 0


def parser() -> Parser:
    """Of all verbs."""
    parser = Parser(
        prog="vlbeit prepare",
        description="Turn files into records: a dataset folder that training reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="NAME")

    scenes = verbs.add_parser("scenes", help="draw the small world of coloured shapes")
    scenes.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist"
    )
    scenes.add_argument(
        "--count",
        type=int,
        required=True,
        help="scenes of each stream of pretraining; three times as many for the tasks",
    )
    scenes.add_argument("--seed", type=int, default=0, help="another one: other scenes (0)")
    scenes.add_argument("--size", type=int, default=40, help="side of a picture in pixels")

    remote = verbs.add_parser("remote", help="a prepared folder at a URL: its shards are named")
    remote.add_argument("url", metavar="URL", help="https://, s3://, ...; shards are fetched later")
    remote.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder that names them here"
    )

    images = add_verb(verbs, "images", "folders, tar archives or JSONL rows of images")
    images.add_argument("sources", nargs="*", metavar="SOURCE", help="folder, .tar or .jsonl")
    images.add_argument(
        "--jsonl", "--labels", dest="labels", action="append", default=[], metavar="FILE",
        help='rows {"image", "label", "class", "split", "shard"}; only these images are taken',
    )  # fmt: skip

    pairs = add_verb(verbs, "pairs", "JSONL, CSV, TSV or JSON list of captions, or tar shards")
    pairs.add_argument("sources", nargs="+", metavar="SOURCE", help="table, or pattern of tars")
    images_option(pairs)
    pairs.add_argument(
        "--image-column", default="image", metavar="NAME", help="column of file names (image)"
    )
    pairs.add_argument(
        "--caption-column", default="caption", metavar="NAME", help="column of texts (caption)"
    )
    shard_options(pairs)

    text = add_verb(
        verbs, "text", ".txt or .jsonl files; X.train.txt and X.val.txt are splits of X"
    )
    text.add_argument("sources", nargs="+", metavar="FILE", help=".txt or .jsonl, a source each")
    text.add_argument(
        "--documents", choices=("lines", "paragraphs"), default="lines",
        help="one document a line, or separated by blank lines",
    )  # fmt: skip

    imagenet = add_verb(verbs, "imagenet", "ImageNet-1K or -22K as it is handed out")
    root_argument(imagenet)
    imagenet.add_argument("--val-labels", type=Path, metavar="FILE", help="classes of a flat val/")
    imagenet.add_argument(
        "--synsets", type=Path, metavar="FILE", help="wnid of ILSVRC2012_ID 1, 2, ... a line"
    )

    coco = add_verb(verbs, "coco", "COCO captions, official or with Karpathy's split")
    root_argument(coco)
    coco.add_argument("--karpathy", type=Path, metavar="FILE", help="dataset_coco.json")
    coco.add_argument(
        "--captions", type=Path, action="append", default=[], metavar="FILE",
        help="captions_*.json, where it does not lie in annotations/",
    )  # fmt: skip
    images_option(coco)

    flickr = add_verb(verbs, "flickr30k", "Flickr30k with Karpathy's split, or its own captions")
    root_argument(flickr)
    flickr.add_argument("--karpathy", type=Path, metavar="FILE", help="dataset_flickr30k.json")
    flickr.add_argument("--captions", type=Path, metavar="FILE", help="results.csv or .token")
    images_option(flickr)

    vg = add_verb(verbs, "vg", "Visual Genome's region descriptions")
    root_argument(vg)
    vg.add_argument(
        "--karpathy", type=Path, metavar="FILE",
        help="dataset_coco.json: leave out the images that are val or test there",
    )  # fmt: skip
    images_option(vg)

    for name, what in (("cc3m", "Conceptual Captions 3M"), ("sbu", "SBU captioned photos")):
        urls = add_verb(
            verbs, name, f"{what}: its lists and the files you downloaded, or tar shards"
        )
        urls.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, or pattern of tars")
        urls.add_argument("--index", type=Path, metavar="FILE", help="which file is which URL's")
        images_option(urls)
        shard_options(urls)
    add_task_verbs(verbs)
    return parser


def _options(given: argparse.Namespace) -> "Options":
    from vlbeit.data.prepare.plan import Options

    if given.out is None and not given.check:
        raise ConfigError(f"vlbeit prepare {given.verb}: --out DIR is missing (or use --check)")
    for name, low, high in (("val_fraction", 0, 0.9), ("budget", 0, 1)):
        if not low <= getattr(given, name) <= high:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(given, name)}: must lie in [{low}, {high}]")
    for name, least in (("per_shard", 1), ("max_size", 0), ("workers", 1)):
        if getattr(given, name) < least:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(given, name)}: must be at least {least}")
    if given.split and given.val_fraction:
        raise ConfigError("--split and --val-fraction: both say where records without a split go")
    if given.verb == "text" and (given.max_size or given.eval_against or given.drop_overlap):
        raise ConfigError("--max-size, --eval-against and --drop-overlap are for images, not text")
    name = given.name or (given.out.name if given.out is not None else given.verb)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
        raise ConfigError(
            f"--name {name!r}: up to 40 ASCII letters, digits, - and _ (it names files and sources)"
        )
    return Options(
        out=None if given.check else given.out,
        name=name,
        split=given.split,
        val_fraction=given.val_fraction,
        per_shard=given.per_shard,
        max_size=given.max_size,
        budget=given.budget,
        workers=given.workers,
        allow_absolute=given.allow_absolute,
        eval_against=tuple(given.eval_against),
        drop_overlap=given.drop_overlap,
    )


def _prepare(given: argparse.Namespace, options: "Options") -> "Report":
    from vlbeit.data.prepare.build import build
    from vlbeit.data.prepare.folder import refuse_existing

    if options.out is not None:
        refuse_existing(options.out)  # before hours of reading, not after
    if given.verb == "text":
        from vlbeit.data.prepare.text import prepare_text

        return prepare_text(given.sources, given.documents, options)
    if given.verb in ("pairs", "cc3m", "sbu") and _are_shards(given.sources):
        from vlbeit.data.prepare.shards import plan_shards, prepare_shards, shards_by_split

        shards = shards_by_split(given.sources, given.val_shards, options.split)
        changes = options.max_size or options.val_fraction or options.eval_against
        if given.copy or given.check or changes:
            return build(plan_shards(shards, options), options)
        return prepare_shards(shards, options)
    return build(_plan(given, options), options)


def _are_shards(sources: list[str]) -> bool:
    """Whether the sources are tar shards; a mixture with tables is refused."""
    tars = [source for source in sources if source.endswith((".tar", ".tar}"))]
    if tars and len(tars) < len(sources):
        other = next(source for source in sources if source not in tars)
        raise ConfigError(f"{tars[0]} and {other}: tar shards and tables in one command")
    return bool(tars)


def _plan(given: argparse.Namespace, options: "Options") -> "Plan":
    """What the family of a verb finds in the user's files."""
    images = [Path(place) for place in getattr(given, "images", [])]
    if given.verb in TASK_VERBS:
        return plan_task(given, images, options)
    if given.verb == "images":
        from vlbeit.data.prepare.images import plan_images

        if not given.sources and not given.labels:
            raise ConfigError("vlbeit prepare images: name a folder, a .tar or a .jsonl file")
        return plan_images(given.sources, given.labels, options)
    if given.verb == "pairs":
        from vlbeit.data.prepare.pairs import plan_pairs

        return plan_pairs(
            given.sources,
            images,
            options,
            image_column=given.image_column,
            caption_column=given.caption_column,
        )
    if given.verb == "imagenet":
        from vlbeit.data.prepare.imagenet import plan_imagenet

        return plan_imagenet(
            given.root, val_labels=given.val_labels, synsets=given.synsets, options=options
        )
    if given.verb == "coco":
        from vlbeit.data.prepare.coco import plan_coco

        return plan_coco(
            given.root,
            captions=given.captions,
            karpathy=given.karpathy,
            images=images,
            options=options,
        )
    if given.verb == "flickr30k":
        from vlbeit.data.prepare.coco import plan_flickr30k

        return plan_flickr30k(
            given.root,
            karpathy=given.karpathy,
            captions=given.captions,
            images=images,
            options=options,
        )
    if given.verb == "vg":
        from vlbeit.data.prepare.vg import plan_vg

        return plan_vg(given.root, karpathy=given.karpathy, images=images, options=options)
    from vlbeit.data.prepare.urls import plan_cc3m, plan_sbu

    if len(given.sources) != 1:
        raise ConfigError(f"vlbeit prepare {given.verb}: one folder, or patterns of tar shards")
    plan = plan_cc3m if given.verb == "cc3m" else plan_sbu
    return plan(Path(given.sources[0]), index=given.index, images=images, options=options)
