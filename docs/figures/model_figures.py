"""Draw the figures of docs/model.md from the code they explain.

    python docs/figures/model_figures.py                       block.svg, routing.svg, masks.png
    python docs/figures/model_figures.py --run runs/demo       attention.png too, by a trained demo

The routing is asked of a real `base` (without memory for its weights), the masks come from the
functions and settings of training. tests/test_model_figures.py fails when the first three are not
what is drawn now.
"""

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import vlbeit
from vlbeit.config import MaskingConfig
from vlbeit.data.scenes import draw_scene
from vlbeit.data.transforms import decode_image
from vlbeit.draws import Draws
from vlbeit.masking import block_masked
from vlbeit.nn.model import VLBeit
from vlbeit.recipes import base, tiny
from vlbeit.types import Modality, Span

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "src" / "vlbeit" / "serve" / "static" / "examples"
COLOURS = {Modality.IMAGE: "#cfe3f7", Modality.TEXT: "#fbe3c0", Modality.FUSED: "#d8ecc8"}
NAMES = {Modality.IMAGE: "V", Modality.TEXT: "L", Modality.FUSED: "VL"}
SHARED = "#e4e4e4"
INK = "#222222"
SIDE = 168
"""Pixels of a drawn picture."""


class Svg:
    """Boxes, arrows and words in SVG; nothing that needs a font file or a script."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, text: str) -> None:
        """A filled box with its lines of text in the middle."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" '
            f'stroke="{INK}"/>'
        )
        lines = text.split("\n")
        for number, line in enumerate(lines):
            down = y + height / 2 + 4.5 + 16 * (number - (len(lines) - 1) / 2)
            self.text(x + width / 2, down, line)

    def text(self, x: float, y: float, words: str, anchor: str = "middle") -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{INK}">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at the last."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#head)"/>'
        )

    def __str__(self) -> str:
        width, height = self.size
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
            "</defs>"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">\n'
            f'<rect width="{width}" height="{height}" fill="white"/>\n{head}\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def base_model() -> VLBeit:
    """`base` as it is built, without memory for its weights."""
    with torch.device("meta"):
        return VLBeit(base().model, seed=None)


def block_figure(model: VLBeit) -> str:
    """One block near the top, with every expert it has."""
    block = model.backbone.blocks[-1]
    held = [Modality(name) for name in block.experts]
    svg = Svg(760, 250)
    middle = 120
    svg.text(12, middle + 4, "x", "start")
    svg.arrow((24, middle), (60, middle))
    svg.box(60, middle - 22, 80, 44, SHARED, "LayerNorm 1\n(shared)")
    svg.arrow((140, middle), (165, middle))
    svg.box(165, middle - 22, 100, 44, SHARED, "attention\n(shared)")
    svg.arrow((265, middle), (300, middle))
    plus = [(312, middle), (700, middle)]
    svg.arrow((36, middle), (36, 30), (312, 30), (312, middle - 12))
    for x, y in plus:
        svg.parts.append(f'<circle cx="{x}" cy="{y}" r="12" fill="white" stroke="{INK}"/>')
        svg.text(x, y + 5, "+")
    if block.gamma_1 is not None:
        start = base().model.layer_scale
        svg.text(60, 196, f"each branch times a shared gamma, {start} at first", "start")
    svg.arrow((324, middle), (385, middle))
    svg.text(345, middle - 8, "h")
    top = middle - 30 * len(held)
    for number, modality in enumerate(held):
        y = top + 60 * number + 8
        name = f"{NAMES[modality]}-expert: LayerNorm 2,\nLinear, GELU, Linear"
        if y + 22 != middle:
            svg.arrow((360, middle), (360, y + 22), (385, y + 22))
        svg.box(385, y, 190, 44, COLOURS[modality], name)
        if y + 22 != middle:
            svg.arrow((575, y + 22), (620, y + 22), (620, middle), (688, middle))
        else:
            svg.arrow((575, y + 22), (688, middle))
    svg.arrow((345, middle), (345, 238), (700, 238), (700, middle + 12))
    svg.arrow((712, middle), (740, middle))
    svg.text(750, middle + 4, "y")
    return str(svg)


def routing(model: VLBeit) -> list[tuple[str, list[Modality]]]:
    """For each kind of token the expert of every block, asked of the blocks themselves."""
    text, image = Span(Modality.TEXT, 2), Span(Modality.IMAGE, 3)
    rows = []
    for label, route, token in (
        ("an image alone", (image,), 0),
        ("a text alone", (text,), 0),
        ("a pair: its text", (text, image), 0),
        ("a pair: its image", (text, image), 4),
    ):
        served = []
        for block in model.backbone.blocks:
            start = 0
            for span in block.spans(route):
                if start <= token < start + span.length:
                    served.append(span.modality)
                start += span.length
        rows.append((label, served))
    return rows


