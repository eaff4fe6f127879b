"""A group is what is compared with each other: built, warmed up, weighed, timed in turns, and torn down again."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure.memory import peak_mib
from measure.timing import Contender, HostClock, clock_for, interleave, summarize, warm_up

WARM_UP_ROUNDS = 3  # that the calls before the timing cost, roughly, with the one that measures memory
EVERY_CONTENDER = "every contender"  # in the row of a group that could not be built
COMPILE_SECONDS = 20.0  # that compiling one contender costs, roughly


@dataclass(frozen=True)
class Group:
    """Contenders for the same job.

    Args:
        keys: what tells this group from the others; they are part of every row of the results.
        build: makes the contenders. Called when the group comes to its turn, because models are large.
        reference, baseline, without: contenders, see `measure.timing.summarize`.
        round_seconds: what a round may cost on 2 CPU cores; only the progress bar depends on it.
        compiles: number of contenders to be compiled; likewise.
        one_core: on one thread, of which the time is taken that it computes, and not the time that it waits for others.
    """

    keys: Mapping[str, Any]
    build: Callable[[], Sequence[Contender]]
    reference: str
    baseline: str
    rounds: int
    round_seconds: float
    compiles: int = 0
    without: str | None = None
    one_core: bool = False

    @property
    def seconds(self) -> float:
        return self.round_seconds * (self.rounds + WARM_UP_ROUNDS) + self.compiles * COMPILE_SECONDS

    def __str__(self) -> str:
        return " ".join(str(value) for value in self.keys.values())


def run_group(group: Group, *, device: str, seed: int, advance: Callable[[float], object]) -> list[dict[str, Any]]:
    """Measure a group.

    Args:
        seed: set before the group is built: of weights, inputs and masks.
        advance: told now and then how many of the group's seconds have passed.

    Returns:
        A row per contender. One that fails, for lack of memory say, is a row with the reason in `failed`, and the
        others go on without it; if it is what they are compared with, or if the group as a whole fails, all rows are.
    """
    rows: list[dict[str, Any]] = []
    names = [EVERY_CONTENDER]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if group.one_core else threads)
        torch.manual_seed(seed)
        contenders = list(group.build())
        names = [contender.name for contender in contenders]
        rows += _measure(group, contenders, device, advance)
    except Exception as error:  # whatever it is: the groups behind it are measured all the same
        failed = in_words(error)
        rows = [{**group.keys, "contender": name, "failed": failed} for name in names]
    finally:
        contenders = []
        torch.set_num_threads(threads)
        _free()
    return rows


def _measure(
    group: Group, contenders: list[Contender], device: str, advance: Callable[[float], object]
) -> list[dict[str, Any]]:
    clock = HostClock(time.process_time) if group.one_core else clock_for(device)
    before_timing = (group.seconds - group.round_seconds * group.rounds) / len(contenders)
    running: list[Contender] = []
    repeats, peaks, rows = [], [], []
    for contender in contenders:
        try:
            times, peak = warm_up(contender, clock), peak_mib(contender.call, device)
        except Exception as error:
            if contender.name in {group.reference, group.baseline, group.without}:
                raise RuntimeError(f"{contender.name}, which the others are compared with: {in_words(error)}") from None
            rows.append({**group.keys, "contender": contender.name, "failed": in_words(error)})
        else:
            running.append(contender)
            repeats.append(times)
            peaks.append(peak)
        advance(before_timing)
    per_sample = group.round_seconds / len(contenders)
    samples = interleave(running, repeats, group.rounds, clock, lambda: advance(per_sample))
    records = summarize(samples, running, group.reference, group.baseline, group.without)
    named = {**group.keys, "reference": group.reference, "baseline": group.baseline}
    rows += [named | record | {"peak_mib": peak} for record, peak in zip(records, peaks, strict=True)]
    return rows


def in_words(error: Exception) -> str:
    """A line, without the frames, which would keep what they hold from being freed."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _free() -> None:
    """Models refer to themselves in circles, and compiled code outlives them."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
