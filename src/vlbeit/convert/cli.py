"""`vlbeit convert`: a foreign checkpoint to a run folder, and a run to a foreign one.

    vlbeit convert LAYOUT FILE --out RUN [--fresh NAME ...]
    vlbeit convert RUN --to LAYOUT --out FOLDER

Prints what became of every tensor. Nothing is partial in silence: what has no source must be
accepted by name with --fresh, and the refusal prints the names to give.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from vlbeit.convert.hf_export import export_hf_beit
from vlbeit.convert.importing import Converted, import_run
from vlbeit.convert.layouts import LAYOUTS, Request
from vlbeit.convert.pixels import SCALINGS
from vlbeit.convert.rewriting import Receipt
from vlbeit.errors import ConfigError, InputError
from vlbeit.tokens.text import TextTokenizer, special_tokens_only

EXPORTS: dict[str, Callable[[Path, Path], Receipt]] = {"hf-beit": export_hf_beit}
"""What can be written: (run, folder) -> receipt."""


VISUAL_TOKENIZERS = ("vqkd", "dalle")
"""Foreign weights that make a tokenizer: another command's."""


def main(argv: Sequence[str]) -> int:
    """`argv` is the words after the verb; returns the exit code."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else ConfigError.exit_code
    if any(word == "--to" or word.startswith("--to=") for word in words):
        return _export(words)
    return _import(words)


def _export(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlbeit convert", description="write a run in a foreign layout"
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    add("--to", required=True, choices=sorted(EXPORTS), help="the layout")
    add("--out", required=True, type=Path, metavar="FOLDER", help="must be new or empty")
    add("--json", action="store_true", help="print the whole receipt as JSON")
    given = parser.parse_args(words)
    receipt = EXPORTS[given.to](given.run, given.out)
    if given.json:
        print(json.dumps(receipt.to_json(), indent=1))
    else:
        print("\n".join([*receipt.describe(), f"written: {given.out}"]))
    return 0


def _usage() -> str:
    width = max(map(len, LAYOUTS))
    layouts = "\n".join(f"  {name:<{width}}  {line.help}" for name, line in LAYOUTS.items())
    return (
        "usage: vlbeit convert LAYOUT FILE --out RUN [--fresh NAME ...]\n"
        f"       vlbeit convert RUN --to {{{','.join(EXPORTS)}}} --out FOLDER\n\n"
        f"layouts that are read:\n{layouts}\n\n"
        "`vlbeit convert LAYOUT --help` lists the settings; docs/convert.md has an example of each."
    )


def _import(words: list[str]) -> int:
    layout = words[0]
    if layout in VISUAL_TOKENIZERS:
        raise ConfigError(
            f"vlbeit convert: {layout} is a visual tokenizer and no model; "
            "`vlbeit tokenizer import FILE --out DIR` takes it (docs/tokenizers.md)"
        )
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"vlbeit convert: no layout {layout!r}{hint} (known: {', '.join(LAYOUTS)})"
        )
    given = _import_parser(layout).parse_args(words[1:])
    if not given.out and not given.dry_run:
        raise ConfigError("vlbeit convert: give --out and a new run folder, or --dry-run")
    converted = import_run(
        layout,
        _request(given),
        Path(given.out) if given.out else None,
        image_size=given.image_size,
        text_positions=given.text_positions,
        accepted=given.fresh,
        dry=given.dry_run,
    )
    _report(converted, given)
    return 0


def _import_parser(layout: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"vlbeit convert {layout}", description=LAYOUTS[layout].help
    )
    add = parser.add_argument
    # fmt: off
    add("file", type=Path, metavar="FILE", help="the weights, or the folder that holds them")
    add("--out", metavar="RUN", help="the run folder to write; it must be new or empty")
    add("--fresh", nargs="+", default=[], metavar="NAME",
        help="tensors (or patterns such as 'text.*') that may stay as initialised")
    add("--dry-run", action="store_true", help="check and show the receipt; read and write nothing")
    add("--json", action="store_true", help="print the whole receipt as JSON")
    add("--image-size", type=int, metavar="PIXELS",
        help="tables of positions for square pictures of another size")
    add("--text-positions", type=int, metavar="TOKENS",
        help="longest text; shorter than the file's is cut (64 where the file has no text)")
    add("--text-tokenizer", metavar="PATH",
        help="tokenizer.json of `vlbeit tokenizer`, for files without words")
    add("--vocabulary", default="", metavar="FILE",
        help="BERT's vocab.txt, where it does not lie beside the weights")
    add("--copy-experts", action="store_true",
        help="L- and VL-experts without a source begin as copies of the V-experts")
    add("--vl-layers", type=int, metavar="COUNT", help="top blocks that get a VL-expert")
    add("--per-layer-bias", action="store_true",
        help="a shared table of relative positions becomes one for each block")
    add("--heads", type=int, default=0, help="attention heads, where nothing in the file tells")
    add("--pixels", choices=sorted(SCALINGS),
        help="scaling of pixels that the model was trained with; it is folded in")
    add("--partial", action="store_true",
        help="take what has a place of a layout that has no exact one (beit3)")
    add("--classes", type=Path, metavar="FILE", help="names of classes: JSON list, or one a line")
    # fmt: on
    return parser


def _request(given: argparse.Namespace) -> Request:
    tokenizer = special_tokens_only()
    if given.text_tokenizer:
        tokenizer = TextTokenizer.load(given.text_tokenizer)
    return Request(
        place=given.file,
        tokenizer=tokenizer,
        vocabulary=given.vocabulary,
        copy_experts=given.copy_experts,
        vl_layers=given.vl_layers,
        per_layer_bias=given.per_layer_bias,
        heads=given.heads,
        text_positions=given.text_positions or Request.text_positions,
        pixels=SCALINGS[given.pixels] if given.pixels else None,
        partial=given.partial,
        classes=read_names(given.classes) if given.classes else (),
    )


def read_names(path: Path) -> tuple[str, ...]:
    """A JSON list of strings, or one name a line.

    Raises:
        InputError: missing, or not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--classes {path}: cannot be read as names ({error})") from None
    names = tuple(str(name).strip() for name in found if str(name).strip())
    if not names:
        raise InputError(f"--classes {path}: no names in it")
    return names


def _report(converted: Converted, given: argparse.Namespace) -> None:
    if given.json:
        print(json.dumps(converted.receipt.to_json(), indent=1))
        return
    print("\n".join(converted.receipt.describe()))
    model = converted.plan.config.model
    print(
        f"model: {model.layers} blocks of {model.width}, {model.heads} heads, pictures of "
        f"{model.image_size[0]} x {model.image_size[1]} in patches of {model.patch}, texts of "
        f"{model.text_positions}"
    )
    print("nothing was written (--dry-run)" if given.dry_run else f"written: {given.out}")
