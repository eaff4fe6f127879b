"""Measure what dropping patches costs and saves, on the machine at hand.

    python benchmarks/run.py
    python benchmarks/run.py --parts step --models vit_base_patch16_224 --modes eager --rounds 20
    python benchmarks/run.py --quick

It leaves in `--output`: `results.json` (written after every group, so that an interrupted run loses nothing),
`results.md` (the tables) and plots. `--help` shows every option, benchmarks/README.md says what is measured.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from measure.machine import head_of_results
from measure.precision import choose_dtype
from part import clip, layer, loader, overhead, sizes, step
from part.groups import Group, in_words, run_group
from report import failures, save_report
from written.files import save


@dataclass(frozen=True)
class Config:
    """What to measure, and how often.

    Args:
        parts: any of layer (the drop by itself), overhead (what it adds to a forward that has little else to do), step
            (a training step of a ViT), clip (CLIP training) and loader (images that one core delivers for it), in the
            order in which they are named.
        ratios: shares of the patches that are dropped.
        modes: of part step: eager, compiled.
        layer_modes: of part layer, likewise.
        stages: of the drop in parts overhead, step and clip: tokens, pixels.
        caption_tokens: of part clip: lengths of the captions beside a mask; whole ones if none is named.
        models: of part step; all of them if none is named.
        unmasked: whether part step times the step on all patches too, which takes longer than all others together.
        dtype: of parts step and clip: float32, bfloat16 (autocast), or auto for the faster of the two on this device.
        rounds: of parts step and clip. Every contender is timed once per round.
        layer_rounds: of parts layer, overhead and loader, whose calls are short.
        photos: shards that part loader reads, instead of stand-ins that it makes.
        beside: results.json of another machine, whose part clip tells how many images per second a model takes; by
            default that of this run.
        memory_budget: GiB that part clip may fill with weights, gradients, moments and activations on a CPU; on a GPU
            it takes nine tenths of the free memory, or less where that does not fit after all.
        minutes: after which no further group is begun; what is left out is said. None is no limit.
        seed: of weights, inputs and masks.
        quick: tiny models and batches and few rounds, in eager mode: shows that everything runs, and measures nothing.
        output: folder for the results.
    """

    parts: tuple[str, ...] = ("layer", "overhead", "step", "clip", "loader")
    ratios: tuple[float, ...] = (0.5, 0.75, 0.918)
    modes: tuple[str, ...] = ("eager", "compiled")
    layer_modes: tuple[str, ...] = ("eager",)
    stages: tuple[str, ...] = ("tokens", "pixels")
    caption_tokens: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    unmasked: bool = True
    dtype: str = "auto"
    rounds: int = 4
    layer_rounds: int = 15
    photos: str | None = None
    beside: Path | None = None
    memory_budget: float = 5.0
    minutes: float | None = None
    seed: int = 0
    quick: bool = False
    output: Path = Path("build/benchmarks")
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    def __post_init__(self) -> None:
        known = {
            "parts": ("layer", "overhead", "step", "clip", "loader"),
            "modes": ("eager", "compiled"),
            "layer_modes": ("eager", "compiled"),
            "stages": ("tokens", "pixels"),
            "dtype": ("auto", "float32", "bfloat16"),
        }
        for name, choices in known.items():
            value = getattr(self, name)
            for choice in (value,) if isinstance(value, str) else value:
                if choice not in choices:
                    raise ValueError(f"{name} must be of {', '.join(choices)}, got {choice!r}")


def quick(config: Config) -> Config:
    """The same parts and stages as `config` in under a minute."""
    once = ("eager",)
    small = replace(config, ratios=(0.5, 0.918), modes=once, layer_modes=once, models=())
    return replace(small, rounds=2, layer_rounds=2, memory_budget=0.005)


def main(config: Config) -> None:
    """Measure, group by group, and write the report."""
    if config.quick:
        config = quick(config)
    size = sizes.QUICK if config.quick else sizes.CUDA if config.device == "cuda" else sizes.CPU
    config.output.mkdir(parents=True, exist_ok=True)
    dtype, reason = choose_dtype(config.dtype, config.device)
    results: dict[str, Any] = {
        **head_of_results(config.device, dtype, reason, config.seed),
        "config": asdict(config) | {"output": config.output.name, "beside": config.beside and config.beside.name},
        "beside": trainer(config.beside),
        "rows": [],
        "cuda": [],
        "left_out": [],
    }
    until = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    groups = plan(config, size, dtype)
    layout = "{l_bar}{bar}| {elapsed}, {remaining} left"
    total = sum(group.seconds for group in groups)
    with tqdm(total=total, file=sys.stdout, bar_format=layout) as bar:

        def advance(seconds: float) -> None:
            bar.update(min(seconds, total - bar.n))  # sums of floats may pass the total

        for group in groups:
            if time.monotonic() > until:
                results["left_out"].append(str(group))
                continue
            bar.set_description(str(group))
            results["rows"] += run_group(group, device=config.device, seed=config.seed, advance=advance)
            save(results, config.output / "results.json")
    if config.device == "cuda" and "layer" in config.parts:
        from part.drop_on_cuda import check_drop

        for mask_ratio in tqdm(config.ratios, desc="the drop on the GPU", file=sys.stdout):
            if time.monotonic() > until:
                results["left_out"].append(f"the drop on the GPU at {mask_ratio}")
                continue
            try:
                results["cuda"].append(check_drop(size, mask_ratio, dtype, config.rounds))
            except Exception as error:  # as in a group
                results["rows"].append(
                    {"part": "the drop on the GPU", "mask_ratio": mask_ratio, "failed": in_words(error)}
                )
            save(results, config.output / "results.json")
    save(results, config.output / "results.json")
    save_report(results, config.output)
    for line in failures(results):
        print(f"not measured: {line}")
    print(f"left in {config.output}: {', '.join(sorted(path.name for path in config.output.iterdir()))}")


def plan(config: Config, size: sizes.Sizes, dtype: torch.dtype) -> list[Group]:
    """All groups, in the order in which they are measured."""
    if config.models:
        size = replace(size, step=tuple(model for model in size.step if model.name in config.models))
    budget_mib = None if config.device == "cuda" else config.memory_budget * 1024
    ratios, device = config.ratios, config.device
    rounds, layer_rounds = config.rounds, config.layer_rounds
    training: dict[str, Any] = {"ratios": ratios, "stages": config.stages, "device": device, "dtype": dtype}
    training["rounds"] = rounds
    short: dict[str, Any] = {"ratios": ratios, "device": device, "rounds": layer_rounds}
    parts: dict[str, Callable[[], list[Group]]] = {
        "layer": lambda: layer.groups(size, **short, modes=config.layer_modes),
        "overhead": lambda: overhead.groups(**short, stages=config.stages),
        "step": lambda: step.groups(size, **training, modes=config.modes, unmasked=config.unmasked),
        "clip": lambda: clip.groups(size, **training, caption_tokens=config.caption_tokens, budget_mib=budget_mib),
        "loader": lambda: loader.groups(size, photos_at=config.photos, device=device, rounds=layer_rounds),
    }
    return [group for part in config.parts for group in parts[part]()]


def trainer(file: Path | None) -> dict[str, Any] | None:
    """The rows of part clip of other results, and the machine."""
    if file is None:
        return None
    other = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for row in other["rows"] if row["part"] == "clip" and "failed" not in row]
    return {"machine": other["machine"], "rows": rows}


if __name__ == "__main__":
    main(tyro.cli(Config))
