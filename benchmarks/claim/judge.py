"""From rows and results to differences with an interval and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clip_intervals import CONFIDENCE, Difference, difference

from claim.compute import CHOICE_SEEDS as RATE_SEEDS
from claim.design import Claim, Results, Row
from claim.masks import CHOICE_SEEDS as CLUSTER_SEEDS
from claim.masks import CONFIRMING_SEEDS
from claim.verdicts import verdict

UNKNOWN = "–"  # in a cell


@dataclass(frozen=True)
class Judged:
    """A row with what came out.

    Args:
        sides: mean figures of the two runs of the pairs, over those seeds that have both.
        found: None without a seed that has both.
        passes: how often a training image was seen.
    """

    row: Row
    sides: tuple[float, float] | None = None
    found: Difference | None = None
    passes: float | None = None

    @property
    def verdict(self) -> str:
        return verdict(self.found, self.row.margin)


def judge(claim: Claim, results: Results) -> list[Judged]:
    """Every row of a claim, on the claim's own seeds, or on all those that no claim has for itself."""
    of_others = {*CLUSTER_SEEDS, *CONFIRMING_SEEDS, *RATE_SEEDS}
    seeds = claim.seeds or sorted({run.seed for run in results} - of_others)
    return [_judge(row, results, seeds) for row in claim.rows]


def _judge(row: Row, results: Results, seeds: Sequence[int]) -> Judged:
    firsts, seconds = [], []
    for seed in seeds:
        first, second = (_mean_figure(row, side, seed, results) for side in (0, 1))
        if first is not None and second is not None:
            firsts.append(first)
            seconds.append(second)
    if not firsts:
        return Judged(row)
    sides = (sum(firsts) / len(firsts), sum(seconds) / len(seconds))
    passes = next(known["passes"] for run, known in results.items() if replace(run, seed=0) == row.pairs[0][0])
    confidence = 1 - (1 - CONFIDENCE) / row.comparisons
    found = difference([a - b for a, b in zip(firsts, seconds, strict=True)], confidence)
    return Judged(row, sides, found, passes)


def _mean_figure(row: Row, side: int, seed: int, results: Results) -> float | None:
    """Over pairs and figures, of one side of the pairs; None if one of them is missing."""
    values = []
    for pair in row.pairs:
        known = results.get(replace(pair[side], seed=seed), {})
        values += [known.get(figure) for figure in row.figures]
    complete = [value for value in values if value is not None]
    return sum(complete) / len(values) if len(complete) == len(values) else None


def name_of(row: Row) -> str:
    return ", ".join(row.labels.values())


def interval(found: Difference | None, digits: int = 2) -> str:
    """As text, with a sign; points."""
    if found is None:
        return UNKNOWN
    middle, low, high = (f"{value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return middle if found.n == 1 else f"{middle} [{low}, {high}]"
