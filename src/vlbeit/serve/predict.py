"""`vlbeit predict RUN`: ask a run, pretrained or fine-tuned.

pretrained       vlbeit predict RUN --image dog.jpg --text "a [MASK] dog on the [MASK]"
                 vlbeit predict RUN --image dog.jpg --hide 0.4 --text "a brown dog on the grass"
classification   vlbeit predict RUN --image dog.jpg
vqa              vlbeit predict RUN --image dog.jpg --question "what colour is the dog?"
statements       vlbeit predict RUN --image left.jpg --right right.jpg --statement "both are dogs"
entailment       vlbeit predict RUN --image dog.jpg --hypothesis "an animal is outside"
segmentation     vlbeit predict RUN --image street.jpg --out classes.png
retrieval        vlbeit predict RUN --image dog.jpg cat.jpg --text "a brown dog on the grass"

--out FILE draws the answer as a PNG; filled patches are always drawn (default: beside the picture).
Of many pictures `vlbeit index` keeps the vectors, for `vlbeit search`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlbeit.errors import ConfigError, SaveError
from vlbeit.eval.cli import table_of
from vlbeit.eval.drawing import draw_answers, draw_classes, draw_ranked
from vlbeit.eval.fill import draw_filled
from vlbeit.serve.predictor import PRETRAINING, Answer, Predictor, load, read_picture
from vlbeit.tasks.retrieval_index import Found
from vlbeit.tokens.text import MASK

INPUTS = ("image", "right", "question", "statement", "hypothesis", "text", "hide")
PRETRAINED = ("image", "text", "hide")


class Asked(NamedTuple):
    """What a run answered."""

    answer: dict[str, Any]
    """As JSON."""
    draw: Callable[[], Image.Image]


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a run folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument("--image", nargs="+", help="a picture file; retrieval: one or more")
    parser.add_argument("--right", help="statements: the picture to the right of --image")
    parser.add_argument("--question", help="vqa: a question about the picture")
    parser.add_argument("--statement", help="statements: a sentence about both pictures")
    parser.add_argument("--hypothesis", help="entailment: a sentence about the picture")
    parser.add_argument("--text", help=f"a caption; of a pretrained run every {MASK} is filled in")
    parser.add_argument("--hide", type=float, help="pretrained: share of patches to hide, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="which patches --hide chooses")
    parser.add_argument("--top", type=int, default=5, help="candidates that are shown")
    parser.add_argument("--out", type=Path, help="PNG of the answer")
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args(argv)
    if all(getattr(args, name) is None for name in INPUTS):
        raise ConfigError("nothing to predict: give --image, --text or both")
    quiet: Any = (lambda text: None) if args.json else print
    run = load(args.run, args.device, quiet)
    answer = {"checkpoint": str(run.run.folder), "trained_for": run.trained_for}
    answer |= filled(run, args) if run.trained_for == PRETRAINING else asked(run, args)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer, Console())
    return 0


def check_inputs(run: Predictor, args: argparse.Namespace, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError for what this run would not look at."""
    for name in INPUTS:
        if getattr(args, name) is not None and name not in allowed:
            raise ConfigError(
                f"--{name}: {run.run.folder} was trained for {run.trained_for} and takes "
                f"{', '.join('--' + one for one in allowed) or 'nothing here'}"
            )


def asked(run: Predictor, args: argparse.Namespace) -> dict[str, Any]:
    """The answer of a fine-tuned run, drawn if --out says where."""
    if run.trained_for not in QUESTIONS:
        raise ConfigError(
            f"{run.run.folder} was trained for {run.trained_for}, which vlbeit predict does not "
            f"know; it knows {', '.join(QUESTIONS)}"
        )
    needed, ask = QUESTIONS[run.trained_for]
    check_inputs(run, args, needed)
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        raise ConfigError(
            f"{run.run.folder} was trained for {run.trained_for}: give {' and '.join(missing)}"
        )
    if run.trained_for != "retrieval":
        args.image = only_one(args.image, run)
    found = ask(run, args)
    answer = {name: getattr(args, name) for name in needed} | found.answer
    if args.out:
        answer["picture"] = save(found.draw(), args.out)
    return answer


def only_one(images: list[str], run: Predictor) -> str:
    if len(images) != 1:
        raise ConfigError(
            f"--image: {run.run.folder} was trained for {run.trained_for} and looks at one "
            f"picture, found {len(images)}"
        )
    return images[0]


def filled(run: Predictor, args: argparse.Namespace) -> dict[str, Any]:
    """Hidden words and patches, as a pretrained run fills them in."""
    check_inputs(run, args, PRETRAINED)
    image = None if args.image is None else only_one(args.image, run)
    if args.hide is not None and (image is None or not 0 < args.hide <= 1):
        raise ConfigError(f"--hide needs --image and a share in (0, 1], found {args.hide}")
    asks_words = args.text is not None and MASK in args.text
    if not asks_words and args.hide is None:
        raise ConfigError(f"nothing is hidden: write {MASK} into --text, or give --hide 0.4")
    answer: dict[str, Any] = {}
    if asks_words:
        words = run.fill_words(args.text, image, args.top)
        answer["text"] = words.best()
        answer["words"] = [[g._asdict() for g in guesses] for guesses in words.guesses]
    if args.hide is not None and image is not None:
        found = run.fill_patches(image, args.hide, args.text, args.seed)
        hidden = int(found.hidden.sum())
        answer["patches"] = {"hidden": hidden, "right": found.right}
        beside = Path(image)
        out = args.out or beside.with_name(f"{beside.stem}-filled.png")
        caption = f"{found.right} of {hidden} codes right. {args.text or ''}"
        answer["picture"] = save(draw_filled(found, caption), out)
    return answer


