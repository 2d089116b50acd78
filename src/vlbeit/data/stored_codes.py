"""Visual codes on disk: computed once for every record, for runs that show whole pictures.

    FOLDER/codes.json      which tokenizer, which picture size, which sources
    FOLDER/00000.npy ...   one a source: (records, P) uint16 or uint32, a record's codes in row i

A code depends on the tokenizer, on the picture and on the crop. So codes.json holds the tokenizer's
digest, a digest of every source's pictures, and the size to which they were squashed; whoever reads
codes says what he has, and is refused where it differs. Rows are found by the picture digest of
the source, not by its name: a pair source and the images taken from it share one file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.transforms import BadImage, decode_image, plain
from vlbeit.errors import DataBudgetError, InputError, SaveError
from vlbeit.tokens.visual import VisualTokenizer

FORMAT = "vlbeit-codes"
VERSION = 1
INDEX = "codes.json"
ENCODE = "vlbeit tokenizer encode"
ADVICE = f"encode again: {ENCODE} TOKENIZER --data DIR --out FOLDER"


class SourceCodes:
    """The codes of one source, row by row, from a file that is mapped and not read as a whole."""

    def __init__(self, path: Path, rows: int, patches: int, dtype: str) -> None:
        """
        Raises:
            InputError: the file is missing or does not hold (rows, patches) of `dtype`.
        """
        self.path = path
        self._expected = ((rows, patches), dtype)
        self._rows: np.ndarray | None = None
        self._map()

    def _map(self) -> np.ndarray:
        if self._rows is None:
            try:
                rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{self.path}: cannot be read ({error}); {ADVICE}") from None
            if (rows.shape, rows.dtype.name) != self._expected:
                raise InputError(
                    f"{self.path}: holds {rows.dtype.name} {rows.shape}, {INDEX} promises "
                    f"{self._expected[1]} {self._expected[0]}; {ADVICE}"
                )
            self._rows = rows
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        # A map would travel to a loader worker as a copy of the whole file.
        return self.__dict__ | {"_rows": None}

    def __len__(self) -> int:
        return self._expected[0][0]

    def row(self, index: int) -> np.ndarray | None:
        """(P,) int64; None for a record that had no usable picture."""
        row = self._map()[index]
        return None if row[0] == np.iinfo(row.dtype).max else row.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class CodeFolder:
    """A folder of codes and what it says about them."""

    folder: Path
    tokenizer: str
    """Digest of the visual tokenizer."""
    image_size: tuple[int, int]
    codes: int
    """Size of the codebook."""
    patches: int
    sources: list[dict[str, Any]]
    """name, records, pictures (digest), file, sha256."""

    @classmethod
    def open(cls, folder: Path | str) -> "CodeFolder":
        """Read codes.json.

        Raises:
            InputError: no such folder, or not one that this release reads.
        """
        path = Path(folder) / INDEX
        try:
            body = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); a folder of codes is made by `{ENCODE}`"
            ) from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise InputError(f"{path}: not a {FORMAT} file; {ADVICE}")
        if body.get("version") != VERSION:
            raise InputError(
                f"{path}: version {body.get('version')!r}; this release reads version {VERSION}"
            )
        try:
            height, width = body["image_size"]
            return cls(
                folder=Path(folder),
                tokenizer=str(body["tokenizer"]),
                image_size=(int(height), int(width)),
                codes=int(body["codes"]),
                patches=int(body["patches"]),
                sources=[_source_row(row) for row in body["sources"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: entry missing or wrong: {error}; {ADVICE}") from None

    def find(
        self, sources: Sequence[RecordSource], tokenizer: str, image_size: tuple[int, int]
    ) -> dict[str, SourceCodes]:
        """The codes of each source, by the name it has in this run; the files are verified.

        Args:
            tokenizer: digest of the tokenizer of the run.
            image_size: to which the run squashes whole pictures.

        Raises:
            InputError: codes of another tokenizer, another size or other pictures, a source that
                was not encoded, or a damaged file.
        """
        if tokenizer != self.tokenizer:
            raise InputError(
                f"{self.folder}: its codes are those of the visual tokenizer {self.tokenizer}, the "
                f"run's is {tokenizer}; {ADVICE}"
            )
        if image_size != self.image_size:
            raise InputError(
                f"{self.folder}: its codes are of pictures of {_by(self.image_size)}, the run "
                f"shows {_by(image_size)}; encode again with --image-size {image_size[0]} "
                f"{image_size[1]}"
            )
        by_pictures = {row["pictures"]: row for row in self.sources}
        names = {row["name"]: row for row in self.sources}
        found: dict[str, SourceCodes] = {}
        for source in sources:
            pictures = source.pictures_digest()
            row = by_pictures.get(pictures)
            if row is None:
                stale = names.get(source.name)
                why = (
                    f"has pictures of digest {pictures}, encoded were those of {stale['pictures']}"
                    if stale
                    else f"was not encoded (there are: {', '.join(names) or 'none'})"
                )
                raise InputError(f"{self.folder}: source {source.name} {why}; {ADVICE}")
            path = self.folder / row["file"]
            _check_file(path, row["sha256"])
            found[source.name] = SourceCodes(path, row["records"], self.patches, self.dtype)
        return found

    @property
    def dtype(self) -> str:
        """Of the files; its largest number stands for "no picture"."""
        return code_dtype(self.codes)


def _source_row(row: Any) -> dict[str, Any]:
    """An entry of codes.json, which may be a stranger's: its file lies in the folder itself."""
    kinds = {"name": str, "records": int, "pictures": str, "file": str, "sha256": str}
    found = {name: kind(row[name]) for name, kind in kinds.items()}
    if Path(found["file"]).name != found["file"]:
        raise ValueError(f"file {found['file']!r} is not in the folder")
    return found


