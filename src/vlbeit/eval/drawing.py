"""What a run says, as pictures: bars, ranked thumbnails, class maps, confusion matrices.

Pictures are (H, W, 3) uint8, of any size. Few pixels are shown as they are, many are smoothed.
"""

import colorsys
import functools
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlbeit.eval.report_html import percent

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
Bars: TypeAlias = Sequence[tuple[str, float]]
"""Names with a number in [0, 1] each, the first of which stands out."""

HEIGHT: Final = 320
WIDEST: Final = 560
"""Most pixels a picture is shown in; the proportions stay."""
GAP: Final = 14
PANEL: Final = 380
"""Width of a title with its bars beside a picture."""
THUMBNAIL: Final = (188, 141)
COLUMNS: Final = 5
NAMED: Final = 14
"""Most classes that a legend names."""
LABELLED: Final = 60
"""Most classes whose names fit beside a confusion matrix."""
DISTINCT: Final = (
    "6e7781 e6194b 3cb44b 4363d8 f58231 911eb4 42d4f4 f032e6 ffe119 bfef45 9a6324 469990 "
    "800000 aaffc3 000075 fabed4 808000 dcbeff ffd8b1 fffac8"
).split()
"""Colours that are told apart side by side (S. Trubetskoy's list, its grey first)."""
BEST, OTHER, TRACK, QUIET = "#1f6feb", "#9bb8e0", "#eef1f5", "#57606a"


def draw_answers(
    pictures: Sequence[np.ndarray], title: str, bars: Bars, say: Callable[[float], str] = percent
) -> Image.Image:
    """One picture with title and bars beside it; several side by side with these below.

    Args:
        say: writes a bar's number.
    """
    row = _in_a_row([_fitted(picture) for picture in pictures])
    beside = len(pictures) == 1
    panel = _panel(title, bars, say, PANEL if beside else max(PANEL, row.width))
    return _framed(_in_a_row([row, panel]) if beside else _in_a_column([row, panel]))


def draw_ranked(
    pictures: Sequence[np.ndarray], title: str, captions: Sequence[Sequence[str]]
) -> Image.Image:
    """Thumbnails in their order, numbered, with some lines of text below each."""
    font, (width, height) = _font(13), THUMBNAIL
    cells = []
    for place, (picture, lines) in enumerate(zip(pictures, captions, strict=True), 1):
        cell = Image.new("RGB", (width, height + 6 + 18 * len(lines)), "white")
        shown = _fitted(picture, height, width)
        cell.paste(shown, (0, height - shown.height))
        pen = ImageDraw.Draw(cell)
        for number, line in enumerate(lines):
            text = f"{place}. {line}" if number == 0 else line
            colour = "black" if number == 0 else QUIET
            y = height + 6 + 18 * number
            pen.text((0, y), _shortened(text, font, width), fill=colour, font=font)
        cells.append(cell)
    rows = [_in_a_row(cells[at : at + COLUMNS]) for at in range(0, len(cells), COLUMNS)]
    wide = max([PANEL, *(row.width for row in rows)])
    return _framed(_in_a_column([_panel(title, (), percent, wide), *rows]))


