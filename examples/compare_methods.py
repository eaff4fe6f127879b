"""Which mask for your images? Every method on data of your own, several seeds each, in the time that you give it.

    python examples/compare_methods.py --train "shards/train-{0000..0009}.tar" --test shards/test.tar --minutes 20
    python examples/compare_methods.py --train images/train --test images/val --minutes 60 --config.mask-ratio 0.5
    python examples/compare_methods.py --train torchvision:CIFAR10 --test torchvision:CIFAR10 --minutes 20
    python examples/compare_methods.py --train images/train --test images/val --methods clip flip glip --config.epochs 4

It ends with a table and a sentence: which mask to take, or that these runs can show no difference. In `--output` it
leaves `results.csv` (a row per run), `curves.csv` and `curves.png`, anew after every run, and `results.md` (the table
and the sentence, with the setting, the versions and the machine). `--help` shows every option.
"""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import open_clip
import timm
import torch
import tyro
from clip_comparison import EVERY_METHOD, advice, compare_on, fastest, fit_into, reference_of, table
from clip_data import load
from clip_evaluation import score_for
from clip_intervals import CONFIDENCE
from clip_step import make_drop
from clip_training import Config, build_model, plot_curves
from matplotlib import pyplot as plt
from user_errors import UserError, one_line, setting_up

import gaussmask

if TYPE_CHECKING:
    import pandas as pd


def main(
    train: str,
    test: str,
    config: Config,
    methods: tuple[str, ...] = EVERY_METHOD,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    minutes: float | None = None,
    limit: int | None = None,
    output: Path = Path("build/compare"),
) -> None:
    """Train and evaluate every method with every seed: zero-shot where the test data has classes, else retrieval.

    All methods train with as many operations: without a mask on fewer images.

    Args:
        train: training data: an image folder, WebDataset shards (path, URL, braces), or torchvision:NAME.
        test: test data, likewise.
        config: of the model and the training.
        methods: any of clip (no mask), flip (random), glip (Gaussian), weighted (Gaussian, drawn by weight), grid,
            block, cluster.
        seeds: of the initial weights, the batches and the masks. Intervals want five.
        minutes: that all runs together shall take; it sets config.epochs, and config.tuning-epochs to a tenth of them.
        limit: read at most so many images of each split.
        output: folder for the results.
    """
    mpl.use("Agg")
    with setting_up():
        check(config, methods, seeds, minutes)
        train_data = load(train, image_size=config.image_size, train=True, limit=limit)
        test_data = load(test, image_size=config.image_size, train=False, limit=limit)
    if len(train_data) < config.batch_size:
        count = f"train has {len(train_data)} images, and a batch takes {config.batch_size}"
        raise UserError(f"{count}: give a smaller --config.batch-size")
    score = score_for(test_data)
    if minutes is not None:
        config, speed = fastest(train_data, test_data, config, score)
        config = fit_into(minutes, speed, config, methods, len(seeds), len(train_data), len(test_data))
        print(
            f"{len(seeds) * len(methods)} runs of {config.epochs:.3g} passes and {config.tuning_epochs:.3g} of tuning"
        )
    output.mkdir(parents=True, exist_ok=True)

    def save(results: "pd.DataFrame", curves: "pd.DataFrame") -> None:
        results.to_csv(output / "results.csv", index=False)
        curves.to_csv(output / "curves.csv", index=False)
        figure = plot_curves(curves, score=score.name)
        figure.savefig(output / "curves.png", dpi=120)
        plt.close(figure)

    results, _ = compare_on(
        train_data, test_data, config, score, methods=methods, seeds=seeds, minutes=minutes, save=save
    )
    blind = score.blind(test_data)
    rows, sentence = table(results), advice(results, blind)
    how = (
        f"{score.name} in percent; differences to {reference_of(results)} with the same seed, and intervals that all "
        f"hold at once with {CONFIDENCE:.0%}. All methods took as many operations. {blind:.1f} can be had without "
        "looking at the images."
    )
    setting = [
        f"{len(train_data)} training and {len(test_data)} test images; seeds {list(seeds)}; {asdict(config)}",
        f"gaussmask {gaussmask.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        f"open_clip {open_clip.__version__}, Python {platform.python_version()}; {device_name(config.device)}",
    ]
    text = f"{sentence}\n\n{rows.to_markdown(disable_numparse=True)}\n\n{how} {', '.join(setting)}\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{rows.to_string()}\n\n{how}\n{sentence}\n")
    print(f"left in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def check(config: Config, methods: Sequence[str], seeds: Sequence[int], minutes: float | None) -> None:
    """Raise before the data is read, and not after the runs."""
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"{name} must be one or more, each of them once, got {' '.join(map(str, values)) or 'none'}"
            )
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"minutes must be a number above 0, got {minutes:g}")
    for method in methods:
        make_drop(method, config.mask_ratio, sigma=config.sigma, sampling=config.sampling)
    if config.width % config.head_width:
        raise UserError(f"config.width must be a multiple of config.head-width={config.head_width}, got {config.width}")
    build_model(config)


def device_name(device: str) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.backends.cpu.get_cpu_capability()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    with one_line("compare_methods.py"):
        tyro.cli(main)