def classified(run: Predictor, args: argparse.Namespace) -> Asked:
    bars = run.classify(args.image, args.top)
    return with_bars([args.image], "", bars)


def answered(run: Predictor, args: argparse.Namespace) -> Asked:
    bars = run.answer(args.image, args.question, args.top)
    return with_bars([args.image], args.question, bars)


def compared(run: Predictor, args: argparse.Namespace) -> Asked:
    share = run.compare(args.image, args.right, args.statement).probability
    bars = [Answer("true", share), Answer("false", 1 - share)]
    return with_bars([args.image, args.right], args.statement, likely_first(bars))


def entailed(run: Predictor, args: argparse.Namespace) -> Asked:
    found = run.entail(args.image, args.hypothesis)
    bars = [Answer(name, share) for name, share in found._asdict().items()]
    return with_bars([args.image], args.hypothesis, likely_first(bars))


def segmented(run: Predictor, args: argparse.Namespace) -> Asked:
    picture = read_picture(args.image)
    found = run.segment(picture)
    answer = {"size": list(found.classes.shape), "classes": [s._asdict() for s in found.shares]}
    return Asked(answer, lambda: draw_classes(picture, found.classes, found.shares))


def matched(run: Predictor, args: argparse.Namespace) -> Asked:
    """The pictures in the order of the fused pass, without one in that of the cosine."""
    index = run.index(images=args.image)
    found = run.search(index, text=args.text, top=len(args.image))
    if "rerank" in run.modes:
        found = run.rerank(found, text=args.text)

    def draw() -> Image.Image:
        captions = [pair_lines(one) for one in found]
        return draw_ranked([read_picture(one.id) for one in found], args.text, captions)

    return Asked({"pictures": [one._asdict() for one in found]}, draw)


class Question(NamedTuple):
    """How a task is asked."""

    needed: tuple[str, ...]
    ask: Callable[[Predictor, argparse.Namespace], Asked]


QUESTIONS: dict[str, Question] = {
    "classification": Question(("image",), classified),
    "vqa": Question(("image", "question"), answered),
    "statements": Question(("image", "right", "statement"), compared),
    "entailment": Question(("image", "hypothesis"), entailed),
    "segmentation": Question(("image",), segmented),
    "retrieval": Question(("image", "text"), matched),
}
"""By task. Pretrained runs take any of image, text and hide."""


def with_bars(images: list[str], title: str, bars: list[Answer]) -> Asked:
    return Asked(
        {"answers": [bar._asdict() for bar in bars]},
        lambda: draw_answers([read_picture(image) for image in images], title, bars),
    )


def likely_first(bars: list[Answer]) -> list[Answer]:
    return sorted(bars, key=lambda bar: -bar.probability)


def pair_lines(found: Found) -> list[str]:
    """What stands below a picture that was compared with a text."""
    scores = f"cosine {found.similarity:.3f}"
    if found.probability is not None:
        scores += f", a pair {100 * found.probability:.1f} %"
    return [Path(found.id).name, scores]


def found_table(kind: str, rows: list[dict[str, Any]]) -> Table:
    """Rows of `Found`, as JSON, for a person."""
    table = table_of(kind, "cosine", "a pair")
    for row in rows:
        share = row["probability"]
        said = "" if share is None else f"{100 * share:.1f} %"
        table.add_row(escape(row["id"]), f"{row['similarity']:.3f}", said)
    return table


def save(sheet: Image.Image, out: Path) -> str:
    """Write a PNG; returns where it is."""
    try:
        sheet.save(out, "PNG")
    except OSError as error:
        raise SaveError(f"{out}: cannot be written ({error.strerror or error})") from None
    return str(out)


def show(answer: dict[str, Any], console: Console) -> None:
    """What a person reads."""
    if "words" in answer:
        print(answer["text"])
        for number, guesses in enumerate(answer["words"], 1):
            named = ", ".join(f"{g['piece']} {100 * g['probability']:.1f} %" for g in guesses)
            print(f"  {MASK} {number}: {named}")
    if "patches" in answer:
        found = answer["patches"]
        print(f"{found['right']} of {found['hidden']} hidden patches: the exact code")
    if "pictures" in answer:
        console.print(found_table("picture", answer["pictures"]))
    if "classes" in answer:
        table = table_of("class", "of the pixels")
        for row in answer["classes"]:
            table.add_row(escape(row["name"]), f"{100 * row['share']:.1f} %")
        console.print(table)
    if answer.get("answers"):
        table = table_of("answer", "probability")
        for row in answer["answers"]:
            table.add_row(escape(row["name"]), f"{100 * row['probability']:.1f} %")
        console.print(table)
    if "picture" in answer:
        print(f"drawn in {answer['picture']}")
