"""Draw the pictures of docs/method.md into docs/method/.

python docs/draw_method.py
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from draw_masks import GRID, draw_mask, load_photo
from measure.arithmetic import Tower, clip_ceiling
from plot_style import DPI, GREY, STYLE, WIDTH

import gaussmask
from gaussmask.functional import num_kept_patches

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-clip.json"
FOLDER = Path(__file__).parent / "method"
RULES = {  # of the README's table
    "random: FLIP": gaussmask.RandomPatchDropout(0.75),
    "Gaussian: GLIP": gaussmask.GaussianPatchDropout(0.75),
    "Gaussian, weighted": gaussmask.GaussianPatchDropout(0.75, sampling="weighted"),
    "cluster": gaussmask.ClusterPatchDropout(0.75),
    "grid": gaussmask.GridPatchDropout(0.75),
    "block": gaussmask.BlockPatchDropout(0.75),
}
RATIOS = (0.5, 0.75, 0.918)
RARELY = 1e-3
SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
IMAGE = Tower(197, 768, 12, 196, 768)  # ViT-B/16
TEXT = Tower(77, 512, 12)  # of CLIP


def main() -> None:
    """Draw all of them."""
    mpl.use("Agg")
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw().savefig(FOLDER / f"{name}.png", dpi=DPI)


def rules() -> Figure:
    """One photo under each rule."""
    figure = gaussmask.plot.compare_drops(load_photo()[0], RULES, seed=1)
    figure.set_size_inches(WIDTH, 3.9)
    return _with_readable_titles(figure)


def frequencies() -> Figure:
    """How often each patch of the photo is kept."""
    torch.manual_seed(0)
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 4.6), layout="constrained")
    image = load_photo() / 127.5 - 1
    for axis, (name, drop) in zip(axes.flat, RULES.items(), strict=True):
        gaussmask.plot.keep_probability(drop, GRID, images=image, draws=2000, ax=axis)
        axis.images[0].colorbar.remove()
        axis.set_title(name)
    figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.6, label="share of the draws in which a patch is kept")
    return _with_readable_titles(figure)


def sigma() -> Figure:
    """How often each patch is kept, by sigma and ratio; below, weighted sampling."""
    settings = [(ratio, "additive") for ratio in RATIOS] + [(RATIOS[-1], "weighted")]
    figure, axes = plt.subplots(4, len(SIGMAS), figsize=(WIDTH, 6.4), layout="constrained")
    for row, (ratio, sampling) in zip(axes, settings, strict=True):
        for axis, variance in zip(row, SIGMAS, strict=True):
            gaussmask.plot.keep_probability(GRID, ratio, sigma=variance, sampling=sampling, ax=axis)
            axis.images[0].colorbar.remove()
            rarely = (
                (gaussmask.keep_probability(GRID, ratio, sigma=variance, sampling=sampling) < RARELY).float().mean()
            )
            axis.set_title(f"σ = {variance:g}" if axis in axes[0] else "")
            axis.set_xlabel(f"{100 * rarely:.0f} % hatched" if rarely else "", fontsize="small")
        row[0].set_ylabel(f"{100 * ratio:g} % dropped,\n{sampling}", fontsize="small")
    colors = figure.colorbar(axes[0, 0].images[0], ax=axes, location="bottom", shrink=0.5, aspect=40)
    colors.set_label("how often a patch is kept (hatched: less than once in a thousand images)")
    return _with_readable_titles(figure)


def photos() -> Figure:
    """One photo under masks of each sigma."""
    torch.manual_seed(3)
    photo = load_photo()
    drops = [("random", gaussmask.RandomPatchDropout(0.75))]
    drops += [(f"σ = {variance:g}", gaussmask.GaussianPatchDropout(0.75, variance)) for variance in SIGMAS]
    masks = torch.cat([draw_mask(drop) for _, drop in drops])
    figure = gaussmask.plot.masked_images(
        photo.expand(len(drops), -1, -1, -1), masks, titles=[name for name, _ in drops], columns=len(drops)
    )
    figure.set_size_inches(WIDTH, 1.5)
    return _with_readable_titles(figure)


def _with_readable_titles(figure: Figure) -> Figure:
    figure.set_layout_engine("constrained", h_pad=0.1)
    for axis in figure.axes:
        axis.title.set_fontsize(9.5)
    return figure


def cost() -> Figure:
    """Arithmetic of a ViT-B/16 and of the whole CLIP, and the speed-up that is measured."""
    ratios = np.linspace(0, 0.95, 96)
    kept = [num_kept_patches(196, ratio) for ratio in ratios]
    tower = [Tower(1 + count, 768, 12, 196, 768).flops / IMAGE.flops for count in kept]
    ceiling = [clip_ceiling(IMAGE, TEXT, dropped=196 - count, stage="tokens") for count in kept]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.0), layout="constrained")
    left.plot(ratios, tower, label="image tower")
    left.plot(ratios, [1 / value for value in ceiling], label="image and text tower")
    left.set(xlabel="share of patches dropped", ylabel="operations, 1 without a mask", ylim=(0, 1.02))
    left.legend()
    right.plot(ratios, ceiling, color=GREY, linewidth=1.2, label="at best, counted")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [row for row in results["rows"] if row["contender"] == "gaussmask pixels"]
    right.plot([row["mask_ratio"] for row in rows], [row["speed_up"] for row in rows], "o", label="measured on a CPU")
    right.set(xlabel="share of patches dropped", ylabel="times the images per second")
    right.legend()
    return figure


def unreachable() -> Figure:
    """Share of the patches that are hardly ever kept, over sigma. Ratios with the same line share one."""
    variances = np.geomspace(0.02, 2, 25)
    ratios: dict[tuple[float, ...], list[str]] = {}
    for ratio in (0.95, 0.918, 0.85, 0.75, 0.5):
        chances = [gaussmask.keep_probability(GRID, ratio, sigma=variance) for variance in variances]
        rarely = tuple(100 * (chance < RARELY).float().mean().item() for chance in chances)
        ratios.setdefault(rarely, []).append(f"{ratio:g}")
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for rarely, names in ratios.items():
        axes.plot(variances, rarely, marker=".", label=f"{' and '.join(names)} dropped")
    axes.axvline(0.2, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        xlabel="sigma (dotted: the authors' 0.2)",
        ylabel="% of the patches, kept less\nthan once in a thousand",
    )
    ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.legend()
    return figure


PICTURES = {
    "rules": rules,
    "frequencies": frequencies,
    "sigma": sigma,
    "photos": photos,
    "cost": cost,
    "unreachable": unreachable,
}

if __name__ == "__main__":
    main()
