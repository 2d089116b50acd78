"""The folder of a visual tokenizer: config.json that says its kind, and model.safetensors."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlbeit.errors import InputError
from vlbeit.tensorfile import read_tensors, write_tensors

FORMAT = "vlbeit-visual-tokenizer"
VERSION = 1
CONFIG_FILE, TENSOR_FILE = "config.json", "model.safetensors"


def save_tokenizer_folder(
    folder: Path | str,
    *,
    kind: str,
    digest: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    """Write both files, all or nothing; a folder that is there is replaced."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_tensors(aside / TENSOR_FILE, tensors)
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "digest": digest,
        "config": config,
        "facts": facts,
    }
    (aside / CONFIG_FILE).write_text(json.dumps(tree, indent=1, sort_keys=True))
    for file in aside.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if folder.is_dir():
        shutil.rmtree(folder)
    aside.replace(folder)
    return folder


def fill_from_folder(model: nn.Module, folder: Path) -> None:
    """Give a model built on the meta device the folder's tensors: every name, every shape.

    Raises:
        InputError: names the first tensor that is missing, extra or of another shape.
    """
    tensors = read_tensors(folder / TENSOR_FILE)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"{folder / TENSOR_FILE}: tensor {name} is {found.get(name, 'missing')}, "
            f"config.json asks for {wanted.get(name, 'none')} ({len(differing)} differ)"
        )
    model.load_state_dict(tensors, assign=True)


def check_digest(folder: Path, found: str, wanted: object) -> None:
    """Raise InputError when a folder's weights are not those that config.json was written for."""
    if found != wanted:
        raise InputError(
            f"{folder}: its weights have digest {found}, config.json says {wanted}; the folder "
            "was changed or damaged, copy or make it again"
        )


def tokenizer_digest(about: object, tensors: Mapping[str, Tensor]) -> str:
    """sha256, in hexadecimal, over what decides the codes and their pictures.

    Args:
        about: the settings that no tensor's shape tells, as plain JSON.
    """
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()
