"""Draw the picture of the README: one photo, masked by FLIP and by GLIP, and how often each patch is kept.

    python examples/draw_masks.py
    python examples/draw_masks.py --image my.jpg --mask-ratio 0.5 --sigma 0.4 --output my_masks.png

The photo of a flower is scikit-learn's sample image, by vultilion, CC BY 2.0 (flickr.com/photos/vultilion/6056698931).
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import tyro
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import v2 as transforms

import gaussmask

GRID = (14, 14)  # of a ViT-B/16 at 224 pixels


def main(
    output: Path = Path("docs/masks.png"),
    image: Path | None = None,
    mask_ratio: float = 0.75,
    sigma: float = 0.2,
    seed: int = 7,
) -> None:
    """Draw it.

    Args:
        output: the PNG to write.
        image: a picture of your own.
        mask_ratio: share of the patches that is dropped.
        sigma: variance of the Gaussian.
        seed: of the masks.
    """
    mpl.use("Agg")
    torch.manual_seed(seed)
    photo = load_photo(image)
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained", width_ratios=(1, 1, 1, 1.02))
    drops = [
        ("all patches: CLIP", None),
        (f"random: FLIP, {mask_ratio:.0%} dropped", gaussmask.RandomPatchDropout(mask_ratio)),
        (f"centred: GLIP, {mask_ratio:.0%} dropped", gaussmask.GaussianPatchDropout(mask_ratio, sigma)),
    ]
    for axis, (title, drop) in zip(axes, drops, strict=False):
        gaussmask.plot.masked_images(photo, None if drop is None else draw_mask(drop), axes=[axis])
        axis.set_title(title)
    gaussmask.plot.keep_probability(GRID, mask_ratio, sigma=sigma, ax=axes[3])
    axes[3].set_title("GLIP: how often a patch is kept")
    figure.savefig(output, dpi=110)


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
