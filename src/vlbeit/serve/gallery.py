"""Pictures or texts that have names: a folder, a file of lines, or a prepared data folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlbeit.data.dataset import open_sources
from vlbeit.data.manifest import IMAGE_EXTENSIONS
from vlbeit.data.records import BadSample
from vlbeit.data.transforms import BadText, clean_text
from vlbeit.errors import InputError
from vlbeit.serve.predictor import read_picture
from vlbeit.tasks.retrieval_index import Kind

STREAMS = ("task:retrieval", "pair", "image")
"""Of a prepared folder the first of these that has what is wanted."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What can be indexed, shown and looked at again."""

    kind: Kind
    place: Path
    split: str
    """Of a prepared folder; else empty."""
    ids: tuple[str, ...]
    """Different from each other: paths within the folder, "source:record", or the texts."""
    read: Callable[[str], np.ndarray | str]
    """The picture (H, W, 3) uint8 or the text of an id; raises InputError, naming it."""
    unreadable: tuple[str, ...] = ()
    """Records that gave no id, by name and reason."""


def open_gallery(kind: Kind, place: Path | str, split: str = "val") -> Gallery:
    """Pictures: those in a folder and its subfolders, or the records of a prepared folder. Texts:
    the lines of a file, or the captions of a prepared folder; equal ones count once.

    Args:
        split: of a prepared folder.

    Raises:
        InputError: nothing of this kind is there.
    """
    place = Path(place).absolute()
    if (place / "dataset.json").is_file():
        found = _prepared_images(place, split) if kind == "image" else _captions(place, split)
    elif kind == "image" and place.is_dir():
        found = _files(place)
    elif kind == "text" and place.is_file():
        found = _lines(place)
    else:
        wanted = "a folder of pictures" if kind == "image" else "a file with one text a line"
        raise InputError(f"{place}: expected {wanted}, or a prepared data folder")
    if not found.ids:
        raise InputError(f"{place}: no {kind} in it{f' ({split})' if found.split else ''}")
    return found


def _files(place: Path) -> Gallery:
    names = sorted(
        path.relative_to(place).as_posix()
        for path in place.rglob("*")
        if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and path.is_file()
    )
    return Gallery(
        kind="image",
        place=place,
        split="",
        ids=tuple(names),
        read=lambda name: read_picture(place / name),
    )


def _prepared_images(place: Path, split: str) -> Gallery:
    for stream in STREAMS:
        sources = {source.name: source for source in open_sources([place], stream, split)}
        if sources:
            break

    def read(name: str) -> np.ndarray:
        source, _, number = name.rpartition(":")
        try:
            return read_picture(sources[source].read(int(number)).image())
        except (BadSample, InputError) as error:
            raise InputError(f"{name} of {place}: {error}") from None

    ids = tuple(f"{name}:{n}" for name, source in sources.items() for n in range(len(source)))
    return Gallery(kind="image", place=place, split=split, ids=ids, read=read)


def _captions(place: Path, split: str) -> Gallery:
    found: dict[str, None] = {}
    unreadable: list[str] = []
    for stream in STREAMS[:2]:
        for source in open_sources([place], stream, split):
            for number in range(len(source)):
                try:
                    captions = source.read(number, only=("json", "txt")).captions()
                except BadSample as error:
                    unreadable.append(f"{source.name}:{number} of {place}: {error}")
                    continue
                found.update(dict.fromkeys(captions))
        if found:
            break
    return Gallery(
        kind="text",
        place=place,
        split=split,
        ids=tuple(found),
        read=_text,
        unreadable=tuple(unreadable),
    )


def _lines(place: Path) -> Gallery:
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: cannot be read as UTF-8 text ({error})") from None
    ids = dict.fromkeys(line.strip() for line in lines if line.strip())
    return Gallery(kind="text", place=place, split="", ids=tuple(ids), read=_text)


def _text(text: str) -> str:
    try:
        return clean_text(text)
    except BadText as error:
        raise InputError(f"the text {text[:80]!r}: {error.detail}") from None
