"""Pictures and texts on their way into the model: decode, clean, crop, flip, jitter.

`decode_image` is the only function of the project that turns bytes into pixels, `clean_text` the
only one that admits text; training, evaluation and the server all call these two, so a picture
or a caption means the same thing everywhere.

Pictures are (H, W, 3) uint8 RGB arrays; what goes to the model is (3, H, W). Sizes are
(height, width).
"""

import codecs
import io
import math
import unicodedata

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError, features

from vlbeit.config import CropConfig
from vlbeit.draws import Draws

try:  # the `fast` extra
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded, width times height; beyond it a record is skipped by name.
A picture of this size takes about 200 MB while it is decoded."""
MAX_CHARACTERS = 100_000
"""Longest text that is kept; the rest is cut."""
MAX_REPLACED = 0.1
"""Largest share of U+FFFD in a text; above it the bytes were not UTF-8 in the first place."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are tried. Pillow's others include decoders that call other programs."""
_MAX_COMBINING = 30
"""Longest run of combining characters (Unicode's Stream-Safe Text Format, UAX #15). Longer runs
are no writing, and normalising them takes time that grows with the square of their length."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the move that undoes it."""


class BadImage(Exception):
    """Bytes that are no usable picture.

    Reasons: not_an_image, too_many_pixels, bad_size, truncated_image, damaged_image,
    unsupported_mode.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class BadText(Exception):
    """A text with nothing in it to learn from. Reasons: empty_text, not_utf8."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded bytes to (H, W, 3) uint8 RGB (the array may be read-only).

    * The number of pixels is checked in the header, before anything is decoded.
    * Rotated and mirrored as EXIF says; an EXIF block that cannot be read is ignored.
    * Transparency is laid over white. Of an animation the first frame is used.
    * 16-bit grey is scaled to 8 bits, not clipped.
    * CMYK JPEGs hold inverted inks, with Adobe's marker or without it (the rule that browsers,
      libvips and Pillow came to: lovell/sharp#1649, LadybirdBrowser/ladybird#6486); CMYK TIFFs
      do not. Colour profiles are not applied, so a broken one does no harm.
    * A truncated picture is refused, never filled up.

    Plain colour JPEGs are decoded by simplejpeg where it is installed, in three quarters of the
    time and to the same bytes; everything else, and whatever simplejpeg objects to, by Pillow.

    Raises:
        BadImage: with the reason.
    """
    image = _open(data, max_pixels)
    pixels = _plain_jpeg(image, data)
    return upright_rgb(image, max_pixels=max_pixels) if pixels is None else pixels


def jpeg_decoder() -> str:
    """Which library decodes plain JPEGs here, with its version: "simplejpeg 1.9.0"."""
    if simplejpeg is not None:
        return f"simplejpeg {simplejpeg.__version__}"
    library = features.version("libjpeg_turbo")
    return f"Pillow {PIL.__version__}, {f'libjpeg-turbo {library}' if library else 'libjpeg'}"


def picture_path() -> str:
    """What makes a JPEG into pixels of the model's size, for the manifest of a checkpoint.

    Both decoders wrap libjpeg-turbo and give the same bytes, but a Pillow that was built against
    another libjpeg may differ by a few levels, and so may a later release of any of them.
    """
    return f"{jpeg_decoder()}; torch uint8 bicubic"


def _plain_jpeg(image: Image.Image, data: bytes) -> np.ndarray | None:
    """(H, W, 3) of a colour JPEG that lies upright; None: Pillow must decode it.

    What is wrong with a damaged picture, and what can be made of it all the same, is for Pillow
    to say: then the answer does not depend on whether simplejpeg is installed.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    if _orientation(image) in _UPRIGHT:
        return None
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        return None
    return pixels


