"""`vlbeit index RUN` and `vlbeit search INDEX`: pictures for a text, or texts for a picture.

vlbeit index RUN --images photos --out photos.index
vlbeit search photos.index --text "a brown dog on the grass" --rerank 20 --out found.png

vlbeit index RUN --texts captions.txt --out captions.index
vlbeit search captions.index --image dog.jpg

An index keeps the vectors of a retrieval run's dual encoder, the digest of its weights, and where
pictures or texts lie; it is searched by that checkpoint only. --rerank K looks at the K nearest
again with the fused pass, which costs one forward pass each.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from vlbeit.data.dataset import SPLITS
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.eval.drawing import draw_answers, draw_ranked
from vlbeit.serve.gallery import Gallery, open_gallery
from vlbeit.serve.predict import found_table, pair_lines, save
from vlbeit.serve.predictor import BATCH, Predictor, load, read_picture
from vlbeit.tasks.retrieval import SecondLookCost
from vlbeit.tasks.retrieval_index import Found, Index

TOLD_EVERY = 20.0
"""Seconds between two lines of progress."""


def index(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a run of vlbeit finetune retrieval, or its checkpoint")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", help="a folder of pictures, or a prepared data folder")
    given.add_argument("--texts", help="a file with one text a line, or a prepared data folder")
    parser.add_argument("--split", default="val", choices=SPLITS, help="of a prepared folder")
    parser.add_argument("--out", required=True, type=Path, help="the new folder")
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    args = parser.parse_args(argv)
    if args.out.exists():
        raise SaveError(f"{args.out}: exists already; choose another folder or remove it")
    run = load(args.run, args.device, print)
    place = args.images or args.texts
    gallery = open_gallery("image" if args.images else "text", place, args.split)
    began = time.perf_counter()
    made, skipped = build(run, gallery, print)
    seconds = time.perf_counter() - began
    made.save(args.out)
    if skipped:
        print(f"{len(skipped)} left out, the first: {skipped[0]}")
    count, width = made.vectors.shape
    print(
        f"{count} {gallery.kind}s in {seconds:.1f} s ({count / seconds:.1f} a second) by "
        f"{made.checkpoint}\n{args.out}: vectors of {width}, {count * width * 4 / 2**20:.1f} MB"
    )
    return 0


def build(run: Predictor, gallery: Gallery, log: Callable[[str], None]) -> tuple[Index, list[str]]:
    """An index of all that can be read, and what could not, by name and reason.

    Raises:
        ConfigError: the run is not one of retrieval.
        InputError: nothing can be read.
    """
    ids: list[str] = []
    vectors: list[torch.Tensor] = []
    skipped = list(gallery.unreadable)
    told = time.perf_counter()
    for start in range(0, len(gallery.ids), BATCH):
        readable: dict[str, Any] = {}
        for name in gallery.ids[start : start + BATCH]:
            try:
                readable[name] = gallery.read(name)
            except InputError as error:
                skipped.append(str(error))
        if readable:
            given: dict[str, Any] = {f"{gallery.kind}s": list(readable.values())}
            vectors.append(run.index(**given, ids=list(readable)).vectors)
            ids += readable
        if time.perf_counter() - told > TOLD_EVERY:
            told = time.perf_counter()
            log(f"{len(ids)} of {len(gallery.ids)} {gallery.kind}s encoded")
    if not ids:
        raise InputError(f"{gallery.place}: nothing can be read, the first: {skipped[0]}")
    made = Index(
        kind=gallery.kind,
        model=run.digest,
        ids=tuple(ids),
        vectors=torch.cat(vectors),
        checkpoint=str(run.run.folder.absolute()),
        place=str(gallery.place),
        split=gallery.split,
    )
    return made, skipped


def search(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("index", help="a folder written by vlbeit index")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="what to find pictures for")
    given.add_argument("--image", help="a picture file to find texts for")
    parser.add_argument("--top", type=int, default=5, help="how many are shown")
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="look at the K nearest again; 0: off"
    )
    parser.add_argument("--run", help="the checkpoint that made the index, if it was moved")
    parser.add_argument("--out", type=Path, help="PNG of what was found")
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args(argv)
    if args.top < 1 or args.rerank < 0:
        raise ConfigError(
            f"--top must be at least 1 and --rerank at least 0, found {args.top} and {args.rerank}"
        )
    made = Index.load(args.index)
    run = load(maker(args.index, made, args.run), args.device, _quiet if args.json else print)
    query: dict[str, Any] = {"text": args.text} if args.text else {"image": args.image}
    began = time.perf_counter()
    found = run.search(made, **query, top=max(args.top, args.rerank))
    costs: dict[str, float] = {"search_seconds": round(time.perf_counter() - began, 4)}
    gallery = open_gallery(made.kind, made.place, made.split) if args.rerank or args.out else None
    if args.rerank:
        assert gallery is not None
        began = time.perf_counter()
        found, rest = found[: args.rerank], found[args.rerank :]
        found = run.rerank(found, **query, read=gallery.read)
        cost = SecondLookCost(
            pairs=len(found), seconds=time.perf_counter() - began, queries=1
        ).to_dict()
        found, costs = found + rest, costs | cost
    found = found[: args.top]
    answer: dict[str, Any] = {
        "index": args.index,
        "checkpoint": str(run.run.folder),
        **query,
        "entries": len(made.ids),
        "kind": made.kind,
        "found": [one._asdict() for one in found],
        "costs": costs,
    }
    if args.out:
        assert gallery is not None
        answer["picture"] = save(drawn(found, gallery, query), args.out)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer, Console())
    return 0


def _quiet(text: str) -> None:
    pass


def maker(place: str, made: Index, run: str | None) -> str:
    """The checkpoint to search with: the one that is given, else the one that made the index.

    Raises:
        InputError: it is not known, or not there.
    """
    if run is not None:
        return run
    if not made.checkpoint or not Path(made.checkpoint).is_dir():
        raise InputError(
            f"{place}: the checkpoint that made it ({made.checkpoint or 'unknown'}, model "
            f"{made.model[:12]}) is not there; say with --run where it is now"
        )
    return made.checkpoint


def drawn(found: list[Found], gallery: Gallery, query: dict[str, Any]) -> Image.Image:
    """Thumbnails of the pictures for a text; a picture with bars for its texts."""
    if gallery.kind == "image":
        pictures = [read_picture(gallery.read(one.id)) for one in found]
        return draw_ranked(pictures, query["text"], [pair_lines(one) for one in found])
    bars = [
        (one.id, one.similarity if one.probability is None else one.probability) for one in found
    ]
    looked = all(one.probability is not None for one in found)
    title = "a pair, by the fused pass" if looked else "cosine"
    return draw_answers([read_picture(query["image"])], title, bars, "{:.3f}".format)


def show(answer: dict[str, Any], console: Console) -> None:
    """What a person reads."""
    console.print(found_table(answer["kind"], answer["found"]))
    costs = answer["costs"]
    said = f"searched {answer['entries']} {answer['kind']}s in {costs['search_seconds']:.3f} s"
    if "rerank_pairs" in costs:
        said += (
            f"; looked at {costs['rerank_pairs']} again in {costs['rerank_seconds']:.2f} s "
            f"({costs['rerank_seconds'] / max(1, costs['rerank_pairs']):.3f} s each)"
        )
    print(said)
    if "picture" in answer:
        print(f"drawn in {answer['picture']}")
