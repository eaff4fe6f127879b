"""What a bad argument gets: an exception that names the argument, the value and the way out."""

import difflib
import math
import operator
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor

OURS = __name__.partition(".")[0]
SAMPLINGS = ("additive", "weighted")
WIDEST = 10.0  # at which the density at a corner is .9 of that at the centre

# What other libraries call the settings of a drop.
ALIASES = {
    **dict.fromkeys(
        ("p", "prob", "rate", "ratio", "drop_prob", "drop_rate", "drop_ratio", "keep_rate", "keep_ratio", "mask_prob",
         "mask_rate", "keep", "dropout", "patch_drop_rate", "patch_dropout", "keep_prob"),
        "mask_ratio",
    ),
    **dict.fromkeys(("prefix", "num_prefix"), "num_prefix_tokens"),
    **dict.fromkeys(("grid", "size"), "grid_size"),
    **dict.fromkeys(("std", "var", "variance"), "sigma"),
}  # fmt: skip


def refuse_misspelling(class_name: str, name: str, settings: Iterable[str], others: Iterable[str]) -> None:
    """Raise AttributeError for a name that can only be meant for one of the `settings`, or of those of `others`."""
    settings = list(settings)
    known = [*settings, *others]
    nearest = [ALIASES[name]] if name in ALIASES else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if nearest:
        meant = f"did you mean {nearest[0]!r}" if nearest[0] in settings else f"it has no {nearest[0]!r} either"
        raise AttributeError(
            f"{class_name} has no attribute {name!r}, and would go on as it was: {meant}? (It has "
            f"{', '.join(settings)}; a subclass may hold what it likes.)"
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        way_out = ": pass value.item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}{way_out}")
    return float(value)


def check_mask_ratio(mask_ratio: object) -> float:
    ratio = _number("mask_ratio", mask_ratio)
    if not 0 <= ratio < 1:
        raise ValueError(
            f"mask_ratio must lie in [0, 1), got {mask_ratio!r}: it is the share of patches that are dropped"
        )
    return ratio


def check_sigma(sigma: object) -> float:
    variance = _number("sigma", sigma)
    if not (0 < variance < math.inf):
        raise ValueError(
            f"sigma must be positive and finite, got {sigma!r}: it is the variance of the Gaussian, "
            "and RandomPatchDropout is its limit for large values"
        )
    return variance


