"""What a rule may see beside coordinates: it asks by name, the way a pytest test asks for a fixture."""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sampling.grids import Packing

NAMES = ("pixels", "tokens", "grid_size", "valid", "num_kept")


def names_asked_for(cls: type) -> frozenset[str]:
    """The names among `NAMES` that are keyword-only parameters of `cls.scores`.

    Raises:
        TypeError: for another keyword-only parameter without a default, which nobody would pass, and for one of the
            names that is not keyword-only.
    """
    asked = set()
    for parameter in inspect.signature(cls.scores).parameters.values():  # type: ignore[attr-defined]
        keyword_only = parameter.kind is parameter.KEYWORD_ONLY
        if parameter.name in NAMES and keyword_only:
            asked.add(parameter.name)
        elif parameter.name in NAMES:
            raise TypeError(
                f"{cls.__name__}.scores asks for {parameter.name} by position, and would never be given it: put a star "
                f"before it, def scores(self, coords, generator=None, *, {parameter.name})"
            )
        elif keyword_only and parameter.default is parameter.empty:
            raise TypeError(
                f"{cls.__name__}.scores asks for {parameter.name!r}, but a rule can ask for {', '.join(NAMES)} only: "
                "make it an attribute of the drop, or give it a default"
            )
    return frozenset(asked)


WAYS_OUT = {
    "pixels": "call drop(x, pixels=gaussmask.functional.cut_patches(images, patch_size)), or attach it to a model",
    "tokens": "call drop(x) on the tokens, or attach it to a model",
}


class Facts(NamedTuple):
    """What is known about the patches of a batch; see `PatchDropout.scores`."""

    coords: Tensor
    num_kept: int | Tensor
    valid: Tensor | None = None
    pixels: Tensor | None = None
    tokens: Tensor | None = None
    grid_size: tuple[int, ...] | None = None

    def given_to(self, rule: type) -> dict[str, Any]:
        """What a class of drops asks for."""
        given = {}
        for name in rule.asks_for:  # type: ignore[attr-defined]
            value = getattr(self, name)
            if name in WAYS_OUT:
                value = value.detach()
            given[name] = value
        return given

    def check_for(self, rule: type) -> None:
        """What a class of drops asks for is there, for these patches."""
        for name in WAYS_OUT:
            if name in rule.asks_for:  # type: ignore[attr-defined]
                if getattr(self, name) is None:
                    raise ValueError(f"{rule.__name__} asks for {name}, and there are none: {WAYS_OUT[name]}")
                self.check(name, getattr(self, name))

    def check(self, name: str, value: object) -> None:
        batch_size, num_patches = self.coords.shape[:2]
        dims, shape = ((5, 6), "patches, channels, height, width") if name == "pixels" else ((3,), "patches, width")
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.ndim not in dims or value.shape[:2] != (batch_size, num_patches):
            raise ValueError(
                f"{name} must have shape (batch, {shape}), here ({batch_size}, {num_patches}, ...), got "
                f"{tuple(value.shape)}"
            )

    def of_one_frame(self, num_frames: int, num_kept: int) -> "Facts":
        """Videos (T, H, W) as images (H, W): patches through time, tokens by their mean."""
        pixels, tokens, valid, grid_size = self.pixels, self.tokens, self.valid, self.grid_size
        if pixels is not None:
            frames = pixels.unflatten(1, (num_frames, -1))  # (B, T, H W, C, t, h, w), without t where frames are images
            frames = frames if pixels.ndim == 6 else frames.unsqueeze(4)
            pixels = frames.movedim(1, 3).flatten(3, 4)
        return Facts(
            self.coords[:, : self.coords.shape[1] // num_frames],
            num_kept,
            None if valid is None else valid.unflatten(1, (num_frames, -1)).all(1),
            pixels,
            None if tokens is None else tokens.unflatten(1, (num_frames, -1)).mean(1),
            grid_size and grid_size[1:],
        )

    def unpacked(self, packing: Packing, num_kept: list[int]) -> "Facts":
        """Packed images side by side, padded to one length."""
        coords, _, valid, pixels, tokens, _ = self
        real = packing.valid if valid is None else packing.valid & packing.unpack(valid[0])
        pixels, tokens = (None if value is None else packing.unpack(value[0]) for value in (pixels, tokens))
        kept = torch.tensor(num_kept, device=coords.device).unsqueeze(1)
        return Facts(packing.unpack(coords[0]), kept, real, pixels, tokens)


def scores_of(rule: Any, facts: Facts, generator: torch.Generator | None) -> Tensor:
    """The scores (B, N) of a drop, given what it asks for, and with padding last.

    Raises:
        TypeError, ValueError: for scores that are no numbers, or not one for each patch.
    """
    name, coords = type(rule).__name__, facts.coords
    asked = facts.given_to(type(rule)) if rule.asks_for else {}
    scores = rule.scores(coords, **asked) if generator is None else rule.scores(coords, generator, **asked)
    if not isinstance(scores, Tensor) or scores.dtype == torch.bool:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{name}.scores must return a tensor of numbers, got {got}")
    if scores.shape != coords.shape[:2]:
        raise ValueError(
            f"{name}.scores must return one score per patch, shape {tuple(coords.shape[:2])}, got {tuple(scores.shape)}"
        )
    return scores if facts.valid is None else scores.masked_fill(~facts.valid, -math.inf)
