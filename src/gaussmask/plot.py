"""Pictures of masks. Needs matplotlib: `pip install "gaussmask[plot]"`."""

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from . import functional
from .drops import GaussianPatchDropout, PatchDropout
from .sampling.checks import check_axes, check_count, check_drop_grid, check_grid_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image

DROPPED_GREY = 0.85
RARELY = "kept less than once in 1,000"


# How often each patch is kept


WAYS_TO_CALL = {  # by whether a drop is given
    True: "of a drop: {}: call keep_probability(drop, grid_size, *, images, draws, ax); the ratio and all else about "
    "the rule are the drop's own",
    False: "without a drop: {}: call keep_probability(grid_size, mask_ratio, *, sigma, center, sampling, ax), or "
    "keep_probability(drop, grid_size, *, images, draws, ax)",
}


@overload
def keep_probability(
    drop: PatchDropout,
    grid_size: Sequence[int],
    *,
    images: Tensor | None = None,
    draws: int = 4096,
    ax: "Axes | None" = None,
) -> "Axes": ...


@overload
def keep_probability(
    grid_size: Sequence[int],
    mask_ratio: float,
    *,
    sigma: float | None = None,
    center: Sequence[float] = (0.0, 0.0),
    sampling: str = "additive",
    ax: "Axes | None" = None,
) -> "Axes": ...


def keep_probability(*args: Any, **options: Any) -> "Axes":
    """Draw how likely each patch is kept, on a scale from 0 to 1, with patches that are hardly ever kept hatched.

    **`keep_probability(drop, grid_size, *, images, draws, ax)`** is of a drop of any rule, which stays as it is, by
    `drop.keep_probability`: on a grid (H, W), patches per column and row. `images` (B, C, height, width), or one
    (C, height, width), are for a rule that asks for pixels, normalised as the model gets them; `draws` is the number of
    masks, from torch's global random state, for a rule whose chances are not known.

    **`keep_probability(grid_size, mask_ratio, *, sigma, center, sampling, ax)`** is of random masks (`sigma` None) and
    Gaussian ones without a drop, by `functional.keep_probability`, whose arguments these are.

    `ax` is where to draw; None is a new figure. Hatched is a chance below 0.001 where the chances are computed, and
    kept in none of the draws where they are drawn; the title says which, and of how many patches.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of the one form in the other, and for too few.
        ValueError: for a grid (T, H, W), and as `drop.keep_probability` and `functional.keep_probability`.
    """
    of_drop = "drop" in options or (len(args) > 0 and isinstance(args[0], PatchDropout))
    draw: Callable[..., Axes] = _drop_probability if of_drop else _formula_probability
    try:
        call = inspect.signature(draw).bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"keep_probability {WAYS_TO_CALL[of_drop].format(error)}") from None
    return draw(*call.args, **call.kwargs)


def _drop_probability(
    drop: PatchDropout,
    grid_size: Sequence[int],
    *,
    images: Tensor | None = None,
    draws: int = 4096,
    ax: "Axes | None" = None,
) -> "Axes":
    if not isinstance(drop, PatchDropout):
        raise TypeError(f"drop must be a PatchDropout, got {drop!r} of type {type(drop).__name__}")
    grid_size = check_drop_grid(grid_size)
    if len(grid_size) == 3:
        way_out = f"draw a frame of drop.keep_probability({grid_size}) with matplotlib's imshow"
        if drop.tube and "pixels" not in drop.asks_for:
            way_out = f"pass grid_size={grid_size[1:]}, whose chances every frame has with tube=True"
        raise ValueError(
            f"grid_size must be (height, width), for the picture is of one frame, got {grid_size}: {way_out}"
        )
    _pyplot()  # before the draws, which take their time
    chance = drop.keep_probability(grid_size, draws=draws, images=images).cpu()
    if drop._exact_probability is None:
        return _draw_chances(chance, chance == 0, f"never kept in {draws:,} draws", _title(drop), ax)
    return _draw_chances(chance, chance < 1e-3, RARELY, _title(drop), ax)


