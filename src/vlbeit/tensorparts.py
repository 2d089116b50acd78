"""Tensors that several ranks hold in shares: each rank writes its part, and any number read them.

torch.distributed.checkpoint does the sharing out, with safetensors as the format of the parts, so
a part is no pickle either. (Ranks of one run do tell each other their plans as pickles while they
write and read; nothing of it reaches the disk.)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlbeit.errors import InputError
from vlbeit.tensorfile import TensorInfo, read_header


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every rank writes its shares into the folder, synced; all ranks call it together.

    A tensor that is whole at every rank is written by one of them.

    Raises:
        OSError: at every rank, when some rank cannot write: with the system's error number.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise _cause(error) from error


def _cause(error: Any) -> BaseException:
    """The failure of the lowest rank that had one, of a CheckpointException."""
    found: BaseException = error.failures[min(error.failures)][0]
    return found


def _reader(place: Path) -> Any:
    """What torch.distributed.checkpoint reads a folder of parts with, or one file of a folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if place.is_dir():
        return HuggingFaceStorageReader(str(place))

    class OneFile(HuggingFaceStorageReader):  # type: ignore[misc, unused-ignore]
        def read_metadata(self) -> Any:
            found = super().read_metadata()
            kept = {
                index: stored
                for index, stored in found.storage_data.items()
                if Path(stored.relative_path).name == place.name
            }
            names = {index.fqn for index in kept}
            found.storage_data = kept
            found.state_dict_metadata = {
                name: info for name, info in found.state_dict_metadata.items() if name in names
            }
            return found

    return OneFile(str(place.parent))


def part_files(place: Path) -> list[Path]:
    """A file of tensors, or the parts in a folder."""
    return [place] if place.is_file() else sorted(place.glob("*.safetensors"))


def part_infos(place: Path) -> dict[str, TensorInfo]:
    """The whole tensors' types and shapes by name, after each part's header was looked at.

    Raises:
        InputError, UnsafeError: as `read_header`; or there is no part.
    """
    files = part_files(place)
    if not files:
        raise InputError(f"{place}: no tensors here; expected *.safetensors")
    for file in files:
        read_header(file)
    whole = _reader(place).read_metadata().state_dict_metadata
    return {
        name: TensorInfo(info.properties.dtype, tuple(info.size)) for name, info in whole.items()
    }


class MergedParts(Mapping[str, Tensor]):
    """The whole tensors of a folder of parts, on the CPU, each read when it is asked for.

    (The library's own merging writes zeros for single numbers, torch 2.13.)

    Raises:
        InputError, UnsafeError: as `part_infos`.
    """

    def __init__(self, place: Path) -> None:
        self.infos = part_infos(place)
        self._pieces: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for index, stored in _reader(place).read_metadata().storage_data.items():
            pieces = self._pieces.setdefault(index.fqn, [])
            pieces.append((stored.relative_path, tuple(index.offset)))

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        for file, begin in self._pieces[name]:
            with safe_open(file, framework="pt") as part:
                piece = part.get_tensor(name)
            ends = zip(begin, piece.shape, strict=True)
            whole[tuple(slice(first, first + count) for first, count in ends)] = piece
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def read_parts(place: Path) -> dict[str, Tensor]:
    """All tensors, whole, on the CPU: the parts merged.

    Raises:
        InputError, UnsafeError: as `part_infos`.
    """
    return dict(MergedParts(place))


def fill_from(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy the named tensors in: whole ones, or this rank's shares, whatever shares were written.

    All ranks call it together.

    Raises:
        InputError: a name is missing, or a part cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        load(dict(tensors), storage_reader=_reader(place))
    except CheckpointException as error:
        raise InputError(f"{place}: cannot be read ({_cause(error)})") from None
