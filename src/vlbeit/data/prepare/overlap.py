"""Evaluation images that are found among training images.

COCO, Visual Genome and Flickr30k share photos, so a model can have seen its test images
(design.md, Data). Two images count as the same when their files are equal, or when their
difference hashes are: that survives another size or another quality of JPEG.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlbeit.data.dataset import Dataset
from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.transforms import BadImage, decode_image


class Print(NamedTuple):
    """What identifies a picture."""

    digest: bytes
    """First 16 bytes of the file's sha256."""
    look: int
    """64-bit difference hash; -1: not computed, or the picture has too little in it to tell."""


class Seen(NamedTuple):
    """An evaluation image."""

    split: str
    label: str


def fingerprint(data: bytes, pixels: np.ndarray | None) -> Print:
    """Of a file and, when its look counts too, its decoded (H, W, 3) uint8 picture."""
    look = -1 if pixels is None else difference_hash(pixels)
    return Print(hashlib.sha256(data).digest()[:16], look)


def difference_hash(pixels: np.ndarray) -> int:
    """64 bits: is each of 8x8 cells brighter than its right neighbour; -1 for a flat picture.

    A picture with fewer than 8 bits of either kind is mostly ground: many different drawings
    would share its hash.
    """
    small = (
        Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX, reducing_gap=2)
    )
    cells = np.asarray(small, dtype=np.int16)
    bits = (cells[:, :-1] > cells[:, 1:]).ravel()
    if not 8 <= int(bits.sum()) <= 56:
        return -1
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class EvalImages:
    """The val and test images of other datasets, and those of the one being written."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.looks_count = bool(folders)
        """Whether pictures are compared by look too, which costs a little for each."""
        self._by_digest: dict[bytes, Seen] = {}
        self._by_look: dict[int, Seen] = {}
        self.count = 0
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
                    continue
                label = f"{dataset.folder}: {source.label(index)}"
                self.add(fingerprint(data, pixels), Seen(info.split, label))

    def add(self, print_: Print, seen: Seen) -> None:
        self.count += 1
        self._by_digest.setdefault(print_.digest, seen)
        if print_.look >= 0:
            self._by_look.setdefault(print_.look, seen)

    def match(self, print_: Print) -> tuple[str, Seen] | None:
        """("file" or "look", the evaluation image) if this picture is one."""
        if seen := self._by_digest.get(print_.digest):
            return "file", seen
        if print_.look >= 0 and (seen := self._by_look.get(print_.look)):
            return "look", seen
        return None