def _formula_probability(
    grid_size: Sequence[int],
    mask_ratio: float,
    *,
    sigma: float | None = None,
    center: Sequence[float] = (0.0, 0.0),
    sampling: str = "additive",
    ax: "Axes | None" = None,
) -> "Axes":
    chance = functional.keep_probability(grid_size, mask_ratio, sigma=sigma, center=center, sampling=sampling)
    method = "uniform" if sigma is None else f"σ = {sigma:g}, {sampling}"
    return _draw_chances(chance, chance < 1e-3, RARELY, f"{method}, ratio {mask_ratio:g}", ax)


def _draw_chances(chance: Tensor, never: Tensor, note: str, title: str, ax: "Axes | None") -> "Axes":
    """`chance` (H, W), with the patches hatched where `never` (H, W); the note counts them."""
    pyplot = _pyplot()
    if ax is None:
        ax = pyplot.figure(figsize=(3.6, 3), layout="constrained").add_subplot()
    image = ax.imshow(chance.numpy(), vmin=0, vmax=1, cmap="viridis")
    for row, column in never.nonzero().tolist():
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(
            pyplot.Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="white", linewidth=0, alpha=0.35)
        )
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    count = f"\n{never.sum().item() / never.numel():.0%} {note}" if never.any() else ""
    ax.set_title(f"{title}{count}", fontsize="medium")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def _title(drop: PatchDropout, name: str = "") -> str:
    method = f"\nσ = {drop.sigma:g}, {drop.sampling}" if isinstance(drop, GaussianPatchDropout) else ""
    return f"{name or type(drop).__name__}, ratio {drop.mask_ratio:g}{method}"


# Images under their masks


