"""Draw the picture of the README: one scene, masked by FLIP and by GLIP, and how often each patch is kept.

python examples/draw_masks.py
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import tyro
from captioned_scenes import make_scenes

import gaussmask

GRID = (14, 14)  # of a ViT-B/16 at 224 pixels


def main(
    output: Path = Path("examples/masks.png"), mask_ratio: float = 0.75, sigma: float = 0.2, seed: int = 7
) -> None:
    """Draw it.

    Args:
        output: the PNG to write.
        mask_ratio: share of the patches that is dropped.
        sigma: variance of the Gaussian.
        seed: of the scene and the masks.
    """
    mpl.use("Agg")
    torch.manual_seed(seed)
    scene = make_scenes(1, image_size=224, centering=0.8, num_distractors=4, seed=seed).images
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained", width_ratios=(1, 1, 1, 1.02))
    drops = [
        ("all patches: CLIP", None),
        (f"random: FLIP, {mask_ratio:.0%} dropped", gaussmask.RandomPatchDropout(mask_ratio)),
        (f"centred: GLIP, {mask_ratio:.0%} dropped", gaussmask.GaussianPatchDropout(mask_ratio, sigma)),
    ]
    for axis, (title, drop) in zip(axes, drops, strict=False):
        if drop is not None:
            drop(torch.zeros(1, GRID[0] * GRID[1], 1))
        gaussmask.plot.masked_images(scene, None if drop is None else drop.keep_mask, axes=[axis])
        axis.set_title(title)
    gaussmask.plot.keep_probability(GRID, mask_ratio, sigma=sigma, ax=axes[3])
    axes[3].set_title("GLIP: how often a patch is kept")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
