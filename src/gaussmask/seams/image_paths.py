"""The ways in which images come to the projection of a host, where it drops pixels; and why some hosts cannot."""

import math
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..sampling.patches import cut_all_patches, take_drawn_patches
from .pixels import PixelStage
from .unsupported import cannot_drop_pixels

OWN_POSITIONS = "its positions differ from image to image, so that one table cannot hold them"
PACKED = "it packs images of many sizes into one sequence"


class FromProjection(PixelStage):
    """The projection itself is given the blank image, where the host takes its batch size from what comes out.

    So whatever the host does to an image before, as padding it, is done to the whole batch by the host itself.
    """

    @property
    def entry(self) -> nn.Module:
        return self.projection

    def obstacle_in_call(self, images: Tensor, others: dict[str, Any]) -> str | None:
        num_axes = 1 if isinstance(self.projection, nn.Linear) else len(cast("Any", self.projection).kernel_size)
        if images.ndim != 2 + num_axes:
            return f"its projection was given {tuple(images.shape)}, which is no batch of images of one size"
        return super().obstacle_in_call(images, others)


class FromPatchProjection(FromProjection):
    """RADIO: its module cuts the images into flattened patches, and projects them."""

    within: tuple[str, ...] = ("patch_projection",)


class FromConv1(FromProjection):
    """open_clip: nothing lies between the convolution and the tokens."""

    within: tuple[str, ...] = ("conv1",)
    steps: tuple[str, ...] = ("_embeds",)


class FromPatchEmbed(FromProjection):
    """timm: `PatchEmbed`, whose tokens are dropped at once."""

    steps: tuple[str, ...] = ("forward_features", "_pos_embed")
    within: tuple[str, ...] = ("patch_embed",)


class FromPatchEmbedAndDropout(FromPatchEmbed):
    """timm: `PatchEmbed`, and the dropout behind its tokens and their positions."""

    within: tuple[str, ...] = ("patch_embed", "pos_drop")


class Videos(PixelStage):
    """(B, T, C, H, W), which comes to the projection as (B, C, T, H, W)."""

    def obstacle_in_call(self, images: Tensor, others: dict[str, Any]) -> str | None:
        frames: int = cast("Any", self.projection).kernel_size[0]
        if images.shape[1] < frames:  # V-JEPA 2 repeats them
            return f"its clips of {images.shape[1]} frames are shorter than a patch of {frames}"
        return super().obstacle_in_call(images, others)

    def arranged(self, images: Tensor) -> Tensor:
        return images.transpose(1, 2)


class Spectrograms(PixelStage):
    """(B, time, frequency), which comes to the projection as (B, 1, frequency, time)."""

    def arranged(self, images: Tensor) -> Tensor:
        return rearrange(images, "b time frequency -> b 1 frequency time")


class OneShape(PixelStage):
    """Flattened patches (B, N, pixels) on grids of `spatial_shapes` (B, 2), which all have to be the same."""

    only = "for batches of images of one shape"

    def obstacle_in_call(self, images: Tensor, others: dict[str, Any]) -> str | None:
        shapes = others["spatial_shapes"]
        same = (shapes == shapes[:1]).all()
        if shapes.is_cpu and not torch.compiler.is_compiling():
            return self.obstacle_in_weight() if same else OWN_POSITIONS
        if not self.insists:
            return f"{OWN_POSITIONS}; whether they do would have to be waited for"
        torch._assert_async(same, str(cannot_drop_pixels(self.host_name, OWN_POSITIONS)))
        return self.obstacle_in_weight()

    def for_one(self, others: dict[str, Any]) -> dict[str, Any]:
        return {**others, "spatial_shapes": others["spatial_shapes"][:1]}


class CutToPatches(PixelStage):
    """The module cuts images into flattened patches by itself, (C, p, q) or, `channels_last`, (p, q, C) each."""

    channels_last = False
    only = "for images, and not for padded batches of patches"

    def obstacle_in_call(self, images: Any, others: dict[str, Any]) -> str | None:
        if reason := super().obstacle_in_call(images, others):
            return reason
        if not isinstance(images, Tensor) or images.ndim != 4:
            return f"it was given patches, not images (B, C, H, W): {OWN_POSITIONS}"
        return None

    def shape_at_projection(self, images: Tensor) -> tuple[int, ...]:
        grid = [side // patch for side, patch in zip(images.shape[2:], self.patch_size, strict=True)]
        return math.prod(grid), images.shape[1] * math.prod(self.patch_size)

    def cut(self, images: Tensor) -> Tensor:
        return cut_all_patches(images, self.patch_size, self.patch_size)

    def kept_patches(self, images: Tensor, keep_indices: Tensor) -> Tensor:
        patches = take_drawn_patches(images, keep_indices, self.patch_size, self.patch_size)
        return (patches.movedim(2, -1) if self.channels_last else patches).flatten(2)

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(cast("Any", self.entry).patch_size)


class Gemma4Images(CutToPatches):
    """timm: images in [0, 1] go to [-1, 1] on the way, so that the blank image brings the -1 into the table."""

    steps: tuple[str, ...] = ("forward_features",)
    entry_path = "patch_embed"
    within: tuple[str, ...] = ("patch_embed",)

    def cut(self, images: Tensor) -> Tensor:
        return 2 * (super().cut(images) - 0.5)

    def kept_patches(self, images: Tensor, keep_indices: Tensor) -> Tensor:
        return 2 * super().kept_patches(images, keep_indices)


class NaFlexImages(CutToPatches):
    """timm: images are padded to whole patches and cut, or convolved."""

    steps: tuple[str, ...] = ("forward_features", "_forward_embeds")
    entry_path = "embeds"
    within: tuple[str, ...] = ("embeds",)

    def arranged(self, images: Tensor) -> Tensor:
        if not cast("Any", self.entry).dynamic_img_pad:
            return images
        missing = [-side % patch for side, patch in zip(images.shape[2:], self.patch_size, strict=True)]
        return F.pad(images, (0, missing[1], 0, missing[0]))

    def shape_at_projection(self, images: Tensor) -> tuple[int, ...]:
        if isinstance(self.projection, nn.Linear):
            return super().shape_at_projection(images)
        return PixelStage.shape_at_projection(self, images)

    def kept_patches(self, images: Tensor, keep_indices: Tensor) -> Tensor:
        if isinstance(self.projection, nn.Linear):
            return super().kept_patches(images, keep_indices)
        return PixelStage.kept_patches(self, images, keep_indices)

    def cut(self, images: Tensor) -> Tensor:
        if isinstance(self.projection, nn.Linear):
            return super().cut(images)
        return PixelStage.cut(self, images)

    @property
    def channels_last(self) -> bool:  # type: ignore[override]
        return getattr(self.entry, "channels_last", True)  # older versions of timm know no other
