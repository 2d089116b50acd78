"""What the rest of the system knows of a visual tokenizer: pictures to codes, codes to pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlbeit.errors import InputError
from vlbeit.tensorfile import refuse_pickle
from vlbeit.tokens.imported import ImportedTokenizer
from vlbeit.tokens.tokenizer_folder import CONFIG_FILE, FORMAT, VERSION
from vlbeit.tokens.vqkd import VQKDTokenizer

KINDS: dict[str, Callable[[Path, dict[str, Any]], "VisualTokenizer"]] = {
    VQKDTokenizer.kind: VQKDTokenizer.load,
    ImportedTokenizer.kind: ImportedTokenizer.load,
}
"""Loaders by the `kind` in config.json."""


class VisualTokenizer(Protocol):
    """Pictures to codes, with the crop that the model sees, in eval mode, without gradient.

    codes       size of the codebook
    patch       side of a patch in pixels; a picture has (H / patch) * (W / patch) codes
    image_size  height and width it was trained at; other sizes work
    digest      sha256 of weights and sizes, in hexadecimal
    draws       whether `decode` has pictures; of an imported tokenizer they are optional
    facts       free: how it was made, how its codes are used
    """

    codes: int
    patch: int
    image_size: tuple[int, int]
    digest: str
    draws: bool
    facts: dict[str, Any]

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, P) int64; no picture changes the codes of another."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """(B, rows, columns) int64 -> (B, 3, H, W) uint8."""
        ...

    def to(self, device: torch.device | str) -> "VisualTokenizer":
        """Move it, in place; returns itself."""
        ...

    def save(self, folder: Path | str) -> Path:
        """Write a folder that `load_visual_tokenizer` reads."""
        ...


def load_visual_tokenizer(folder: Path | str) -> VisualTokenizer:
    """The tokenizer in a folder (config.json with its `kind`, model.safetensors), on the CPU.

    Raises:
        InputError: missing, damaged, of an unknown kind or version.
        UnsafeError: weights as a pickle, or beyond the limits of `tensorfile`.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if folder.is_dir():
        refuse_pickle(folder)
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); a visual tokenizer is a folder made by "
            "`vlbeit tokenizer train-visual` or `vlbeit tokenizer import`"
        ) from None
    except ValueError:
        raise InputError(f"{path}: is not JSON; copy or train the tokenizer again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise InputError(f"{path}: is not the config.json of a visual tokenizer")
    if tree.get("version") != VERSION or tree.get("kind") not in KINDS:
        raise InputError(
            f"{path}: kind {tree.get('kind')!r}, version {tree.get('version')!r}; this release "
            f"reads version {VERSION} of {', '.join(KINDS)}"
        )
    return KINDS[tree["kind"]](folder, tree)
