"""Draw the picture of the README: one photo under the masks of every rule, a new draw in every step.

    python examples/draw_masks.py
    python examples/draw_masks.py --image my.jpg --mask-ratio 0.5 --steps 20 --output my_masks.gif

The photo of a flower is scikit-learn's sample image, by vultilion, CC BY 2.0 (flickr.com/photos/vultilion/6056698931).
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from plot_style import STYLE
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import v2 as transforms

import gaussmask

GRID = (14, 14)  # of a ViT-B/16 at 224 pixels


def main(
    output: Path = Path("docs/masks.webp"),
    image: Path | None = None,
    mask_ratio: float = 0.75,
    sigma: float = 0.2,
    steps: int = 12,
    milliseconds: int = 600,
) -> None:
    """Draw it.

    Args:
        output: the animation to write, a .webp or a .gif.
        image: a picture of your own.
        mask_ratio: share of the patches that is dropped.
        sigma: variance of the Gaussian.
        steps: of the animation, with a draw of its own each.
        milliseconds: of a step.
    """
    mpl.use("Agg")
    photo = load_photo(image)[0]
    drops = {
        "random: FLIP": gaussmask.RandomPatchDropout(mask_ratio),
        "Gaussian: GLIP": gaussmask.GaussianPatchDropout(mask_ratio, sigma),
        "cluster": gaussmask.ClusterPatchDropout(mask_ratio),
        "grid": gaussmask.GridPatchDropout(mask_ratio),
        "block": gaussmask.BlockPatchDropout(mask_ratio),
    }
    frames = []
    with mpl.rc_context(STYLE):
        for seed in range(steps):
            figure = gaussmask.plot.compare_drops(photo, drops, grid_size=GRID, seed=seed, columns=1 + len(drops))
            frames.append(_rendered(figure))
            plt.close(figure)
    first, *others = frames
    first.save(output, save_all=True, append_images=others, duration=milliseconds, loop=0, quality=80, method=6)


def _rendered(figure: Figure) -> Image.Image:
    figure.set_dpi(90)
    figure.set_figheight(figure.get_figheight() + 0.15)
    for axis in figure.axes:
        axis.title.set_fontsize(13)  # the six panels are shown in the width of a page
    figure.canvas.draw()
    return Image.fromarray(np.array(figure.canvas.buffer_rgba()))  # type: ignore[attr-defined]


def load_photo(image: Path | None = None) -> Tensor:
    """(1, 3, 224, 224) uint8, cut out of the middle; by default the flower."""
    picture = Image.fromarray(load_sample_image("flower.jpg")) if image is None else Image.open(image).convert("RGB")
    square = transforms.Compose([transforms.Resize(224), transforms.CenterCrop(224), transforms.PILToTensor()])
    photo: Tensor = square(picture)
    return photo.unsqueeze(0)


def draw_mask(drop: gaussmask.PatchDropout) -> Tensor:
    """(1, 14, 14) bool, True where a patch is kept."""
    num_patches = GRID[0] * GRID[1]
    keep_indices = drop.draw(1, num_patches, GRID)
    return torch.zeros(1, num_patches, dtype=torch.bool).scatter(1, keep_indices, True).view(1, *GRID)


if __name__ == "__main__":
    tyro.cli(main)
