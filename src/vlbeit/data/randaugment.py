"""RandAugment: a few operations drawn from a list, each with the same strength.

Cubuk and others (arXiv 1909.13719) in the form of timm's "rand-m9-mstd0.5-inc1", with which BEiT
fine-tunes: every operation gets stronger with the magnitude. Pillow does the work.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlbeit.config import RandAugmentConfig
from vlbeit.draws import Draws

FILL = (128, 128, 128)
"""What comes into the picture from outside: grey, the mean of mean = std = 0.5 inputs."""
SHEAR, TRANSLATE, ROTATE, ENHANCE, SOLARIZE_ADD = 0.3, 0.45, 30.0, 0.9, 110
"""Strengths at magnitude 10 (timm)."""

Operation = Callable[[Image.Image, float, float], Image.Image]
"""(picture, strength 0..1, sign +1 or -1) -> picture."""


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=FILL,
    )


def _rotate(image: Image.Image, strength: float, sign: float) -> Image.Image:
    angle = sign * strength * ROTATE
    return image.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, sign: kind(image).enhance(1.0 + sign * strength * ENHANCE)


def _solarize_add(image: Image.Image, strength: float, sign: float) -> Image.Image:
    added = int(strength * SOLARIZE_ADD)
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": lambda image, strength, sign: ImageOps.posterize(
        image, 4 - int(strength * 4) or 1
    ),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, 256 - int(strength * 256)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign: _affine(
        image, (1, sign * strength * SHEAR, 0, 0, 1, 0)
    ),
    "shear_y": lambda image, strength, sign: _affine(
        image, (1, 0, 0, sign * strength * SHEAR, 1, 0)
    ),
    "translate_x": lambda image, strength, sign: _affine(
        image, (1, 0, sign * strength * TRANSLATE * image.width, 0, 1, 0)
    ),
    "translate_y": lambda image, strength, sign: _affine(
        image, (1, 0, 0, 0, 1, sign * strength * TRANSLATE * image.height)
    ),
}


def rand_augment(pixels: np.ndarray, draws: Draws, config: RandAugmentConfig) -> np.ndarray:
    """(3, height, width) uint8 to the same shape; with 0 operations the picture itself.

    Each operation is applied with probability 1/2, as in timm.
    """
    if config.operations == 0:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    names = tuple(OPERATIONS)
    for _ in range(config.operations):
        name = draws.choice(names)
        applied, sign = draws.uniform() < 0.5, 1.0 if draws.uniform() < 0.5 else -1.0
        strength = min(max(config.magnitude + config.spread * _normal(draws), 0.0), 10.0) / 10.0
        if applied:
            image = OPERATIONS[name](image, strength, sign)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _normal(draws: Draws) -> float:
    """One standard normal number (Box and Muller)."""
    radius = math.sqrt(-2.0 * math.log(1.0 - draws.uniform()))
    return radius * math.cos(2.0 * math.pi * draws.uniform())
