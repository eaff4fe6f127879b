"""Where each family of models takes a drop.

A host is one row of `HOSTS`: a class name and how to reach its seam. Nothing here imports timm, transformers or
open_clip: classes are recognised by name along the MRO, so that subclasses and classes made on the fly (FSDP2) count.

A seam is a parameter-free module in the host. It carries the drop, tells it what the host knows (prefix tokens, the
true grid of this very forward) and hands the result back in the form that the host expects. Hooks are bound methods of
the seam and their handles lie in it, so that deep copies and pickles of the host have a seam, a drop and hooks of
their own.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .dropout import PatchDropout


class UnsupportedModelError(TypeError):
    """A model that cannot be masked; the message names its class, the reason and, where there is one, the way out."""


class Seam(nn.Module):
    """A seam that is a module of the host, called with the tokens; returns the tokens."""

    def __init__(self, drop: PatchDropout, num_prefix_tokens: int, host_name: str) -> None:
        super().__init__()
        self.drop = drop
        self.num_prefix_tokens = num_prefix_tokens
        self.host_name = host_name
        self.replaced: nn.Module | None = None
        self.slot_was: str = ""  # a "submodule" (None among them), an "attribute" or "absent"
        self.grid_size: tuple[int, ...] | None = None
        self.handles: list[RemovableHandle] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.drop._seam = weakref.ref(self)  # the copied drop sits in the copied host

    def check(self, parent: Any) -> None:
        """Raise where the drop or the surroundings of the host do not fit, before anything is changed."""
        self.agreed("num_prefix_tokens", self.num_prefix_tokens)

    def install(self, host: nn.Module, parent: Any, slot: str, grid_source: str) -> None:
        """Take the place of `host.<slot>`, and watch the module that shows the grid."""
        self.drop._seam = weakref.ref(self)
        self.slot_was = "submodule" if slot in host._modules else "attribute" if hasattr(host, slot) else "absent"
        self.replaced = getattr(host, slot, None)
        setattr(host, slot, self)
        self.handles.append(self.watch(host.get_submodule(grid_source)))
        if hasattr(host, "forward_intermediates"):
            host.forward_intermediates = FeatureMapGuard(host, self.drop)  # type: ignore[assignment]

    def remove(self, host: nn.Module, slot: str) -> None:
        """Leave `host` as `install` found it."""
        for handle in self.handles:
            handle.remove()
        if self.slot_was != "submodule":
            delattr(host, slot)
        if self.slot_was != "absent":
            setattr(host, slot, self.replaced)
        guard = host.__dict__.get("forward_intermediates")
        if isinstance(guard, FeatureMapGuard):
            guard.remove()
        self.drop._seam = None

    def watch(self, grid_source: nn.Module) -> RemovableHandle:
        return grid_source.register_forward_hook(self.watch_grid)

    def watch_grid(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of a convolution: its output is the grid."""
        self.grid_size = tuple(output.shape[2:])

    def agreed(self, name: str, host_value: Any) -> Any:
        """The host's value of a drop's argument, which a value of the drop's own must not contradict."""
        own = getattr(self.drop, name)
        if own is not None and own != host_value:
            raise ValueError(
                f"the drop says {name}={own}, but {self.host_name} has {host_value}: leave {name} None and the host's "
                "own value is used"
            )
        return host_value

    def drop_tokens(self, x: Tensor, **facts: Any) -> tuple[Tensor, Tensor | None]:
        grid_size, self.grid_size = self.grid_size, None  # true for one forward only
        if not facts and self.drop.active:
            if grid_size is None:
                raise UnsupportedModelError(
                    f"{self.host_name} reached its patch dropout without its patch embedding, so the grid is unknown: "
                    "call the model's forward, or detach first"
                )
            grid_size = self.agreed("grid_size", grid_size)
        return self.drop.drop_tokens(x, self.agreed("num_prefix_tokens", self.num_prefix_tokens), grid_size, **facts)

    def forward(self, x: Tensor) -> Any:
        return self.drop_tokens(x)[0]


