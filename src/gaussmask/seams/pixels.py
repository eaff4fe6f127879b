"""Dropping before the projection: only the kept patches are cut from the image and projected.

    images -----------> kept patches --> projection, no bias --> (B, K, D) --.
                                                                              + --> tokens (B, P + K, D)
    one blank image --> embedding of the host's own --> table (1, P + N, D) --'

A token is `projection @ patch + bias + position`, and only its first term depends on the image. So the host embeds one
blank image in place of the batch, which gives all the rest, prefix tokens included, as a table under autograd. Whatever
makes a token more than such a sum (a norm, dropout, positions that differ from image to image) is an obstacle.
"""

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from ..sampling.patches import take_drawn_patches
from ..sampling.tokens import take_drawn_tokens, token_indices
from .link import Helper, Link
from .obstacles import Obstacle, obstacle_in_methods, obstacle_in_projection, obstacle_on_the_way, state_of
from .patches import Flat, cut_entering, padding_of
from .unsupported import cannot_drop_pixels

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Before torch 2.7 no graph goes through the look for obstacles, at the hooks of the modules on the way.
BREAKS_GRAPHS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7)


class Images(NamedTuple):
    """Images on their way round the projection, and the part of a blank one that it was given in their place."""

    images: Tensor
    blank: Tensor

    @property
    def batch_size(self) -> int:
        return self.images.shape[0]


