"""Seams that are hooks on a module which returns the embedded tokens: transformers, and timm models without a slot."""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .call import Argument, is_in_method_of
from .host import Place
from .image_paths import FromPatchEmbed, FromPatchEmbedAndDropout, FromPatchProjection
from .patch_dropout import TimmSeam
from .patches import Flat
from .pixels import PixelStage
from .seam import Seam
from .unsupported import UnsupportedModelError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class HookSeam(Seam):
    """A forward hook on the module that returns the tokens, alone or first in a tuple."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = PixelStage
    prefix_is_in_tokens = True

    def seat(self, place: Place) -> nn.Module:
        return place.tower  # embeddings that are frozen, in eval mode, are still those of a tower that trains

    def how(self, place: Place) -> str:
        return f"forward hook on {place.at(place.host.tokens)}"

    def install(self, place: Place) -> None:
        self.needs_call: bool = any(follower.needs_call for follower in place.host.followers.values())
        self.attention_mask: Argument | None = Argument.of_any(place.tower, "attention_mask")
        self.link.before(place.tower, self.relay.begin)
        super().install(place)
        self.link.after(place.module.get_submodule(place.host.tokens), self.relay.after_tokens)

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Forward pre-hook of the tower: what the last forward drew is not this one's."""
        self.begin_draw()
        self.arguments.check(kwargs, self.masks_refused)
        if self.drop.active and self.attention_mask is not None:
            self.take_mask(self.attention_mask.read(args, kwargs))

    def take_mask(self, attention_mask: Tensor | None) -> None:
        """An attention mask of the user's own, over all tokens."""
        if attention_mask is not None:
            self.arguments.refuse("attention_mask")

    def after_tokens(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if self.drop.active and not self.now.running and not torch.compiler.is_compiling():
            if self.needs_call:
                raise UnsupportedModelError(
                    f"{self.host_name} hands on to its layers which patches were kept, in hooks that a call of its "
                    "parts, or of its forward, goes round: call the model, model(...)"
                )
            if not module.training and not is_in_method_of(self.link.tower):
                return None  # called by itself, in eval mode
        tokens, *rest = output if isinstance(output, tuple) else (output,)
        facts = self.facts(args, kwargs, rest) if self.drop.active else {}
        tokens, _ = self.drop_tokens(tokens, None if self.prefix_is_in_tokens else 0, **facts)
        return (tokens, *rest) if isinstance(output, tuple) else tokens

    def facts(self, args: Args, kwargs: Kwargs, rest: list[Any]) -> dict[str, Any]:
        """What `PatchDropout.draw` has to know and no convolution shows, from the module's input and further output."""
        return {}


class TimmHookSeam(HookSeam, TimmSeam):
    """timm: the grid is shown by its `patch_embed`."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = FromPatchEmbedAndDropout


class LatePrefixSeam(TimmHookSeam):
    """timm, where the prefix tokens join behind the drop."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = FromPatchEmbed
    prefix_is_in_tokens = False


class UnfoldSeam(HookSeam):
    """The embeddings cut the image by themselves: their input shows the grid, and no convolution does."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = FromPatchProjection
    projection_below = "patch_projection"

    def flat_patches(self, place: Place) -> Flat | None:
        return Flat((cast("Any", place.module).patch_size,) * 2, channels_last=False)

    def watch_grid(self, module: nn.Module, args: Args, output: Tensor) -> None:
        embeddings: Any = module
        if self.drop.active and len(args) > 1 and args[1] is not None:
            raise UnsupportedModelError(
                f"{self.host_name} was called with images of many sizes packed into one sequence, which gaussmask does "
                "not mask: pass images of one size, as pixel_values (B, C, H, W)"
            )
        self.now.grid_size = tuple(side // embeddings.patch_size for side in args[0].shape[-2:])

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        embeddings: Any = place.module
        return tuple(side // embeddings.patch_size for side in place.configured_size())
