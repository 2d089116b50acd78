"""Files of torch.save, looked through as data before torch may read them.

Such a file is a zip: `data.pkl` says what there is, each storage is an entry of its own. Here
data.pkl is walked opcode by opcode with stand-ins for everything it names, so nothing is imported,
called or allocated; what a state dict needs is a short list, and all else is refused by name. Only
then torch's own `weights_only` reader maps the file. The outline also has what that reader does
not ask: whether a tensor lies within its storage, whether a storage lies within the file, and
how much all of it is.
"""

from __future__ import annotations

import argparse
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from vlbeit.errors import InputError, UnsafeError
from vlbeit.tensorfile import MAX_DIMS, MAX_TENSORS, TensorInfo

MAX_FILE = 64 << 30
"""Bytes of a weights file."""
MAX_PICKLE = 2 << 20
"""Bytes of data.pkl; a training file of BEiT large, optimizer included, has 0.3 MB."""
MAX_DIRECTORY = 4 << 20
"""Bytes of the zip's directory; some 40,000 entries."""
MAX_OPCODES = 1 << 20

STORAGES: dict[str, torch.dtype] = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
DICTS = ("collections OrderedDict",)
NAMESPACE = "argparse Namespace"
"""unilm's training files hold their command line; torch's reader is told of it by name."""
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
SIZE = "torch Size"
ALLOWED = frozenset({*STORAGES, *DICTS, NAMESPACE, TENSOR, PARAMETER, SIZE})

ADVICE = (
    "Ask its author for a .safetensors file; or, where you trust the file, write one yourself with "
    "safetensors.torch.save_file(state_dict, 'model.safetensors') and convert that"
)

_END, _END64 = b"PK\x05\x06", b"PK\x06\x06"


@dataclass(frozen=True)
class _Named:
    """Something that the pickle names, `module name`."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Outline:
    """A tensor as data.pkl describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Namespace:
    """Stands for an argparse.Namespace, whatever is in it."""


