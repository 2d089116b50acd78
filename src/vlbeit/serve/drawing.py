"""An answer as a picture: what was asked about, the question, and bars for the candidates."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlbeit.serve.predictor import Answer

HEIGHT: Final = 320
WIDEST: Final = 640
"""Most pixels a picture is shown in; the proportions stay."""
GAP: Final = 12
ROW: Final = 26
BEST, OTHER, TRACK = "#1f6feb", "#9bb8e0", "#eef1f5"


def draw_answers(
    pictures: Sequence[np.ndarray], title: str, answers: Sequence[Answer]
) -> Image.Image:
    """The pictures side by side, below them the title and a bar for each answer.

    Shapes: pictures (H, W, 3) uint8, at least one.
    """
    shown = [_fitted(picture) for picture in pictures]
    width = max(360, sum(one.width + GAP for one in shown) + GAP)
    font = ImageFont.load_default(size=15)
    lines = _wrapped(title, font, width - 2 * GAP)
    top = 2 * GAP + max(one.height for one in shown)
    below = top + 22 * len(lines) + GAP // 2
    sheet = Image.new("RGB", (width, below + ROW * len(answers) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    left = (width - sum(one.width + GAP for one in shown) + GAP) // 2
    for one in shown:
        sheet.paste(one, (left, GAP))
        left += one.width + GAP
    for number, line in enumerate(lines):
        pen.text((GAP, top + 22 * number), line, fill="black", font=font)
    start, stop = GAP + width * 2 // 5, width - GAP - 62
    for number, (name, probability) in enumerate(answers):
        y = below + ROW * number
        label = _wrapped(name, font, start - 2 * GAP)[:1] or [""]
        pen.text((GAP, y + 2), label[0], fill="black", font=font)
        pen.rectangle((start, y + 4, stop, y + ROW - 6), fill=TRACK)
        end = start + round((stop - start) * min(1.0, max(0.0, probability)))
        if end > start:
            pen.rectangle((start, y + 4, end, y + ROW - 6), fill=OTHER if number else BEST)
        pen.text((stop + 8, y + 2), f"{100 * probability:.1f} %", fill="black", font=font)
    return sheet


def _fitted(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    scale = min(HEIGHT / image.height, WIDEST / image.width)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    # Few pixels are shown as they are; many are smoothed.
    kind = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize((size[0], size[1]), kind)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Lines no wider than `width` pixels, four at most; a longer word is cut."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            while len(word) > 1 and font.getlength(word) > width:
                word = word[:-1]
            lines.append(word)
    return lines[:4]
