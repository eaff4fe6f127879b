"""Guards against calls of a host in which fewer tokens would go unnoticed or be taken for a whole image."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..drops.base import PatchDropout
from .unsupported import UnsupportedModelError


class MustReachDrop:
    """Sees to it that patches which a forward embeds come to the drop, and raises where they go on without it."""

    def __init__(self, drop: PatchDropout, host_name: str) -> None:
        self.drop = drop
        self.host_name = host_name
        self.pending: bool = False  # patches were embedded, and have not reached the drop

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": False}

    def watch_embedding(self, patch_embedding: nn.Module) -> list[RemovableHandle]:
        return [patch_embedding.register_forward_hook(self.embedded)]

    def watch_forward(self, *modules: nn.Module) -> list[RemovableHandle]:
        """To be installed last, for then its hooks are the last to run."""
        handles = []
        for module in dict.fromkeys(modules):
            handles.append(module.register_forward_pre_hook(self.begin))
            handles.append(module.register_forward_hook(self.end))
        return handles

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model: what an earlier forward left behind, which broke off, is none of this one."""
        self.pending = False

    def embedded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the patch embedding, which a forward calls once."""
        self.demand()
        self.pending = self.drop.active

    def reached(self) -> None:
        """What was embedded has come to the drop."""
        self.pending = False

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model."""
        self.demand()

    def demand(self) -> None:
        if self.pending:
            self.pending = False
            raise UnsupportedModelError(
                f"{self.host_name} embedded patches and went on without its patch dropout, so that none were dropped: "
                "its forward is overridden, or its parts are called one by one. Detach, and call the drop on the "
                "tokens there, x = drop(x); or turn it off with drop.eval()"
            )


class NoDenseMaps:
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
