"""Charts as inline SVG, drawn by hand: lines over steps, values with intervals, sorted shares.

Colours and fonts come from classes of the page (report_html), so that a chart follows its light or
dark theme; every chart carries a sentence for those who do not see it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
POINTS = 120
"""A longer line is drawn as the means of so many neighbouring groups of steps."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line. Shapes: steps, values (n,). `kind` is a class of the page (train, held, level), of
    several runs with the run's (held run0); what was held out gets dots."""

    name: str
    kind: str
    steps: np.ndarray
    values: np.ndarray

    @staticmethod
    def smoothed(name: str, kind: str, rows: Sequence[tuple[float, float, float]]) -> "Line":
        """From (step, value, weight) rows: weighted means of neighbouring steps."""
        table = np.array(rows, dtype=np.float64).reshape(-1, 3)
        table = table[np.isfinite(table).all(axis=1) & (table[:, 2] > 0)]
        groups = [g for g in np.array_split(table, min(POINTS, max(len(table), 1))) if len(g)]
        return Line(
            name=name,
            kind=kind,
            steps=np.array([g[:, 0].mean() for g in groups]),
            values=np.array([np.average(g[:, 1], weights=g[:, 2]) for g in groups]),
        )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(f * scale for f in (1, 2, 2.5, 5, 10) if f * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    label: str, lines: Sequence[Line], last: float = 0.0, *, percent: bool = False
) -> str:
    """Values over steps from zero to `last` (0: the last one drawn).

    `label` is the sentence read out instead of the picture.
    """
    shown = [line for line in lines if len(line.values)]
    last = last or max((float(line.steps.max()) for line in shown), default=0.0) or 1.0
    values = [v for line in shown for v in line.values]
    top = 1.0 if percent else max(values, default=1.0) * 1.05 or 1.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(value, top) / top

    parts = []
    for tick in nice_ticks(0.0, top, 4):
        name = f"{100 * tick:.0f} %" if percent else f"{tick:g}"
        parts.append(_rule(LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        parts.append(_text(LEFT - 6, y(tick) + 3.5, name, "end"))
    for tick in nice_ticks(0.0, last, 4):
        # The number at the right edge would stand half outside the picture.
        anchor = "end" if x(tick) > WIDTH - 2 * RIGHT else "middle"
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 15, f"{tick:,.0f}", anchor))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "step", "middle"))
    for line in shown:
        points = [(x(s), y(v)) for s, v in zip(line.steps, line.values, strict=True)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        if "held" in line.kind.split():
            parts += [
                f'<circle class="dot {line.kind}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
                for a, b in points
            ]
    return _svg(WIDTH, HEIGHT, label, parts)


def interval_chart(
    label: str,
    rows: Sequence[tuple[str, Mapping[str, Mapping[str, float]], float]],
    kinds: Mapping[str, str],
) -> str:
    """One row a word kind: a dot with its 95 % interval for each condition, a bar at the prior.

    Args:
        rows: (name, estimates by condition, prior); all values are shares in [0, 1].
        kinds: class of the page by condition, in drawing order.
    """
    head, row_height, left, right = 8, 34, 80, 24
    height = head + row_height * len(rows) + 24
    bottom = height - 22

    def x(share: float) -> float:
        return left + (WIDTH - left - right) * share

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_rule(x(tick), head, x(tick), bottom))
        parts.append(_text(x(tick), height - 6, f"{100 * tick:.0f} %", "middle"))
    for number, (name, estimates, prior) in enumerate(rows):
        middle = head + row_height * (number + 0.5)
        parts.append(_text(left - 8, middle + 4, name, "end", "tick strong"))
        parts.append(
            f'<line class="prior" x1="{x(prior):.1f}" x2="{x(prior):.1f}" '
            f'y1="{middle - 12:.1f}" y2="{middle + 12:.1f}"/>'
        )
        asked = [(kind, estimates[c]) for c, kind in kinds.items() if c in estimates]
        for place, (kind, found) in enumerate(asked):
            at = middle + 9 * (place - (len(asked) - 1) / 2)
            parts.append(
                f'<line class="whisker {kind}" x1="{x(found["low"]):.1f}" '
                f'x2="{x(found["high"]):.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<circle class="dot {kind}" cx="{x(found["value"]):.1f}" cy="{at:.1f}" r="4.5"/>'
            )
    return _svg(WIDTH, height, label, parts)


def share_chart(label: str, shares: np.ndarray) -> str:
    """Shares (n,), the largest first, as an area; a level line marks equal use."""
    ordered = np.sort(shares)[::-1]
    top = float(ordered.max()) * 1.05 or 1.0
    height = 170

    def y(value: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * value / top

    def x(place: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * place / len(ordered)

    parts = []
    for tick in nice_ticks(0.0, top, 3):
        parts.append(_rule(LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        parts.append(_text(LEFT - 6, y(tick) + 3.5, f"{100 * tick:.3g} %", "end"))
    for tick in nice_ticks(0, len(ordered), 4):
        parts.append(_text(x(tick), height - BOTTOM + 15, f"{tick:,.0f}", "middle"))
    parts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, height - 3, "codes, the most used first", "middle")
    )
    corners = [(x(0), y(0))]
    for place, value in enumerate(ordered):
        corners += [(x(place), y(value)), (x(place + 1), y(value))]
    corners.append((x(len(ordered)), y(0)))
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    parts.append(f'<polygon class="area" points="{path}"/>')
    even = y(1 / len(ordered))
    parts.append(
        f'<line class="line level" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
        f'y1="{even:.1f}" y2="{even:.1f}"/>'
    )
    return _svg(WIDTH, height, label, parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
