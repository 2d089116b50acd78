"""A stranger's weights: what is in them before any is read, and one tensor at a time after that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlbeit.convert.torchfile import TorchFile
from vlbeit.errors import InputError, UnsafeError
from vlbeit.tensorfile import TensorInfo, read_header

CONTAINERS = ("model", "module", "state_dict", "")
"""Where training files keep their weights, best first; "": in the outermost dict."""
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_BYTES = 64 << 30
"""Bytes of all tensors of one container."""


class Weights(Mapping[str, Tensor]):
    """Names to tensors. A tensor is read when it is asked for, on the CPU.

    infos      type and shape of each tensor, from the file's header
    path       the file
    container  the key under which the file keeps them; "" for none
    """

    def __init__(
        self,
        path: Path,
        infos: dict[str, TensorInfo],
        container: str,
        read: Callable[[str], Tensor],
    ) -> None:
        total = sum(info.bytes for info in infos.values())
        if total > MAX_BYTES:
            raise UnsafeError(f"{path}: {total} bytes of tensors, the limit is {MAX_BYTES}")
        self.path, self.infos, self.container = path, infos, container
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def outline(self) -> dict[str, Tensor]:
        """The same names with tensors that have type and shape but no numbers (meta)."""
        return {
            name: torch.empty(info.shape, dtype=info.dtype, device="meta")
            for name, info in self.infos.items()
        }


def open_weights(place: Path | str) -> Weights:
    """The weights in a file, or in a folder of `transformers`.

    The kind of file is told by how it begins, not by its name.

    Raises:
        InputError: there is none, it cannot be read, or no tensors are in it.
        UnsafeError: reading it could run code, or it is beyond a limit (exit code 77).
    """
    path = weights_path(Path(place))
    with path.open("rb") as file:
        head = file.read(4)
    pickled = head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")
    if path.suffix == ".safetensors" and not pickled:
        return Weights(path, read_header(path), "", _safetensors_reader(path))
    opened = TorchFile(path)
    found = opened.containers()
    for container in CONTAINERS:
        if container in found:
            return Weights(
                path,
                found[container],
                container,
                functools.partial(opened.read, container),
            )
    raise InputError(
        f"{path}: no tensors under {', '.join(repr(c) for c in CONTAINERS if c)} or at the top; "
        f"it has {', '.join(map(repr, found)) or 'none at all'}"
    )


def weights_path(place: Path) -> Path:
    """The one file with weights; of a folder the one that `transformers` writes.

    Raises:
        InputError: nothing there, or the weights are in several files.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder")
    for name in FOLDER_FILES:
        if (place / name).is_file():
            return place / name
    if any(place.glob("*.index.json")):
        raise InputError(
            f"{place}: its weights are in several files; save the model once more in one, with "
            "save_pretrained(folder, max_shard_size='100GB')"
        )
    raise InputError(f"{place}: none of {', '.join(FOLDER_FILES)} in this folder")


def _safetensors_reader(path: Path) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: tensor {name!r} cannot be read ({error})") from None

    return read
