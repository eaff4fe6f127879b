"""Seams of hosts whose images have grids of their own: padded to one length, or packed into one sequence."""

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..sampling.grids import own_grids, patch_coordinates, positions_on_grids
from .call import Argument
from .embeddings import HookSeam
from .host import Place
from .image_paths import OWN_POSITIONS, PACKED, Gemma4Images, OneShape
from .link import Helper, Link, Linked
from .patches import Flat
from .pixels import PixelStage
from .seam import Seam
from .unsupported import UnsupportedModelError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class PaddedGridSeam(HookSeam):
    """Images of many sizes, padded at the right and the bottom to one grid, which `patch_attention_mask` tells."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = OWN_POSITIONS

    def install(self, place: Place) -> None:
        super().install(place)
        self.mask: Argument = Argument.of(place.module, "patch_attention_mask")

    def facts(self, args: Args, kwargs: Kwargs, rest: list[Any]) -> dict[str, Any]:
        mask = self.mask.read(args, kwargs)
        positions = torch.cartesian_prod(*(torch.arange(side, device=mask.device) for side in mask.shape[1:]))
        grid_size = self.agreed("grid_size", tuple(mask.shape[1:]))
        return {"grid_size": grid_size, **own_grids(positions.expand(len(mask), -1, -1), mask.flatten(1))}


class FlattenedPatchesSeam(HookSeam):
    """Flattened patches (B, N, 2 + pixels), each with its row and column in front; padding is all zeros."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = OWN_POSITIONS
    masks_refused: ClassVar[tuple[str, ...]] = ("attn_mask",)

    def flat_patches(self, place: Place) -> Flat | None:
        configs: Any = (getattr(module, "config", None) for module in (place.module, *reversed(place.owners)))
        side = next((config.patch_size for config in configs if hasattr(config, "patch_size")), None)
        return Flat((side, side), channels_last=True) if isinstance(side, int) else None

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        return None

    def take_mask(self, attention_mask: Tensor | None) -> None:
        self.now.padding_mask = attention_mask

    def facts(self, args: Args, kwargs: Kwargs, rest: list[Any]) -> dict[str, Any]:
        patches = args[0] if args else kwargs["flattened_patches"]
        mask, self.now.padding_mask = self.now.padding_mask, None
        valid = patches.sum(dim=-1) != 0 if mask is None else mask.bool()  # as the host tells it
        positions = patches[..., :2].long()
        far = positions.masked_fill(~valid.unsqueeze(-1), positions.shape[1])
        return own_grids((positions - far.amin(dim=1, keepdim=True)).clamp(min=0), valid)


PADDING_MASKS = ("pixel_attention_mask", "attention_mask")  # the second in the towers of transformers 5.0


class MaskFromOutsideSeam(HookSeam):
    """Patches with a padding mask that enters the model from outside and is used behind the embeddings too.

    So the draw comes before the embeddings, where the outermost module takes in the mask, and the mask goes on with the
    kept patches alone.
    """

    pixels_by_default: ClassVar[type[PixelStage] | str] = OneShape
    masks_refused: ClassVar[tuple[str, ...]] = ("attn_mask",)

    def flat_patches(self, place: Place) -> Flat:
        return Flat((cast("Any", place.module).patch_size,) * 2, channels_last=True)

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        return (cast("Any", place.module).position_embedding_size,) * 2

    def install(self, place: Place) -> None:
        super().install(place)
        self.shapes: Argument = Argument.of(place.module, "spatial_shapes")
        self.flat: Flat = self.flat_patches(place)
        for owner in place.owners:
            mask = next((name for name in PADDING_MASKS if Argument.known(owner, name)), None)
            if mask and Argument.known(owner, "spatial_shapes"):
                self.link.before(owner, MaskGate(self.link, owner, mask).before)

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """A forward begins at the gate."""
        self.arguments.check(kwargs, self.masks_refused)

    def draw_patches(self, images: Tensor, shapes: Tensor, valid: Tensor) -> Tensor:
        """The kept patches, drawn before the embeddings; `images` are flattened patches (B, N, numbers)."""
        batch_size, num_patches = valid.shape
        draw = self.new_draw()
        draw.num_patches = num_patches
        facts = own_grids(positions_on_grids(shapes, num_patches), valid)
        self.agreed("num_prefix_tokens", self.num_prefix_tokens)
        self.agree_to_own_grids(facts)
        if "pixels" in self.drop.asks_for:
            facts["pixels"] = self.flat.unflatten(images)
        if "tokens" in self.drop.asks_for:  # made for the draw alone, and once more in their place
            with torch.no_grad():
                facts["tokens"] = type(self.link.host).forward(self.link.host, images, shapes)
            self.now.pending = False
        draw.keep_indices = self.drop.draw(batch_size, num_patches, None, **facts)
        self.now.draw = draw
        return draw.keep_indices

    def facts(self, args: Args, kwargs: Kwargs, rest: list[Any]) -> dict[str, Any]:
        shapes, num_patches = self.shapes.read(args, kwargs), args[0].shape[1]
        valid = torch.arange(num_patches, device=shapes.device) < shapes.prod(dim=1, keepdim=True)
        return own_grids(positions_on_grids(shapes, num_patches), valid)

    def drop_tokens(
        self, x: Tensor, num_prefix_tokens: int | None = None, **facts: Any
    ) -> tuple[Tensor, Tensor | None]:
        now = self.now
        keep_indices = now.draw.keep_indices
        if now.padding_mask is None or keep_indices is None:
            return super().drop_tokens(x, num_prefix_tokens, **facts)
        now.padding_mask = now.entering = None
        self.guard.reached()
        images = None if self.pixels is None else self.pixels.take()
        return self.take(x, images, keep_indices, self.num_prefix_tokens), keep_indices