def _frames_to_the_user() -> int:
    """The `stacklevel` of a warning that points at the first line outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (OURS, "torch"):
        level, frame = level + 1, frame.f_back
    return level


def check_drop_sigma(sigma: object) -> float:
    """A variance beyond the image can only be meant in pixels or degrees."""
    variance = check_sigma(sigma)
    if variance > WIDEST:
        warnings.warn(
            f"sigma={variance:g} is the variance of a Gaussian on the square [-1, 1]^2, in which no patch differs from "
            "another: it is no number of pixels or degrees. RandomPatchDropout is the limit of large values",
            stacklevel=_frames_to_the_user(),
        )
    return variance


def check_center(center: object) -> tuple[float, float]:
    if isinstance(center, str) or not isinstance(center, Sequence) or len(center) != 2:
        raise ValueError(f"center must be a pair (y, x), got {center!r}")
    y, x = (_number("center", value) for value in center)
    if not (-1 <= y <= 1 and -1 <= x <= 1):
        raise ValueError(f"center must lie in [-1, 1] x [-1, 1], got {center!r}: (0, 0) is the middle of the image")
    return y, x


def check_sampling(sampling: object) -> str:
    if not isinstance(sampling, str) or sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}")
    return sampling


def check_count(name: str, value: object, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return cast("int", value) if type(value) in (int, torch.SymInt) else int(value)  # a symbolic size stays one


def check_anchors(value: object) -> float | int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return check_count("anchors", value, least=1)
    share = _number("anchors", value)
    if not 0 < share < 1:
        raise ValueError(
            f"anchors must be a share of the patches in (0, 1), or a whole number of them from 1, got {value!r}"
        )
    return share


def check_noise(value: object) -> float:
    noise = _number("noise", value)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {value!r}")
    return noise


def check_prefix_count(value: object) -> int | None:
    return None if value is None else check_count("num_prefix_tokens", value)


def check_float_dtype(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
    return dtype


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_drop_grid(grid_size: object) -> tuple[int, ...]:
    if isinstance(grid_size, str) or not isinstance(grid_size, Sequence) or len(grid_size) not in (2, 3):
        raise ValueError(
            f"grid_size must be (height, width), or (time, height, width) of a video, in patches, got {grid_size!r}"
        )
    return tuple(check_count("grid_size", size, least=1) for size in grid_size)


def check_grid_size(grid_size: object) -> tuple[int, ...]:
    if isinstance(grid_size, str) or not isinstance(grid_size, Sequence) or len(grid_size) != 2:
        raise ValueError(f"grid_size must be a pair (height, width) of patch counts, got {grid_size!r}")
    return tuple(check_count("grid_size", size, least=1) for size in grid_size)


def check_coords(coords: object) -> None:
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords must be a tensor, got {type(coords).__name__}")
    if coords.ndim != 3 or coords.shape[2] != 2:
        raise ValueError(
            f"coords must have shape (batch, patches, 2), the (y, x) of every patch, got {tuple(coords.shape)}"
        )


def check_scores(scores: object) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor, got {type(scores).__name__}")
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (batch, patches), got {tuple(scores.shape)}")


def check_tokens(x: object, num_prefix_tokens: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of tokens, got {type(x).__name__}")
    if x.ndim != 3:
        images = ". Images go into a model, which gaussmask.attach(model, drop) lets drop patches" * (x.ndim == 4)
        raise ValueError(f"x must have shape (batch, tokens, width), got {tuple(x.shape)}{images}")
    if x.shape[1] <= num_prefix_tokens:
        raise ValueError(
            f"x of shape {tuple(x.shape)} holds no patch behind its num_prefix_tokens={num_prefix_tokens} prefix tokens"
        )


def check_images(images: object) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim not in (4, 5):
        raise ValueError(f"images must have shape (batch, channels, height, width), got {tuple(images.shape)}")


def check_axes(name: str, value: object, num_axes: int) -> tuple[int, ...]:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * num_axes
    if len(values) != num_axes:
        raise ValueError(f"{name} must be an integer or {num_axes} of them, one per axis of the image, got {value!r}")
    return tuple(check_count(name, size, least=1) for size in values)


def check_keep_indices(keep_indices: object, batch_size: int, device: torch.device) -> None:
    if not isinstance(keep_indices, Tensor):
        raise TypeError(f"keep_indices must be a tensor, got {type(keep_indices).__name__}")
    if keep_indices.dtype != torch.int64 or keep_indices.ndim != 2 or keep_indices.shape[0] != batch_size:
        raise ValueError(
            f"keep_indices must be int64 of shape ({batch_size}, kept), one row per image, "
            f"got {keep_indices.dtype} of shape {tuple(keep_indices.shape)}"
        )
    if keep_indices.device != device:
        raise ValueError(f"keep_indices must lie on {device}, beside what it picks from, got {keep_indices.device}")


def plain_number(size: int) -> int:
    """A size as a number, where `torch.jit.trace` hands out tensors: the trace is for images of this very size."""
    return int(size) if isinstance(size, Tensor) else size


def is_square(num_patches: int) -> bool:
    num_patches = operator.index(num_patches)  # a number, where the compiler has a symbol
    return math.isqrt(num_patches) ** 2 == num_patches


def square_grid_size(num_patches: int) -> tuple[int, int]:
    num_patches = operator.index(num_patches)  # a number, where the compiler has a symbol
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"{num_patches} patches form no square grid: pass grid_size=(height, width), "
            "and num_prefix_tokens if class or register tokens stand in front of them"
        )
    return side, side


def check_grid_holds(grid_size: Sequence[int], num_patches: int) -> None:
    if math.prod(grid_size) != num_patches:
        raise ValueError(
            f"a grid of {' x '.join(map(str, grid_size))} does not hold {num_patches} patches: "
            "pass the grid_size (and num_prefix_tokens) of these tokens"
        )
