"""Intervals by resampling samples: what would other pictures of the same kind have given?"""

from dataclasses import dataclass

import numpy as np

from vlbeit.draws import Draws

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A ratio of sums over samples with its 95 % percentile-bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def resample_counts(samples: int, resamples: int, *key: int | str) -> np.ndarray:
    """(resamples, samples) int32: how often each sample is in each bootstrap draw."""
    draws = Draws("bootstrap", *key)
    counts = np.empty((resamples, samples), dtype=np.int32)
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

    def ratios(pair: tuple[np.ndarray, np.ndarray] | None) -> tuple[float, np.ndarray]:
        if pair is None:
            return 0.0, np.zeros(len(counts))
        top, bottom = (np.asarray(part, dtype=np.float64) for part in pair)
        resampled = (counts @ top) / np.maximum(counts @ bottom, 1e-12)
        return float(top.sum() / max(bottom.sum(), 1e-12)), resampled

    value_1, draws_1 = ratios(first)
    value_2, draws_2 = ratios(second)
    low, high = np.percentile(draws_1 - draws_2, (2.5, 97.5))
    return Estimate(value=value_1 - value_2, low=float(low), high=float(high))
