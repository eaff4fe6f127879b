"""Timing contenders against each other: in turns, so that whatever slows the machine down slows all of them."""

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd
import torch

SHORTEST_SAMPLE_MS = 20  # shorter calls are timed several at once
WARM_UP_SECONDS = 0.1


@dataclass(frozen=True)
class Contender:
    """One of the things that a group compares.

    Args:
        call: what is timed.
        batch: images that one call works on; contenders are compared by the time per image.
        prepare: called, untimed, before `call` comes to its turn.
        facts: go into the row of the results as they are.
    """

    name: str
    call: Callable[[], object]
    batch: int
    prepare: Callable[[], object] = lambda: None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Clock(Protocol):
    """Times calls; a reading may be asked for its milliseconds only after `finish`."""

    def time(self, call: Callable[[], object], repeats: int) -> Callable[[], float]: ...

    def finish(self) -> None: ...


class HostClock:
    """For calls that return when they are done."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def time(self, call: Callable[[], object], repeats: int) -> Callable[[], float]:
        started = self._now()
        for _ in range(repeats):
            call()
        milliseconds = (self._now() - started) * 1000
        return lambda: milliseconds

    def finish(self) -> None:
        pass


class CudaClock:
    """Events in the stream, so that timing waits for nothing; the host waits once, in `finish`."""

    def time(self, call: Callable[[], object], repeats: int) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        return lambda: start.elapsed_time(end)

    def finish(self) -> None:
        torch.cuda.synchronize()


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()


def warm_up(contender: Contender, clock: Clock) -> int:
    """Call until caches, allocators and compilers are warm; returns how many calls make one sample long enough."""
    contender.prepare()
    contender.call()
    until = time.perf_counter() + WARM_UP_SECONDS
    while True:
        reading = clock.time(contender.call, 1)
        clock.finish()
        if time.perf_counter() > until:
            return max(1, math.ceil(SHORTEST_SAMPLE_MS / max(reading(), 1e-3)))


def interleave(
    contenders: Sequence[Contender],
    repeats: Sequence[int],
    rounds: int,
    clock: Clock,
    after_sample: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """Time every contender once per round; each round starts one contender further on.

    Args:
        repeats: for each contender, the number of consecutive calls in one sample.

    Returns:
        Milliseconds of one call: a row per round, a column per contender.
    """
    turns = list(zip(contenders, repeats, strict=True))
    readings: list[dict[str, Callable[[], float]]] = []
    with _no_garbage_collection():
        for first in itertools.islice(itertools.cycle(range(len(turns))), rounds):
            taken = {}
            for contender, times in turns[first:] + turns[:first]:
                contender.prepare()
                taken[contender.name] = clock.time(contender.call, times)
                after_sample()
            readings.append(taken)
        clock.finish()
    samples: pd.DataFrame = pd.DataFrame(
        {contender.name: [taken[contender.name]() / times for taken in readings] for contender, times in turns}
    )
    samples.index.name = "round"
    return samples


def summarize(
    samples: pd.DataFrame,
    contenders: Sequence[Contender],
    reference: str,
    baseline: str,
    without: str | None = None,
) -> list[dict[str, Any]]:
    """One record per contender, with medians and the quartiles `_q25` and `_q75` over the rounds.

    Args:
        samples: from `interleave`.
        reference: `ratio` is the time per image in units of this contender's, formed within each round.
        baseline: `speed_up` is this contender's time per image over that of the row, formed within each round.
        without: where there is one, `added` is the milliseconds beyond this contender's, and `added_ratio` that in
            units of what the reference adds, both formed within each round.
    """
    per_image = samples / pd.Series({contender.name: contender.batch for contender in contenders})
    measures = {
        "ms": samples,
        "ratio": per_image.div(per_image[reference], axis=0),
        "speed_up": per_image.rdiv(per_image[baseline], axis=0),
    }
    if without is not None:
        measures["added"] = samples.sub(samples[without], axis=0)
        measures["added_ratio"] = measures["added"].div(measures["added"][reference], axis=0)
    records = []
    for contender in contenders:
        record: dict[str, Any] = {"contender": contender.name, "batch": contender.batch}
        for measure, values in measures.items():
            for suffix, quantile in (("", 0.5), ("_q25", 0.25), ("_q75", 0.75)):
                record[measure + suffix] = float(values[contender.name].quantile(quantile))
        record["images_per_s"] = 1000 * contender.batch / record["ms"]
        records.append(record | {"rounds": len(samples)} | dict(contender.facts))
    return records


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