class TorchFile:
    """A file that was looked through; tensors are read when they are asked for.

    Raises:
        UnsafeError: the file names code, is older than torch's zip format, or is beyond a limit.
        InputError: it cannot be read, or its tensors and its storages do not fit together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._storages: dict[str, int] = {}
        try:
            tree = self._outline()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, struct.error) as error:
            raise UnsafeError(
                f"{path}: its zip is damaged or made to mislead ({error}). {ADVICE}"
            ) from None
        self._tree = tree
        self._loaded: Any = None

    def containers(self) -> dict[str, dict[str, TensorInfo]]:
        """Tensors by place: "" holds those of the outermost dict, "model" those under that key."""
        found: dict[str, dict[str, TensorInfo]] = {}
        if not isinstance(self._tree, dict):
            return found
        places = {"": self._tree} | {
            key: value
            for key, value in self._tree.items()
            if isinstance(key, str) and isinstance(value, dict)
        }
        for place, values in places.items():
            tensors = {
                name: self._checked(name, value)
                for name, value in values.items()
                if isinstance(name, str) and isinstance(value, _Outline)
            }
            if len(tensors) > MAX_TENSORS:
                raise UnsafeError(
                    f"{self.path}: {len(tensors)} tensors, the limit is {MAX_TENSORS}"
                )
            if tensors:
                found[place] = tensors
        return found

    def read(self, container: str, name: str) -> Tensor:
        """One tensor, on the CPU; a copy, so that the file may go away."""
        if self._loaded is None:
            with torch.serialization.safe_globals([argparse.Namespace]):
                # Mapped, not read: a training file's optimizer is never brought into memory.
                self._loaded = torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=True
                )
        values = self._loaded[container] if container else self._loaded
        tensor: Tensor = values[name]
        return tensor.detach().clone()

    # ---- the zip

    def _outline(self) -> Any:
        size = self.path.stat().st_size
        if size > MAX_FILE:
            raise UnsafeError(f"{self.path}: {size} bytes, the limit is {MAX_FILE}")
        with self.path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise UnsafeError(
                    f"{self.path}: no zip of torch.save (torch before 1.6, or another program's "
                    f"pickle), and such a file can run code when it is loaded. {ADVICE}"
                )
            length = _directory_length(file, size)
            if length > MAX_DIRECTORY:
                raise UnsafeError(
                    f"{self.path}: a zip directory of {length} bytes, the limit is {MAX_DIRECTORY}"
                )
            with zipfile.ZipFile(file) as archive:
                root = self._check_entries(archive.infolist(), size)
                data = archive.read(f"{root}/data.pkl")
        return self._walk(data)

    def _check_entries(self, entries: list[zipfile.ZipInfo], size: int) -> str:
        """The archive's root folder. Entries must be stored as they are and lie side by side."""
        names = [entry.filename for entry in entries]
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(set(names)) != len(names):
            self._refuse("it does not have each entry, and data.pkl, exactly once")
        root = roots[0]
        if any(name.startswith((f"{root}/code/", f"{root}/constants.pkl")) for name in names):
            self._refuse("it is a TorchScript program")
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                self._refuse(f"entry {entry.filename!r} is compressed or encrypted")
            if entry.header_offset < end or entry.file_size != entry.compress_size:
                self._refuse(f"entry {entry.filename!r} overlaps the one before it")
            end = entry.header_offset + entry.file_size
            if end > size:
                self._refuse(f"entry {entry.filename!r} reaches beyond the end of the file")
            if entry.filename.startswith(f"{root}/data/"):
                self._storages[entry.filename.removeprefix(f"{root}/data/")] = entry.file_size
            elif entry.filename == f"{root}/data.pkl" and entry.file_size > MAX_PICKLE:
                self._refuse(f"data.pkl has {entry.file_size} bytes, the limit is {MAX_PICKLE}")
        return root

    def _refuse(self, why: str) -> NoReturn:
        raise UnsafeError(f"{self.path}: {why}. {ADVICE}")

    # ---- the tensors

    def _checked(self, name: str, outline: _Outline) -> TensorInfo:
        """The tensor's type and shape, once it is known to lie within its storage.

        A tensor may not be larger than its storage either: with strides of 0 a few bytes stand for
        terabytes as soon as somebody copies them.
        """
        where = f"tensor {name!r}"
        shape, stride, storage = outline.shape, outline.stride, outline.storage
        if len(shape) > MAX_DIMS or len(stride) != len(shape):
            self._refuse(f"{where} has {len(shape)} dimensions, the limit is {MAX_DIMS}")
        if storage.key not in self._storages:
            self._refuse(f"{where} lies in storage {storage.key!r}, which the file does not have")
        info = TensorInfo(storage.dtype, shape)
        held = self._storages[storage.key]
        last = outline.offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        needed = 0 if 0 in shape else (last + 1) * storage.dtype.itemsize
        if max(needed, info.bytes, storage.count * storage.dtype.itemsize) > held:
            self._refuse(
                f"{where} of shape {shape} needs {max(needed, info.bytes)} bytes, its storage has "
                f"{held}"
            )
        return info

    # ---- the pickle

    def _walk(self, data: bytes) -> Any:
        try:
            return _Walk(self._refuse).run(data)
        except UnsafeError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            # What a stranger wrote may be wrong in any way; none of it is ours to mend.
            self._refuse(f"data.pkl is damaged ({type(error).__name__}: {error})"[:300])


