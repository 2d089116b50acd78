"""Evaluation images that are found among training images.

COCO, Visual Genome and Flickr30k share photos, so a model can have seen its test images.
Two images count as the same when their files are equal, or when their
thumbnails are: that survives another size, another shape and another quality of JPEG.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlbeit.data.dataset import Dataset
from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.transforms import BadImage, decode_image

SIDE = 8
"""Thumbnails have SIDE x SIDE pixels of three colours."""
ALIKE = 0.985
"""Correlation of two thumbnails from which on they show the same picture. Measured on 11,000
photos of Flickr8k and Imagenette: copies of another size or JPEG quality down to 40 lie above
0.993, the most alike of 60 million pairs of different photos at 0.976. (Equal 64-bit difference
hashes, the usual way, found 2 % of the copies of another size.)"""
LEAST_CONTRAST = 4.0
"""Standard deviation of a thumbnail (0 to 255) below which it has too little in it to compare;
the least of those photos had 7.5."""


class Print(NamedTuple):
    """What identifies a picture."""

    digest: bytes
    """First 16 bytes of the file's sha256."""
    look: np.ndarray | None
    """(3 * SIDE**2,) float32 of length 1; None: not wanted, or the picture is all but flat."""


class Seen(NamedTuple):
    """An evaluation image."""

    split: str
    label: str


def fingerprint(data: bytes, pixels: np.ndarray | None) -> Print:
    """Of a file and, when its look counts too, its decoded (H, W, 3) uint8 picture."""
    look = None if pixels is None else thumbnail(pixels)
    return Print(hashlib.sha256(data).digest()[:16], look)


def thumbnail(pixels: np.ndarray) -> np.ndarray | None:
    """The picture squashed to a few cells, without its mean and scaled to length 1."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).ravel()
    values -= values.mean()
    length = float(np.linalg.norm(values))
    if length < LEAST_CONTRAST * values.size**0.5:
        return None
    return values / length


class EvalImages:
    """The val and test images of other datasets, and those of the one being written.

    Raises InputError when a folder is no prepared dataset.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self.looks_count = bool(folders)
        """Whether pictures are compared by look too, which costs a little for each."""
        self._by_digest: dict[bytes, Seen] = {}
        self._looks = np.empty((0, 3 * SIDE**2), np.float32)  # grown by doubling
        self._seen: list[Seen] = []
        self.unreadable = 0
        for folder in folders:
            self._read(Dataset.open(folder))

    def _read(self, dataset: Dataset) -> None:
        for info in dataset.sources:
            if info.split == "train" or info.stream == "text":
                continue
            source = RecordSource(info.name, info.shards)
            for index in range(len(source)):
                try:
                    data = source.read(index).image()
                    pixels = decode_image(data)
                except (BadSample, BadImage):
                    self.unreadable += 1
                    continue
                label = f"{dataset.folder}: {source.label(index)}"
                self.add(fingerprint(data, pixels), Seen(info.split, label))

    def add(self, print_: Print, seen: Seen) -> None:
        """Remember an evaluation image."""
        self._by_digest.setdefault(print_.digest, seen)
        if print_.look is None:
            return
        if len(self._seen) == len(self._looks):
            grown = np.empty((max(1024, 2 * len(self._looks)), 3 * SIDE**2), np.float32)
            grown[: len(self._looks)] = self._looks
            self._looks = grown
        self._looks[len(self._seen)] = print_.look
        self._seen.append(seen)

    def match(self, print_: Print) -> tuple[str, Seen] | None:
        """("file" or "look", the evaluation image) if this picture is one."""
        if seen := self._by_digest.get(print_.digest):
            return "file", seen
        if print_.look is None or not self._seen:
            return None
        alike = self._looks[: len(self._seen)] @ print_.look
        best = int(alike.argmax())
        return ("look", self._seen[best]) if alike[best] >= ALIKE else None
