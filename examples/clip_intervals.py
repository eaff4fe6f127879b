"""From differences, one per seed, to their mean and an interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, with Student's t interval; no interval for fewer than two."""

    n: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(values: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Of the differences of n seeds.

    Raises:
        ValueError: without any.
    """
    if not values:
        raise ValueError("a difference needs at least one pair of runs")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Difference(n, mean, math.nan, math.nan)
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)