def masked_images(
    images: "Tensor | NDArray[Any] | Image",
    keep_mask: "Tensor | NDArray[Any] | None",
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    columns: int | None = None,
    visibility: float = 0.2,
    titles: Sequence[str] = (),
    axes: "Sequence[Axes] | None" = None,
) -> "Figure":
    """Draw images or videos with the dropped patches dimmed: faded to a light grey.

    Args:
        images: uint8, or numbers in [0, 1], or normalised (see `mean`).

            - A tensor has its channels first: (B, 3 or 1, height, width), one image (3 or 1, height, width), or videos
              (B, T, 3 or 1, height, width).
            - A numpy array has them last: (B, height, width, 3 or 1), one image (height, width, 3 or 1) or
              (height, width), or videos (B, T, height, width, 3 or 1). A PIL image is RGB or L.
        keep_mask: (B, H, W) bool, as `drop.keep_mask` gives it after a forward of these images; (H, W) or (1, H, W) of
            one image; (B, T', H, W) of videos, where T' divides T and each frame of the mask stands for T / T' of the
            video, as tubelets do. None (nothing was dropped) leaves the images as they are.
        mean: what the images were normalised with, one number or one per channel. It is undone before drawing, and
            what is then outside [0, 1] is clamped.
        std: likewise, and given with `mean`.
        columns: images per row, None is 8; frames per row, None is all of them. Every video starts a row.
        visibility: of a dropped patch, 0 (a grey square) to 1 (as it was).
        titles: one for each image or video, or none. That of a video stands over its first frame.
        axes: where to draw, one for each image or frame, video by video; None is a new figure.

    Returns:
        The Figure.

    Raises:
        ValueError: for shapes and counts that do not fit, for `mean` or `std` alone or of another length, and with
            uint8 images.
        TypeError: for images that are neither a tensor nor an array nor a PIL image.

    Warns:
        UserWarning: for values far outside [0, 1] without `mean` and `std`, which are clamped.
    """
    values = _channels_first("images", images)
    is_video = values.ndim == 5
    count = 1 if values.ndim == 3 else len(values)
    num_axes = count * values.shape[1] if is_video else count
    for name, given, wanted, of_what in (
        ("titles", titles or None, count, "videos" if is_video else "images"),
        ("axes", axes, num_axes, "frames" if is_video else "images"),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{name} must be one for each of the {wanted} {of_what}, got {len(given)}")
    if columns is not None:
        columns = check_count("columns", columns, least=1)
    pixels = _unit_range("images", values, mean, std).reshape(num_axes, *values.shape[-3:])
    if keep_mask is not None:
        visible = torch.where(_mask_per_frame(keep_mask, values.shape), 1.0, visibility).unsqueeze(1)
        visible = torch.nn.functional.interpolate(visible, size=pixels.shape[2:], mode="nearest-exact")
        pixels = visible * pixels + (1 - visible) * DROPPED_GREY
    per_row = num_axes // count if is_video else num_axes  # what a video, or the batch of images, has at most in a row
    if axes is None:
        at_most = columns or (per_row if is_video else 8)
        axes = _axes_grid(num_axes // per_row, per_row, min(at_most, per_row), 1.3, 1.5 if titles else 1.3)
    for axis, image in zip(axes, pixels.movedim(1, -1).numpy(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
    for axis, title in zip(axes[:: num_axes // count], titles, strict=False):
        axis.set_title(title, fontsize="small", loc="left" if is_video else "center")
    return axes[0].figure  # type: ignore[return-value]  # not a subfigure


def compare_drops(
    image: "Tensor | NDArray[Any] | Image",
    drops: Iterable[PatchDropout] | Mapping[str, PatchDropout],
    *,
    grid_size: Sequence[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
    seed: int = 0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    columns: int | None = None,
) -> "Figure":
    """Draw one image under the masks of several drops, beside the image itself.

    Each drop is copied and draws once, whatever its mode, from the same seed. The drops and torch's global random state
    stay as they are.

    A rule that asks for pixels is given the patches of the image as a model would get them: as it is where it is
    normalised (`mean` and `std` are given, or its values lie far outside [0, 1]), otherwise scaled to [-1, 1].

        figure = plot.compare_drops(photo, [RandomPatchDropout(0.75), ClusterPatchDropout(0.75)], patch_size=16)

    Args:
        image: a tensor (3 or 1, height, width), a numpy array (height, width, 3 or 1) or (height, width), or a PIL
            image, RGB or L; uint8, or numbers in [0, 1], or normalised (see `mean`).
        drops: of any rule but one that asks for tokens; by their titles, or else titled by class and ratio.
        grid_size: (H, W), patches per column and row. A `grid_size` of a drop's own does not count.
        patch_size: side of a patch in pixels, or (height, width), instead of `grid_size`; 16 where neither is given.
            The image must be cut evenly.
        seed: of every draw.
        mean: what the image was normalised with, see `masked_images`.
        std: likewise.
        columns: panels per row; None is 4.

    Returns:
        The Figure, whose first panel is the image.

    Raises:
        ValueError: for an image of another shape or one that is not cut evenly, `grid_size` beside `patch_size`, no
            drops, or a rule that asks for tokens, which only a model has; and as `masked_images`.
        TypeError: for drops of another type; and as `masked_images`.

    Warns:
        UserWarning: as `masked_images`.
    """
    values = _channels_first("image", image)
    if values.ndim != 3:
        raise ValueError(
            f"image must be one image, got {tuple(values.shape)}, channels first: pass one of them, image[0]"
        )
    named = _by_title(drops)
    grid, patch = _grid_of(values.shape[1:], grid_size, patch_size)
    columns = 4 if columns is None else check_count("columns", columns, least=1)
    pixels = _unit_range("image", values, mean, std)
    is_normalised = mean is not None or _is_far_outside(values)
    patches = functional.cut_patches((values.float() if is_normalised else 2 * pixels - 1).unsqueeze(0), patch)
    masks = [torch.ones(1, *grid, dtype=torch.bool, device="cpu")]
    masks += [_draw_mask(drop, grid, patches, seed) for _, drop in named]
    titles = ["all patches", *(title for title, _ in named)]
    _, height, width = values.shape
    room = 0.2 * (1 + max(title.count("\n") for title in titles))
    axes = _axes_grid(1, len(titles), min(columns, len(titles)), 2.2, 2.2 * height / width + room)
    return masked_images(pixels.expand(len(titles), -1, -1, -1), torch.cat(masks), titles=titles, axes=axes)


def _by_title(drops: Iterable[PatchDropout] | Mapping[str, PatchDropout]) -> list[tuple[str, PatchDropout]]:
    if not isinstance(drops, Iterable):
        raise TypeError(f"drops must be a sequence of drops, or a dict of them by title, got {drops!r}")
    named = list(drops.items()) if isinstance(drops, Mapping) else [("", drop) for drop in drops]
    if not named:
        raise ValueError(f"drops must hold at least one drop, got {drops!r}")
    for _, drop in named:
        if not isinstance(drop, PatchDropout):
            raise TypeError(f"drops must hold PatchDropouts, got {drop!r} of type {type(drop).__name__}")
        if "tokens" in drop.asks_for:
            raise ValueError(
                f"{type(drop).__name__} asks for tokens, which only a model makes: draw its drop.keep_mask after a "
                "forward with plot.masked_images"
            )
    return [(title or _title(drop, type(drop).__name__.removesuffix("PatchDropout")), drop) for title, drop in named]


def _grid_of(
    sides: Sequence[int], grid_size: Sequence[int] | None, patch_size: int | Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The grid and the patch that cut an image."""
    if grid_size is not None and patch_size is not None:
        raise ValueError(f"pass grid_size or patch_size, not both, got {grid_size!r} and {patch_size!r}")
    if grid_size is not None:
        grid = check_grid_size(grid_size)
        patch = tuple(side // count for side, count in zip(sides, grid, strict=True))
        by = f"grid_size={grid}"
    else:
        patch = check_axes("patch_size", 16 if patch_size is None else patch_size, 2)
        grid = tuple(side // length for side, length in zip(sides, patch, strict=True))
        by = f"patch_size={patch}{', the default' if patch_size is None else ''}"
    if any(count * length != side for count, length, side in zip(grid, patch, sides, strict=True)):
        raise ValueError(
            f"an image of {sides[0]} x {sides[1]} pixels is not cut evenly by {by}: resize or crop it, or pass a "
            "grid_size or patch_size that cuts it"
        )
    return grid, patch


def _draw_mask(drop: PatchDropout, grid: tuple[int, ...], patches: Tensor, seed: int) -> Tensor:
    """(1, H, W) bool. The drop and the global random state stay as they are."""
    drop, num_patches = copy.deepcopy(drop).cpu(), math.prod(grid)
    pixels = patches if "pixels" in drop.asks_for else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        keep_indices = drop.draw(1, num_patches, grid, pixels=pixels, device="cpu")
    return torch.zeros(1, num_patches, dtype=torch.bool, device="cpu").scatter(1, keep_indices, True).view(1, *grid)


# What images may be


def _channels_first(name: str, images: object) -> Tensor:
    """(3 or 1, height, width), (B, ...) or (B, T, ...), on the CPU."""
    if isinstance(images, Tensor):
        values, shape = images.detach().cpu(), tuple(images.shape)
        expected = "(batch, 3 or 1, height, width), without batch for one image, with (batch, time) for videos"
    else:
        array = _array(name, images)
        values, shape = torch.from_numpy(array), array.shape
        values = values.unsqueeze(2) if values.ndim == 2 else values
        values = values.movedim(-1, -3) if values.ndim > 2 else values
        expected = "(batch, height, width, 3 or 1), without batch for one image, with (batch, time) for videos"
    if values.ndim not in (3, 4, 5) or values.shape[-3] not in (1, 3) or 0 in values.shape:
        hint, is_tensor = "", isinstance(images, Tensor)
        if len(shape) > 2 and is_tensor and shape[-1] in (1, 3):
            hint = f"; a tensor has its channels first: {name}.movedim(-1, -3)"
        elif len(shape) == 5 and is_tensor and shape[1] in (1, 3):
            hint = f"; a video has time before its channels: {name}.transpose(1, 2)"
        elif len(shape) > 2 and not is_tensor and shape[-3] in (1, 3):
            hint = f"; an array has its channels last: numpy.moveaxis({name}, -3, -1)"
        raise ValueError(f"{name} must have shape {expected}, got {shape}{hint}")
    return values


def _array(name: str, images: object) -> "NDArray[Any]":
    """A copy, which torch takes whatever the memory order and whether it may be written to."""
    import numpy

    if not isinstance(images, numpy.ndarray):
        from PIL.Image import Image  # matplotlib needs it too

        if not isinstance(images, Image):
            raise TypeError(
                f"{name} must be a tensor, a numpy array or a PIL image, got {type(images).__name__}: put several of "
                "one size together with torch.stack or numpy.stack"
            )
        if images.mode not in ("L", "RGB"):
            raise ValueError(f'{name} must be RGB or L, got mode {images.mode!r}: pass image.convert("RGB")')
    return numpy.array(images, order="C")


def _unit_range(
    name: str, values: Tensor, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> Tensor:
    """Float in [0, 1], with the normalisation undone."""
    if (mean is None) != (std is None):
        missing, given = ("mean", "std") if mean is None else ("std", "mean")
        raise ValueError(f"{given} was given without {missing}: pass both, with which the normalisation was done")
    if mean is not None:
        if values.dtype == torch.uint8:
            raise ValueError(
                f"{name} must be normalised where mean and std are given, got uint8: leave mean and std out"
            )
        channels = values.shape[-3]
        scale = _per_channel("std", std, channels)
        if not (scale > 0).all():
            raise ValueError(f"std must be positive, got {std!r}")
        return (values.float() * scale + _per_channel("mean", mean, channels)).clamp(0, 1)
    if _is_far_outside(values):
        warnings.warn(
            f"clamped {name} with values from {values.min():.3g} to {values.max():.3g} to [0, 1]: pass mean= and "
            "std=, with which they were normalised, or uint8 where they go to 255",
            stacklevel=3,  # who called masked_images or compare_drops
        )
    return values / 255 if values.dtype == torch.uint8 else values.float().clamp(0, 1)


def _is_far_outside(values: Tensor) -> bool:
    """Whether these are no numbers in [0, 1]. Interpolation overshoots a little, which is none of it."""
    return values.dtype != torch.uint8 and bool(values.min() < -0.1 or values.max() > 1.1)


def _per_channel(name: str, value: Any, channels: int) -> Tensor:
    """(1 or `channels`, 1, 1) float32."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or one per channel, got {value!r}") from None
    if numbers.numel() not in (1, channels):
        raise ValueError(f"{name} must be one number or one for each of the {channels} channels, got {value!r}")
    return numbers.reshape(-1, 1, 1)


def _mask_per_frame(keep_mask: "Tensor | NDArray[Any]", shape: Sequence[int]) -> Tensor:
    """(images or frames, H, W) bool on the CPU, for images of a shape with channels first."""
    if isinstance(keep_mask, Tensor):
        mask = keep_mask.detach().cpu()
    else:
        import numpy

        mask = torch.from_numpy(numpy.array(keep_mask, order="C"))
    if len(shape) == 3:
        wanted = "(rows, columns) or (1, rows, columns) for one image"
        fits = mask.ndim == 2 or (mask.ndim == 3 and len(mask) == 1)
    elif len(shape) == 4:
        wanted = f"({shape[0]}, rows, columns) for images"
        fits = mask.ndim == 3 and len(mask) == shape[0]
    else:
        wanted = f"({shape[0]}, frames, rows, columns), with a number of frames that divides {shape[1]}, for videos"
        fits = mask.ndim == 4 and len(mask) == shape[0] and mask.shape[1] > 0 and shape[1] % mask.shape[1] == 0
    if not fits or mask.dtype != torch.bool:
        raise ValueError(
            f"keep_mask must be bool of shape {wanted} of shape {tuple(shape)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if len(shape) == 5:
        mask = mask.repeat_interleave(shape[1] // mask.shape[1], dim=1)
    return mask.reshape(-1, *mask.shape[-2:])


# matplotlib


def _axes_grid(groups: int, per_group: int, columns: int, width: float, height: float) -> "list[Axes]":
    """Axes for `groups` of `per_group` pictures, each group beginning in a row of its own; left-over ones are blank."""
    rows = groups * math.ceil(per_group / columns)
    size = (width * columns, height * rows)
    _, axes = _pyplot().subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    return [axis for group in axes.reshape(groups, -1) for axis in group[:per_group]]


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError('gaussmask.plot needs matplotlib: pip install "gaussmask[plot]"') from None
    return pyplot
