"""Tables of positions at another size: pictures by interpolation, texts by cutting.

Absolute tables are resampled bicubically, as the model does for pictures of another size. Tables
of relative positions are not: unilm stretches them along a geometric series and fits a cubic
spline, so that small offsets keep their meaning (linear interpolation cost BEiT a lot on ADE20K,
unilm#376). That is done here once, at conversion; receipt.json and config.json then hold the new
size, and running the model on other pictures is the model's own bicubic rule.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlbeit.config import FinetuneConfig, ModelConfig, PretrainConfig
from vlbeit.convert.rewriting import Plan, Rule, with_result
from vlbeit.errors import ConfigError
from vlbeit.nn.positions import resize_grid

LEAST_RATIO, MOST_RATIO = 1.01, 1.5
"""Between these unilm searches the ratio of the geometric series."""
DEGREE = 3


def geometric_offsets(reach: int, wanted: float) -> Tensor:
    """(2 reach + 1,) float64: where unilm puts the old offsets -reach .. reach.

    Neighbours are 1, q, q^2, ... apart; q is found by bisection so that the outermost lies at
    `wanted`. It never goes below 1.01: for a smaller target the table is cut rather than squeezed.
    """
    left, right = LEAST_RATIO, MOST_RATIO
    middle = left
    while right - left > 1e-6:
        middle = (left + right) / 2
        if (1 - middle**reach) / (1 - middle) > wanted:
            right = middle
        else:
            left = middle
    steps = torch.tensor([middle**power for power in range(reach)], dtype=torch.float64)
    outward = steps.cumsum(0)
    return torch.cat((-outward.flip(0), torch.zeros(1, dtype=torch.float64), outward))


def spline_matrix(places: Tensor, wanted: Tensor) -> Tensor:
    """(new, old) float64: values at `places` to those of the cubic spline through them.

    FITPACK's knots for smoothing 0 (not-a-knot), so the spline is SciPy's; beyond the ends the
    end value holds, as there. Shapes: places (old,) rising, wanted (new,).
    """
    inner = places[2:-2]
    ends = [places[:1].expand(DEGREE + 1), inner, places[-1:].expand(DEGREE + 1)]
    knots = torch.cat(ends)
    basis = _b_splines(knots, places)
    asked = _b_splines(knots, wanted.clamp(float(places[0]), float(places[-1])))
    matrix: Tensor = torch.linalg.solve(basis.T, asked.T).T
    return matrix


def _b_splines(knots: Tensor, at: Tensor) -> Tensor:
    """(points, knots - 4): the cubic B-splines at each point (Cox and de Boor's recursion)."""
    inside = (knots[:-1] <= at[:, None]) & (at[:, None] < knots[1:])
    last = at == knots[-1]
    inside[last] = False
    inside[last, len(knots) - DEGREE - 2] = True
    values = inside.double()
    for degree in range(1, DEGREE + 1):
        width = knots[degree:-1] - knots[: -degree - 1]
        rising = (at[:, None] - knots[: -degree - 1]) / width.where(width > 0, 1.0)
        width = knots[degree + 1 :] - knots[1:-degree]
        falling = (knots[degree + 1 :] - at[:, None]) / width.where(width > 0, 1.0)
        values = rising * values[:, :-1] + falling * values[:, 1:]
    return values


def resize_relative(table: Tensor, old: int, new: int) -> Tensor:
    """unilm's resize of the image rows of a relative table, for square grids.

    Shapes: table ((2 old - 1)^2, C), return ((2 new - 1)^2, C); the 3 rows of [I_CLS] and what
    follows them are not part of it.
    """
    if old == new:
        return table
    side, reach = 2 * old - 1, new - 1
    if table.device.type == "meta":
        return table.new_empty((2 * new - 1) ** 2, table.shape[1])
    wanted = torch.arange(-reach, reach + 1, dtype=torch.float64)
    matrix = spline_matrix(geometric_offsets(old - 1, (2 * new - 1) // 2), wanted)
    square = table.double().T.reshape(-1, side, side)
    resized = matrix @ square @ matrix.T
    return resized.flatten(1).T.to(table.dtype)


def cut_text_offsets(rows: Tensor, old: int, new: int) -> Tensor:
    """The rows of offsets between words, (2 old, C) to (2 new, C): the far offsets are left out."""
    return torch.cat((rows[old - new : old - new + 2 * new - 3], rows[-3:]))


def at_size(plan: Plan, image_size: int | None, text_positions: int | None) -> Plan:
    """The plan with tables of positions for another picture size or text length.

    Raises:
        ConfigError: not a multiple of the patch; relative positions on a grid that is not square;
            more text positions than there are; or a text shorter than 3 tokens.
    """
    old = plan.config.model
    new = replace(
        old,
        image_size=(image_size, image_size) if image_size else old.image_size,
        text_positions=text_positions or old.text_positions,
    )
    if new == old:
        return plan
    _check(old, new)
    rules = [_resized(rule, old, new) for rule in plan.rules]
    return replace(plan, config=for_model(plan.config, new), rules=rules)


def for_model(
    config: PretrainConfig | FinetuneConfig, model: ModelConfig
) -> PretrainConfig | FinetuneConfig:
    """The settings with another model; texts no longer than it reads."""
    longest = model.text_positions
    if isinstance(config, PretrainConfig):
        texts = replace(
            config.input,
            text_length=min(config.input.text_length, longest),
            pair_text_length=min(config.input.pair_text_length, longest),
        )
        return replace(config, model=model, input=texts)
    text = replace(config.input, text_length=min(config.input.text_length, longest))
    return replace(config, model=model, input=text)


def _check(old: ModelConfig, new: ModelConfig) -> None:
    side = new.image_size[0]
    if side < new.patch or side % new.patch:
        raise ConfigError(f"--image-size {side}: not a multiple of the patch, {new.patch}")
    square = old.image_size[0] == old.image_size[1]
    if new.image_size != old.image_size and old.relative_bias != "none" and not square:
        raise ConfigError(
            f"--image-size {side}: the table of relative positions belongs to pictures of "
            f"{old.image_size[0]} x {old.image_size[1]}, and unilm's resize is for square ones"
        )
    if not 3 <= new.text_positions <= old.text_positions:
        raise ConfigError(
            f"--text-positions {new.text_positions}: 3 to {old.text_positions}, what the file has"
        )


def _resized(rule: Rule, old: ModelConfig, new: ModelConfig) -> Rule:
    grids = [(m.image_size[0] // m.patch, m.image_size[1] // m.patch) for m in (old, new)]
    if rule.target == "image.positions" and grids[0] != grids[1]:
        return with_result(
            rule,
            lambda t: torch.cat((t[:1], resize_grid(t[1:], *grids))),
            "interpolated",
            f"bicubic, grid {grids[0]} to {grids[1]}",
        )
    if rule.target == "text.positions" and new.text_positions < old.text_positions:
        note = f"the first {new.text_positions} of {old.text_positions} positions"
        return with_result(rule, lambda t: t[: new.text_positions], rule.action, note)
    if rule.target == "backbone.relative_bias.table":
        rows = (2 * grids[0][0] - 1) * (2 * grids[0][1] - 1)

        def change(table: Tensor) -> Tensor:
            image, cls_and_cross, text = table[:rows], table[rows : rows + 5], table[rows + 5 :]
            if grids[0] != grids[1]:
                image = resize_relative(image, grids[0][0], grids[1][0])
            if new.text_positions < old.text_positions:
                text = cut_text_offsets(text, old.text_positions, new.text_positions)
            return torch.cat((image, cls_and_cross, text))

        notes = []
        if grids[0] != grids[1]:
            notes.append(f"unilm's geometric spline, grid {grids[0]} to {grids[1]}")
        if new.text_positions < old.text_positions:
            notes.append(f"offsets between words cut to texts of {new.text_positions}")
        action = "interpolated" if grids[0] != grids[1] else rule.action
        return with_result(rule, change, action, "; ".join(notes))
    return rule
