"""`vlbeit predict RUN`: ask a run, pretrained or fine-tuned.

pretrained       vlbeit predict RUN --image dog.jpg --text "a [MASK] dog on the [MASK]"
                 vlbeit predict RUN --image dog.jpg --hide 0.4 --text "a brown dog on the grass"
classification   vlbeit predict RUN --image dog.jpg
vqa              vlbeit predict RUN --image dog.jpg --question "what colour is the dog?"
statements       vlbeit predict RUN --image left.jpg --right right.jpg --statement "both are dogs"
retrieval        vlbeit predict RUN --image dog.jpg --text "a brown dog on the grass"

--out FILE draws the answer as a PNG; filled patches are always drawn (default: beside the picture).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vlbeit.errors import ConfigError, SaveError
from vlbeit.eval.cli import table_of
from vlbeit.eval.fill import draw_filled
from vlbeit.serve.drawing import draw_answers
from vlbeit.serve.predictor import PRETRAINING, Answer, Predictor, load, read_picture
from vlbeit.tokens.text import MASK

NEEDED = {
    "classification": ("image",),
    "vqa": ("image", "question"),
    "statements": ("image", "right", "statement"),
    "retrieval": ("image", "text"),
}
"""What must be given to ask a fine-tuned run. Pretrained ones take any of image, text and hide."""
INPUTS = ("image", "right", "question", "statement", "text", "hide")
PRETRAINED = ("image", "text", "hide")


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a run folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument("--image", help="a picture file")
    parser.add_argument("--right", help="statements: the picture to the right of --image")
    parser.add_argument("--question", help="vqa: a question about the picture")
    parser.add_argument("--statement", help="statements: a sentence about both pictures")
    parser.add_argument("--text", help=f"a caption; of a pretrained run every {MASK} is filled in")
    parser.add_argument("--hide", type=float, help="pretrained: share of patches to hide, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="which patches --hide chooses")
    parser.add_argument("--top", type=int, default=5, help="candidates that are shown")
    parser.add_argument("--out", type=Path, help="PNG of the answer")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
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
    needed = NEEDED.get(run.trained_for, ())
    check_inputs(run, args, needed)
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing or not needed:
        what = f"give {' and '.join(missing)}" if missing else "vlbeit predict does not know it"
        raise ConfigError(f"{run.run.folder} was trained for {run.trained_for}: {what}")
    bars: list[Answer]
    title = ""
    if run.trained_for == "classification":
        bars = run.classify(args.image, args.top)
    elif run.trained_for == "vqa":
        title = args.question
        bars = run.answer(args.image, args.question, args.top)
    elif run.trained_for == "statements":
        title = args.statement
        share = run.compare(args.image, args.right, args.statement).probability
        bars = sorted([Answer("true", share), Answer("false", 1 - share)], key=lambda a: -a[1])
    else:
        title = args.text
        found = run.match(args.image, args.text)
        bars = [] if found.probability is None else [Answer("a pair", found.probability)]
        title += f" (cosine {found.similarity:.3f})"
    answer: dict[str, Any] = {name: getattr(args, name) for name in needed}
    answer["answers"] = [bar._asdict() for bar in bars]
    if run.trained_for == "retrieval":
        answer["similarity"] = found.similarity
    if args.out:
        pictures = [read_picture(one) for one in (args.image, args.right) if one is not None]
        answer["picture"] = save(draw_answers(pictures, title, bars), args.out)
    return answer


def filled(run: Predictor, args: argparse.Namespace) -> dict[str, Any]:
    """Hidden words and patches, as a pretrained run fills them in."""
    check_inputs(run, args, PRETRAINED)
    if args.hide is not None and (args.image is None or not 0 < args.hide <= 1):
        raise ConfigError(f"--hide needs --image and a share in (0, 1], found {args.hide}")
    asks_words = args.text is not None and MASK in args.text
    if not asks_words and args.hide is None:
        raise ConfigError(f"nothing is hidden: write {MASK} into --text, or give --hide 0.4")
    answer: dict[str, Any] = {}
    if asks_words:
        words = run.fill_words(args.text, args.image, args.top)
        answer["text"] = words.best()
        answer["words"] = [[g._asdict() for g in guesses] for guesses in words.guesses]
    if args.hide is not None:
        found = run.fill_patches(args.image, args.hide, args.text, args.seed)
        hidden = int(found.hidden.sum())
        answer["patches"] = {"hidden": hidden, "right": found.right}
        beside = Path(args.image)
        out = args.out or beside.with_name(f"{beside.stem}-filled.png")
        caption = f"{found.right} of {hidden} codes right. {args.text or ''}"
        answer["picture"] = save(draw_filled(found, caption), out)
    return answer


def save(sheet: Any, out: Path) -> str:
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
    if "similarity" in answer:
        print(f"cosine {answer['similarity']:.3f}")
    if answer.get("answers"):
        table = table_of("answer", "probability")
        for row in answer["answers"]:
            table.add_row(escape(row["name"]), f"{100 * row['probability']:.1f} %")
        console.print(table)
    if "picture" in answer:
        print(f"drawn in {answer['picture']}")