def routing_figure(model: VLBeit) -> str:
    """Rows: what a token belongs to. Columns: blocks, the first to the left."""
    rows = routing(model)
    cell = 44
    svg = Svg(150 + cell * model.config.layers + 10, 40 + 40 * len(rows))
    for layer in range(model.config.layers):
        svg.text(150 + cell * (layer + 0.5), 22, str(layer + 1))
    svg.text(140, 22, "block", "end")
    for number, (label, served) in enumerate(rows):
        y = 34 + 40 * number
        svg.text(140, y + 21, label, "end")
        for layer, modality in enumerate(served):
            box = (150 + cell * layer + 2, y, cell - 4, 34)
            svg.box(*box, COLOURS[modality], NAMES[modality])
    return str(svg)


def hide(picture: np.ndarray, grid: tuple[int, int], masked: np.ndarray) -> Image.Image:
    """The picture at SIDE pixels, hidden patches grey, with the grid over it."""
    image = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    rows, columns = grid
    for place in np.flatnonzero(masked):
        top, left = divmod(int(place), columns)
        corner = (left * SIDE / columns, top * SIDE / rows)
        pen.rectangle(
            (*corner, corner[0] + SIDE / columns, corner[1] + SIDE / rows), fill="#8a8a8a"
        )
    for line in range(1, rows):
        pen.line((0, line * SIDE / rows, SIDE, line * SIDE / rows), fill="#ffffff")
        pen.line((line * SIDE / columns, 0, line * SIDE / columns, SIDE), fill="#ffffff")
    return image


def masks_of(
    picture: np.ndarray, grid: tuple[int, int], masking: MaskingConfig
) -> list[Image.Image]:
    """The picture whole, and under three masks as training draws them."""
    places = grid[0] * grid[1]
    count = round(masking.image * places)
    drawn = [
        block_masked(Draws("figure", n), grid, count, masking.min_block, masking.max_aspect)
        for n in range(3)
    ]
    return [hide(picture, grid, m) for m in [np.zeros(places, dtype=bool), *drawn]]


def masks_figure() -> Image.Image:
    """An emoji under the masks of `base` (14 x 14), a scene under those of `tiny` (5 x 5)."""
    emoji = decode_image((EXAMPLES / "dog-face.png").read_bytes())
    scene = np.asarray(draw_scene(seed=0, split="val", index=3).image.convert("RGB"))
    rows = [
        masks_of(emoji, (14, 14), base().masking),
        masks_of(scene, (5, 5), tiny().masking),
    ]
    return in_rows(rows)


def in_rows(rows: list[list[Image.Image]], gap: int = 8) -> Image.Image:
    """Pictures of one size, in rows."""
    width, height = rows[0][0].size
    most = max(map(len, rows))
    sheet = Image.new(
        "RGB", (most * (width + gap) + gap, len(rows) * (height + gap) + gap), "white"
    )
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            sheet.paste(picture, (gap + across * (width + gap), gap + down * (height + gap)))
    return sheet


def attention_figure(run_dir: str, layer: int = 3, caption: str = "") -> Image.Image:
    """Where each word of a scene's caption looks at one layer; brighter: more of its attention."""
    run = vlbeit.load(run_dir)
    scene = draw_scene(seed=0, split="val", index=3)
    picture = scene.image.convert("RGB")
    found = run.attention(picture, caption or scene.captions[-1], layer=layer)
    large = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)).astype(float)
    cells = [labelled(Image.fromarray(large.astype(np.uint8)), "the picture")]
    for word, weights in zip(found.words, found.weights, strict=True):
        if word.startswith("["):
            continue
        map_ = weights.reshape(found.grid) / weights.max()
        light = np.kron(map_, np.ones((SIDE // found.grid[0] + 1, SIDE // found.grid[1] + 1)))
        light = light[:SIDE, :SIDE, None]
        cells.append(
            labelled(Image.fromarray((large * (0.15 + 0.85 * light)).astype(np.uint8)), word)
        )
    return in_rows([cells[:5], cells[5:10]] if len(cells) > 5 else [cells])


def labelled(picture: Image.Image, words: str) -> Image.Image:
    """The picture with a line of text below."""
    sheet = Image.new("RGB", (picture.width, picture.height + 22), "white")
    sheet.paste(picture, (0, 0))
    ImageDraw.Draw(sheet).text((2, picture.height + 3), words, INK, ImageFont.load_default(14))
    return sheet


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="a demo folder's pretrain/, or any pretrained run of scenes")
    parser.add_argument("--layer", type=int, default=3, help="of the attention; 1 is the first")
    given = parser.parse_args(words)
    model = base_model()
    (HERE / "block.svg").write_text(block_figure(model))
    (HERE / "routing.svg").write_text(routing_figure(model))
    masks_figure().save(HERE / "masks.png", optimize=True)
    if given.run:
        attention_figure(given.run, given.layer).save(HERE / "attention.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
