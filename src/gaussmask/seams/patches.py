"""The pixels of a host's patches, for a rule that asks for them: as they enter the projection of the host.

    images --> ... of the host --> projection: caught before it --> cut --> (B, N, C, h, w) --> scores

Only a rule that asks has anything caught or cut.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ..sampling.patches import cut_all_patches
from .link import Helper, Link
from .unsupported import UnsupportedModelError


class Flat(NamedTuple):
    """How the numbers of a flattened patch lie: (C, p, q), or `channels_last` (p, q, C)."""

    patch_size: tuple[int, ...]
    channels_last: bool

    def unflatten(self, patches: Tensor) -> Tensor:
        """(B, N, numbers) as (B, N, C, p, q)."""
        if self.channels_last:
            return patches.unflatten(-1, (*self.patch_size, -1)).movedim(-1, 2)
        return patches.unflatten(-1, (-1, *self.patch_size))


def plain(projection: nn.Module) -> Any:
    """The layer itself, below the adapters of PEFT."""
    while isinstance(below := getattr(projection, "base_layer", None), nn.Module):
        projection = below
    return projection


def padding_of(conv: Any) -> tuple[int, ...]:
    return (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding


def cut_entering(entering: Tensor, projection: Any, flat: Flat | None) -> Tensor:
    """The patches (B, N, C, ...) of what enters a projection: images, or patches that are flat already."""
    if flat is not None and entering.ndim == 3:
        return flat.unflatten(entering)
    padding = padding_of(projection)
    if any(padding):
        entering = F.pad(entering, [pad for pad in reversed(padding) for _ in range(2)])
    return cut_all_patches(entering, projection.kernel_size, projection.stride)


def why_not_cut(patch_embedding: nn.Module, projection: nn.Module, flat: Flat | None) -> str | None:
    """Why images do not reach the projection as patches, or as images that it cuts; None if they do."""
    for name, module in patch_embedding.named_children():
        if module is projection:
            break
        if any(True for _ in module.parameters()):
            return f"its images pass through a {name} ({type(module).__name__}) before their projection"
    layer = plain(projection)
    if isinstance(layer, nn.Linear):
        if flat is None or layer.in_features % math.prod(flat.patch_size):
            return f"how its patches lie in the {layer.in_features} numbers that enter its projection is not known"
        return None
    if not isinstance(layer, (nn.Conv2d, nn.Conv3d)):
        return f"its projection is a {type(layer).__name__}, and no Conv2d, Conv3d or Linear"
    if layer.padding == "same" or any(step != 1 for step in layer.dilation):
        return f"its projection has padding={layer.padding!r} and dilation={layer.dilation!r}"
    if any(padding_of(layer)) and layer.padding_mode != "zeros":
        return f"its projection has padding_mode={layer.padding_mode!r}"
    return None


class CaughtPatches(Helper):
    """Catches what enters the projection of a host in each forward, and cuts it into patches once."""

    def __init__(self, link: Link, flat: Flat | None) -> None:
        super().__init__(link)
        self.flat = flat

    def install(self, projection: nn.Module) -> None:
        self.link.anchor("projection", projection)
        self.link.before(projection, self.before_projection)

    def before_projection(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Images on their way round the projection are cut where they are kept.
        self.now.entering = args[0].detach() if self.active and self.now.images is None else None

    def take(self) -> Tensor:
        """(B, N, C, h, w), of the forward that is running."""
        return self.cut(self.take_entering())

    def cut(self, entering: Tensor) -> Tensor:
        return cut_entering(entering, plain(self.link.projection), self.flat)

    def take_entering(self) -> Tensor:
        """What entered the projection in the forward that is running."""
        entering, self.now.entering = self.now.entering, None
        if entering is None:
            raise UnsupportedModelError(
                f"{type(self.drop).__name__} asks for pixels, but nothing entered the projection that "
                f"{self.host_name} had at attach: if it was replaced, attach again"
            )
        return entering
