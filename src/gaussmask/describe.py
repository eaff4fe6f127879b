"""What `attach` would do to a model, as data and readable at a glance."""

import math
from dataclasses import dataclass, field

from torch import nn

from .attach import find_place, seams_of
from .drops import RandomPatchDropout
from .sampling.top import num_kept_patches
from .seams.unsupported import UnsupportedModelError

RATIOS = (0.5, 0.75, 0.918)


@dataclass(frozen=True)
class Description:
    """What `attach` would do to a model; `str()` of it is meant to be read.

    Attributes:
        model: class of the model.
        supported: whether `attach` would succeed.
        reason: why not, else None. Where it is not None, everything below is empty.
        family: library and class of the host, the part of the model that takes the drop.
        path: where the host lies in the model, "" for the model itself.
        seam: how the drop is put in.
        besides: what else loses the rows of the dropped patches.
        num_prefix_tokens, num_suffix_tokens: tokens in front of and behind the patches, which are always kept.
        grid_size: (H, W), or (T, H, W) of a video, at the size of image that the model is configured for; None where
            every image has its own. A forward goes by the true grid of its input.
        kept: how many of these patches are kept, by mask_ratio.
        stage: `"pixels"` or `"tokens"`: which of them the next forward drops, with the drop that the model carries, or
            with one that is attached at the default stage.
        stage_reason: why tokens, None for pixels.
        pixels_reason: why `attach(..., stage="pixels")` would raise, None if it would not.
        pixels_only: which calls can drop pixels, "" for all.
        note: what else to know about this family.
        idle: whether the model is in eval mode, in which a drop does nothing.
    """

    model: str
    reason: str | None = None
    family: str = ""
    path: str = ""
    seam: str = ""
    besides: tuple[str, ...] = ()
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    grid_size: tuple[int, ...] | None = None
    kept: dict[float, int] = field(default_factory=dict)
    stage: str = ""
    stage_reason: str | None = None
    pixels_reason: str | None = None
    pixels_only: str = ""
    note: str = ""
    idle: bool = False

    @property
    def supported(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        if self.reason is not None:
            first = self.reason.partition(" ")[0]  # Class, or library.Class
            return self.reason if self.model in first.split(".") else f"{self.model}: {self.reason}"
        always = f"{self.num_prefix_tokens} in front" if self.num_prefix_tokens else ""
        always += ", " * bool(always and self.num_suffix_tokens)
        always += f"{self.num_suffix_tokens} behind" if self.num_suffix_tokens else ""
        grid, patches = "of each image", "of each image's own"
        if self.grid_size is not None:
            grid = f"{' x '.join(map(str, self.grid_size))} as configured; a forward goes by its input"
            patches = f"of {math.prod(self.grid_size)}"
        kept = ", ".join(f"{count} at {ratio:g}" for ratio, count in self.kept.items())
        rows = {
            "host": f"{self.family} at {self.path!r}" if self.path else self.family,
            "seam": self.seam,
            "follows": "; ".join(self.besides),
            "always kept": always or "no other tokens",
            "grid": grid,
            "patches kept": f"{kept} {patches}" if kept else "",
            "stage": f"pixels {self.pixels_only}" if self.stage_reason is None else f"tokens: {self.stage_reason}",
            "note": self.note,
            "mode": "eval: nothing is dropped until model.train()" if self.idle else "",
        }
        return "\n".join([f"{self.model}:", *(f"  {name:<13} {text}".rstrip() for name, text in rows.items() if text)])


def describe(model: nn.Module) -> Description:
    """Tell what `attach(model, drop)` would do, or why it would raise. Nothing is changed, and no forward is run.

    Examples:
        >>> from torch import nn
        >>> print(describe(nn.Linear(2, 2)))  # doctest: +ELLIPSIS
        torch.Linear holds no vision transformer that gaussmask knows...
    """
    model_name = type(model).__name__
    try:
        place = find_place(model)
        seam = place.host.seam(RandomPatchDropout(0.5), place, "auto")
        seam.check(place)
    except (UnsupportedModelError, ValueError) as error:
        return Description(model_name, reason=str(error))
    grid_size = seam.configured_grid(place)
    kept = {} if grid_size is None else {ratio: num_kept_patches(math.prod(grid_size), ratio) for ratio in RATIOS}
    pixels = seam.pixel_stage(place)
    reason = next(seams_of(model), seam).why_tokens()
    followers = [(name, part) for name, part in place.host.followers.items() if part.what and place.within(name)]
    return Description(
        model_name,
        family=place.key.replace(".", " "),
        path=place.path,
        seam=seam.how(place),
        besides=tuple(f"{part.what} ({name})" for name, part in followers),
        num_prefix_tokens=seam.num_prefix_tokens,
        num_suffix_tokens=seam.num_suffix_tokens,
        grid_size=grid_size,
        kept=kept,
        stage="pixels" if reason is None else "tokens",
        stage_reason=reason,
        pixels_reason=pixels if isinstance(pixels, str) else pixels.obstacle(),
        pixels_only="" if isinstance(pixels, str) else pixels.only,
        note=place.host.note,
        idle=not seam.seat(place).training,
    )
