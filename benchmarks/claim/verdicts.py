"""From differences, one per seed, to an interval and a verdict: the rule of docs/claims-rule.md."""

from collections.abc import Iterable

from clip_intervals import Difference

MIN_RUNS = 5
SHOWN, NOT_SHOWN, CONTRADICTED, NOT_ENOUGH = "shown", "not shown", "contradicted", "not enough runs"


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


def in_a_sentence(word: str) -> str:
    """Behind "the claim is"."""
    return "not decided: not enough runs" if word == NOT_ENOUGH else word
