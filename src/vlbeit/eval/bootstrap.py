"""Intervals by resampling samples: what would other pictures of the same kind have given?"""

from dataclasses import dataclass

import numpy as np

from vlbeit.draws import Draws

RESAMPLES = 2000
BLOCK = 200
"""Resamples that are multiplied out at once; bounds memory."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A ratio of sums over samples with its 95 % percentile-bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def resample_counts(samples: int, resamples: int, *key: int | str) -> np.ndarray:
    """(resamples, samples) uint8: how often each sample is in each bootstrap draw.

    A count is Poisson with mean 1 in the limit: it never comes near 255, and 50,000 samples take
    100 MB.
    """
    draws = Draws("bootstrap", *key)
    counts = np.empty((resamples, samples), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(draws.integers(0, samples, samples), minlength=samples)
    return counts


def ratio(
    numerator: np.ndarray, denominator: np.ndarray, counts: np.ndarray | None = None
) -> Estimate:
    """sum(numerator) / sum(denominator), whole samples resampled.

    Shapes: (samples,) both; counts as from `resample_counts`.
    """
    return difference((numerator, denominator), None, counts)


def difference(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray] | None,
    counts: np.ndarray | None = None,
) -> Estimate:
    """The first ratio minus the second; the same samples are drawn for both (paired)."""
    samples = len(first[0])
    if counts is None:
        counts = resample_counts(samples, RESAMPLES, samples)

    blocks_of = range(0, len(counts), BLOCK)

    def ratios(pair: tuple[np.ndarray, np.ndarray] | None) -> tuple[float, np.ndarray]:
        if pair is None:
            return 0.0, np.zeros(len(counts))
        columns = np.stack(pair, axis=1).astype(np.float64)  # (samples, 2)
        blocks = [counts[i : i + BLOCK].astype(np.float64) @ columns for i in blocks_of]
        resampled = np.concatenate(blocks)
        top, bottom = columns.sum(axis=0)
        return float(top / max(bottom, 1e-12)), resampled[:, 0] / np.maximum(resampled[:, 1], 1e-12)

    value_1, draws_1 = ratios(first)
    value_2, draws_2 = ratios(second)
    low, high = np.percentile(draws_1 - draws_2, (2.5, 97.5))
    return Estimate(value=value_1 - value_2, low=float(low), high=float(high))
