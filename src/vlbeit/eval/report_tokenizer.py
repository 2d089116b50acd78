"""`vlbeit report RUN` for a run of `vlbeit tokenizer train-visual`: is the codebook alive?"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlbeit.data.dataset import open_sources
from vlbeit.data.manifest import write_atomic
from vlbeit.data.records import BadSample
from vlbeit.data.transforms import BadImage, decode_image, plain
from vlbeit.errors import InputError
from vlbeit.eval.code_pictures import code_sheet, decoded
from vlbeit.eval.curves import Line, line_chart, share_chart
from vlbeit.eval.report_html import key, page, paragraph, percent, picture, section, table
from vlbeit.eval.run_rows import read_rows
from vlbeit.tokens.quantizer import code_use
from vlbeit.tokens.visual import VisualTokenizer, load_visual_tokenizer

COUNTED = 512
"""Pictures on which the finished tokenizer's use of codes is counted."""
SHOWN = 12
SHEET_CODES = 2048
"""A larger codebook is not drawn code by code."""

CURVES = (
    # key of metrics.jsonl, title, share of something
    ("used", "codes in use", True),
    ("perplexity", "perplexity of the codes", False),
    ("entropy", "entropy of the codes (nats)", False),
    ("revived", "codes restarted since the row before", False),
    ("pixel_loss", "pixels, mean squared error", False),
    ("feature_loss", "teacher's features, 1 - cosine", False),
    ("commitment", "commitment", False),
)


def is_tokenizer_run(folder: Path) -> bool:
    """Whether a run folder is one of `vlbeit tokenizer train-visual`."""
    try:
        tree = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and "tokenizer" in tree and "model" not in tree


def write_tokenizer_report(
    run_dir: Path, out: Path, *, data: Sequence[str] = (), samples: int = 0
) -> Path:
    """Write the page; a run that is still going is shown as far as it is.

    Args:
        data: prepared folders with the pictures to show; default: the run's own.
        samples: most pictures on which codes are counted; 0: 512.

    Raises:
        InputError: the run has no rows of metrics yet.
        SaveError: the page cannot be written.
    """
    config = json.loads((run_dir / "config.json").read_bytes())
    metrics = read_rows(run_dir / "metrics.jsonl")
    if not metrics:
        raise InputError(f"{run_dir}: no row in metrics.jsonl yet; wait for the first, or train")
    settings = config["tokenizer"]
    parts = [_header(settings, metrics), _curves(metrics)]
    if (run_dir / "visual" / "config.json").is_file():
        tokenizer = load_visual_tokenizer(run_dir / "visual")
        pictures, split = _pictures(
            tuple(data) or tuple(config["data"]), tokenizer.image_size, samples or COUNTED
        )
        parts += _pictures_part(tokenizer, pictures, split)
    shown = escape(json.dumps(config, indent=2))
    parts.append(
        f"<details><summary>Every setting of the run</summary><pre>{shown}</pre></details>"
    )
    title = f"Visual tokenizer: {settings['codes']} codes, teacher {settings['teacher']}"
    write_atomic(out, page(title, parts).encode())
    return out


def _header(settings: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    last = metrics[-1]
    size = settings["image_size"]
    text = (
        f"{last['step']:,} steps of {settings['batch']} pictures of {size[0]} x {size[1]} pixels, "
        f"patch {settings['patch']}."
    )
    if "used" in last:
        text += (
            f" At the last row {percent(last['used'])} of the codes were in use, as many different "
            f"ones as {last['perplexity']:.0f} equally frequent codes would be (perplexity)."
        )
    head = f"Visual tokenizer: {settings['codes']} codes, teacher {settings['teacher']}"
    return f"<header><h1>{escape(head)}</h1>{paragraph(text, 'lead')}</header>"


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    last = float(metrics[-1]["step"])
    panels = []
    for name, title, is_share in CURVES:
        rows = [(float(row["step"]), float(row[name]), 1.0) for row in metrics if name in row]
        if not any(value for _, value, _ in rows):
            continue
        line = Line.smoothed(title, "train", rows)
        label = f"{title} over steps, from {line.values[0]:.3g} to {line.values[-1]:.3g}."
        chart = line_chart(label, [line], last, percent=is_share)
        panels.append(f'<figure class="panel"><h3>{escape(title)}</h3>{chart}</figure>')
    return section("Training", f'<div class="grid">{"".join(panels)}</div>')


def _pictures(
    folders: Sequence[str], size: tuple[int, int], count: int
) -> tuple[torch.Tensor | None, str]:
    """Held-out pictures spread over the sources; training ones where nothing is held out."""
    for split in ("val", "train"):
        sources = open_sources(folders, "image", split, images_from_pairs=True)
        every = [(source, index) for source in sources for index in range(len(source))]
        found = []
        for at in range(min(count, len(every))):
            source, index = every[at * len(every) // min(count, len(every))]
            try:
                found.append(plain(decode_image(source.read(index).image()), size))
            except (BadSample, BadImage):
                continue  # training names and counts them; here they are only not shown
        if found:
            return torch.from_numpy(np.stack(found)), split
    return None, ""


def _pictures_part(
    tokenizer: VisualTokenizer, pixels: torch.Tensor | None, split: str
) -> list[str]:
    parts = []
    if pixels is not None:
        codes, drawn = decoded(tokenizer, pixels)
        counts = torch.bincount(codes.flatten(), minlength=tokenizer.codes)
        use = code_use(counts)
        words = "held-out" if split == "val" else "training"
        rows = [
            (f"{words} pictures", f"{len(pixels):,}"),
            ("codes that occur", f"{percent(use.used)} of {tokenizer.codes:,}"),
            ("perplexity", f"{use.perplexity:.1f}"),
            ("entropy", f"{use.entropy:.3f} nats"),
            ("most frequent code", percent(use.top)),
            ("digest", f"{tokenizer.digest[:16]}\u2026"),
        ]
        shares = (counts / counts.sum()).numpy()
        label = f"Shares of {tokenizer.codes} codes in falling order, from {use.top:.4f}."
        places = torch.linspace(0, len(pixels) - 1, min(SHOWN, len(pixels))).long().tolist()
        pairs = "".join(
            f"<figure>{picture(_hwc(pixels[i]), f'{words} picture')}"
            f"{picture(_hwc(drawn[i]), 'the same decoded from its codes')}</figure>"
            for i in places
        )
        parts.append(
            section(
                "The finished tokenizer",
                table("Measured on whole pictures.", (), [[escape(a), b] for a, b in rows]),
                f'<div class="grid"><figure class="panel"><h3>How often each code is used</h3>'
                f"{share_chart(label, shares)}{key([('level', 'equal use of all codes')])}"
                '</figure><figure class="panel"><h3>Pictures and what their codes decode to</h3>'
                f'<div class="codes">{pairs}</div></figure></div>',
            )
        )
    if tokenizer.codes <= SHEET_CODES:
        sheet = picture(np.asarray(code_sheet(tokenizer)), "each code as a patch")
        parts.append(
            section(
                "Every code",
                paragraph(
                    "As the pixel decoder draws it among its like; dark above, bright below, cold "
                    "left, warm right."
                ),
                f'<figure class="panel">{sheet}</figure>',
            )
        )
    return parts


def _hwc(pixels: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