class _Walk:
    """The stack machine of a pickle, with stand-ins for all that it would import or call."""

    def __init__(self, refuse: Callable[[str], NoReturn]) -> None:
        self._refuse = refuse
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        steps = 0
        for opcode, value, _ in pickletools.genops(data):
            steps += 1
            if steps > MAX_OPCODES:
                self._refuse(f"data.pkl has more than {MAX_OPCODES} opcodes")
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            handler = _HANDLERS.get(name)
            if handler is None:
                self._refuse(f"data.pkl uses the opcode {name}, which no state dict needs")
            handler(self, value)
        raise ValueError("no end")

    # Each handler takes the opcode's argument.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def whole_number(self, value: int) -> None:
        if abs(value) >= 1 << 63:
            raise ValueError("a number of more than 64 bits")
        self.push(value)

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def since_mark(self) -> list[Any]:
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def several(self, count: int) -> None:
        items = tuple(self._stack[len(self._stack) - count :])
        if len(items) < count:
            raise IndexError("a short stack")
        del self._stack[len(self._stack) - count :]
        self.push(items)

    def put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def set_items(self, items: list[Any]) -> None:
        into = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys could be made to collide, and then a short file takes hours.
            if not isinstance(key, (str, int, float)):
                self._refuse(f"data.pkl has a {type(key).__name__} for a key")
            if isinstance(into, dict):
                into[key] = value
            elif not isinstance(into, _Namespace):
                raise TypeError("items for something that has none")

    def append(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if not isinstance(into, list):
            raise TypeError("items for something that has none")
        into.extend(items)

    def named(self, value: str) -> None:
        if value not in ALLOWED:
            self._refuse(f"data.pkl names {value.replace(' ', '.', 1)[:80]!r}: that can run code")
        self.push(_Named(value))

    def persistent(self, _: Any) -> None:
        kind, storage, key, _location, count = self._stack.pop()
        dtype = STORAGES[storage.name]
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("a storage without key and size")
        self.push(_Storage(dtype, key, count))

    def reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self.push(self.stand_in(function.name, arguments))

    def stand_in(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What calling the named thing would give, as data."""
        if name in DICTS and not arguments:
            return {}
        if name == NAMESPACE and not arguments:
            return _Namespace()
        if name == SIZE:
            return arguments[0]
        if name == PARAMETER:
            return arguments[0]
        if name == TENSOR:
            storage, offset, shape, stride = arguments[:4]
            numbers = (offset, *shape, *stride)
            if not isinstance(storage, _Storage) or not all(
                type(n) is int and n >= 0 for n in numbers
            ):
                raise ValueError("a tensor without storage, shape and stride")
            return _Outline(storage, offset, tuple(shape), tuple(stride))
        raise ValueError(f"a call of {name} with {len(arguments)} arguments")

    def build(self, _: Any) -> None:
        """State for an object: of a dict its attributes (`_metadata`), which are left out."""
        self._stack.pop()
        if not isinstance(self._stack[-1], (dict, _Namespace)):
            raise TypeError("state for something that has none")


_HANDLERS: dict[str, Any] = {
    "PROTO": lambda walk, value: None,
    "NONE": _Walk.push,
    "NEWTRUE": lambda walk, value: walk.push(True),
    "NEWFALSE": lambda walk, value: walk.push(False),
    "BININT": _Walk.push,
    "BININT1": _Walk.push,
    "BININT2": _Walk.push,
    "LONG1": _Walk.whole_number,
    "BINFLOAT": _Walk.push,
    "BINUNICODE": _Walk.push,
    "SHORT_BINSTRING": _Walk.push,
    "EMPTY_DICT": lambda walk, value: walk.push({}),
    "EMPTY_LIST": lambda walk, value: walk.push([]),
    "EMPTY_TUPLE": lambda walk, value: walk.push(()),
    "MARK": _Walk.mark,
    "TUPLE": lambda walk, value: walk.push(tuple(walk.since_mark())),
    "TUPLE1": lambda walk, value: walk.several(1),
    "TUPLE2": lambda walk, value: walk.several(2),
    "TUPLE3": lambda walk, value: walk.several(3),
    "SETITEM": lambda walk, value: walk.set_items([walk._stack.pop(-2), walk._stack.pop()]),
    "SETITEMS": lambda walk, value: walk.set_items(walk.since_mark()),
    "APPEND": lambda walk, value: walk.append([walk._stack.pop()]),
    "APPENDS": lambda walk, value: walk.append(walk.since_mark()),
    "BINPUT": _Walk.put,
    "LONG_BINPUT": _Walk.put,
    "BINGET": lambda walk, value: walk.push(walk._memo[value]),
    "LONG_BINGET": lambda walk, value: walk.push(walk._memo[value]),
    "GLOBAL": _Walk.named,
    "REDUCE": _Walk.reduce,
    "NEWOBJ": _Walk.reduce,
    "BUILD": _Walk.build,
    "BINPERSID": _Walk.persistent,
}
"""The opcodes of pickle protocol 2 that torch.save writes; torch's `weights_only` has the same."""


def _directory_length(file: BinaryIO, size: int) -> int:
    """Bytes of the zip's directory as its end says, before zipfile reads all of it."""
    file.seek(max(0, size - (1 << 17)))
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0:
        raise zipfile.BadZipFile("it has no end")
    length: int = struct.unpack_from("<I", tail, at + 12)[0]
    wide = tail.rfind(_END64, 0, at)
    if wide >= 0:
        length = max(
            length if length != 0xFFFFFFFF else 0, struct.unpack_from("<Q", tail, wide + 40)[0]
        )
    file.seek(0)
    return length