class PixelStage(Helper):
    """How a host drops pixels: in this class, an embedding module that is given the blank image itself.

    `image_paths` has the other ways in.

    Args:
        link: to the seam and to the host, which is also what is given the blank image.
        projection: path of the projection, below the host.
        flat: how patches lie that enter the projection flattened.
        insists: whether to raise where something stands in the way; otherwise the tokens are dropped.
    """

    entry_path = ""  # below the host, of the module that is given the blank image
    within: tuple[str, ...] = ("",)  # paths, below the host, of the modules from the projection to the tokens
    steps: tuple[str, ...] = ("forward",)  # methods of the host on the way from the image to the tokens
    only = ""  # the calls that can drop pixels, where not all can

    def __init__(self, link: Link, projection: str, flat: Flat | None = None, *, insists: bool = True) -> None:
        super().__init__(link)
        self.insists = insists
        self.projection_path = projection
        self.flat = flat

    @property
    def host(self) -> nn.Module:
        return self.link.host

    @property
    def projection(self) -> nn.Module:
        """The one that the host had at attach."""
        return self.link.projection

    # What stands in the way

    def obstacle(self) -> str | None:
        """Why tokens are not a linear map of their patch and something common to all images; None if they are.

        Looked up anew when a module on the way, its hooks, its children or its forward have changed.
        """
        if torch.compiler.is_compiling():
            return self.look_for_obstacles()
        found = self.now.obstacle
        if found is None or found.state != state_of(self.host, self.steps, found.modules):
            modules = [self.host.get_submodule(self.projection_path)]
            modules += [module for path in self.within for module in self.host.get_submodule(path).modules()]
            reason = self.look_for_obstacles()
            found = self.now.obstacle = Obstacle(reason, modules, state_of(self.host, self.steps, modules))
        return found.reason

    def look_for_obstacles(self) -> str | None:
        projection = self.host.get_submodule(self.projection_path)
        return (
            obstacle_in_projection(projection, expected=self.link.projection or projection)
            or obstacle_in_methods(self.host, self.steps)
            or obstacle_on_the_way(self.host, self.within, projection)
        )

    def check(self) -> None:
        if reason := self.obstacle():
            raise cannot_drop_pixels(self.host_name, reason)

    # The blank image goes in

    @property
    def entry(self) -> nn.Module:
        """The module that is given the blank image."""
        return self.host.get_submodule(self.entry_path)

    def install(self, projection: nn.Module) -> None:
        self.link.anchor("projection", projection)
        self.names: list[str] = list(inspect.signature(self.entry.forward).parameters)
        self.link.before(self.entry, self.before_entry)
        self.link.before(projection, self.before_projection)
        self.link.after(projection, self.after_projection)

    def before_entry(self, module: nn.Module, args: Args, kwargs: Kwargs | None = None) -> Any:
        """Forward pre-hook: one blank image instead of the batch.

        Without keywords where the module swaps of torch.ao have registered it anew.
        """
        now = self.now
        now.images = now.blank = None
        if not (self.active and self.inside):
            return None
        if BREAKS_GRAPHS and not self.insists and torch.compiler.is_compiling():
            return None
        others = dict(zip(self.names, args, strict=False)) | (kwargs or {})
        images = others.pop(self.names[0])
        if reason := self.obstacle() or self.obstacle_in_call(images, others):
            if self.insists:
                raise cannot_drop_pixels(self.host_name, reason)
            return None
        now.images = self.arranged(images)
        given = {self.names[0]: images.new_zeros(1, *images.shape[1:]), **self.for_one(others)}
        positional = tuple(given.pop(name) for name in self.names[: len(args)])
        return positional if kwargs is None else (positional, given)

    def obstacle_in_call(self, images: Any, others: dict[str, Any]) -> str | None:
        """The same, of a call of the entry with `images` and `others`, by name."""
        for name, value in others.items():
            if isinstance(value, Tensor):
                return f"it was called with {name}, by which tokens differ from image to image"
        return self.obstacle_in_weight()

    def obstacle_in_weight(self) -> str | None:
        """The weight is used outside of its module, where it has to be whole and plain."""
        weight: Any = self.projection.weight
        if type(weight) not in (Tensor, nn.Parameter, FakeTensor) or weight.ndim < 2:
            return (
                f"where its tokens are dropped, the weight of its projection is a {type(weight).__name__} of shape "
                f"{tuple(weight.shape)} (quantised, or sharded apart from the model around it)"
            )
        return None

    def for_one(self, others: dict[str, Any]) -> dict[str, Any]:
        """The further arguments of the entry, for one image."""
        return others

    def before_projection(self, module: nn.Module, args: Args) -> Args | None:
        """Forward pre-hook: the patches of a blank image are all alike, so that one of them is enough."""
        if self.now.images is None:
            return None
        self.now.blank = blank = args[0]
        if isinstance(module, nn.Linear):
            return (blank[:, :1],)
        one = (slice(None), slice(None), *(slice(side) for side in cast("Any", module).kernel_size))
        return (blank[one],)

    def after_projection(self, module: nn.Module, args: Args, output: Tensor) -> Tensor | None:
        """Forward hook: what became of one patch, for all of them."""
        blank = self.now.blank
        if blank is None:
            return None
        if isinstance(module, nn.Linear):
            return output.expand(1, blank.shape[1], -1).contiguous()
        conv, sides = cast("Any", module), blank.shape[2:]
        axes = zip(sides, padding_of(conv), conv.kernel_size, conv.stride, strict=True)
        grid_size = [(side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in axes]
        if any(side != 1 for side in output.shape[2:]):  # with padding
            one: tuple[slice, ...] = (slice(None), slice(None), *(slice(1) for _ in sides))
            output = output[one]
        return output.expand(1, -1, *grid_size).contiguous()  # several times faster than repeat

    def arranged(self, images: Tensor) -> Tensor:
        """The input of the entry as it reaches the projection."""
        return images

    # The tokens come out

    def take(self) -> Images | None:
        """The images on their way; None where the images were embedded whole, as by parts that are called by hand."""
        now = self.now
        images, blank = now.images, now.blank
        now.images = now.blank = None
        if images is None or blank is None:
            if self.insists:
                self.check()
            if images is None:
                return None
            raise cannot_drop_pixels(
                self.host_name, "it reached its patch dropout, but no images had gone through its embedding"
            )
        return Images(images, blank)

    def embed(
        self,
        taken: Images,
        table: Tensor,
        keep_indices: Tensor,
        num_prefix_tokens: int,
        num_suffix_tokens: int,
    ) -> Tensor:
        """The tokens (B, P + K + S, D) of the prefix, the kept patches and the suffix.

        Args:
            table: (1, P + N + S, D), the host's embedding of the blank image.
            keep_indices: (B, K), counted over the patches.
        """
        images, blank = taken
        if reason := self.obstacle_in_weight():
            raise cannot_drop_pixels(self.host_name, reason)
        if len(table) != 1 or self.shape_at_projection(images) != blank.shape[1:]:
            raise cannot_drop_pixels(
                self.host_name,
                f"of images {tuple(images.shape)} a blank one came to its projection as {tuple(blank.shape)}, and its "
                f"tokens came out as {tuple(table.shape)}, a way that gaussmask does not know",
            )
        num_patches = table.shape[1] - num_prefix_tokens - num_suffix_tokens
        rows = token_indices(keep_indices, num_patches, num_prefix_tokens, num_suffix_tokens)
        if table.requires_grad and not torch.compiler.is_compiling():
            table.register_hook(_by_columns)
        constant = table.squeeze(0).index_select(0, rows.flatten()).view(*rows.shape, table.shape[-1])
        patches = self.kept_patches(images, keep_indices).to(blank.dtype)
        projected = project_patches(patches, cast("Any", self.projection).weight)
        return constant + F.pad(projected, (0, 0, num_prefix_tokens, num_suffix_tokens))

    def all_patches(self, taken: Images) -> Tensor:
        """All patches (B, N, C, h, w) of the images on their way, for a rule that asks for pixels."""
        return self.cut(taken.images.detach()).to(taken.blank.dtype)

    def cut(self, images: Tensor) -> Tensor:
        """The patches of images, as they would enter the projection."""
        return cut_entering(images, self.projection, self.flat)

    def shape_at_projection(self, images: Tensor) -> tuple[int, ...]:
        """The shape of one image where it enters the projection."""
        return images.shape[1:]

    def kept_patches(self, images: Tensor, keep_indices: Tensor) -> Tensor:
        """The kept patches (B, K, ...) of the images, laid out as the weight of the projection."""
        if images.ndim == 3:  # flattened patches (B, N, pixels)
            return take_drawn_tokens(images, keep_indices, 0)
        conv: Any = self.projection
        if any(padding_of(conv)):
            images = F.pad(images, [pad for pad in reversed(padding_of(conv)) for _ in range(2)])
        return take_drawn_patches(images, keep_indices, conv.kernel_size, conv.stride)


def project_patches(patches: Tensor, weight: Tensor) -> Tensor:
    """Patches (B, K, C, ...) by a weight (D, C, ...), without a bias: (B, K, D)."""
    if patches.ndim > 3 and not patches.is_contiguous():  # channels last in memory: reorder the weight, not the pixels
        patches, weight = patches.movedim(2, -1), weight.movedim(1, -1)
    return F.linear(patches.flatten(2), weight.flatten(1))


def _by_columns(gradient: Tensor) -> Tensor:
    """The gradient of a table, in another order in memory.

    Where a host puts its table together from a class token and patches, their gradients are slices of the table's. The
    slice of a parameter would become its `grad` with strides that no parameter has, at which DDP warns. A slice of this
    one is copied by autograd.
    """
    return gradient.mT.contiguous().mT