class MaskGate(Helper):
    """Before a module that takes in the padding mask: draws, and passes on the mask of the kept patches."""

    def __init__(self, link: Link, module: nn.Module, mask: str) -> None:
        super().__init__(link)
        self.mask: Argument = Argument.of(module, mask)
        self.shapes: Argument = Argument.of(module, "spatial_shapes")
        self.images: Argument = Argument.of(module, "pixel_values")

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        seam, now, mask = self.seam, self.now, self.mask.read(args, kwargs)
        if seam is None or (mask is not None and mask is now.padding_mask):  # or an outer gate was here
            return None
        now.draw, now.padding_mask = seam.new_draw(), None
        if mask is None or not seam.drop.active:
            return None
        images, shapes = self.images.read(args, kwargs), self.shapes.read(args, kwargs)
        keep_indices = seam.draw_patches(images, shapes, mask.bool())
        now.padding_mask = mask.gather(1, keep_indices)
        return self.mask.write(args, kwargs, now.padding_mask)


class PositionsInOutputSeam(HookSeam):
    """The embeddings return (tokens, positions (B, N, 2) as (x, y), padding (B, N) or None), and all three are kept."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = Gemma4Images
    projection_below = "input_proj"
    remembers = True

    def flat_patches(self, place: Place) -> Flat | None:
        patch_embed: Any = place.module.get_submodule(place.host.patch_embedding)
        return Flat(tuple(patch_embed.patch_size), channels_last=False)

    def configured_grid(self, place: Place) -> tuple[int, ...] | None:
        return None  # a host of any size of image, which it is not built for

    def install(self, place: Place) -> None:
        super().install(place)
        for owner in place.owners:
            if hasattr(type(owner), "forward_head"):  # and not by way of a wrapper's __getattr__
                self.link.put(owner, "forward_head", KeptPool(self.link, owner))

    def watch_grid(self, module: nn.Module, args: Args, output: Any) -> None:
        images, embeddings = args[0], cast("Any", module)
        if isinstance(images, Tensor) and images.ndim == 4 and output[2] is None:
            self.now.grid_size = tuple(
                side // patch for side, patch in zip(images.shape[-2:], embeddings.patch_size, strict=True)
            )

    def facts(self, args: Args, kwargs: Kwargs, rest: list[Any]) -> dict[str, Any]:
        positions, padding = rest
        return {} if self.now.grid_size else own_grids(positions.flip(-1), None if padding is None else ~padding)

    def after_tokens(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        tokens, positions, padding = super().after_tokens(module, args, kwargs, output)
        keep_indices = self.now.draw.keep_indices
        if keep_indices is not None:
            positions = positions.take_along_dim(keep_indices.unsqueeze(-1), 1)
            padding = None if padding is None else padding.gather(1, keep_indices)
        return tokens, positions, padding


class KeptPool(Linked):
    """Stands before the `forward_head` of a classifier, which pools the tokens by a mask over all patches."""

    def __init__(self, link: Link, classifier: Any) -> None:
        self.link = link
        self.classifier = classifier

    def __call__(self, x: Tensor, patch_valid: Tensor | None = None, **kwargs: Any) -> Tensor:
        seam = self.link.seam
        keep_indices = None if seam is None else seam.draw_of(x).keep_indices
        if patch_valid is not None and keep_indices is not None:
            patch_valid = patch_valid.gather(1, keep_indices)
        return type(self.classifier).forward_head(self.classifier, x, patch_valid=patch_valid, **kwargs)


class PackedSeam(Seam):
    """Images packed into one sequence, whose embeddings are no module: a pre-hook on the transformer."""

    pixels_by_default: ClassVar[type[PixelStage] | str] = PACKED

    def how(self, place: Place) -> str:
        return f"forward pre-hook on {place.at(place.host.tokens)}"

    def install(self, place: Place) -> None:
        super().install(place)
        transformer = place.module.get_submodule(place.host.tokens)
        self.image_sizes: Argument = Argument.of(place.module, "image_sizes")
        self.tokens: Argument = Argument.of(transformer, "inputs_embeds")
        self.mask: Argument = Argument.of(transformer, "attention_mask")
        self.rotary: Argument = Argument.of(transformer, "position_embeddings")
        self.link.before(place.module, self.relay.begin)
        self.link.before(transformer, self.relay.before_transformer)

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.arguments.check(kwargs, self.masks_refused)
        sizes = self.image_sizes.read(args, kwargs)
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        patch = cast("Any", module).patch_size
        self.now.grids = sizes and [tuple(int(side) // patch for side in size) for size in sizes]

    def watch_grid(self, module: nn.Module, args: Args, output: Tensor) -> None:
        if self.now.grids is None:
            self.now.grids = [tuple(output.shape[2:])] * len(output)

    def before_transformer(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        grids, self.now.grids = self.now.grids, None
        self.guard.reached()
        x = self.tokens.read(args, kwargs)
        if not self.drop.active:
            self.drop._drawn.nothing()
            return None
        mask = self.mask.read(args, kwargs)
        if mask is None:
            raise UnsupportedModelError(
                f"{self.host_name} keeps its images apart by sequence lengths and not by a mask (flash attention), "
                "which gaussmask does not mask: build it with attn_implementation='sdpa'"
            )
        if grids is None:
            self.known_grid(None)
        kept = self.draw_packed(grids or [], x)
        cos, sin = self.rotary.read(args, kwargs)
        args, kwargs = self.tokens.write(args, kwargs, x.index_select(1, kept))
        args, kwargs = self.mask.write(args, kwargs, mask.index_select(-2, kept).index_select(-1, kept))
        return self.rotary.write(args, kwargs, (cos.index_select(0, kept), sin.index_select(0, kept)))

    def draw_packed(self, grids: list[tuple[int, ...]], x: Tensor) -> Tensor:
        """The kept rows (K,) of the sequence, image by image."""
        self.agreed("num_prefix_tokens", 0)
        asked = self.asked_of_packed(grids, x)
        num_images, num_tokens = len(grids), x.shape[1]
        if len(set(grids)) == 1:
            num_patches = num_tokens // num_images
            grid_size = self.agreed("grid_size", grids[0])
            asked = {name: value.unflatten(1, (num_images, -1)).squeeze(0) for name, value in asked.items()}
            keep_indices = self.drop.draw(num_images, num_patches, grid_size, **asked, device=x.device)
            first = torch.arange(0, num_tokens, num_patches, device=x.device).unsqueeze(1)
            return (keep_indices + first).flatten()
        self.agree_to_own_grids({})
        coords = torch.cat([patch_coordinates(grid, device=x.device) for grid in grids]).unsqueeze(0)
        lengths = [math.prod(grid) for grid in grids]
        return self.drop.draw(1, num_tokens, None, coords, lengths=lengths, **asked)[0]

    def asked_of_packed(self, grids: list[tuple[int, ...]], x: Tensor) -> dict[str, Any]:
        """What the rule asks for, (1, N of all images, ...)."""
        asked: dict[str, Any] = {"tokens": x} if "tokens" in self.drop.asks_for else {}
        if self.caught is not None:
            patch_height, patch_width = self.link.projection.kernel_size
            own = (  # of images that are padded to one size
                image[:, : height * patch_height, : width * patch_width]
                for image, (height, width) in zip(self.caught.take_entering(), grids, strict=True)
            )
            asked["pixels"] = torch.cat([self.caught.cut(image.unsqueeze(0)) for image in own], dim=1)
        return asked