def code_dtype(codes: int) -> str:
    """The smallest type that holds the codes and one number more."""
    return "uint16" if codes < np.iinfo(np.uint16).max else "uint32"


def write_codes(
    folder: Path | str,
    tokenizer: VisualTokenizer,
    sources: Sequence[RecordSource],
    image_size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    batch: int = 64,
    skip_budget: float = 0.01,
    log: Callable[[str], None] = lambda text: None,
) -> CodeFolder:
    """Encode every picture of `sources`, whole and squashed to `image_size`; all or nothing.

    Sources with the same pictures are encoded once. A record without a usable picture is named in
    the log and gets no codes.

    Raises:
        InputError: `image_size` does not fit the tokenizer's patch, or no sources.
        DataBudgetError: more bad pictures in a source than `skip_budget`.
        SaveError: the folder exists, or cannot be written.
    """
    folder = Path(folder)
    if not sources:
        raise InputError(f"{ENCODE}: no source with pictures; look at --data and --split")
    if image_size[0] % tokenizer.patch or image_size[1] % tokenizer.patch:
        raise InputError(
            f"--image-size {_by(image_size)}: not multiples of the tokenizer's patch "
            f"({tokenizer.patch})"
        )
    if folder.exists():
        raise SaveError(f"{folder} exists already; remove it or give another --out")
    patches = (image_size[0] // tokenizer.patch) * (image_size[1] // tokenizer.patch)
    aside = folder.with_name(f".{folder.name}.part")
    rows: dict[str, dict[str, Any]] = {}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for source in sources:
            pictures = source.pictures_digest()
            if pictures in rows:
                log(f"{source.name}: the pictures of {rows[pictures]['name']}, encoded already")
                continue
            path = aside / f"{len(rows):05d}.npy"
            bad = _encode_source(
                path, tokenizer, source, image_size, patches, device, batch, skip_budget, log
            )
            log(f"{source.name}: {len(source) - bad} of {len(source)} pictures encoded")
            rows[pictures] = {
                "name": source.name,
                "records": len(source),
                "pictures": pictures,
                "file": path.name,
                "sha256": _sha256(path),
                "bad": bad,
            }
        body = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer.digest,
            "image_size": list(image_size),
            "codes": tokenizer.codes,
            "patches": patches,
            "sources": list(rows.values()),
        }
        (aside / INDEX).write_text(json.dumps(body, indent=1) + "\n")
        for file in aside.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        aside.rename(folder)
    except OSError as error:
        raise SaveError(
            f"{folder}: cannot write the codes ({error.strerror}); free space or give another --out"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return CodeFolder.open(folder)


def _encode_source(
    path: Path,
    tokenizer: VisualTokenizer,
    source: RecordSource,
    image_size: tuple[int, int],
    patches: int,
    device: torch.device | str,
    batch: int,
    skip_budget: float,
    log: Callable[[str], None],
) -> int:
    """Writes the file of one source; the number of records without a usable picture."""
    dtype = np.dtype(code_dtype(tokenizer.codes))
    _reserve(path, len(source) * patches * dtype.itemsize)
    rows = np.lib.format.open_memmap(path, "w+", dtype, (len(source), patches))
    bad = 0
    for first in range(0, len(source), batch):
        places, shown = [], []
        for index in range(first, min(first + batch, len(source))):
            try:
                shown.append(plain(decode_image(source.read(index).image()), image_size))
                places.append(index)
            except (BadSample, BadImage) as why:
                bad += 1
                rows[index] = np.iinfo(dtype).max
                log(f"no codes for {source.label(index)}: {why.reason} ({why.detail})")
        if shown:
            pixels = torch.from_numpy(np.stack(shown)).to(device)
            rows[places] = tokenizer.encode(pixels).cpu().numpy().astype(dtype)
    rows.flush()
    if bad > skip_budget * len(source):
        raise DataBudgetError(
            f"source {source.name}: {bad} of {len(source)} pictures are bad, --skip-budget allows "
            f"{skip_budget:.2%}; repair the source or raise the budget"
        )
    return bad


def _reserve(path: Path, needed: int) -> None:
    """A write to a mapped file on a full disk kills the process: refuse before."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SaveError(f"{path}: no room: {needed} bytes needed, {free} bytes free")


def _check_file(path: Path, expected: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {ADVICE}") from None
    if found != expected:
        raise InputError(
            f"{path}: damaged: sha256 {found} found, {expected} expected; copy it again, or "
            f"{ADVICE}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
