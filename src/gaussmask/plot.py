"""Pictures of masks. Needs matplotlib: `pip install "gaussmask[plot]"`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from . import functional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DROPPED_GREY = 0.85


def keep_probability(
    grid_size: Sequence[int],
    mask_ratio: float,
    *,
    sigma: float | None = None,
    center: Sequence[float] = (0.0, 0.0),
    sampling: str = "additive",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how likely each patch is kept, on a scale from 0 to 1, with patches that are never kept (< 0.001) hatched.

    Args:
        grid_size: (H, W), patches per column and row.
        mask_ratio: share of the patches that is dropped, in [0, 1).
        sigma: variance of the Gaussian on [-1, 1]^2; None is uniform.
        center: (y, x) of the Gaussian's mean in [-1, 1]^2.
        sampling: `"additive"` or `"weighted"`, see `functional.gaussian_scores`.
        ax: where to draw; None is a new figure.

    Returns:
        The Axes.
    """
    pyplot = _pyplot()
    chance = functional.keep_probability(grid_size, mask_ratio, sigma=sigma, center=center, sampling=sampling)
    if ax is None:
        ax = pyplot.figure(figsize=(3.6, 3), layout="constrained").add_subplot()
    image = ax.imshow(chance.numpy(), vmin=0, vmax=1, cmap="viridis")
    never = chance < 1e-3
    for row, column in never.nonzero().tolist():
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(
            pyplot.Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="white", linewidth=0, alpha=0.35)
        )
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    method = "uniform" if sigma is None else f"σ = {sigma:g}, {sampling}"
    note = f"\n{never.sum().item() / chance.numel():.0%} never kept" if never.any() else ""
    ax.set_title(f"{method}, ratio {mask_ratio:g}{note}", fontsize="medium")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def masked_images(
    images: Tensor,
    keep_mask: Tensor | None,
    *,
    columns: int = 8,
    visibility: float = 0.2,
    titles: Sequence[str] = (),
    axes: "Sequence[Axes] | None" = None,
) -> "Figure":
    """Draw a batch of images with the dropped patches dimmed: faded to a light grey.

    Args:
        images: (B, 3, height, width) or (B, 1, height, width), uint8 or float in [0, 1].
        keep_mask: (B, H, W) bool, as `drop.keep_mask` gives it after a forward of these images; None (nothing was
            dropped) leaves them as they are.
        columns: images per row.
        visibility: of a dropped patch, 0 (a grey square) to 1 (as it was).
        titles: one for each image, or none.
        axes: where to draw, one for each image; None is a new figure.

    Returns:
        The Figure.

    Raises:
        ValueError: for shapes and counts that do not fit.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must have shape (batch, 3 or 1, height, width), got {tuple(images.shape)}")
    for name, values in (("titles", titles or None), ("axes", axes)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{name} must be one for each of the {len(images)} images, got {len(values)}")
    pixels = images.detach().cpu()
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels.float().clamp(0, 1)
    if keep_mask is not None:
        if keep_mask.ndim != 3 or len(keep_mask) != len(images) or keep_mask.dtype != torch.bool:
            raise ValueError(
                f"keep_mask must be bool of shape ({len(images)}, rows, columns) for images of shape "
                f"{tuple(images.shape)}, got {keep_mask.dtype} of shape {tuple(keep_mask.shape)}"
            )
        visible = torch.where(keep_mask.cpu(), 1.0, visibility).unsqueeze(1)
        visible = torch.nn.functional.interpolate(visible, size=pixels.shape[2:], mode="nearest-exact")
        pixels = visible * pixels + (1 - visible) * DROPPED_GREY
    if axes is None:
        axes = _axes_grid(len(pixels), min(columns, len(pixels)), height=1.5 if titles else 1.3)
    for axis, image in zip(axes, rearrange(pixels, "b c h w -> b h w c").numpy(), strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize="small")
    for axis in axes:
        axis.axis("off")
    return axes[0].figure  # type: ignore[return-value]  # not a subfigure


def _axes_grid(count: int, columns: int, height: float) -> "Sequence[Axes]":
    rows = math.ceil(count / columns)
    size = (1.3 * columns, height * rows)
    _, axes = _pyplot().subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    return list(axes.flat)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError('gaussmask.plot needs matplotlib: pip install "gaussmask[plot]"') from None
    return pyplot
