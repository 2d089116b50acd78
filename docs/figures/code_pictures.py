"""Draw docs/figures/code-pictures.png: pictures, and below them what tokenizers' codes decode to.

    python docs/figures/code_pictures.py --pictures FILE ... --tokenizers "pixels=RUN/visual" ...

The pictures must be free to show; those of the page are of openclipart (public domain).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vlbeit.data.transforms import decode_image, plain, resize
from vlbeit.eval.code_pictures import decoded
from vlbeit.tokens.visual import load_visual_tokenizer

HERE = Path(__file__).resolve().parent
SIDE, GAP, NAMES = 128, 4, 110
"""Pixels of a picture, between two, and of the column of names."""


def rows_of(pictures: list[Path], tokenizers: dict[str, str]) -> dict[str, list[np.ndarray]]:
    """(SIDE, SIDE, 3) uint8 pictures by the name of their row, the originals first."""
    given = [resize(decode_image(path.read_bytes()), (SIDE, SIDE)) for path in pictures]
    rows = {"original": given}
    for name, folder in tokenizers.items():
        tokenizer = load_visual_tokenizer(folder)
        seen = [plain(picture, tokenizer.image_size) for picture in given]
        _, drawn = decoded(tokenizer, torch.from_numpy(np.stack(seen)))
        rows[name] = [
            resize(picture, (SIDE, SIDE)) for picture in drawn.permute(0, 2, 3, 1).numpy()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", nargs="+", type=Path, required=True)
    parser.add_argument("--tokenizers", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=HERE / "code-pictures.png")
    args = parser.parse_args()
    rows = rows_of(args.pictures, dict(entry.rsplit("=", 1) for entry in args.tokenizers))
    step = SIDE + GAP
    sheet = Image.new("RGB", (NAMES + step * len(args.pictures), step * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (name, pictures) in enumerate(rows.items()):
        pen.text((4, step * row + SIDE // 2 - 8), name, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (NAMES + step * column, step * row))
    sheet.quantize(256).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
