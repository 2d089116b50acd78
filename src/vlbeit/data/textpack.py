"""A text source as one flat array of tokens, cut into chunks without padding.

Tokenizing is done once per (vocabulary, shards) and kept in a cache folder. Documents follow one
another, separated by [T_SEP]; a chunk is any full-length stretch, so short documents share a
chunk and long ones span several: no place of a batch is spent on padding.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlbeit.data.records import BadSample, RecordSource, open_manifest
from vlbeit.data.transforms import BadText, clean_text
from vlbeit.draws import Draws
from vlbeit.errors import DataBudgetError, InputError, SaveError
from vlbeit.tokens.text import TextTokenizer

FORMAT = "vlbeit-textpack"
VERSION = 1
_DOCUMENTS_AT_ONCE = 2048
_TOKENS, _SKIPS, _META = "tokens.bin", "skips.jsonl", "meta.json"


@dataclass
class _Tally:
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    records: int = 0
    bad_documents: int = 0
    bad_records: int = 0


class PackedText:
    """The tokens of one text source, read at random.

    Keeps an open file and no array, so memory stays flat however large the corpus is; may be
    forked or pickled at any time.
    """

    def __init__(self, name: str, folder: Path) -> None:
        """Open what `pack_text` made.

        Raises:
            InputError: files are missing, damaged or of another version.
        """
        self.name = name
        self.folder = folder
        try:
            meta = json.loads((folder / _META).read_bytes())
            if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"format {meta.get('format')!r} version {meta.get('version')!r}")
            self.tokens: int = meta["tokens"]
            self.documents: int = meta["documents"]
            self._dtype = np.dtype(meta["dtype"])
            with open(folder / _TOKENS, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != meta["sha256"]:
                raise ValueError(f"sha256 {found[:16]}... found, {meta['sha256'][:16]}... expected")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder}: packed text of source {name} cannot be used ({error}); delete the "
                "folder, the next run makes it again"
            ) from None
        self._handle: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __del__(self) -> None:
        if self.__dict__.get("_handle") is not None:
            os.close(self.__dict__["_handle"])

    def skips(self) -> Iterator[dict[str, Any]]:
        """What could not be packed: rows of source, shard, member (key.txt:line), reason, detail.

        The rows are those of the build; a run writes them to its skips.jsonl once, at its start.
        """
        with open(self.folder / _SKIPS, encoding="utf-8") as file:
            for line in file:
                yield {"source": self.name, **json.loads(line)}

    def chunks(self, length: int) -> int:
        """Chunks of `length` tokens in an epoch, [T_CLS] and [T_SEP] included.

        Raises:
            InputError: the whole source is shorter than one chunk.
        """
        count = self.tokens // (length - 2)
        if count == 0:
            raise InputError(
                f"text source {self.name}: {self.tokens} tokens in {self.documents} documents do "
                f"not fill one chunk of {length} (input.text_length); add text or lower it"
            )
        return count

    def chunk(self, index: int, epoch: int, length: int, seed: int) -> np.ndarray:
        """(length,) int32: [T_CLS], length - 2 tokens of running text, [T_SEP].

        An epoch starts at a place of its own, so the borders of chunks move; the end of the
        source is joined to its beginning, so every chunk is full. An epoch leaves out fewer
        tokens than one chunk holds, others in each epoch.
        """
        body = length - 2
        if not 0 <= index < self.chunks(length):
            raise IndexError(f"{self.name}: chunk {index} of {self.chunks(length)}")
        start = Draws(seed, "chunks", self.name, epoch).integer(0, self.tokens)
        start = (start + index * body) % self.tokens
        words = np.empty(length, dtype=np.int32)
        words[0], words[-1] = TextTokenizer.cls, TextTokenizer.sep
        first = min(body, self.tokens - start)
        words[1 : 1 + first] = self._read(start, first)
        if first < body:
            words[1 + first : -1] = self._read(0, body - first)
        return words

    def _read(self, start: int, count: int) -> np.ndarray:
        if self._handle is None:
            self._handle = os.open(self.folder / _TOKENS, os.O_RDONLY)
        size = self._dtype.itemsize
        return np.frombuffer(os.pread(self._handle, count * size, start * size), self._dtype)


def pack_text(
    source: RecordSource,
    tokenizer: TextTokenizer,
    cache: Path,
    *,
    skip_budget: float,
    log: Callable[[str], None] = lambda message: None,
) -> PackedText:
    """The packed tokens of a source, from the cache or made now.

    Several processes may ask at once: one makes them, the others wait for it. The records hold
    one document per line. A line of white space only is listed as a skip (empty_text) and not
    counted against the budget; whatever else cannot be used is.

    Raises:
        DataBudgetError: no usable document, or more bad ones than `skip_budget` allows.
        SaveError: the cache cannot be written.
    """
    target = cache / f"text-{_digest_of(source, tokenizer)[:32]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{target.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (target / _META).exists():
                try:
                    return PackedText(source.name, target)
                except InputError as error:
                    log(f"{error} (made again now)")
                    shutil.rmtree(target)
            aside = Path(tempfile.mkdtemp(dir=cache, prefix=f"{target.name}.", suffix=".part"))
            try:
                tally = _pack(source, tokenizer, aside, skip_budget)
                os.rename(aside, target)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        raise SaveError(
            f"{target}: cannot write the packed text of source {source.name} ({error.strerror}); "
            "free space there or set VLBEIT_CACHE to another folder"
        ) from error
    log(
        f"text source {source.name}: {tally.documents} documents, {tally.tokens} tokens packed "
        f"into {target}; skipped: {tally.bad_documents} documents, {tally.bad_records} records, "
        f"{tally.empty} empty lines"
    )
    return PackedText(source.name, target)


def _digest_of(source: RecordSource, tokenizer: TextTokenizer) -> str:
    """What the tokens depend on: the vocabulary and every listed byte, not where they lie."""
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {tokenizer.digest}".encode())
    for shard in source.shards:
        manifest = open_manifest(shard)
        digest.update(f"\n{manifest.records} {manifest.bad}\n".encode())
        digest.update(manifest.key_bytes.tobytes() + manifest.member_sha256.tobytes())
    return digest.hexdigest()


def _pack(
    source: RecordSource, tokenizer: TextTokenizer, folder: Path, skip_budget: float
) -> _Tally:
    dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
    tally, reasons, digest = _Tally(), dict[str, int](), hashlib.sha256()
    waiting: list[tuple[str, str, str]] = []
    with (
        open(folder / _TOKENS, "wb") as tokens,
        open(folder / _SKIPS, "w", encoding="utf-8") as skips,
    ):

        def skip(shard: str, member: str, reason: str, detail: str) -> None:
            row = {"shard": shard, "member": member, "reason": reason, "detail": detail}
            skips.write(json.dumps(row) + "\n")
            reasons[reason] = reasons.get(reason, 0) + 1

        def flush() -> None:
            encoded = tokenizer.encode_batch([text for _, _, text in waiting])
            for (shard, member, _), ids in zip(waiting, encoded, strict=True):
                if len(ids) == 0:
                    tally.bad_documents += 1
                    skip(shard, member, "empty_text", "no token is left after tokenizing")
                    continue
                data = np.append(ids, TextTokenizer.sep).astype(dtype).tobytes()
                tokens.write(data)
                digest.update(data)
                tally.documents += 1
                tally.tokens += len(ids) + 1
            waiting.clear()

        for index in range(len(source)):
            tally.records += 1
            try:
                record = source.read(index)
                if "txt" not in record.members:
                    found = ", ".join(record.members)
                    raise BadSample(record.shard, record.key, "no_text", f"it has {found}")
            except BadSample as bad:
                tally.bad_records += 1
                skip(bad.shard, bad.member, bad.reason, bad.detail)
                continue
            for number, line in enumerate(_lines(record.members["txt"]), 1):
                member = f"{record.key}.txt:{number}"
                try:
                    waiting.append((record.shard, member, clean_text(line)))
                except BadText as bad_text:
                    if line.strip():
                        tally.bad_documents += 1
                    else:
                        tally.empty += 1
                    skip(record.shard, member, bad_text.reason, bad_text.detail)
                if len(waiting) == _DOCUMENTS_AT_ONCE:
                    flush()
        flush()
        for file in (tokens, skips):
            file.flush()
            os.fsync(file.fileno())
    _check_budget(source.name, tally, reasons, skip_budget)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "source": source.name,
        "tokenizer": tokenizer.digest,
        "dtype": dtype.name,
        "tokens": tally.tokens,
        "documents": tally.documents,
        "sha256": digest.hexdigest(),
    }
    with open(folder / _META, "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return tally


def _check_budget(name: str, tally: _Tally, reasons: dict[str, int], skip_budget: float) -> None:
    top = ", ".join(f"{n} x {reason}" for reason, n in sorted(reasons.items(), key=lambda r: -r[1]))
    if tally.documents == 0:
        raise DataBudgetError(
            f"no usable sample in text source {name}: {tally.records} records hold no document "
            f"({top or 'all are empty'}); `vlbeit verify` on its shards says more"
        )
    share = max(
        tally.bad_documents / (tally.bad_documents + tally.documents),
        tally.bad_records / tally.records,
    )
    if share > skip_budget:
        raise DataBudgetError(
            f"text source {name}: {tally.bad_documents} documents and {tally.bad_records} of "
            f"{tally.records} records are bad ({top}), a share of {share:.2%}; input.skip_budget "
            f"allows {skip_budget:.2%}; repair the source or raise the budget"
        )


def _lines(data: bytes) -> list[bytes]:
    """The documents of a member; a newline at its end does not start another."""
    return data.removesuffix(b"\n").split(b"\n") if data else []
