"""What every seam does: it carries the drop into a host, tells it what the host knows, and returns the kept tokens.

    attach:  Seam(drop, place) --> check --> install --> hooks and stand-ins in the host, tied to the seam by a `link`
    forward: the grid is watched --> drop_tokens --> the drop draws --> take --> kept tokens --> the host's blocks

A seam is a parameter-free module that sits in the host. What the host holds beside the tokens, with one row for each,
loses the same rows: the followers, which ask for the `current_draw`.

All of it lies in the host, so that deep copies and pickles of a host have a seam, a drop and hooks of their own. What
one forward leaves for its later steps is in `now`.
"""

import math
import weakref
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..drops.base import PatchDropout
from ..sampling.checks import plain_number
from ..sampling.tokens import take_drawn_tokens
from .call import Draw, Forward
from .guards import MASKS, MustReachDrop, NoDenseMaps, TokenArguments
from .host import Place
from .link import Helper, Link, Linked
from .patches import CaughtPatches, Flat, plain, why_not_cut
from .pixels import Images, PixelStage
from .unsupported import UnsupportedModelError, cannot_drop_pixels

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


# How timm and open_clip call the ratio of their own patch dropout, and what one might take it for.
RATIOS_OF_OTHERS = ("prob", "p", "drop_prob", "mask_ratio", "keep_prob")


