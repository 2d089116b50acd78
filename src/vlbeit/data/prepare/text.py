"""Plain text: documents of files, packed many to a record.

A record holds up to 64 KiB, one document a line: text needs no random access to each document,
and a tar member of a few words would be mostly header.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from vlbeit.data.dataset import Dataset
from vlbeit.data.prepare.account import Account, Report
from vlbeit.data.prepare.folder import Sink, new_folder
from vlbeit.data.prepare.plan import SPLITS, Options, require, split_by_content, split_of_file
from vlbeit.data.prepare.rows import Bad, json_lines, opened
from vlbeit.data.transforms import BadText, clean_text
from vlbeit.errors import InputError

Documents = Literal["lines", "paragraphs"]
MEMBER = 64 << 10
"""Bytes of the largest text record."""
PIECE = 60_000
"""Bytes of the longest document; a longer one becomes several, cut at a blank."""


class Document(NamedTuple):
    """A document as it stands in its file; blank ones too."""

    where: str
    data: bytes


class TextFile(NamedTuple):
    path: Path
    source: str
    split: str
    """Empty: to be drawn from the content of each document."""


def prepare_text(files: Sequence[str], documents: Documents, options: Options) -> Report:
    """Checks text files and, unless only checking, writes their documents as a dataset folder.

    Each file is a source of its own, so that a run can weight it; `X.train.txt` and `X.val.txt`
    are the splits of source X. Raises what `build` raises.
    """
    start = time.monotonic()
    inputs = [_text_file(Path(name), options) for name in files]
    # What is bad in text is a row; the number of rows is known only after reading them all.
    account = Account(options, expected=None)
    if options.out is None:
        _pack(inputs, documents, options, account, Sink(None, options.per_shard, account.report))
        account.close()
        account.report.seconds = time.monotonic() - start
        return account.report
    with new_folder(options.out) as (folder, stop):
        sink = Sink(folder, options.per_shard, account.report, stop)
        facts = _pack(inputs, documents, options, account, sink)
        sources = sink.close()
        account.close()
        account.report.seconds = time.monotonic() - start
        account.report.out = str(options.out)
        account.write(folder)
        Dataset.write(
            folder,
            options.name,
            sources,
            {"documents": facts, "prepared": account.report.facts()},
        )
    return account.report


def _text_file(path: Path, options: Options) -> TextFile:
    require(path, "a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: expected a .txt or .jsonl file")
    stem, split = path.stem, options.split or ("" if options.val_fraction else "train")
    if named := split_of_file(path):
        stem, split = stem.removesuffix(named).rstrip(".") or options.name, SPLITS[named]
    return TextFile(path, re.sub(r"[^A-Za-z0-9_-]+", "_", stem), split)


class _Packer:
    """Fills records of one source and split."""

    def __init__(self, sink: Sink, source: str, split: str) -> None:
        self._sink = sink
        self._source = source
        self._split = split
        self._lines: list[bytes] = []
        self._size = 0
        self._count = 0
        self.documents = 0

    def add(self, text: str) -> None:
        # Once more: cleaning can make a text longer (one bad byte becomes three).
        for piece in _cut(text.encode()):
            line = piece.strip() + b"\n"
            if self._size + len(line) > MEMBER:
                self.flush()
            self._lines.append(line)
            self._size += len(line)
            self.documents += 1

    def flush(self) -> None:
        if self._lines:
            data = b"".join(self._lines)
            self._sink.add(self._source, "text", self._split, f"{self._count:08d}", {"txt": data})
            self._lines, self._size, self._count = [], 0, self._count + 1


def _pack(
    inputs: list[TextFile], documents: Documents, options: Options, account: Account, sink: Sink
) -> dict[str, int]:
    packers: dict[tuple[str, str], _Packer] = {}
    blank = 0
    for path, source, split in inputs:
        for found in read_documents(path, documents):
            if isinstance(found, Bad):
                account.skip(found)
                continue
            try:
                text = clean_text(found.data)
            except BadText as error:
                if error.reason == "empty_text":
                    blank += bool(found.data)
                else:
                    account.skip(Bad(found.where, "", error.reason, error.detail))
                continue
            account.report.seen += 1
            digest = hashlib.sha256(text.encode()).digest()
            where = split or split_by_content(digest, options.val_fraction)
            packer = packers.get((source, where))
            if packer is None:
                packer = packers[source, where] = _Packer(sink, source, where)
            packer.add(text)
    for packer in packers.values():
        packer.flush()
    if blank:
        account.report.notes.append(f"{blank:,} blank documents left out")
    counts = {f"{source} {split}": p.documents for (source, split), p in packers.items()}
    for place, count in sorted(counts.items()):
        account.report.notes.append(f"{count:,} documents in {place}")
    return counts


def read_documents(path: Path, documents: Documents) -> Iterator[Document | Bad]:
    """Documents of a .txt or .jsonl file, none longer than PIECE bytes, in constant memory."""
    if path.suffix == ".jsonl":
        for row in json_lines(path):
            if isinstance(row, Bad):
                yield row
            elif not isinstance(text := row.values.get("text"), str):
                yield Bad(row.where, "", "no_text", 'no "text" that is a string')
            else:
                for piece in _cut(text.encode("utf-8", errors="replace")):
                    yield Document(row.where, piece)
        return
    with opened(path) as file:
        number = first = 1
        rest = b""
        while line := file.readline(PIECE):
            if documents == "paragraphs" and not line.strip() and rest[-1:] in (b"", b"\n"):
                yield Document(f"{path}:{first}", rest)
                rest, first = b"", number + 1
            else:
                *whole, rest = _cut(rest + line)
                for piece in whole:
                    yield Document(f"{path}:{first}", piece)
            if line.endswith(b"\n"):
                number += 1
                if documents == "lines":
                    yield Document(f"{path}:{first}", rest)
                    rest, first = b"", number
        yield Document(f"{path}:{first}", rest)


def _cut(data: bytes) -> list[bytes]:
    """Pieces of at most PIECE bytes, cut at blanks where there are any; the last may be empty."""
    pieces = []
    while len(data) > PIECE:
        end = max(data.rfind(b" ", 0, PIECE), data.rfind(b"\n", 0, PIECE)) + 1
        if not end:
            end = PIECE
            while end > PIECE - 4 and 0x80 <= data[end] < 0xC0:
                end -= 1  # not inside a character
        pieces.append(data[:end])
        data = data[end:]
    return [*pieces, data]