def draw_classes(
    picture: np.ndarray, classes: np.ndarray, shares: Sequence[tuple[str, int, float]]
) -> Image.Image:
    """The picture, its class map over it, and a legend.

    Shapes: picture (H, W, 3), classes (H, W) class numbers.

    Args:
        shares: name, number and share of the pixels of each class that occurs, in the order of
            the legend.
    """
    shown = _fitted(picture)
    table = np.array([class_colour(number) for number in range(int(classes.max()) + 1)])
    numbers = Image.fromarray(classes).resize(shown.size, Image.Resampling.NEAREST)
    chosen = np.asarray(numbers)
    over = 0.45 * np.asarray(shown) + 0.55 * table[chosen]
    over[_borders(chosen)] = 255
    coloured = Image.fromarray(over.round().astype(np.uint8))

    font = _font(14)
    named = list(shares[:NAMED])
    legend = Image.new("RGB", (PANEL // 2 + 60, 24 * (len(named) + (len(shares) > NAMED))), "white")
    pen = ImageDraw.Draw(legend)
    for row, (name, number, share) in enumerate(named):
        y, value = 24 * row, percent(share)
        pen.rectangle((0, y + 3, 16, y + 19), fill=class_colour(number), outline=QUIET)
        right = legend.width - font.getlength(value)
        pen.text((right, y + 2), value, fill=QUIET, font=font)
        pen.text((24, y + 2), _shortened(name, font, right - 34), fill="black", font=font)
    if len(shares) > NAMED:
        rest = sum(share for _, _, share in shares[NAMED:])
        text = f"{len(shares) - NAMED} more classes, {percent(rest)}"
        pen.text((24, 24 * len(named) + 2), text, fill=QUIET, font=font)
    return _framed(_in_a_row([shown, coloured, legend]))


def draw_confusion(names: Sequence[str], counts: np.ndarray, title: str = "") -> Image.Image:
    """How many of each class (row) were called what (column); darker: more of its row.

    Shapes: counts (C, C), C at least 1. Up to LABELLED classes are named, large cells also hold
    their number.
    """
    classes = len(names)
    cell = max(4, min(56, 900 // classes))
    font = _font(min(14, max(9, cell - 3)))
    labelled = classes <= LABELLED
    room = 8 + round(min(170.0, max(font.getlength(name) for name in names))) if labelled else 0
    side = cell * classes
    sheet = Image.new("RGB", (room + side + 1, room + side + 1), "white")
    pen = ImageDraw.Draw(sheet)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row in range(classes):
        for column in range(classes):
            share, count = float(shares[row, column]), int(counts[row, column])
            x, y = room + cell * column, room + cell * row
            strength = share**0.6  # a few per cent can be seen
            base = (31, 111, 235) if row == column else (207, 34, 46)
            fill = tuple(round(255 + strength * (part - 255)) for part in base)
            pen.rectangle((x, y, x + cell, y + cell), fill=fill, outline="#d0d7de")
            if not count or cell < 20:
                continue
            small = _font(11 if count < 10_000 else 9)
            if small.getlength(str(count)) <= cell - 6:
                middle = (x + cell / 2, y + cell / 2)
                ink = "white" if strength > 0.6 else "black"
                pen.text(middle, str(count), fill=ink, font=small, anchor="mm")
    for place, name in enumerate(names if labelled else ()):
        text, centre = _shortened(name, font, room - 8), room + cell * place + cell / 2
        pen.text((room - 8, centre), text, fill="black", font=font, anchor="rm")
        label = Image.new("RGB", (room - 8, cell), "white")
        middle = (0, cell / 2)
        ImageDraw.Draw(label).text(middle, text, fill="black", font=font, anchor="lm")
        sheet.paste(label.rotate(90, expand=True), (round(centre - cell / 2), 0))
    wide = max(PANEL, sheet.width)
    note = "rows: the class it has; columns: the class that was said"
    return _framed(_in_a_column([_panel(title, (), percent, wide, note), sheet]))


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class in every map; from that of DISTINCT's length on, turns of the hue."""
    if number < len(DISTINCT):
        text = DISTINCT[number]
        return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)
    hue = number * 0.61803398875 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, (0.95, 0.65)[number % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(
    title: str, bars: Bars, say: Callable[[float], str], width: int, note: str = ""
) -> Image.Image:
    """The title, a quiet line, and below them each name over its bar."""
    large, font = _font(17), _font(14)
    head = _wrapped(title, large, width, 4)
    named = [_wrapped(name, font, width, 2) for name, _ in bars]
    height = 23 * len(head) + 20 * bool(note) + sum(18 * len(lines) + 30 for lines in named)
    sheet = Image.new("RGB", (width, max(1, height)), "white")
    pen = ImageDraw.Draw(sheet)
    y = 0
    for line in head:
        pen.text((0, y), line, fill="black", font=large)
        y += 23
    if note:
        pen.text((0, y), _shortened(note, font, width), fill=QUIET, font=font)
    y += 8
    room = max((font.getlength(say(value)) for _, value in bars), default=0)
    stop = round(width - room - 10)
    for number, (lines, (_, value)) in enumerate(zip(named, bars, strict=True)):
        for line in lines:
            pen.text((0, y), line, fill="black", font=font)
            y += 18
        pen.rectangle((0, y + 2, stop, y + 12), fill=TRACK)
        end = round(stop * min(1.0, max(0.0, value)))
        if end > 0:
            pen.rectangle((0, y + 2, end, y + 12), fill=OTHER if number else BEST)
        pen.text((width, y + 7), say(value), fill="black", font=font, anchor="rm")
        y += 30
    return sheet


def _fitted(picture: np.ndarray, height: int = HEIGHT, width: int = WIDEST) -> Image.Image:
    image = Image.fromarray(picture)
    scale = min(height / image.height, width / image.width)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    kind = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize((size[0], size[1]), kind)


def _borders(classes: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose neighbour to the right or below is of another class."""
    found = np.zeros(classes.shape, dtype=bool)
    found[:, :-1] = classes[:, :-1] != classes[:, 1:]
    found[:-1] |= classes[:-1] != classes[1:]
    return found


def _in_a_row(parts: Sequence[Image.Image]) -> Image.Image:
    """Side by side, tops aligned."""
    width = sum(part.width for part in parts) + GAP * (len(parts) - 1)
    sheet = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + GAP
    return sheet


def _in_a_column(parts: Sequence[Image.Image]) -> Image.Image:
    """One above the other, left sides aligned."""
    height = sum(part.height for part in parts) + GAP * (len(parts) - 1)
    sheet = Image.new("RGB", (max(part.width for part in parts), height), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + GAP
    return sheet


def _framed(sheet: Image.Image) -> Image.Image:
    framed = Image.new("RGB", (sheet.width + 2 * GAP, sheet.height + 2 * GAP), "white")
    framed.paste(sheet, (GAP, GAP))
    return framed


@functools.cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def _shortened(text: str, font: Font, width: float) -> str:
    """The text, or what fits of it with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}\u2026") > width:
        text = text[:-1]
    return f"{text.rstrip()}\u2026"


def _wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """At most `most` lines no wider than `width` pixels; an ellipsis says that there was more."""
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < most - 1:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        lines.append(_shortened(line, font, width))
    if words:
        lines.append(_shortened(" ".join(words), font, width))
    return lines
