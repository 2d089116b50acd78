"""safetensors files with limits before allocation, and a refusal of everything that is pickle.

Reading is the library's work; the header is looked at first, so that a file that promises more
than it holds is refused before memory is taken. Writing is done here because a checkpoint needs
two things that the library's writer does not give: the digest of the bytes as they were in
memory (a digest of the file afterwards would bless a bad write) and the system's error number
when the disk is full.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlbeit.errors import InputError, UnsafeError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The element types that a file may hold, by their name in the header."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 16 << 20
"""Bytes; about 100,000 tensors."""
MAX_TENSORS = 65_536
MAX_DIMS = 8

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def refuse_pickle(path: Path | str) -> None:
    """Stops at weights whose loading could run code.

    A folder is refused when it holds such files and no safetensors file. A file is refused by its
    suffix, and, unless it is named .safetensors, by how it begins (pickle protocol 2-5, or the zip
    that torch.save writes).

    Raises:
        UnsafeError: with the file's name and how to convert it.
    """
    path = Path(path)
    suspect = None
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            suspect = next((f for f in sorted(path.iterdir()) if _is_pickle_name(f)), None)
    elif _is_pickle_name(path):
        suspect = path
    elif path.is_file() and path.suffix != ".safetensors":
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
            suspect = path
    if suspect is not None:
        raise UnsafeError(
            f"{suspect}: a pickle file can run code when it is loaded, so only safetensors are "
            "read. Ask its author for a .safetensors file, or make one where you trust the file: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )


def _is_pickle_name(path: Path) -> bool:
    return path.suffix.lower() in PICKLE_SUFFIXES


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of the tensors in a safetensors file; allocates nothing for them.

    Raises:
        InputError: no such file, or its header and its size do not fit together.
        UnsafeError: more tensors or dimensions than the limits, or a type that is not allowed.
    """
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(
                    f"{path}: not a whole safetensors file: its header says {length} bytes, the "
                    f"file has {size}. Copy it again."
                )
            if length > MAX_HEADER:
                raise UnsafeError(f"{path}: header of {length} bytes, the limit is {MAX_HEADER}")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: the header is not JSON; the file is damaged") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object; the file is damaged")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise UnsafeError(f"{path}: {len(header)} tensors, the limit is {MAX_TENSORS}")
    infos: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        infos[name], span = _tensor_info(path, name, entry)
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise InputError(f"{path}: tensors overlap or leave a gap at byte {end}; damaged file")
        end = stop
    if end != size - 8 - length:
        raise InputError(
            f"{path}: the header describes {end} bytes of tensors, the file holds "
            f"{size - 8 - length}. The file is cut or damaged; copy it again."
        )
    return infos


def _tensor_info(path: Path, name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: no description in the header")
    dtype = entry.get("dtype")
    if dtype not in DTYPES:
        raise UnsafeError(f"{where}: type {dtype!r} is none of {', '.join(DTYPES)}")
    shape, span = _whole_numbers(entry.get("shape")), _whole_numbers(entry.get("data_offsets"))
    if shape is None or span is None or len(span) != 2:
        raise InputError(f"{where}: its shape or place in the file is not a list of numbers")
    if len(shape) > MAX_DIMS:
        raise UnsafeError(f"{where}: {len(shape)} dimensions, the limit is {MAX_DIMS}")
    info = TensorInfo(DTYPES[dtype], tuple(shape))
    if span[1] - span[0] != info.bytes:
        raise InputError(
            f"{where}: shape {shape} of {dtype} needs {info.bytes} bytes, "
            f"the header gives it {span[1] - span[0]}"
        )
    return info, (span[0], span[1])


def _whole_numbers(value: object) -> list[int] | None:
    if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
        return value
    return None


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file, after `read_header` has accepted it.

    Raises:
        InputError, UnsafeError: as `read_header`.
    """
    read_header(path)
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Types and shapes by name. A mapping that reads its tensors when they are asked for knows them
    beforehand, as `infos`."""
    known: dict[str, TensorInfo] | None = getattr(tensors, "infos", None)
    if known is not None:
        return known
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors themselves, without the header."""
    return sum(info.bytes for info in infos_of(tensors).values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes a new safetensors file; the caller syncs it.

    The bytes depend on names, types, shapes and values alone. Tensors that share storage are
    written once each. Each is asked for once, when its turn comes.

    Returns:
        size in bytes and sha256 of what was handed to the system.

    Raises:
        OSError: with the system's error number, for the caller to name what was being saved.
        ValueError: a type that safetensors does not have.
    """
    if sys.byteorder != "little":
        raise ValueError("safetensors are little-endian; this machine is not")
    # Wide types first keeps every tensor aligned to its own size, as the library does.
    infos = infos_of(tensors)
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        info = infos[name]
        if info.dtype not in NAMES:
            raise ValueError(f"tensor {name!r}: {info.dtype} has no safetensors type")
        stop = place + info.bytes
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [place, stop],
        }
        place = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    size = 0
    with path.open("xb", buffering=0) as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            size += _write_all(file.fileno(), memoryview(piece), sha)
        for name in order:
            if infos[name].bytes:
                flat = tensors[name].detach().cpu().contiguous().reshape(-1)
                size += _write_all(file.fileno(), flat.view(torch.uint8).numpy().data, sha)
    return size, sha.hexdigest()


def _write_all(file: int, view: memoryview, sha: hashlib._Hash) -> int:
    """Writes and digests the view in pieces; a raw write may take less than it was given."""
    place = 0
    while place < len(view):
        written = os.write(file, view[place : place + (16 << 20)])
        sha.update(view[place : place + written])
        place += written
    return place
