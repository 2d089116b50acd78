"""`vlbeit tokenizer`: train-text, train-visual, import, encode, show."""

import argparse
import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlbeit.checkpoint import save_checkpoint
from vlbeit.config import InputConfig, TextTokenizerConfig, TokenizerRunConfig, digest, to_dict
from vlbeit.data.dataset import SPLITS, open_sources
from vlbeit.data.stored_codes import write_codes
from vlbeit.data.transforms import BadImage, BadText, clean_text, decode_image, plain
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.eval.code_pictures import code_sheet, decoded, in_rows
from vlbeit.overrides import parse_config
from vlbeit.recipes import PRETRAIN
from vlbeit.tokens.text import (
    FILE_NAME,
    TextTokenizer,
    tokenizer_facts,
    train_text_tokenizer,
)
from vlbeit.tokens.visual import load_visual_tokenizer
from vlbeit.train.distributed import choose_device
from vlbeit.train.opening import Opened, check_same_run, open_run
from vlbeit.train.tokenizer_import import import_tokenizer_file
from vlbeit.train.tokenizers import all_texts
from vlbeit.train.visual_tokenizer import Keeping, train_visual_tokenizer
from vlbeit.types import Stream

USAGE = """usage: vlbeit tokenizer VERB ...

  train-text    --data DIR ... | --lines FILE ...  --out DIR [--kind --vocab --lowercase]
  train-visual  RECIPE --data DIR ... --run-dir DIR [--tokenizer.codes N ...]
  import        FILE --out DIR     a SentencePiece .model, a BERT vocab.txt, or the weights of
                                   BEiT v2's or DALL-E's visual tokenizer
  encode        VISUAL --data DIR ... --out FOLDER [--image-size H W --split SPLIT]
  show          PATH [--text WORDS | --image FILE ... --out PICTURE.png | --codes SHEET.png]

`vlbeit tokenizer VERB --help` for one of them."""

_UNUSED = {
    "input": (
        "images",
        "pairs",
        "text_length",
        "pair_text_length",
        "workers",
        "loader_timeout",
    ),
    "log": ("ledger", "tensorboard", "eval_every", "eval_samples"),
    "runtime": ("checkpoint_activations", "compile", "sharding", "exact"),
}
"""Settings of the shared groups that mean nothing here; a value of one's own is refused."""

_MAY_CHANGE = ("run_dir", "data", "max_steps", "save_every", "device", "log", "runtime")
"""What may differ when a run goes on."""


def main(argv: Sequence[str]) -> int:
    """Run one of the verbs."""
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train-text": _train_text,
        "train-visual": _train_visual,
        "import": import_tokenizer_file,
        "encode": _encode,
        "show": _show,
    }
    words = list(argv)
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not words or words[0] not in verbs:
        found = repr(words[0]) if words else "nothing"
        raise ConfigError(f"vlbeit tokenizer: found {found} for a verb\n{USAGE}")
    return verbs[words[0]](words[1:])


# Text --------------------------------------------------------------------------------------------


def _train_text(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlbeit tokenizer train-text",
        description="Learn a subword vocabulary; the same text gives the same file.",
    )
    parser.add_argument("--data", nargs="+", default=[], help="prepared data folders")
    parser.add_argument("--lines", nargs="+", default=[], help="text files, one text a line")
    parser.add_argument("--out", required=True, help="folder for tokenizer.json")
    parser.add_argument(
        "--kind",
        choices=("unigram", "wordpiece"),
        default="unigram",
        help="unigram, as the paper (default); wordpiece, quicker to train",
    )
    parser.add_argument(
        "--vocab",
        type=int,
        default=TextTokenizerConfig().vocab,
        help="most pieces, special ones included (default: %(default)s)",
    )
    parser.add_argument("--lowercase", action="store_true", help="small letters only")
    given = parser.parse_args(words)
    if not given.data and not given.lines:
        raise ConfigError("tokenizer train-text: give --data or --lines")
    config = TextTokenizerConfig(kind=given.kind, vocab=given.vocab, lowercase=given.lowercase)
    tokenizer = train_text_tokenizer(_texts(given.data, given.lines), config)
    path = tokenizer.save(given.out)
    print(f"{path}: {tokenizer.kind}, {tokenizer.size} pieces, digest {tokenizer.digest}")
    if tokenizer.size < config.vocab:
        print(f"the text held no more pieces than {tokenizer.size} ({config.vocab} asked for)")
    return 0


def _texts(folders: Sequence[str], files: Sequence[str]) -> Iterator[str]:
    streams: tuple[Stream, ...] = ("text", "pair")
    yield from all_texts({stream: open_sources(folders, stream, "train") for stream in streams})
    for pattern in files:
        paths = sorted(glob.glob(pattern)) or [pattern]
        for path in paths:
            try:
                with open(path, "rb") as file:
                    for line in file:
                        try:
                            yield clean_text(line)
                        except BadText:
                            continue
            except OSError as error:
                raise InputError(f"--lines {path}: cannot be read ({error.strerror})") from None


