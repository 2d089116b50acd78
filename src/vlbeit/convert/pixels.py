"""Other scalings of pixels, folded into the patch projection.

This model reads pixels in [-1, 1] (mean = std = 0.5). A model made for another mean and standard
deviation of each channel gets the difference worked into the projection of patches: it is linear,
and a masked patch is replaced after it, so the function stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelScaling:
    """What the foreign model subtracts from and divides pixels in [0, 1] by, a number a channel."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def ours(self) -> bool:
        return self == PixelScaling()

    def weight(self, weight: Tensor) -> Tensor:
        """A convolution (D, 3, patch, patch) for pixels scaled as ours, flattened."""
        if self.ours:
            return weight.flatten(1)
        factor = torch.tensor([0.5 / s for s in self.std], dtype=torch.float64)
        scaled = weight.double() * factor.to(weight.device)[:, None, None]
        return scaled.to(weight.dtype).flatten(1)

    def bias(self, bias: Tensor, weight: Tensor) -> Tensor:
        """Its bias (D,): what the shift of each channel adds to every patch."""
        if self.ours:
            return bias
        pairs = zip(self.mean, self.std, strict=True)
        shift = torch.tensor([(0.5 - m) / s for m, s in pairs], dtype=torch.float64)
        added = weight.double().sum(dim=(2, 3)) @ shift.to(weight.device)
        return (bias.double() + added).to(bias.dtype)


IMAGENET = PixelScaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SCALINGS = {"half": PixelScaling(), "imagenet": IMAGENET}
"""By the name that `--pixels` takes."""