class Relay(Helper):
    """The hooks that are methods of the seam; see `Seam`, `HookSeam`, `NaFlexSeam` and `PackedSeam`."""

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if (seam := self.seam) is not None:
            seam.begin(module, args, kwargs)

    def watch_embeds(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        if (seam := self.seam) is not None:
            seam.watch_embeds(module, args, kwargs, output)

    def after_tokens(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return None if (seam := self.seam) is None else seam.after_tokens(module, args, kwargs, output)

    def before_transformer(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        return None if (seam := self.seam) is None else seam.before_transformer(module, args, kwargs)


class Seam(nn.Module, Linked):
    """A module that sits in the host, called with the tokens; returns those that are kept.

    Args:
        drop: the drop to carry.
        place: where.
        stage: `"tokens"`, `"pixels"` to drop before the projection, or `"auto"` to do that where nothing stands in the
            way.
    """

    pixels_by_default: ClassVar[type[PixelStage] | str]  # how, or why not, where the row of a family says nothing
    projection_below: ClassVar[str] = ""  # path of the projection, below the patch embedding
    masks_refused: ClassVar[tuple[str, ...]] = MASKS  # arguments that do not follow the drop
    block_masks_refused: ClassVar[tuple[str, ...]] = ()  # those that a tower hands on to its blocks under their names
    remembers: bool = False  # whether something behind the tower asks for draws, by the tokens that came out of it
    makes_masks: ClassVar[bool] = False  # whether a tower makes such masks by itself, of the kept tokens

    def __init__(self, drop: PatchDropout, place: Place, stage: str = "tokens") -> None:
        super().__init__()
        host = place.host
        self.drop = drop
        self.host_name: str = place.name
        self.num_prefix_tokens: int = host.count(host.prefix, place.module)
        self.num_suffix_tokens: int = host.count(host.suffix, place.module)
        self.replaced: nn.Module | None = None  # the host's own patch dropout, which goes on following its mode
        self.link: Link = Link()
        self.link.seam, self.link.drop, self.link.host = self, drop, place.module
        self.relay: Relay = Relay(self.link)
        self.guard: MustReachDrop = MustReachDrop(self.link)
        self.arguments: TokenArguments = TokenArguments(self.link)
        self.stage: str = stage
        self.pixels: PixelStage | None = None
        self.no_pixels: str | None = None  # why this seam never drops any
        self.choose(self.pixel_stage(place, insists=stage == "pixels"))
        self.caught: CaughtPatches | None = None  # for a rule that asks for pixels
        if "pixels" in drop.asks_for:
            self.caught = CaughtPatches(self.link, self.flat_patches(place))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.link.seam, self.link.drop = self, self.drop
        self.drop._seam = weakref.ref(self)  # the copied drop sits in the copied host

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RATIOS_OF_OTHERS:
            raise AttributeError(
                f"a {type(self.drop).__name__} sits in the place of the model's own patch dropout, which has no "
                f"{name!r}: set gaussmask.attached(model).mask_ratio"
            )
        super().__setattr__(name, value)
        if name == "drop" and "link" in vars(self):  # exchanged by hand
            self.link.drop, value._seam = value, weakref.ref(self)

    def __prepare_scriptable__(self) -> Any:  # what torch.jit.script asks for
        raise UnsupportedModelError(
            f"{self.host_name} carries a drop, whose hooks torch.jit.script does not compile: detach first"
        )

    @property
    def now(self) -> Forward:
        """What the forward that is running has left so far."""
        return self.link.now

    def new_draw(self) -> Draw:
        return Draw(self.num_prefix_tokens, self.num_suffix_tokens)

    def begin_draw(self) -> None:
        """Hand a draw on before it is drawn."""
        self.now.draw = self.now.begun = self.new_draw()

    # Before the installation

    def pixel_stage(self, place: Place, *, insists: bool = True) -> PixelStage | str:
        """How the host drops before its projection, or why a host of its family cannot."""
        stage = place.host.pixels or self.pixels_by_default
        if isinstance(stage, str):
            return stage
        return stage(self.link, self.projection_path(place), self.flat_patches(place), insists=insists)

    def choose(self, pixels: PixelStage | str) -> None:
        """How this seam drops pixels, or why it does not."""
        asks_for_tokens = "tokens" in self.drop.asks_for
        if self.stage == "tokens":
            self.no_pixels = "stage='tokens' was asked for"
        elif isinstance(pixels, str):
            self.no_pixels = pixels
        elif asks_for_tokens:
            self.no_pixels = (
                f"the scores of {type(self.drop).__name__} ask for tokens, which there are behind the projection only"
            )
        else:
            self.pixels = pixels
        if self.stage == "pixels" and self.no_pixels is not None:
            raise cannot_drop_pixels(self.host_name, self.no_pixels)

    def why_tokens(self) -> str | None:
        """Why the next forward drops tokens, as far as can be known before; None where it drops pixels."""
        return self.no_pixels if self.pixels is None else self.pixels.obstacle()

    def projection_path(self, place: Place) -> str:
        """Of the projection, below the host."""
        return ".".join(part for part in (place.host.patch_embedding, self.projection_below) if part)

    def flat_patches(self, place: Place) -> Flat | None:
        """How patches lie that enter the projection flattened; None where it cuts images by itself."""
        return None

    def how(self, place: Place) -> str:
        """The seam in words, for `describe`."""
        return f"stands in for {place.at(place.host.patch_dropout)}"

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        """The grid of an image of the size that the host is configured for; None where every image has its own."""
        conv = plain(place.module.get_submodule(place.host.patch_embedding))
        size = place.configured_size()
        padding = (0,) * len(size) if isinstance(conv.padding, str) else conv.padding
        sides = zip(size, padding, conv.kernel_size, conv.stride, strict=True)
        return tuple((side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in sides)

    def check(self, place: Place) -> None:
        """Raise where the drop or the surroundings of the host do not fit, before anything is changed."""
        self.agreed("num_prefix_tokens", self.num_prefix_tokens)
        self.check_asked(place)
        if self.pixels is not None and self.pixels.insists:
            self.pixels.check()
        for class_name, follower in place.host.followers.items():
            if follower.needed and not place.within(class_name):
                name = type(place.module).__name__
                raise UnsupportedModelError(
                    f"{name} by itself lacks {follower.needed}: attach to the model that holds both"
                )

    def check_asked(self, place: Place) -> None:
        """Raise where the scores of the drop ask for what the host cannot give."""
        if "pixels" not in self.drop.asks_for:
            return
        projection = place.module.get_submodule(self.projection_path(place))
        patch_embedding = place.module.get_submodule(place.host.patch_embedding)
        if reason := why_not_cut(patch_embedding, projection, self.flat_patches(place)):
            rule = type(self.drop).__name__
            raise UnsupportedModelError(
                f"{self.host_name} cannot give the pixels that the scores of {rule} ask for: {reason}"
            )

    # Installation

    def seat(self, place: Place) -> nn.Module:
        """The module that the seam sits in, and whose mode the drop follows."""
        return place.module

    def install(self, place: Place) -> None:
        """Sit down in the host and watch the module that shows the grid."""
        module, host, link, seat = place.module, place.host, self.link, self.seat(place)
        self.drop._seam = weakref.ref(self)
        replaced = seat._modules.get(host.patch_dropout)
        link.put(seat, host.patch_dropout, self)
        link.anchor("host", module)
        link.anchor("tower", place.tower)
        self.replaced = replaced
        projection = module.get_submodule(self.projection_path(place))
        if self.pixels is not None:
            self.pixels.install(projection)
        if self.caught is not None:
            self.caught.install(projection)
        patch_embedding, first_block = module.get_submodule(host.patch_embedding), place.first_block()
        self.guard.watch_parts(patch_embedding, first_block)
        self.watch(patch_embedding)
        for class_name, follower in host.followers.items():
            for part in place.within(class_name):
                follower(link).install(part)
        if hasattr(module, "forward_intermediates"):
            link.put(module, "forward_intermediates", NoDenseMaps(link, module))

    def watch_forward(self, place: Place) -> None:
        """Raise when a forward ends without the drop: the last to be installed."""
        self.remembers = self.remembers or any(getattr(part, "behind", False) for part in place.host.followers.values())
        followers = [found[0] for name in place.host.followers if len(found := place.paths_within(name)) == 1]
        self.guard.watch_forward(place.outermost, place.tower, place.path, followers)

    def remove(self) -> None:
        """Part from the host, and leave it as `install` found it; in a copy, `take_off` has to go round its modules."""
        self.link.cut()
        self.drop._seam = None

    # What the host tells

    def watch(self, patch_embedding: nn.Module) -> None:
        """Hook what `watch_grid` cannot see."""

    def watch_grid(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The grid, of what a convolution returned: (H, W) of an image or (T, H, W) of a video."""
        self.now.grid_size = tuple(output.shape[2:])

    def agreed(self, name: str, host_value: Any) -> Any:
        """The host's value of a drop's argument, which a value of the drop's own must not contradict."""
        own = getattr(self.link.drop, name)
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

    def draw_of(self, *values: Any) -> Draw:
        """The draw of the forward that one of `values` came out of, for what lies behind the tower; or the latest."""
        if not self.link.drop.active:
            return self.new_draw()
        now = self.now
        if torch.compiler.is_compiling():  # a graph knows no tensors of other calls
            return now.draw
        return next(
            (now.drawn[value] for value in values if isinstance(value, Tensor) and value in now.drawn), now.draw
        )

    def current_draw(self) -> Draw:
        """The draw of the forward that is running, for what the host makes after it."""
        if not self.link.drop.active:
            return self.new_draw()
        draw = self.now.draw
        if draw.keep_indices is None or draw.over:
            raise UnsupportedModelError(
                f"{self.host_name} asked for positions before its patches were dropped. If its parts are called one by "
                "one, embed the patches first, or call the model; if a module was replaced after attach, attach again; "
                "otherwise this version of its library is not supported yet"
            )
        if draw.ambiguous:
            raise UnsupportedModelError(
                f"the parts of {self.host_name} were called one by one for several batches in turn, so that it is not "
                "known which patches of which batch were kept: call the model"
            )
        draw.used = True
        return draw

    def drop_tokens(
        self, x: Tensor, num_prefix_tokens: int | None = None, **facts: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Drop tokens as told by `facts` (see `PatchDropout.draw`), or by the grid that was watched."""
        now, drop = self.link.now, self.link.drop
        now.pending = now.expected = False
        watched, now.grid_size = now.grid_size, None  # true for one forward only
        self.agreed("num_prefix_tokens", self.num_prefix_tokens)
        prefix = self.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens
        # Never the draw of a forward before: a layer that is recomputed may still need it as it is.
        draw, now.begun = now.begun or self.new_draw(), None
        draw.num_patches = plain_number(x.shape[1]) - prefix - self.num_suffix_tokens
        last, now.draw = now.draw, draw
        draw.ambiguous = not (now.running or last.keep_indices is None or last.used or last.over)
        if facts:
            self.agree_to_own_grids(facts)
        if not drop.active:
            drop._drawn.nothing()
            return x, None
        facts = facts or {"grid_size": self.agreed("grid_size", self.known_grid(watched))}
        images = None if self.pixels is None else self.pixels.take()
        draw.keep_indices = self.ask_drop(x, prefix, draw.num_patches, images, **facts)
        now.draw = draw  # a rule may have called the model meanwhile
        return self.take(x, images, draw.keep_indices, prefix), draw.keep_indices

    def known_grid(self, watched: tuple[int, ...] | None) -> tuple[int, ...]:
        if watched is None:
            raise UnsupportedModelError(
                f"{self.host_name} reached its patch dropout without the patch embedding that it had at attach, so the "
                "grid is unknown: if it was replaced, attach again; otherwise call the model's forward, or detach first"
            )
        return watched if type(watched[0]) is int else tuple(plain_number(side) for side in watched)

    def ask_drop(
        self,
        x: Tensor,
        prefix: int,
        num_patches: int,
        images: Images | None,
        grid_size: tuple[int, ...] | None = None,
        **facts: Any,
    ) -> Tensor:
        """The kept patches (B, K), of the N that stand behind `prefix` others in `x`, or lie in `images`."""
        batch_size = x.shape[0] if images is None else images.batch_size
        for fact, value in facts.items():  # of a blank image, where pixels are dropped
            facts[fact] = value.expand(batch_size, *value.shape[1:])
        if grid_size is not None and math.prod(grid_size) != num_patches:
            raise UnsupportedModelError(
                f"{self.host_name} has a grid of {' x '.join(map(str, grid_size))} patches, but {num_patches} tokens "
                f"besides its {self.num_prefix_tokens + self.num_suffix_tokens} others: if it was given further "
                "tokens, count them in its num_prefix_tokens and attach again"
            )
        drop: PatchDropout = self.link.drop
        if asked := drop.asks_for:
            if "pixels" in asked:
                facts["pixels"] = self.all_patches(images)
            if "tokens" in asked:
                facts["tokens"] = x[:, prefix : prefix + num_patches]
        return drop.draw(batch_size, num_patches, grid_size, **facts, device=x.device)

    def all_patches(self, images: Images | None) -> Tensor:
        """All patches (B, N, C, h, w) as they enter the projection, for a rule that asks for pixels."""
        if self.pixels is None or images is None:
            return cast("CaughtPatches", self.caught).take()
        return self.pixels.all_patches(images)

    def take(self, x: Tensor, images: Images | None, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
        """The prefix, the kept patches and the suffix: of embedded tokens, or from `images` and the table `x`."""
        if self.pixels is None or images is None:
            return take_drawn_tokens(x, keep_indices, num_prefix_tokens, self.num_suffix_tokens)
        return self.pixels.embed(images, x, keep_indices, num_prefix_tokens, self.num_suffix_tokens)

    def forward(self, x: Tensor) -> Any:
        return self.drop_tokens(x)[0]