# Encode ------------------------------------------------------------------------------------------


def _encode(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlbeit tokenizer encode",
        description=(
            "Store the codes of every picture, for runs that show whole pictures (scale 1 1, flip "
            "0, jitter 0): `vlbeit pretrain ... --tokenizers.visual VISUAL --tokenizers.codes OUT`."
        ),
    )
    parser.add_argument("visual", help="folder of a visual tokenizer")
    parser.add_argument("--data", nargs="+", required=True, help="prepared data folders")
    parser.add_argument("--out", required=True, help="folder for the codes; must not exist")
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="which records (default: train)"
    )
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="of the run that will use them (model.image_size); default: the tokenizer's own",
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time")
    parser.add_argument(
        "--skip-budget",
        type=float,
        default=InputConfig().skip_budget,
        help="largest share of pictures that may be unusable (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    given = parser.parse_args(words)
    if given.batch < 1:
        raise ConfigError(f"tokenizer encode: --batch must be at least 1, found {given.batch}")
    tokenizer = load_visual_tokenizer(given.visual)
    size = tuple(given.image_size or tokenizer.image_size)
    device = choose_device(given.device, 0, 1)
    written = write_codes(
        given.out,
        tokenizer.to(device),
        open_sources(given.data, "image", given.split, images_from_pairs=True),
        (size[0], size[1]),
        device=device,
        batch=given.batch,
        skip_budget=given.skip_budget,
        log=print,
    )
    print(f"{written.folder}: codes of tokenizer {written.tokenizer}")
    return 0


# Show --------------------------------------------------------------------------------------------


def _show(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlbeit tokenizer show",
        description="What a tokenizer is, and what it makes of a text or a picture.",
    )
    parser.add_argument("path", help="tokenizer.json, or a folder with it or a visual tokenizer")
    parser.add_argument("--text", help="cut this text into pieces")
    parser.add_argument("--image", nargs="+", default=[], help="encode these pictures")
    parser.add_argument("--out", help="with --image: PNG of the pictures, their codes drawn below")
    parser.add_argument("--codes", help="PNG of every code, as the pixel decoder draws it")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args(words)
    path = Path(given.path)
    is_text = path.is_file() or (path / FILE_NAME).is_file()
    if is_text and (given.image or given.out or given.codes):
        raise ConfigError(
            f"{path} is a text tokenizer; --image, --out and --codes are for a visual one"
        )
    if not is_text and given.text is not None:
        raise ConfigError(f"{path} is no text tokenizer; --text is for one")
    facts = (
        _show_text(path, given.text)
        if is_text
        else _show_visual(path, given.image, given.out, given.codes)
    )
    if given.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            print(f"{name}: {value}")
    return 0


def _show_text(path: Path, text: str | None) -> dict[str, Any]:
    tokenizer = TextTokenizer.load(path)
    facts = tokenizer_facts(tokenizer)
    if text is not None:
        ids = tokenizer.encode(text)
        facts["pieces"] = tokenizer.pieces(ids)
        facts["ids"] = ids.tolist()
    return facts


def _show_visual(
    path: Path, images: Sequence[str], out: str | None, sheet: str | None
) -> dict[str, Any]:
    tokenizer = load_visual_tokenizer(path)
    facts: dict[str, Any] = {
        "codes": tokenizer.codes,
        "patch": tokenizer.patch,
        "image_size": list(tokenizer.image_size),
        "digest": tokenizer.digest,
        "draws": tokenizer.draws,
        "facts": tokenizer.facts,
    }
    if out and not images:
        raise ConfigError("tokenizer show: --out needs --image")
    if images:
        pixels = torch.stack([_open_plain(name, tokenizer.image_size) for name in images])
        codes, drawn = decoded(tokenizer, pixels)
        facts["image_codes"] = codes.tolist() if len(images) > 1 else codes[0].tolist()
        if out:
            _save_png(in_rows((pixels, drawn), max(1, SHOWN_HEIGHT // pixels.shape[-2])), out)
    if sheet:
        _save_png(code_sheet(tokenizer), sheet)
    return facts


SHOWN_HEIGHT = 128
"""Small pictures are enlarged to about so many rows of pixels."""


def _open_plain(name: str, size: tuple[int, int]) -> Tensor:
    """(3, *size) uint8 of a picture file.

    Raises:
        InputError: it cannot be read, or is no picture.
    """
    try:
        return torch.from_numpy(plain(decode_image(Path(name).read_bytes()), size))
    except OSError as error:
        raise InputError(f"--image {name}: cannot be read ({error.strerror})") from None
    except BadImage as bad:
        raise InputError(f"--image {name}: {bad.reason} ({bad.detail})") from None


def _save_png(picture: Image.Image, name: str) -> None:
    try:
        picture.save(name, "PNG")
    except OSError as error:
        raise SaveError(f"{name}: cannot be written ({error.strerror})") from None


# Visual ------------------------------------------------------------------------------------------


def _recipe(name: str) -> Callable[[], TokenizerRunConfig]:
    """The tokenizer of a pretraining recipe as a run of its own."""

    def build() -> TokenizerRunConfig:
        whole = PRETRAIN[name]()
        visual = whole.tokenizers.train_visual
        return TokenizerRunConfig(
            recipe=name,
            run_dir=f"runs/{name}-visual",
            max_steps=visual.total_steps,
            save_every=max(1, visual.total_steps // 10),
            tokenizer=visual,
        )

    return build


def _train_visual(words: list[str]) -> int:
    recipes = {name: _recipe(name) for name in PRETRAIN}
    config = parse_config(
        TokenizerRunConfig, recipes, words, command="vlbeit tokenizer train-visual"
    )
    _refuse_unused(config)
    with open_run(config) as opened:
        _run(config, opened)
    return 0


def _refuse_unused(config: TokenizerRunConfig) -> None:
    plain = TokenizerRunConfig(recipe=config.recipe)
    for group, names in _UNUSED.items():
        for name in names:
            if getattr(getattr(config, group), name) != getattr(getattr(plain, group), name):
                hint = "; the tokenizer's crop is tokenizer.crop" if name == "images" else ""
                raise ConfigError(
                    f"{group}.{name} means nothing to train-visual{hint}; leave it out"
                )
    for name in ("save_every", "max_steps"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, found {getattr(config, name)}")
    if not config.data:
        raise ConfigError("train-visual: no --data; give prepared folders (`vlbeit prepare`)")


def _run(config: TokenizerRunConfig, opened: Opened) -> None:
    run_dir, world, folder, say = opened.run_dir, opened.world, opened.folder, opened.log
    resume = opened.checkpoint
    check_same_run(opened, config, _MAY_CHANGE)
    pictures = open_sources(config.data, "image", "train", images_from_pairs=True)
    step = 0 if resume is None else resume.step

    def start() -> None:
        opened.write_start(step, config)
        say(
            f"visual tokenizer: {config.tokenizer.codes} codes from "
            f"{sum(len(s) for s in pictures)} pictures of {', '.join(s.name for s in pictures)}, "
            f"{config.max_steps} steps, config {digest(config.tokenizer)[:12]}"
        )
        if resume is not None:
            say(f"going on from {resume.folder}")

    world.on_main(start)

    def save(
        at: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        def write() -> None:
            assert folder is not None
            folder.sync()
            place = save_checkpoint(
                run_dir,
                at,
                model_tensors=model,
                optimizer_tensors=optimizer,
                state=state,
                config=to_dict(config),
                preprocessor={"image_size": list(config.tokenizer.image_size)},
                text_tokenizer=_NoText(),
                visual_tokenizer=None,
                world_size=world.size,
                threads=opened.threads,
                keep=config.log.keep,
                log=say,
            )
            say(f"saved {place}")

        world.on_main(write)

    def row(values: dict[str, Any]) -> None:
        assert folder is not None
        if "skipped" in values:
            folder.skips.append({"step": 0, **values})
        elif "alarm" in values:
            say(f"ALARM {values['alarm']}")
        elif "loss" in values:
            folder.metrics.append(values | {"loss": values["loss"].hex()})
            if values["step"] % config.log.print_every == 0:
                say(", ".join(f"{name} {_short(value)}" for name, value in values.items()))
        else:
            say(", ".join(f"{name} {_short(value)}" for name, value in values.items()))

    def asked() -> bool:
        flag = torch.tensor([float(opened.stop.requested)], device=world.device)
        return bool(world.sum_over_ranks(flag) > 0)

    train_visual_tokenizer(
        config.tokenizer,
        pictures,
        run_dir / "visual",
        seed=config.seed,
        device=world.device,
        log=row,
        max_steps=config.max_steps,
        input=config.input,
        precision=config.precision,
        world=world,
        stop=asked,
        keeping=Keeping(config.save_every, save, resume),
        log_every=config.log.every,
    )
    say(f"done: {run_dir / 'visual'}; use it with --tokenizers.visual {run_dir / 'visual'}")
    say(f"see how its codes are used, and what they look like: vlbeit report {run_dir}")
    world.close()


class _NoText:
    """A checkpoint asks for a text tokenizer; a run that trains a visual one has none."""

    digest = ""

    def save(self, folder: Path) -> None:
        """Nothing to write."""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
