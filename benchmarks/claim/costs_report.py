"""Claim C2 from its records: verdicts, table and plot. Its seeds are the rounds in which all contenders took turns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from clip_intervals import Difference, difference
from matplotlib.figure import Figure
from plot_style import GREY, WIDTH
from written.tables import markdown

from claim.costs import BASELINE
from claim.design import RATIO, RATIOS, Claim, Setting
from claim.records import Record, costs_of
from claim.verdicts import CONTRADICTED, NOT_ENOUGH, SHOWN, combined, in_a_sentence, verdict

COSTS = Claim("C2", "It costs no more than FLIP", [], ("GLIP", "FLIP"))
SPEED_MARGIN, MEMORY_LIMIT = math.log(0.97), 1.03


@dataclass(frozen=True)
class Cost:
    """What one model costs at one ratio; logarithms of ratios of images per second.

    Args:
        speed: of GLIP to FLIP.
        memory: peak of GLIP over that of FLIP.
        speed_ups: of FLIP and of GLIP over CLIP.
        ceiling: of the two, by the arithmetic.
    """

    model: str
    batch: int
    mask_ratio: float
    speed: Difference
    memory: float
    speed_ups: tuple[Difference, Difference]
    ceiling: float

    @property
    def verdict(self) -> str:
        by_speed = verdict(self.speed, SPEED_MARGIN)
        if by_speed == NOT_ENOUGH:
            return by_speed
        return combined([by_speed, SHOWN if self.memory < MEMORY_LIMIT else CONTRADICTED])


def judge_costs(records: Sequence[Record], setting: Setting) -> list[Cost]:
    """Every model at every ratio, from its latest measurement."""
    found = []
    for name in setting.cost_models:
        record = costs_of(records, name, setting)
        if record is None:
            continue
        milliseconds, peaks = record["milliseconds"], record["peak_mib"]

        def faster(one: str, other: str, times: dict[str, list[float]] = milliseconds) -> Difference:
            return difference([math.log(b / a) for a, b in zip(times[one], times[other], strict=True)])

        for ratio in RATIOS:
            flip, glip = f"flip {ratio:g}", f"glip {ratio:g}"
            speed_ups = (faster(flip, BASELINE), faster(glip, BASELINE))
            memory = peaks[glip] / peaks[flip]
            ceiling = record["ceiling"][flip]
            found.append(Cost(name, record["batch"], ratio, faster(glip, flip), memory, speed_ups, ceiling))
    return found


def costs_text(records: Sequence[Record], setting: Setting) -> str:
    costs = judge_costs(records, setting)
    if not costs:
        return "Not measured."
    cells = [
        {
            "verdict": f"**{cost.verdict}**" if cost.mask_ratio == RATIO else cost.verdict,
            "model": f"{cost.model}, batch {cost.batch}",
            "ratio": f"{cost.mask_ratio:g}",
            "images/s, GLIP / FLIP (95 %)": times(cost.speed),
            "peak memory, GLIP / FLIP": f"{cost.memory:.3f}",
            "speed-up of FLIP over CLIP": times(cost.speed_ups[0], 2),
            "of GLIP": times(cost.speed_ups[1], 2),
            "ceiling": f"{cost.ceiling:.2f}",
            "n": str(cost.speed.n),
        }
        for cost in costs
    ]
    primary = [cost for cost in costs if cost.mask_ratio == RATIO]
    rows = "; ".join(f"{cost.model}: {times(cost.speed)}, memory {cost.memory:.3f}, {cost.verdict}" for cost in primary)
    said = in_a_sentence(combined(cost.verdict for cost in primary))
    return f"**{COSTS.name} is {said}.** {rows}.\n\n{markdown(pd.DataFrame(cells))}"


def costs_summary_row(records: Sequence[Record], setting: Setting) -> dict[str, str]:
    primary = [cost for cost in judge_costs(records, setting) if cost.mask_ratio == RATIO]
    said = "; ".join(f"{cost.model}: {times(cost.speed)} of FLIP's images/s" for cost in primary)
    return {
        "verdict": f"**{combined(cost.verdict for cost in primary)}**",
        "claim": f"{COSTS.name} {COSTS.title[0].lower()}{COSTS.title[1:]}",
        "primary rows: difference in points (95 %)": said,
    }


def times(found: Difference, digits: int = 3) -> str:
    """A ratio, from its logarithm."""
    middle, low, high = (f"{math.exp(value):.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{middle}× [{low}, {high}]"


def plot_costs(costs: Sequence[Cost]) -> Figure:
    """Speed-ups over CLIP, with the ceiling."""
    models = list(dict.fromkeys(cost.model for cost in costs)) or [""]
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = [cost for cost in costs if cost.model == model]
        for side, (name, shift) in enumerate((("FLIP", -0.2), ("GLIP", 0.2))):
            middle = [math.exp(cost.speed_ups[side].mean) for cost in own]
            low = [value - math.exp(cost.speed_ups[side].low) for value, cost in zip(middle, own, strict=True)]
            high = [math.exp(cost.speed_ups[side].high) - value for value, cost in zip(middle, own, strict=True)]
            axes.bar(
                [place + shift for place in range(len(own))],
                middle,
                0.38,
                yerr=[low, high],
                label=name,
                capsize=2,
                ecolor=GREY,
            )
        for place, cost in enumerate(own):
            axes.hlines(cost.ceiling, place - 0.4, place + 0.4, color=GREY)
        axes.set_xticks(range(len(own)), [f"{cost.mask_ratio:g}" for cost in own])
        axes.set(title=model, xlabel="share of patches dropped")
    figure.axes[0].set_ylabel("times CLIP's images per second")
    figure.axes[0].plot([], color=GREY, label="at best, by the arithmetic")
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure
