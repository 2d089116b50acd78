"""`vlbeit predict RUN`: fill [MASK] words for an image, hidden patches for a text.

vlbeit predict RUN --image dog.jpg --text "a [MASK] dog on the [MASK]"
vlbeit predict RUN --image dog.jpg --hide 0.4 --text "a brown dog on the grass" --out filled.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlbeit.data.transforms import BadImage, BadText
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.evaluate import LoadedRun, load_run
from vlbeit.eval.fill import (
    draw_filled,
    fill_patches,
    fill_words,
    hide_share,
    open_picture,
)
from vlbeit.tokens.text import MASK


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a run folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument("--image", type=Path, help="a picture file")
    parser.add_argument("--text", help=f"a text; every {MASK} in it is filled in")
    parser.add_argument("--hide", type=float, help="share of patches to hide, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="which patches --hide chooses")
    parser.add_argument("--top", type=int, default=5, help="candidates for each word")
    parser.add_argument("--out", type=Path, help="PNG of the filled picture")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.text is None and args.image is None:
        raise ConfigError("nothing to predict: give --text, --image or both")
    if args.hide is not None and (args.image is None or not 0 < args.hide <= 1):
        raise ConfigError(f"--hide needs --image and a share in (0, 1], found {args.hide}")
    asks_words = args.text is not None and MASK in args.text
    if not asks_words and args.hide is None:
        raise ConfigError(f"nothing is hidden: write {MASK} into --text, or give --hide 0.4")
    quiet: Any = (lambda text: None) if args.json else print
    run = load_run(args.run, args.device, quiet)
    picture = None if args.image is None else read_picture(run, args.image)
    answer: dict[str, Any] = {"checkpoint": str(run.folder)}
    try:
        if asks_words:
            words = fill_words(run, args.text, picture, args.top)
            answer["text"] = words.best()
            answer["words"] = [[g._asdict() for g in guesses] for guesses in words.guesses]
        if args.hide is not None and picture is not None:
            hidden = hide_share(run, args.hide, args.seed)
            filled = fill_patches(run, picture, hidden, args.text)
            answer["patches"] = {"hidden": int(hidden.sum()), "right": filled.right}
            out = args.out or args.image.with_name(f"{args.image.stem}-filled.png")
            caption = f"{filled.right} of {int(hidden.sum())} codes right. {args.text or ''}"
            draw_filled(filled, caption).save(out)
            answer["picture"] = str(out)
    except BadText as error:
        raise InputError(f"--text: {error}") from None
    print(json.dumps(answer, indent=1) if args.json else in_words(answer))
    return 0


def read_picture(run: LoadedRun, path: Path) -> np.ndarray:
    try:
        return open_picture(run, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except BadImage as error:
        raise InputError(f"{path}: {error}") from None


def in_words(answer: dict[str, Any]) -> str:
    """What a person reads."""
    lines = []
    if "words" in answer:
        lines.append(answer["text"])
        for number, guesses in enumerate(answer["words"], 1):
            named = ", ".join(f"{g['piece']} {100 * g['probability']:.1f} %" for g in guesses)
            lines.append(f"  {MASK} {number}: {named}")
    if "patches" in answer:
        found = answer["patches"]
        lines.append(f"{found['right']} of {found['hidden']} hidden patches: the exact code")
        lines.append(f"drawn in {answer['picture']}")
    return "\n".join(lines)