def upright_rgb(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An opened picture to (H, W, 3) uint8 RGB, as `decode_image`, which calls this.

    Raises:
        BadImage: with the reason.
    """
    _check_size(image, max_pixels)
    try:
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        image = _to_rgb(image)
        return np.asarray(image if upright is None else image.transpose(upright))
    except BadImage:
        raise
    except Exception as error:  # decoders of foreign bytes raise whatever they like
        raise _damaged(error) from None


def decode_map(data: bytes) -> np.ndarray:
    """Encoded bytes of a class map to (H, W) uint8: grey levels or palette numbers as they are.

    Raises:
        BadImage: as `decode_image`, and unsupported_mode for anything but 8 bits a pixel.
    """
    image = _open(data, MAX_PIXELS)
    if image.mode not in ("L", "P"):
        detail = f"a class map with pixels of type {image.mode}; store it as 8-bit grey PNG"
        raise BadImage("unsupported_mode", detail)
    try:
        return np.asarray(image)
    except Exception as error:  # see decode_image
        raise _damaged(error) from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_many_pixels", f"{error} (our limit: {max_pixels})"[:200]) from None
    except UnidentifiedImageError:
        start = data[:16].hex(" ") or "nothing"
        detail = f"{len(data)} bytes that begin with {start}; formats: {', '.join(_FORMATS)}"
        raise BadImage("not_an_image", detail) from None
    except Exception as error:  # see decode_image
        raise _damaged(error) from None
    _check_size(image, max_pixels)
    return image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        detail = f"{width} x {height} pixels; the limit is {max_pixels}"
        raise BadImage("too_many_pixels", detail)
    if width < 1 or height < 1:
        raise BadImage("bad_size", f"{width} x {height} pixels")


def _damaged(error: Exception) -> BadImage:
    text = f"{type(error).__name__}: {error}"[:200]
    cut = isinstance(error, EOFError) or "truncated" in text.lower()
    return BadImage("truncated_image" if cut else "damaged_image", text)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a picture is worth more than its camera's notes
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        return _grey_16(image)
    if mode in ("I", "F", "LAB", "HSV"):
        detail = f"pixels of type {mode}; store it with 8 or 16 bits a channel, in RGB or grey"
        raise BadImage("unsupported_mode", detail)
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _grey_16(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    grey = (np.clip(values, 0, 65535) * 255 + 32767) // 65535
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def clean_text(data: bytes | str) -> str:
    """One line of text as the tokenizers may see it.

    Bytes are read as UTF-8 (as UTF-16 where they begin with its byte order mark). Invalid
    sequences and lone surrogates become U+FFFD; byte order marks and control characters are
    removed, white space of any kind becomes one space, and the result is in Unicode form NFC and
    at most `MAX_CHARACTERS` long. Joiners of emoji and marks of right-to-left text stay.
    Cleaning twice changes nothing more.

    Raises:
        BadText: empty_text, or not_utf8 when more than `MAX_REPLACED` of it had to be replaced.
    """
    text = _decode(data) if isinstance(data, bytes) else data
    text = text[:MAX_CHARACTERS]
    if not text.isascii():
        # Joins surrogate pairs that came one by one; what stays alone becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if not text.isprintable():
        text = "".join(" " if c.isspace() else c for c in text if c.isspace() or not _dropped(c))
    if not text.isascii():
        # Last, because what was removed may have stood between a letter and its accent.
        text = unicodedata.normalize("NFC", _limit_combining(text))
    text = " ".join(text.split())[:MAX_CHARACTERS].rstrip()
    if not text:
        raise BadText("empty_text", f"nothing is left of {len(data)} characters or bytes")
    replaced = text.count("\ufffd")
    if replaced > MAX_REPLACED * len(text):
        detail = f"{replaced} of {len(text)} characters could not be read; store it as UTF-8"
        raise BadText("not_utf8", detail)
    return text


def _decode(data: bytes) -> str:
    data = data[: 4 * MAX_CHARACTERS + 4]  # a byte order mark, and at most four a character
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8", "replace")


def _dropped(char: str) -> bool:
    return char == "\ufeff" or unicodedata.category(char) == "Cc"


def _limit_combining(text: str) -> str:
    if len(text) <= _MAX_COMBINING:
        return text
    kept: list[str] = []
    run = 0
    for char in text:
        run = run + 1 if unicodedata.combining(char) else 0
        if run <= _MAX_COMBINING:
            kept.append(char)
    return "".join(kept)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) to (*size, 3): bicubic with antialiasing, squashed where the shape differs."""
    return np.ascontiguousarray(_resized(image, size).transpose(1, 2, 0))


def resize_map(classes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 to size: the nearest pixel's number, as numbers of classes have no mean."""
    height, width = size
    return np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))


def flip_horizontal(image: np.ndarray) -> np.ndarray:
    """(H, W, 3), mirrored left to right."""
    return np.ascontiguousarray(image[:, ::-1])


