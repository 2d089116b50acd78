"""Rows of the files that describe a data set, one at a time and with their line number.

A row that cannot be read is yielded as a `Bad` that names the file and the line, so that a
caller counts it; a file that cannot be read at all is an InputError.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlbeit.errors import InputError

MAX_LINE = 16 << 20
"""Bytes of the longest line or list element that is parsed; a longer one is no row of a list of
captions but a damaged file."""


class Bad(NamedTuple):
    """Something that was left out: where it lies, which record, and why."""

    where: str
    """File and line, item or row."""
    name: str
    """Image name or other id; empty when not even that could be read."""
    reason: str
    detail: str


class Row(NamedTuple):
    where: str
    values: dict[str, Any]


def opened(path: Path, mode: str = "rb", **options: Any) -> Any:
    """`path.open`, but a file that cannot be read is an InputError with its path."""
    try:
        return path.open(mode, **options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def json_lines(path: Path) -> Iterator[Row | Bad]:
    """Objects of a JSONL file; blank lines are passed over."""
    with opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE + 1)
                yield Bad(where, "", "bad_json", f"line is longer than {MAX_LINE} bytes")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _object(where, line)


def _object(where: str, line: bytes) -> Row | Bad:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad(where, "", "not_utf8", f"byte {error.start} of the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Bad(where, "", "bad_json", f"{type(error).__name__}: {error}")
    if not isinstance(value, dict):
        return Bad(where, "", "bad_json", f"expected an object, found {type(value).__name__}")
    return Row(where, value)


def json_list(path: Path, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON list, read in pieces: a list of any size needs little memory.

    Args:
        key: the list is the value of this key of the top-level object; None: the file is the
            list itself.

    Raises:
        InputError: the file is not such a list; names the element at which it breaks.
    """
    decoder = json.JSONDecoder()
    with opened(path, "r", encoding="utf-8-sig", errors="replace") as file:
        reader = _Pieces(file, path)
        if key is not None:
            reader.skip_to_key(key, decoder)
        reader.expect("[")
        index = 0
        while not reader.at("]"):
            if index:
                reader.expect(",")
            yield f"{path}:item {index}", reader.value(decoder, f"item {index}")
            index += 1


def json_head(path: Path, keys: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What a JSON object says before the first of some keys, and that key ("" for none).

    Raises:
        InputError: the file is not a JSON object.
    """
    decoder = json.JSONDecoder()
    head: dict[str, Any] = {}
    with opened(path, "r", encoding="utf-8-sig", errors="replace") as file:
        reader = _Pieces(file, path)
        for name in reader.keys(decoder):
            if name in keys:
                return head, name
            head[name] = reader.value(decoder, f"the value of {name!r}")
    return head, ""


class _Pieces:
    """A JSON text of which only a window is in memory."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._start = 0

    def _more(self) -> bool:
        # Doubled each time, so that a long element is parsed again only a few times.
        piece = self._file.read(max(1 << 20, len(self._text) - self._start))
        self._text = self._text[self._start :] + piece
        self._start = 0
        return bool(piece)

    def _space(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            while self._start < len(self._text):
                if not self._text[self._start].isspace():
                    return self._text[self._start]
                self._start += 1
            if not self._more():
                return ""

    def at(self, character: str) -> bool:
        return self._space() == character

    def expect(self, character: str) -> None:
        found = self._space()
        if found != character:
            raise InputError(
                f"{self._path}: expected {character!r}, found {found or 'the end of the file'!r}; "
                "is this the data set's own file, complete?"
            )
        self._start += 1

    def value(self, decoder: json.JSONDecoder, what: str) -> Any:
        self._space()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._start)
                # A number may go on in the next piece; everything else ends by itself.
                if end < len(self._text) or isinstance(value, (dict, list, str)):
                    self._start = end
                    return value
            except (ValueError, RecursionError) as error:
                problem = str(error)
            else:
                problem = "cut off"
            if len(self._text) - self._start > MAX_LINE * 8 or not self._more():
                raise InputError(f"{self._path}: {what} is not JSON ({problem})")

    def keys(self, decoder: json.JSONDecoder) -> Iterator[str]:
        """The keys of an object; whoever asks for the next one has read the value before."""
        self.expect("{")
        first = True
        while not self.at("}"):
            if not first:
                self.expect(",")
            first = False
            name = self.value(decoder, "a key")
            self.expect(":")
            yield name

    def skip_to_key(self, key: str, decoder: json.JSONDecoder) -> None:
        for name in self.keys(decoder):
            if name == key:
                return
            self.value(decoder, f"the value of {name!r}")
        raise InputError(f"{self._path}: has no {key!r}; is this the data set's own file?")


def delimited(path: Path, *, delimiter: str = ",") -> Iterator[Row | Bad]:
    """Rows of a CSV or TSV file with a header line, as dicts by column name."""
    with opened(path, "r", encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        try:
            header = [name.strip() for name in next(reader)]
        except StopIteration:
            raise InputError(f"{path}: is empty; expected a header line and rows") from None
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Bad(f"{path}:{reader.line_num}", "", "bad_row", str(error))
                continue
            where = f"{path}:{reader.line_num}"
            if len(cells) == len(header):
                yield Row(where, dict(zip(header, cells, strict=True)))
            elif cells:
                detail = f"{len(cells)} columns, the header has {len(header)}"
                yield Bad(where, "", "bad_row", detail)


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines without their end, for files that are neither JSON nor quoted CSV."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield f"{path}:{number}", line.decode("utf-8", errors="replace").rstrip("\r\n")
