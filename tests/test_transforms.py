"""Fault tests D03 and D04, and the laws of crops, jitter and resizing.

Golden pixels are made from the definition of each format (inks, alpha, EXIF orientation), not
from what some decoder gave.
"""

import io
import math
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vlbeit.config import CropConfig
from vlbeit.data import transforms
from vlbeit.data.transforms import (
    MAX_PIXELS,
    BadImage,
    augment,
    color_jitter,
    decode_image,
    flip_horizontal,
    plain,
    random_resized_crop,
    resize,
)
from vlbeit.draws import Draws

RED, GREEN, BLUE, GREY = (200, 30, 20), (20, 160, 60), (30, 40, 210), (120, 120, 120)


def tiles(*rows: list[tuple[int, ...]], side: int = 16) -> np.ndarray:
    """A picture of one-coloured tiles, as large as two JPEG blocks each."""
    small = np.array(rows, np.uint8)
    return small.repeat(side, axis=0).repeat(side, axis=1)


PICTURE = tiles([RED, GREEN, BLUE], [GREY, RED, GREEN])  # (32, 48, 3), no symmetry
LUMA = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)  # 16-bit grey, 0..65535


def saved(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    made = image if isinstance(image, Image.Image) else Image.fromarray(image)
    made.save(file, form, **options)
    return file.getvalue()


def jpeg(image: Image.Image | np.ndarray, **options: Any) -> bytes:
    return saved(image, "JPEG", quality=100, subsampling=0, **options)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG by hand; `rows` are the filtered scan lines."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + body + png_chunk(b"IEND", b"")


def png_chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


UNDONE: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    # Where row 0 and column 0 of the stored picture lie, by the EXIF standard.
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def without_adobe_marker(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def from_inks(inks: np.ndarray) -> np.ndarray:
    rest = 255 - inks.astype(float)
    return np.rint(rest[..., :3] * rest[..., 3:] / 255).astype(np.uint8)


INKS = tiles([(0, 200, 220, 20), (230, 0, 90, 0)], [(10, 10, 10, 200), (0, 0, 0, 0)])
CMYK = Image.frombytes("CMYK", (32, 32), INKS.tobytes())
ALPHA = np.full((32, 48), 255, np.uint8)
ALPHA[:16], ALPHA[16:, :16] = 64, 0
RGBA = np.dstack([PICTURE, ALPHA])
PALETTE = Image.fromarray(PICTURE).quantize(4)
SECOND = Image.fromarray(255 - PICTURE)
ROWS_16 = b"".join(
    b"\0" + b"".join(struct.pack(">3H", *(int(v) * 257 for v in pixel)) for pixel in row)
    for row in PICTURE
)
PICTURE_JPEG = jpeg(PICTURE)
PICTURE_PNG = saved(PICTURE, "PNG")


def clear_at(image: Image.Image, form: str, at: tuple[int, int]) -> bytes:
    """A palette picture whose colour at one place is transparent."""
    return saved(image, form, transparency=image.getpixel(at))


def cleared(colour: tuple[int, int, int]) -> np.ndarray:
    gone = (PICTURE == np.array(colour)).all(axis=2, keepdims=True)
    return np.where(gone, np.uint8(255), PICTURE)


Case = tuple[str, bytes, np.ndarray | str]
GREY_16 = (WIDE.astype(float) / 257).round()
CASES: list[Case] = [
    ("rgb png", PICTURE_PNG, PICTURE),
    ("rgb jpeg", PICTURE_JPEG, PICTURE),
    ("progressive jpeg", jpeg(PICTURE, progressive=True), PICTURE),
    ("rgb webp", saved(PICTURE, "WEBP", lossless=True), PICTURE),
    ("rgb bmp", saved(PICTURE, "BMP"), PICTURE),
    ("rgb tiff", saved(PICTURE, "TIFF"), PICTURE),
    ("gif", saved(PALETTE, "GIF"), PICTURE),
    ("palette png", saved(PALETTE, "PNG"), PICTURE),
    ("grey png", saved(LUMA, "PNG"), grey(LUMA)),
    ("grey jpeg", jpeg(np.full((16, 16), 77, np.uint8)), grey(np.full((16, 16), 77))),
    ("1-bit png", saved(Image.fromarray(LUMA > 99), "PNG"), grey((LUMA > 99) * 255)),
    ("16-bit grey png", saved(Image.fromarray(WIDE), "PNG"), grey(GREY_16)),
    ("16-bit grey tiff", saved(Image.fromarray(WIDE), "TIFF"), grey(GREY_16)),
    ("16-bit rgb png", png(48, 32, 16, 2, ROWS_16), PICTURE),
    (
        "16-bit grey png with a transparent value",
        png(
            16,
            16,
            16,
            0,
            b"".join(b"\0" + row.astype(">u2").tobytes() for row in WIDE),
            png_chunk(b"tRNS", struct.pack(">H", 257 * 3)),
        ),
        grey(np.where(WIDE == 257 * 3, 255, GREY_16)),
    ),
    ("rgba png", saved(RGBA, "PNG"), over_white(PICTURE, ALPHA)),
    ("rgba webp", saved(RGBA, "WEBP", lossless=True, exact=True), over_white(PICTURE, ALPHA)),
    (
        "grey and alpha png",
        saved(np.dstack([PICTURE[..., 0], ALPHA]), "PNG"),
        over_white(grey(PICTURE[..., 0]), ALPHA),
    ),
    ("palette png, transparent", clear_at(PALETTE, "PNG", (0, 0)), cleared(RED)),
    ("gif, transparent", clear_at(PALETTE, "GIF", (40, 0)), cleared(BLUE)),
    ("rgb png, transparent colour", saved(PICTURE, "PNG", transparency=GREEN), cleared(GREEN)),
    ("cmyk jpeg with adobe marker", jpeg(CMYK), from_inks(INKS)),
    ("cmyk jpeg without marker", without_adobe_marker(jpeg(CMYK)), from_inks(INKS)),
    ("cmyk tiff", saved(CMYK, "TIFF"), from_inks(INKS)),
    *[
        (f"jpeg, exif orientation {n}", jpeg(PICTURE, exif=exif(n)), UNDONE[n](PICTURE))
        for n in range(1, 9)
    ],
    ("png, exif orientation 6", saved(PICTURE, "PNG", exif=exif(6)), UNDONE[6](PICTURE)),
    ("tiff, orientation 6", saved(PICTURE, "TIFF", tiffinfo={0x0112: 6}), UNDONE[6](PICTURE)),
    ("jpeg, exif orientation 77", jpeg(PICTURE, exif=exif(77)), PICTURE),
    ("jpeg, broken exif", jpeg(PICTURE, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), PICTURE),
    ("jpeg, broken profile", jpeg(PICTURE, icc_profile=b"\0" * 60 + b"nonsense"), PICTURE),
    ("animated gif", saved(PALETTE, "GIF", save_all=True, append_images=[SECOND]), PICTURE),
    (
        "animated webp",
        saved(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[SECOND]),
        PICTURE,
    ),
    ("animated png", saved(PICTURE, "PNG", save_all=True, append_images=[SECOND]), PICTURE),
    ("1 x 1", saved(PICTURE[:1, :1], "PNG"), PICTURE[:1, :1]),
    ("1 x 60000", saved(np.full((60000, 1, 3), 9, np.uint8), "PNG"), np.full((60000, 1, 3), 9)),
    ("zero width", png(0, 4, 8, 2, b"\0" * 4), "damaged_image bad_size not_an_image"),
    ("truncated jpeg", PICTURE_JPEG[: len(PICTURE_JPEG) * 2 // 3], "truncated_image"),
    ("truncated png", PICTURE_PNG[: len(PICTURE_PNG) - 40], "truncated_image"),
    ("header only", PICTURE_PNG[:33], "not_an_image truncated_image"),
    ("png with a wrong checksum", PICTURE_PNG[:60] + b"!" + PICTURE_PNG[61:], "damaged_image"),
    ("html named .jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    ("nothing", b"", "not_an_image"),
    ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    ("floats", saved(Image.new("F", (4, 4)), "TIFF"), "unsupported_mode"),
    ("60000 x 60000 in the header", png(60000, 60000, 8, 2, b""), "too_many_pixels"),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_hand_made_pictures_have_golden_pixels_or_a_reason(case: Case) -> None:
    """D03: within two levels of the golden picture, or refused by name."""
    _, data, wanted = case
    if isinstance(wanted, str):
        with pytest.raises(BadImage) as caught:
            decode_image(data)
        assert caught.value.reason in wanted.split() and caught.value.detail
        return
    image = decode_image(data)
    assert image.dtype == np.uint8 and image.shape == wanted.shape
    assert np.abs(image.astype(int) - wanted.astype(int)).max() <= 2


def test_a_wrong_polarity_or_orientation_would_be_seen() -> None:
    """The negative check of the golden pictures: they tell the usual mistakes apart."""
    assert np.abs(from_inks(INKS).astype(int) - from_inks(255 - INKS)).max() > 100
    for n, undo in UNDONE.items():
        for other, different in UNDONE.items():
            a, b = undo(PICTURE), different(PICTURE)
            assert n == other or a.shape != b.shape or not np.array_equal(a, b)


def resident_peak(*, reset: bool = False) -> int:
    """Largest resident memory of this process in bytes; `reset` starts it anew from now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_pixel_bomb_is_refused_from_its_header() -> None:
    """D04: 13,300 x 13,300 pixels in about 500 kB; at most 0.1 s and 32 MB."""
    side = 13_300
    squeeze = zlib.compressobj(9)
    start = squeeze.compress(b"") + squeeze.flush(zlib.Z_FULL_FLUSH)
    # After a full flush the same lines squeeze to the same bytes, so 1 % of them is enough.
    part = squeeze.compress(bytes((1 + 3 * side) * side // 100)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    rows = start + 100 * part + squeeze.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    assert 400_000 < len(bomb) < 700_000
    for data in (bomb, png(60_000, 60_000, 8, 2, b"")):
        before = resident_peak(reset=True)
        begun = time.perf_counter()
        with pytest.raises(BadImage) as caught:
            decode_image(data)
        seconds, grown = time.perf_counter() - begun, resident_peak() - before
        assert caught.value.reason == "too_many_pixels"
        assert seconds <= 0.1 and grown <= 32e6


def test_the_pixel_limit_counts_exactly() -> None:
    assert decode_image(PICTURE_PNG, max_pixels=32 * 48).shape == (32, 48, 3)
    with pytest.raises(BadImage, match="48 x 32 pixels; the limit is 1535"):
        decode_image(PICTURE_PNG, max_pixels=32 * 48 - 1)
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None and limit >= MAX_PIXELS  # Pillow's own limit stays behind ours


def test_every_cut_of_a_picture_is_refused_or_whole() -> None:
    """A picture that lost its end is never filled up with grey."""
    for data in (PICTURE_JPEG, PICTURE_PNG, saved(PICTURE, "WEBP", lossless=True)):
        whole = decode_image(data)
        for length in range(0, len(data), max(1, len(data) // 60)):
            try:
                assert np.array_equal(decode_image(data[:length]), whole)
            except BadImage as bad:
                assert bad.reason in ("truncated_image", "damaged_image", "not_an_image")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells what it makes of broken tags
def test_random_bytes_never_raise_anything_but_a_bad_image() -> None:
    draws = Draws("random pictures")
    for data in (PICTURE_JPEG, PICTURE_PNG, saved(PALETTE, "GIF"), saved(PICTURE, "TIFF")):
        for _ in range(100):
            changed = bytearray(data)
            for at in draws.integers(0, len(data), 5):
                changed[at] = draws.integer(0, 256)
            try:
                assert decode_image(bytes(changed)).shape[2] == 3
            except BadImage as bad:
                assert bad.reason


def outcome(data: bytes) -> tuple[str, bytes]:
    """What `decode_image` makes of some bytes: shape and pixels, or the reason."""
    try:
        pixels = decode_image(data)
    except BadImage as bad:
        return bad.reason, b""
    return str(pixels.shape), pixels.tobytes()


def both_outcomes(data: bytes, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """With simplejpeg, and as if it were not installed."""
    found = [outcome(data)]
    with monkeypatch.context() as patch:
        patch.setattr(transforms, "simplejpeg", None)
        found.append(outcome(data))
    return found


def jpegs() -> list[tuple[str, bytes]]:
    """JPEGs of every kind that Pillow writes, of sizes that fill no whole block too."""
    made = []
    for height, width in ((60, 90), (1, 1), (7, 5), (61, 33), (375, 500)):
        image = photo(height, width)
        for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
            name = f"{height} x {width}, {subsampling}"
            made.append((name, saved(image, "JPEG", quality=90, subsampling=subsampling)))
        made += [
            (f"{height} x {width}, {name}", saved(image, "JPEG", **options))
            for name, options in {
                "progressive": {"progressive": True, "quality": 85},
                "restart markers": {"restart_marker_rows": 1},
                "optimised": {"optimize": True, "quality": 30},
                "rgb inside": {"keep_rgb": True, "quality": 95},
            }.items()
        ]
    return made


def test_simplejpeg_and_pillow_decode_every_jpeg_to_the_same_bytes(monkeypatch):
    """The law behind the optional decoder: what a picture is does not depend on an extra."""
    pytest.importorskip("simplejpeg")
    for name, data in jpegs():
        fast, plain_way = both_outcomes(data, monkeypatch)
        assert fast == plain_way, name


def test_the_fast_path_is_taken_for_plain_jpegs_and_a_rougher_one_would_be_seen(monkeypatch):
    """The negative check: simplejpeg's fast transform is another picture."""
    simplejpeg = pytest.importorskip("simplejpeg")
    exact, calls = simplejpeg.decode_jpeg, []

    def rough(data: bytes, **options: Any) -> np.ndarray:
        calls.append(data)
        return exact(data, **options, fastdct=True, fastupsample=True)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", rough)
    different = [name for name, data in jpegs() if len(set(both_outcomes(data, monkeypatch))) > 1]
    assert len(calls) == len(jpegs()) and len(different) > 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_and_unusual_jpegs_fare_the_same_with_simplejpeg_and_without(monkeypatch):
    """CMYK, grey, turned, cut and altered files: Pillow decides, whatever is installed."""
    pytest.importorskip("simplejpeg")
    draws = Draws("damaged jpegs")
    files = [data for _, data, _ in CASES if data[:2] == b"\xff\xd8"]
    for data in (jpeg(photo()), saved(photo(), "JPEG", progressive=True)):
        files += [data[:length] for length in range(0, len(data), max(1, len(data) // 50))]
        files += [data[:-1], data[:-2], data + b"\0" * 9, data + data]
        for _ in range(150):
            changed = bytearray(data)
            for at in draws.integers(2, len(data), 2):
                changed[at] = draws.integer(0, 256)
            files.append(bytes(changed))
    reasons = set()
    for data in files:
        fast, plain_way = both_outcomes(data, monkeypatch)
        assert fast == plain_way, data[:40]
        reasons.add(fast[0])
    assert {"truncated_image", "(60, 90, 3)"} <= reasons


def photo(height: int = 60, width: int = 90) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


CROPS = CropConfig(scale=(0.2, 1.0), jitter=0.4)


def test_the_same_key_gives_the_same_bytes_and_another_key_others() -> None:
    image = photo()
    views = [augment(image, Draws(0, "crop", key), (32, 48), CROPS) for key in (1, 1, 2)]
    assert views[0].shape == (3, 32, 48) and views[0].dtype == np.uint8
    assert views[0].flags.c_contiguous and views[0].flags.writeable
    assert np.array_equal(views[0], views[1]) and not np.array_equal(views[0], views[2])


def test_augmentation_that_is_switched_off_is_the_plain_view() -> None:
    off = CropConfig(scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    for key in range(5):
        assert np.array_equal(augment(photo(), Draws(key), (24, 24), off), plain(photo(), (24, 24)))
    always = CropConfig(scale=(1.0, 1.0), flip=1.0, jitter=0.0)
    mirrored = augment(photo(), Draws(0), (60, 90), always)
    assert np.array_equal(mirrored, flip_horizontal(photo()).transpose(2, 0, 1))


def test_flips_come_as_often_as_the_config_says() -> None:
    config = CropConfig(scale=(1.0, 1.0), flip=0.3, jitter=0.0)
    straight = plain(photo(), (8, 8))
    flipped = sum(
        not np.array_equal(augment(photo(), Draws("flip", k), (8, 8), config), straight)
        for k in range(1000)
    )
    assert abs(flipped - 300) < 3.3 * math.sqrt(1000 * 0.3 * 0.7)


def coordinates(height: int, width: int) -> np.ndarray:
    """A picture whose pixels say where they are: row, column, 0."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack([rows, columns, 0 * rows]).astype(np.uint8)


def test_crops_stay_inside_and_keep_to_area_and_shape() -> None:
    image = coordinates(200, 200)
    areas, tops = [], []
    for key in range(300):
        part = random_resized_crop(image, Draws("box", key), (40, 40), (0.1, 0.6), (0.75, 4 / 3))
        rows, columns = (part[..., c].astype(float) for c in (0, 1))
        # From the first and last centre of 40 samples to the edges: 40/39 of their distance.
        height, width = (np.ptp(rows) * 40 / 39), (np.ptp(columns) * 40 / 39)
        areas.append(height * width / 200**2)
        tops.append(rows.min() / 200)
        assert 0.65 < width / height < 1.55
    assert 0.08 < min(areas) < 0.15 and 0.5 < max(areas) < 0.66
    assert abs(float(np.mean(areas)) - 0.35) < 0.04  # uniform in [0.1, 0.6]
    assert min(tops) < 0.03 and max(tops) > 0.4


def test_a_picture_too_narrow_for_any_crop_gives_its_centre() -> None:
    """torchvision's fall-back: the largest centred part whose shape is in range."""
    image = coordinates(200, 10)
    part = random_resized_crop(image, Draws(0), (16, 16), (1.0, 1.0 - 1e-9), (0.75, 4 / 3))
    rows = part[..., 0].astype(float)
    assert rows.min() >= 92 and rows.max() <= 107  # 13 rows around the middle
    for height, width in ((1, 60_000), (60_000, 1), (1, 1)):
        tall = np.full((height, width, 3), 7, np.uint8)
        view = augment(tall, Draws(1), (8, 8), CropConfig(jitter=0.0))
        assert view.shape == (3, 8, 8) and (view == 7).all()


def reference_jitter(image: np.ndarray, draws: Draws, strength: float) -> np.ndarray:
    """torchvision's formulas for PIL images in floating point, same draws."""
    now = image.astype(float)
    for which in draws.permutation(3):
        factor = draws.uniform(max(0.0, 1 - strength), 1 + strength)
        luma = np.rint(now @ np.array([0.299, 0.587, 0.114]))[..., None]
        against = [np.zeros(1), np.rint(luma.mean()), luma][which]
        now = np.clip(np.trunc(factor * now + (1 - factor) * against), 0, 255)
    return now


def test_jitter_follows_the_formulas_of_brightness_contrast_and_saturation() -> None:
    image = photo()
    for key in range(20):
        ours = color_jitter(image, Draws("jitter", key), 0.4)
        reference = reference_jitter(image, Draws("jitter", key), 0.4)
        assert np.abs(ours - reference).max() <= 4 and np.abs(ours - reference).mean() < 1
    assert np.array_equal(color_jitter(image, Draws(0), 0.0), image)
    assert not np.array_equal(color_jitter(image, Draws(0), 0.4), image)


def test_jitter_comes_in_every_order() -> None:
    orders = {tuple(Draws("order", key).permutation(3).tolist()) for key in range(60)}
    assert len(orders) == 6


def test_resizing_averages_where_it_shrinks() -> None:
    """Antialiasing: a fine chequerboard becomes grey, not black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    shrunk = resize(grey(board), (8, 8))
    assert shrunk.shape == (8, 8, 3) and np.abs(shrunk.astype(int) - 127).max() <= 3
    assert plain(photo(), (20, 30)).shape == (3, 20, 30)


def pillow_resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    made = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(made).astype(int)


def test_resizing_is_pillows_to_within_rounding():
    noise = np.random.default_rng(1).integers(0, 256, (150, 130, 3), np.uint8)
    for image in (photo(375, 500), photo(64, 64), noise, photo(5, 7)):
        for size in ((224, 224), (112, 96), (32, 48)):
            ours = resize(image, size)
            difference = np.abs(ours - pillow_resized(image, size))
            assert difference.max() <= 2 and difference.mean() < 0.02
    aliased = noise[::4, ::4][:32, :32]  # the negative check: no antialiasing
    assert np.abs(aliased - pillow_resized(noise[:128, :128], (32, 32))).mean() > 10


def test_a_picture_of_the_models_size_is_not_touched():
    assert np.array_equal(resize(photo(), (60, 90)), photo())


def test_how_the_picture_lies_in_memory_does_not_matter():
    """Decoders give read-only arrays, crops are cut out of larger ones."""
    wide = photo(100, 120)
    part = wide[10:71, 5:96]
    frozen = part.copy()
    frozen.flags.writeable = False
    for same in (frozen, np.asfortranarray(part), part[::-1][::-1]):
        assert np.array_equal(plain(same, (32, 32)), plain(part.copy(), (32, 32)))


def test_jitter_is_pillows_to_the_bit():
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for key in range(40):
        draws = Draws("bits", key)
        wanted = Image.fromarray(photo())
        for which in draws.permutation(3):
            wanted = kinds[which](wanted).enhance(draws.uniform(0.0, 2.0))
        assert np.array_equal(color_jitter(photo(), Draws("bits", key), 1.0), np.asarray(wanted))


def seconds_per_call(function: Callable[[int], object], calls: int = 60) -> float:
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for number in range(calls):
            function(number)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


@pytest.mark.slow
def test_decoding_and_cropping_costs_little_more_than_pillow_alone() -> None:
    """500 x 375 JPEG to a 224 px view, without jitter."""
    data = saved(photo(375, 500), "JPEG", quality=90)
    config = CropConfig(scale=(0.6, 0.6), jitter=0.0, flip=0.0)

    def pillow(_: int) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image.crop((80, 40, 428, 333)).resize((224, 224), Image.Resampling.BICUBIC)

    ours = seconds_per_call(lambda n: augment(decode_image(data), Draws(n), (224, 224), config))
    bare = seconds_per_call(pillow)
    print(f"{ours * 1e3:.2f} ms, Pillow alone {bare * 1e3:.2f} ms")
    assert ours < 1.8 * bare