def random_resized_crop(
    image: np.ndarray,
    draws: Draws,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """A random part of (H, W, 3), resized to (*size, 3).

    Args:
        scale: the part's share of the area, uniform in this range; (1, 1): the whole picture,
            whatever `ratio` says.
        ratio: its width over height, log-uniform in this range.

    torchvision's RandomResizedCrop: ten tries, then the largest centred part whose shape is in
    range.
    """
    part = _random_crop(image, draws, size, scale, ratio)
    return np.ascontiguousarray(part.transpose(1, 2, 0))


def color_jitter(image: np.ndarray, draws: Draws, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation of (H, W, 3), changed in random order.

    Each factor is uniform in [max(0, 1 - strength), 1 + strength] (torchvision's ColorJitter
    with its three arguments equal).
    """
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return np.ascontiguousarray(_jittered(planes, draws, strength).transpose(1, 2, 0))


def augment(image: np.ndarray, draws: Draws, size: tuple[int, int], crop: CropConfig) -> np.ndarray:
    """(H, W, 3) to (3, *size) uint8: crop, flip and jitter as `crop` says.

    The same picture, key of `draws` and config give the same bytes.
    """
    part = _random_crop(image, draws, size, crop.scale, crop.ratio)
    if draws.uniform() < crop.flip:
        part = np.ascontiguousarray(part[:, :, ::-1])
    return _jittered(part, draws, crop.jitter) if crop.jitter > 0 else part


def plain(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) to (3, *size) uint8: the whole picture, squashed to size, nothing random."""
    return _resized(image, size)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) to (3, *size), contiguous, by torch's kernel for bytes.

    It computes Pillow's filter (bicubic with a = -0.5, one pass an axis) in 16-bit instead of
    22-bit fixed point, in a third of the time: on photos one value in 200 differs, by one level;
    noise that is stretched along one axis and shrunk along the other may differ by five. The
    bytes are the same with every instruction set (tried: none, AVX2, AVX-512).
    """
    import torch  # `prepare` decodes too, and starts without it

    # Copied unless the rows lie end to end: other layouts take a slower path with other rounding.
    # The array may also be a read-only view of a decoder's bytes, which torch does not take.
    pixels = np.require(image, requirements=("C", "W"))
    made = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None],
        size=size,
        mode="bicubic",
        antialias=True,
    )
    return np.ascontiguousarray(made[0].numpy())


def _random_crop(
    image: np.ndarray,
    draws: Draws,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """(3, *size), contiguous."""
    if scale == (1.0, 1.0):
        return _resized(image, size)
    top, left, rows, columns = crop_box(image.shape[0], image.shape[1], draws, scale, ratio)
    return _resized(image[top : top + rows, left : left + columns], size)


def crop_box(
    height: int, width: int, draws: Draws, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, rows and columns of a random part."""
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top = draws.integer(0, height - rows + 1)
            return top, draws.integer(0, width - columns + 1), rows, columns
    rows, columns = height, width
    if width < ratio[0] * height:
        rows = max(1, min(height, round(width / ratio[0])))
    elif width > ratio[1] * height:
        columns = max(1, min(width, round(height * ratio[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _jittered(planes: np.ndarray, draws: Draws, strength: float) -> np.ndarray:
    """(3, H, W) uint8 to the same shape: bit for bit what Pillow's ImageEnhance makes of it.

    Brightness, contrast and saturation each move a pixel away from (or towards) a reference:
    black, the mean grey of the picture, the grey of the pixel. After each the result is cut to
    0..255 and rounded down, as bytes are. float32 holds every intermediate grey exactly.
    """
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    x = planes.astype(np.float32)
    for which in draws.permutation(3):
        factor = np.float32(draws.uniform(low, high))
        if which == 0:
            x *= factor
        else:
            grey = _grey(x)
            against = np.float32(int(grey.mean(dtype=np.float64) + 0.5)) if which == 1 else grey
            x -= against
            x *= factor
            x += against
        np.clip(x, 0.0, 255.0, out=x)
        np.floor(x, out=x)
    return x.astype(np.uint8)


def _grey(planes: np.ndarray) -> np.ndarray:
    """(3, H, W) whole numbers to (H, W): Rec. 601 luma in sixteen bits, rounded, as Pillow."""
    red, green, blue = planes
    grey: np.ndarray = red * np.float32(19595 / 65536)
    grey += green * np.float32(38470 / 65536)
    grey += blue * np.float32(7471 / 65536)
    grey += np.float32(0.5)
    np.floor(grey, out=grey)
    return grey
