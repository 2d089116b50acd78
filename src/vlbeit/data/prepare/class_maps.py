"""Class maps: pictures whose value at a pixel is the number of its class."""

from io import BytesIO

import numpy as np
from PIL import Image

from vlbeit.data.prepare.plan import ClassMap
from vlbeit.data.transforms import MAX_PIXELS

IGNORE = 255
"""Value of pixels that belong to no class, in every record."""
_LOSSLESS = ("PNG", "BMP", "TIFF", "GIF")


class BadMap(Exception):
    """A class map that does not fit its picture or holds what is no class.

    Reasons: bad_map, map_size, bad_class.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_class_map(
    wanted: ClassMap, size: tuple[int, int], stored: tuple[int, int]
) -> tuple[bytes, np.ndarray]:
    """A map as it goes into a record: 8-bit PNG, classes from 0, IGNORE where there is none.

    A file that is that already comes back byte for byte.

    Args:
        size: height and width of the picture it belongs to, as in its file.
        stored: height and width of that picture as it is stored.

    Returns:
        The PNG, and (256,) int64: how often each value occurs in it.

    Raises:
        BadPlace: the file cannot be read.
        BadMap: it is no 8-bit map, of another size than its picture, or holds a value that is
            no class.
    """
    data = wanted.place.read()
    values, as_is = _decode(data, wanted.place.path)
    if values.shape != size:
        detail = (
            f"{wanted.place.path}: the map is {values.shape[1]} x {values.shape[0]} pixels, its "
            f"picture {size[1]} x {size[0]}"
        )
        raise BadMap("map_size", detail)
    renumbered = _renumbered(values, wanted.ignore)
    _check_classes(renumbered, values, wanted)
    if stored != size:
        small = Image.fromarray(renumbered).resize(stored[::-1], Image.Resampling.NEAREST)
        renumbered = np.asarray(small)
    counts = np.bincount(renumbered.ravel(), minlength=256)
    if as_is and stored == size and (renumbered is values or np.array_equal(renumbered, values)):
        return data, counts
    file = BytesIO()
    Image.fromarray(renumbered).save(file, "PNG")
    return file.getvalue(), counts


def _decode(data: bytes, path: str) -> tuple[np.ndarray, bool]:
    """(H, W) uint8, and whether the file is an 8-bit grey PNG. The numbers of a palette picture
    are its classes; its colours are for the eye."""
    try:
        with Image.open(BytesIO(data), formats=_LOSSLESS) as image:
            if image.width * image.height > MAX_PIXELS:
                detail = f"{path}: {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}"
                raise BadMap("bad_map", detail)
            if image.mode not in ("L", "P", "1"):
                detail = (
                    f"{path}: pixels of mode {image.mode}; a map has one number a "
                    "pixel, 8-bit grey or palette"
                )
                raise BadMap("bad_map", detail)
            grey_png = image.mode == "L" and image.format == "PNG"
            values = np.asarray(image).astype(np.uint8, copy=False)
            return values, grey_png
    except BadMap:
        raise
    except Exception as error:  # decoders of foreign bytes raise whatever they like
        kinds = ", ".join(_LOSSLESS)
        detail = f"{path}: {type(error).__name__}: {error}; expected one of {kinds}"
        raise BadMap("bad_map", detail[:300]) from None


def _renumbered(values: np.ndarray, ignore: int | None) -> np.ndarray:
    if ignore is None or ignore == IGNORE:
        return values
    numbers = np.arange(256)
    table = np.where(numbers > ignore, numbers - 1, numbers)
    table[ignore] = table[IGNORE] = IGNORE
    renumbered: np.ndarray = table.astype(np.uint8)[values]
    return renumbered


def _check_classes(renumbered: np.ndarray, values: np.ndarray, wanted: ClassMap) -> None:
    if wanted.classes is None:
        return
    wrong = (renumbered >= wanted.classes) & (renumbered != IGNORE)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        detail = (
            f"{wanted.place.path}: value {values[row, column]} at row {row}, column {column}; "
            f"there are {wanted.classes} classes"
        )
        raise BadMap("bad_class", detail)
