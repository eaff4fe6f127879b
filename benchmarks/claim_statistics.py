"""From differences, one per seed, to an interval and a verdict: the rule of docs/claims-rule.md."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95
MIN_RUNS = 5
SHOWN, NOT_SHOWN, CONTRADICTED, NOT_ENOUGH = "shown", "not shown", "contradicted", "not enough runs"


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, with Student's t interval at 95 %; no interval for fewer than two."""

    n: int
    mean: float
    low: float
    high: float


def difference(values: Sequence[float]) -> Difference:
    """Of the differences of n seeds.

    Raises:
        ValueError: without any.
    """
    if not values:
        raise ValueError("a difference needs at least one pair of runs")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Difference(n, mean, math.nan, math.nan)
    half = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)


def verdict(found: Difference | None, margin: float = 0.0) -> str:
    """On the claim that the difference lies above `margin`; None stands for no runs at all."""
    if found is None or found.n < MIN_RUNS:
        return NOT_ENOUGH
    if found.low > margin:
        return SHOWN
    return CONTRADICTED if found.high < margin else NOT_SHOWN


def combined(verdicts: Iterable[str]) -> str:
    """On a claim, from the verdicts on its primary rows."""
    found = set(verdicts)
    if NOT_ENOUGH in found or not found:
        return NOT_ENOUGH
    if CONTRADICTED in found:
        return CONTRADICTED
    return SHOWN if found == {SHOWN} else NOT_SHOWN