class TimmSeam(Seam):
    """timm's `patch_drop` where it returns the tokens."""

    def watch_grid(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # The grid_size of the config is not the true one for dynamic sizes; those come out as (B, H, W, D).
        patch_embed: Any = module
        self.grid_size = tuple(
            output.shape[1:3] if output.ndim == 4 else patch_embed.dynamic_feat_size(args[0].shape[-2:])
        )


class TimmTupleSeam(TimmSeam):
    """timm's `patch_drop` where it returns (tokens, keep_indices or None), by which timm gathers the rotary table."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.drop_tokens(x)


class NaFlexSeam(Seam):
    """timm NaFlexVit: as `TimmTupleSeam`, but skipped in eval, never None, and with padded batches of many grids."""

    def watch(self, grid_source: nn.Module) -> RemovableHandle:
        self.patches: dict[str, Tensor] = {}
        return grid_source.register_forward_hook(self.watch_embeds, with_kwargs=True)

    def watch_embeds(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.drop.active and not module.training:
            raise UnsupportedModelError(
                f"{self.host_name} skips its patch dropout in eval mode, so nothing would be masked: for masked "
                "inference put the model into training mode, with its other dropouts at 0"
            )
        if not module.training:
            self.drop.keep_indices = None  # the seam, which would say so, is skipped
            return
        self.grid_size = output[1]
        self.patches = {} if self.grid_size else _naflex_patches(**kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        patches, self.patches = self.patches, {}
        x, keep_indices = self.drop_tokens(x, **patches)
        if keep_indices is None:
            num_patches = x.shape[1] - self.num_prefix_tokens
            keep_indices = torch.arange(num_patches, device=x.device).expand(x.shape[0], -1)
        return x, keep_indices


def _naflex_patches(patch_coord: Tensor, patch_valid: Tensor | None = None) -> dict[str, Tensor]:
    """Coordinates in [-1, 1]^2 on each image's own grid, from NaFlex's integer (y, x), and which patches are real."""
    if patch_valid is None:
        patch_valid = torch.ones(patch_coord.shape[:2], dtype=torch.bool, device=patch_coord.device)
    last = patch_coord.masked_fill(~patch_valid.bool().unsqueeze(-1), 0).amax(dim=1, keepdim=True)
    coords = 2 * patch_coord / last.clamp(min=1) - (last > 0).to(torch.float32)
    return {"coords": coords.to(torch.float32), "valid": patch_valid.bool()}


class HookSeam(Seam):
    """A forward hook on an embedding module that returns tokens with their positions: transformers."""

    def install(self, host: nn.Module, parent: Any, slot: str, grid_source: str) -> None:
        super().install(host, parent, slot, grid_source)
        self.handles.append(host.register_forward_hook(self.after_embeddings))

    def after_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self(output)


class RotaryHookSeam(HookSeam):
    """`HookSeam`, and the rotary table that the model makes beside it loses the rows of the dropped patches."""

    def check(self, parent: Any) -> None:
        super().check(parent)
        if not hasattr(parent, "rope_embeddings"):
            raise UnsupportedModelError(
                f"{self.host_name} by itself lacks the rotary positions that the model makes beside it: attach to the "
                "model that holds both"
            )

    def install(self, host: nn.Module, parent: Any, slot: str, grid_source: str) -> None:
        super().install(host, parent, slot, grid_source)
        self.handles.append(parent.rope_embeddings.register_forward_hook(self.after_rotary))

    def after_rotary(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        keep_indices = self.drop.keep_indices
        if keep_indices is None:
            return output
        return tuple(table[keep_indices].unsqueeze(1) for table in output)  # (N, D) -> (B, 1, K, D)


class FeatureMapGuard:
    """Stands before `forward_intermediates`, whose (B, D, H, W) maps would be scrambled by a shorter sequence."""

    def __init__(self, host: Any, drop: PatchDropout) -> None:
        self.host = host
        self.drop = drop
        self.own = host.__dict__.get("forward_intermediates")  # somebody's on the instance, before the class's

    def remove(self) -> None:
        del self.host.forward_intermediates
        if self.own is not None:
            self.host.forward_intermediates = self.own

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


@dataclass(frozen=True)
class Host:
    """How one family takes a drop.

    Args:
        seam: the kind of seam.
        slot: attribute of the host that holds the seam.
        grid_source: path, below the host, of the module whose forward shows the true grid.
        num_prefix_tokens: reads the number of class, distillation and register tokens off the host.
    """

    seam: type[Seam]
    slot: str
    grid_source: str
    num_prefix_tokens: Callable[[Any], int]


def _timm(seam: type[Seam], grid_source: str = "patch_embed") -> Host:
    return Host(seam, "patch_drop", grid_source, lambda model: model.num_prefix_tokens)


def _embeddings(num_prefix_tokens: Callable[[Any], int], grid_source: str, seam: type[Seam] = HookSeam) -> Host:
    return Host(seam, "patch_drop", grid_source, num_prefix_tokens)


HOSTS: dict[str, Host] = {
    "timm.VisionTransformer": _timm(TimmSeam),
    "timm.Eva": _timm(TimmTupleSeam),
    "timm.NaFlexVit": _timm(NaFlexSeam, "embeds"),
    "open_clip.VisionTransformer": Host(Seam, "patch_dropout", "conv1", lambda model: 1),
    "transformers.CLIPVisionEmbeddings": _embeddings(lambda _: 1, "patch_embedding"),
    "transformers.SiglipVisionEmbeddings": _embeddings(lambda _: 0, "patch_embedding"),
    "transformers.ViTEmbeddings": _embeddings(lambda _: 1, "patch_embeddings.projection"),
    "transformers.DeiTEmbeddings": _embeddings(lambda _: 2, "patch_embeddings.projection"),
    "transformers.Dinov2Embeddings": _embeddings(lambda _: 1, "patch_embeddings.projection"),
    "transformers.Dinov2WithRegistersEmbeddings": _embeddings(
        lambda embeddings: 1 + embeddings.register_tokens.shape[1], "patch_embeddings.projection"
    ),
    "transformers.DINOv3ViTEmbeddings": _embeddings(
        lambda embeddings: 1 + embeddings.register_tokens.shape[1], "patch_embeddings", RotaryHookSeam
    ),
}
