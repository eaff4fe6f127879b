"""How a host takes a drop: the mechanisms behind the table of `hosts`.

A seam is a parameter-free module that sits in the host. It carries the drop, tells it what the host knows in this very
forward (prefix tokens, the true grid, which patches are padding) and hands the kept tokens back in the form that the
host expects. Whatever else the host holds one row per token of, beside the tokens, loses the same rows: `besides`.

Hooks are bound methods of the seam, or objects that hold it, and all of them lie in the host. So deep copies and
pickles of a host have a seam, a drop and hooks of their own.
"""

import math
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..drops.base import PatchDropout
from ..sampling.tokens import take_drawn_tokens
from .call import Draw
from .host import Place
from .pixels import PixelStage
from .unsupported import UnsupportedModelError, cannot_drop_pixels


class Seam(nn.Module):
    """A module that sits in the host, called with the tokens; returns those that are kept.

    Args:
        drop: the drop to carry.
        place: where.
        stage: `"tokens"`, or `"pixels"` to drop before the projection.
    """

    pixels_by_default: ClassVar[type[PixelStage] | str]  # where the row of a family says nothing

    def __init__(self, drop: PatchDropout, place: Place, stage: str = "tokens") -> None:
        super().__init__()
        host = place.host
        self.drop = drop
        self.host_name: str = place.name
        self.num_prefix_tokens: int = host.count(host.prefix, place.module)
        self.num_suffix_tokens: int = host.count(host.suffix, place.module)
        self.slot: str = host.slot
        self.replaced: nn.Module | None = None  # a submodule that gave way, which goes on following the host's mode
        self.aside: list[tuple[Any, str, str, Any]] = []
        self.handles: list[RemovableHandle] = []
        self.grid_size: tuple[int, ...] | None = None
        self.draw: Draw = self.new_draw()  # the latest
        self.begun: Draw | None = None  # one that is handed on before it is drawn
        self.undropped: bool = False  # patches were embedded, and have not reached the drop
        pixels = self.pixel_stage(place) if stage == "pixels" else None
        if isinstance(pixels, str):
            raise cannot_drop_pixels(place.name, pixels)
        self.pixels = pixels

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.drop._seam = weakref.ref(self)  # the copied drop sits in the copied host

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "grid_size": None, "draw": self.new_draw(), "begun": None, "undropped": False}

    def new_draw(self) -> Draw:
        return Draw(self.num_prefix_tokens, self.num_suffix_tokens)

    def begin_draw(self) -> None:
        """Hand a draw on before it is drawn."""
        self.draw = self.begun = self.new_draw()

    # Before the installation

    def pixel_stage(self, place: Place) -> PixelStage | str:
        """How the host drops before its projection, or why a host of its family cannot."""
        stage = place.host.pixels or self.pixels_by_default
        if isinstance(stage, str):
            return stage
        path = ".".join(part for part in (place.host.grid_source, stage.projection_below) if part)
        return stage(place.module, place.name, path, self.drop)

    def how(self, place: Place) -> str:
        """The seam in words, for `describe`."""
        return f"stands in for {place.at(self.slot)}"

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        """The grid of an image of the size that the host is configured for; None where every image has its own."""
        conv: Any = place.module.get_submodule(place.host.grid_source)
        size = place.configured_size()
        padding = (0,) * len(size) if isinstance(conv.padding, str) else conv.padding
        sides = zip(size, padding, conv.kernel_size, conv.stride, strict=True)
        return tuple((side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in sides)

    def check(self, place: Place) -> None:
        """Raise where the drop or the surroundings of the host do not fit, before anything is changed."""
        self.agreed("num_prefix_tokens", self.num_prefix_tokens)
        if self.pixels is not None:
            self.pixels.check()
        for class_name, beside in place.host.besides.items():
            if beside.needed and not place.within(class_name):
                name = type(place.module).__name__
                raise UnsupportedModelError(
                    f"{name} by itself lacks {beside.needed}: attach to the model that holds both"
                )

    # Installation

    def install(self, place: Place) -> None:
        """Sit down in the host and watch the module that shows the grid."""
        module, host = place.module, place.host
        self.drop._seam = weakref.ref(self)
        self.put(module, self.slot, self)
        if self.pixels is not None:
            self.handles += self.pixels.install()
        grid_source = module.get_submodule(host.grid_source)
        self.handles.append(self.watch(grid_source))
        self.handles.append(grid_source.register_forward_hook(self.expect_drop))
        for class_name, beside in host.besides.items():
            for part in place.within(class_name):
                self.handles += beside(self, part).install()
        if hasattr(module, "forward_intermediates"):
            self.put(module, "forward_intermediates", FeatureMapGuard(module, self.drop))

    def guard(self, place: Place) -> None:
        """Raise when a forward ends without the drop. To be installed last, for then its hooks are the last to run."""
        for module in dict.fromkeys((*place.owners[:1], place.tower)):
            self.handles.append(module.register_forward_pre_hook(self.enter))
            self.handles.append(module.register_forward_hook(self.leave))

    def put(self, owner: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the host's modules, and remember what was there."""
        if name in owner._modules:
            self.replaced = owner._modules[name]
            self.aside.append((owner, name, "submodule", None))
        else:
            kind = "attribute" if name in vars(owner) else "absent"
            self.aside.append((owner, name, kind, vars(owner).get(name)))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Leave the host as `install` found it."""
        for handle in self.handles:
            handle.remove()
        for owner, name, kind, was in reversed(self.aside):
            if kind == "submodule":
                setattr(owner, name, self.replaced)
                continue
            delattr(owner, name)
            if kind == "attribute":
                setattr(owner, name, was)
        self.drop._seam = None

    # What the host tells

    def watch(self, grid_source: nn.Module) -> RemovableHandle:
        return grid_source.register_forward_hook(self.watch_grid)

    def watch_grid(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of a convolution: its output is the grid, of an image (H, W) or of a video (T, H, W)."""
        self.grid_size = tuple(output.shape[2:])

    # Whether embedded patches come to the drop

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model: what an earlier forward left behind, which broke off, is none of this one."""
        self.undropped = False

    def expect_drop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the module that shows the grid, which a forward calls once."""
        self.demand_drop()
        self.undropped = self.drop.active

    def reach_drop(self) -> None:
        """What was embedded has come to the drop."""
        self.undropped = False

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model."""
        self.demand_drop()

    def demand_drop(self) -> None:
        if self.undropped:
            self.undropped = False
            raise UnsupportedModelError(
                f"{self.host_name} embedded patches and went on without its patch dropout, so that none were dropped: "
                "its forward is overridden, or its parts are called one by one. Detach, and call the drop on the "
                "tokens there, x = drop(x); or turn it off with drop.eval()"
            )

    def agreed(self, name: str, host_value: Any) -> Any:
        """The host's value of a drop's argument, which a value of the drop's own must not contradict."""
        own = getattr(self.drop, name)
        if own is not None and own != host_value:
            raise ValueError(
                f"the drop says {name}={own}, but {self.host_name} has {host_value}: leave {name} None and the host's "
                "own value is used"
            )
        return host_value

    def agree_to_own_grids(self, facts: dict[str, Any]) -> None:
        """A grid of the drop's own has no meaning for images with grids of theirs."""
        if "grid_size" not in facts:
            self.agreed("grid_size", "a grid for every image")

    # The drop

    def current_draw(self) -> Draw:
        """The draw of the forward that is running, for what the host makes after it."""
        if self.draw.keep_indices is None and self.drop.active:
            raise UnsupportedModelError(
                f"{self.host_name} asked for positions before its patches were dropped, an order that gaussmask does "
                "not know: this version of its library is not supported yet"
            )
        return self.draw

    def drop_tokens(
        self, x: Tensor, num_prefix_tokens: int | None = None, **facts: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Drop tokens as told by `facts` (see `PatchDropout.draw`), or by the grid that was watched."""
        self.reach_drop()
        grid_size, self.grid_size = self.grid_size, None  # true for one forward only
        if not facts and self.drop.active:
            if grid_size is None:
                raise UnsupportedModelError(
                    f"{self.host_name} reached its patch dropout without its patch embedding, so the grid is unknown: "
                    "call the model's forward, or detach first"
                )
            facts = {"grid_size": self.agreed("grid_size", grid_size)}
        elif facts:
            self.agree_to_own_grids(facts)
        prefix = self.agreed("num_prefix_tokens", self.num_prefix_tokens)
        prefix = prefix if num_prefix_tokens is None else num_prefix_tokens
        # Never that of a forward before: a layer that is recomputed may still need it as it is.
        self.draw, self.begun = self.begun or self.new_draw(), None
        num_patches = self.draw.num_patches = x.shape[1] - prefix - self.num_suffix_tokens
        if not self.drop.active:
            self.drop.keep_indices = None
            return x, None
        batch_size = x.shape[0] if self.pixels is None else self.pixels.batch_size
        for fact in facts.keys() & {"coords", "valid"}:  # of a blank image, where pixels are dropped
            facts[fact] = facts[fact].expand(batch_size, *facts[fact].shape[1:])
        grid_size = facts.pop("grid_size", None)
        if grid_size is not None and math.prod(grid_size) != num_patches:
            raise UnsupportedModelError(
                f"{self.host_name} has a grid of {' x '.join(map(str, grid_size))} patches, but {num_patches} tokens "
                f"besides its {self.num_prefix_tokens + self.num_suffix_tokens} others: if it was given further "
                "tokens, count them in its num_prefix_tokens and attach again"
            )
        keep_indices = self.drop.draw(batch_size, num_patches, grid_size, **facts, device=x.device)
        self.draw.keep_indices = keep_indices
        return self.take(x, keep_indices, prefix), keep_indices

    def take(self, x: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
        """The prefix, the kept patches and the suffix: of embedded tokens, or from pixels and the table `x`."""
        take = take_drawn_tokens if self.pixels is None else self.pixels.embed
        return take(x, keep_indices, num_prefix_tokens, self.num_suffix_tokens)

    def forward(self, x: Tensor) -> Any:
        return self.drop_tokens(x)[0]


def own_grids(positions: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """What `PatchDropout.draw` wants to know of images with grids of their own.

    Args:
        positions: (B, N, 2), the integer (y, x) of every patch on its image's grid, whose first patch is at (0, 0).
        valid: (B, N), False for padding; None if there is none.

    Returns:
        `coords` (B, N, 2) float32 in [-1, 1]^2, and `valid` (B, N) bool.
    """
    if valid is None:
        valid = torch.ones(positions.shape[:2], dtype=torch.bool, device=positions.device)
    valid = valid.bool()
    last = positions.masked_fill(~valid.unsqueeze(-1), 0).amax(dim=1, keepdim=True)
    coords = 2 * positions / last.clamp(min=1) - (last > 0).to(torch.float32)
    return {"coords": coords.to(torch.float32), "valid": valid}


class FeatureMapGuard:
    """Stands before `forward_intermediates`, whose (B, D, H, W) maps would be scrambled by a shorter sequence."""

    def __init__(self, host: Any, drop: PatchDropout) -> None:
        self.host = host
        self.drop = drop
        self.own: Any = vars(host).get("forward_intermediates")  # somebody's on the instance, before the class's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.drop.active and not any(
            isinstance(value, str) and value == "NLC" for value in (*args, *kwargs.values())
        ):
            raise UnsupportedModelError(
                f"{type(self.host).__name__}.forward_intermediates lays its tokens out as a dense map, which dropped "
                'patches leave with holes: pass output_fmt="NLC", or call it in eval mode'
            )
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.host).forward_intermediates(self.host, *args, **kwargs)
