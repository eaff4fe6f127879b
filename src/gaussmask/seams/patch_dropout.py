"""Seams that take the place of the host's own patch dropout: open_clip and timm."""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..sampling.grids import own_grids
from .host import Place
from .image_paths import FromConv1, FromPatchEmbedAndDropout, NaFlexImages
from .patches import Flat
from .pixels import PixelStage
from .seam import Seam
from .unsupported import UnsupportedModelError


class OpenClipSeam(Seam):
    """open_clip's `patch_dropout`."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = FromConv1


class TimmSeam(Seam):
    """timm's `patch_drop` where it returns the tokens."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = FromPatchEmbedAndDropout
    projection_below = "proj"
    block_masks_refused: ClassVar[tuple[str, ...]] = Seam.masks_refused

    def check(self, place: Place) -> None:
        if not hasattr(place.module.get_submodule("patch_embed"), "dynamic_feat_size"):
            raise UnsupportedModelError(
                f"the patch_embed of {place.name} has no dynamic_feat_size, which tells the grid: it is not one of "
                "timm 1.0.20 or newer"
            )
        super().check(place)

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        return tuple(cast("Any", place.module).patch_embed.grid_size)

    def watch_grid(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # The grid_size of the config is not the true one for dynamic sizes; those come out as (B, H, W, D).
        patch_embed: Any = module
        self.now.grid_size = tuple(
            output.shape[1:3] if output.ndim == 4 else patch_embed.dynamic_feat_size(args[0].shape[-2:])
        )


class TimmTupleSeam(TimmSeam):
    """timm's `patch_drop` where it returns (tokens, keep_indices or None), by which timm gathers the rotary table."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.drop_tokens(x)


class NaFlexSeam(Seam):
    """timm NaFlexVit: as `TimmTupleSeam`, but skipped in eval, never None, and with padded batches of many grids."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = NaFlexImages
    projection_below = "proj"
    block_masks_refused: ClassVar[tuple[str, ...]] = Seam.masks_refused
    makes_masks: ClassVar[bool] = True

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        grid_size = cast("Any", place.module).embeds.pos_embed_grid_size
        return None if grid_size is None else tuple(grid_size)

    def flat_patches(self, place: Place) -> Flat | None:
        embeds: Any = place.module.get_submodule(place.host.patch_embedding)
        return Flat(tuple(embeds.patch_size), getattr(embeds, "channels_last", True))

    def watch_grid(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """It is in the keywords too."""

    def watch(self, patch_embedding: nn.Module) -> None:
        self.link.after(patch_embedding, self.relay.watch_embeds)

    def watch_embeds(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        training = self.link.host.training  # embeddings that are frozen, in eval mode, are still those of a tower
        if self.drop.active and not training:
            raise UnsupportedModelError(
                f"{self.host_name} skips its patch dropout in eval mode, so nothing would be masked: for masked "
                "inference put the model into training mode, with its other dropouts at 0"
            )
        if not training:
            self.drop._drawn.nothing()  # the seam, which would say so, is skipped
            return
        grid_size = output[1]
        self.now.grid_size = grid_size
        self.now.facts = None if grid_size else own_grids(kwargs["patch_coord"], kwargs.get("patch_valid"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        facts, self.now.facts = self.now.facts, None
        x, keep_indices = self.drop_tokens(x, **(facts or {}))
        if keep_indices is None:
            num_patches = x.shape[1] - self.num_prefix_tokens
            keep_indices = torch.arange(num_patches, device=x.device).expand(x.shape[0], -1)
        return x, keep_indices
