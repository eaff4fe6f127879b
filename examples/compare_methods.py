"""CLIP, FLIP and GLIP side by side on data of your own: the notebook's experiment as a command.

    python examples/compare_methods.py --train "shards/train-{0000..0009}.tar" --test shards/test.tar
    python examples/compare_methods.py --train torchvision:CIFAR10 --test torchvision:CIFAR10
    python examples/compare_methods.py --train images/train --test images/val --seeds 0 1 2 --config.mask-ratio 0.5

It prints the result table and leaves in `--output`: `results.csv` (a row per run), `curves.csv`, `curves.png` and
`results.md` (the table, with the setting, the versions and the machine). `--help` shows every option.
"""

import os
import platform
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import open_clip
import timm
import torch
import tyro
from clip_data import load
from clip_step import METHODS
from clip_training import Config, compare, plot_curves, summarize
from user_errors import one_line, setting_up

import gaussmask


def main(
    train: str,
    test: str,
    config: Config,
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0,),
    limit: int | None = None,
    output: Path = Path("build/compare"),
) -> None:
    """Train and evaluate every method with every seed.

    Args:
        train: training data: an image folder, WebDataset shards (path, URL, braces), or torchvision:NAME.
        test: test data with class labels, likewise.
        config: of the model and the training.
        methods: any of clip, flip, glip.
        seeds: of the initial weights, the batches and the masks.
        limit: read at most so many images of each split.
        output: folder for the results.
    """
    mpl.use("Agg")
    with setting_up():
        train_data = load(train, image_size=config.image_size, train=True, limit=limit)
        test_data = load(test, image_size=config.image_size, train=False, limit=limit)
    results, curves = compare(train_data, test_data, config, methods=methods, seeds=seeds)
    output.mkdir(parents=True, exist_ok=True)
    results.to_csv(output / "results.csv", index=False)
    curves.to_csv(output / "curves.csv", index=False)
    plot_curves(curves).savefig(output / "curves.png", dpi=120)
    table = summarize(results)
    (output / "results.md").write_text(
        f"{table.to_markdown()}\n\n{len(train_data)} training and {len(test_data)} test images; seeds {list(seeds)}; "
        f"{asdict(config)}; gaussmask {gaussmask.__version__}, torch {torch.__version__}, timm {timm.__version__}, "
        f"open_clip {open_clip.__version__}, Python {platform.python_version()}; {device_name(config.device)}\n"
    )
    print(f"\n{table.to_string()}\n\nleft in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def device_name(device: str) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.backends.cpu.get_cpu_capability()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    with one_line("compare_methods.py"):
        tyro.cli(main)
