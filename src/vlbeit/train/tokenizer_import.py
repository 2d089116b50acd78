"""`vlbeit tokenizer import`: vocabularies and visual tokenizers that others made."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlbeit.config import InputConfig
from vlbeit.convert.folder import RECEIPT
from vlbeit.convert.rewriting import Entry, Receipt
from vlbeit.convert.weightfile import open_weights
from vlbeit.data.dataset import open_sources
from vlbeit.data.transforms import plain
from vlbeit.errors import ConfigError, InputError
from vlbeit.tensorfile import PICKLE_SUFFIXES
from vlbeit.tokens.foreign_layout import TensorAccount
from vlbeit.tokens.imported import import_tokenizer, with_pictures
from vlbeit.tokens.text import import_bert_vocab, import_sentencepiece
from vlbeit.train.visual_tokenizer import PictureReader

WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
PICTURE_BATCH = 32


def import_tokenizer_file(words: list[str]) -> int:
    """`vlbeit tokenizer import FILE --out DIR`; `words` stand after the verb."""
    parser = argparse.ArgumentParser(
        prog="vlbeit tokenizer import",
        description=(
            "Text: bring a SentencePiece Unigram .model or a BERT vocab.txt under this project's "
            "ids: [PAD] [UNK] [T_CLS] [T_SEP] [MASK] are 0 to 4, then the file's own pieces in "
            "order. Visual: take the weights of BEiT v2's VQ-KD (unilm's layout) or of DALL-E's "
            "encoder (FlavaImageCodebook's, a whole FLAVA's or its own names) exactly."
        ),
    )
    parser.add_argument("file", help="the file, or a folder of transformers")
    parser.add_argument("--out", required=True, help="folder for the tokenizer")
    visual = parser.add_argument_group("visual tokenizers")
    visual.add_argument("--heads", type=int, default=0, help="BEiT v2: of its ViTs (width / 64)")
    visual.add_argument(
        "--patch",
        type=int,
        default=0,
        help="DALL-E: pixels of a patch of the model, a multiple of 8 (16: half size)",
    )
    visual.add_argument(
        "--pictures",
        nargs="+",
        default=[],
        metavar="DATA",
        help="prepared folders; the mean patch of each code on their pictures becomes its picture",
    )
    visual.add_argument(
        "--count", type=int, default=2000, help="most pictures to look at (2000; 0: all)"
    )
    given = parser.parse_args(words)
    path = Path(given.file)
    if path.is_dir() or path.suffix in WEIGHT_SUFFIXES:
        return _import_visual(path, given)
    if given.heads or given.patch or given.pictures:
        raise ConfigError(f"{path}: --heads, --patch and --pictures are for a visual tokenizer")
    tokenizer = import_bert_vocab(path) if path.suffix == ".txt" else import_sentencepiece(path)
    written = tokenizer.save(given.out)
    print(f"{written}: {tokenizer.kind}, {tokenizer.size} pieces, digest {tokenizer.digest}")
    return 0


def _import_visual(path: Path, given: argparse.Namespace) -> int:
    """BEiT v2's or DALL-E's weights; beside the tokenizer a receipt.json of every tensor."""
    weights = open_weights(path)
    tokenizer, accounts = import_tokenizer(
        weights, origin=str(weights.path), heads=given.heads, patch=given.patch
    )
    if given.pictures:
        tokenizer = with_pictures(
            tokenizer, _plain_pictures(given.pictures, given.count, tokenizer.image_size)
        )
    folder = tokenizer.save(given.out)
    receipt = Receipt(
        layout=tokenizer.network.name,
        origin=str(weights.path),
        entries=[_entry(account) for account in accounts],
    )
    (folder / RECEIPT).write_text(json.dumps(receipt.to_json(), indent=1) + "\n")
    print("\n".join(receipt.describe()))
    print(
        f"{folder}: {tokenizer.network.name}, {tokenizer.codes} codes, patch {tokenizer.patch}, "
        f"digest {tokenizer.digest}"
    )
    if "pictures" in tokenizer.facts:
        seen = tokenizer.facts["pictures"]
        print(f"pictures of {seen['codes_seen']} codes from {seen['images']} pictures")
    return 0


def _entry(account: TensorAccount) -> Entry:
    """A line of receipt.json, as `vlbeit convert` has them."""
    return Entry(
        action=account.action,
        target=account.tensor,
        sources=(account.source,) if account.source else (),
        note=account.note,
    )


def _plain_pictures(
    folders: Sequence[str], count: int, size: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """Batches (B, 3, *size) of whole pictures, spread evenly over the training sources.

    Raises:
        InputError: no source with pictures.
        DataBudgetError: too many of them are bad.
    """
    sources = open_sources(folders, "image", "train", images_from_pairs=True)
    if not sources:
        raise InputError(
            f"--pictures {' '.join(folders)}: no image or pair source in the train split"
        )
    reader = PictureReader(sources, InputConfig().skip_budget, _say_row)
    every = [(source.name, index) for source in sources for index in range(len(source))]
    chosen = [every[at * len(every) // count] for at in range(count)] if count else every
    chosen = list(dict.fromkeys(chosen))
    for at in range(0, len(chosen), PICTURE_BATCH):
        images = (reader.picture(*key) for key in chosen[at : at + PICTURE_BATCH])
        shown = [torch.from_numpy(plain(image, size)) for image in images if image is not None]
        if shown:
            yield torch.stack(shown)


def _say_row(row: Mapping[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in row.items()))
