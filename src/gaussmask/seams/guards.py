"""Guards against calls of a host in which fewer tokens would go unnoticed or be taken for a whole image."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..drops.base import PatchDropout
from .unsupported import UnsupportedModelError

PARTS = (
    "its forward is overridden, or its parts are called one by one. Detach, and call the drop on the tokens there, "
    "x = drop(x); or turn it off with drop.eval()"
)


class MustReachDrop:
    """Sees to it that the patches of a forward come to the drop, and raises where they go on without it.

    In a forward of the tower, at its end; where its parts are called one by one, before the first block.
    """

    def __init__(self, drop: PatchDropout, host_name: str) -> None:
        self.drop = drop
        self.host_name = host_name
        self.pending: bool = False  # patches were embedded, and have not reached the drop
        self.expected: bool = False  # a forward of the tower has begun, and has not reached the drop

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": False, "expected": False}

    def watch_embedding(self, patch_embedding: nn.Module) -> list[RemovableHandle]:
        return [patch_embedding.register_forward_hook(self.embedded)]

    def watch_block(self, block: nn.Module) -> list[RemovableHandle]:
        """The first one."""
        return [block.register_forward_pre_hook(self.before_block, with_kwargs=True)]

    def watch_forward(self, outermost: nn.Module, tower: nn.Module) -> list[RemovableHandle]:
        """To be installed last, for then its hooks are the last to run."""
        handles = [tower.register_forward_pre_hook(self.begin_tower), tower.register_forward_hook(self.end_tower)]
        if outermost is not tower:
            handles.append(outermost.register_forward_pre_hook(self.begin))
            handles.append(outermost.register_forward_hook(self.end))
        return handles

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model: what an earlier forward left behind, which broke off, is none of this one."""
        self.pending = False

    def begin_tower(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.pending, self.expected = False, self.drop.active
        if self.expected and vars(module).get("_is_replica"):
            raise UnsupportedModelError(
                f"{self.host_name} is a replica of torch.nn.DataParallel, whose hooks are those of the original, so "
                "that replicas would mix up their masks: use DistributedDataParallel, with one process per GPU (a "
                "Trainer: start it with torchrun, or show it one GPU)"
            )

    def embedded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the patch embedding, which a forward calls once."""
        if isinstance(output, torch.fx.Proxy):
            raise UnsupportedModelError(
                f"{self.host_name} carries a drop, whose hooks torch.fx cannot trace (nor torchvision's "
                "create_feature_extractor, which uses it): detach first"
            )
        if self.drop.active:
            self.demand()
        self.pending = self.drop.active

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the first block."""
        self.demand()

    def reached(self) -> None:
        """What was embedded has come to the drop."""
        self.pending = self.expected = False

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model."""
        self.demand()

    def end_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.demand()
        if self.expected:
            self.expected = False
            raise UnsupportedModelError(
                f"{self.host_name} ran without the patch dropout and the patch embedding that it had at attach, so "
                f"that no patches were dropped: if they were replaced after attach, attach again; otherwise {PARTS}"
            )

    def demand(self) -> None:
        if self.pending:
            self.pending = self.expected = False
            raise UnsupportedModelError(
                f"{self.host_name} embedded patches and went on without its patch dropout, so that none were dropped: "
                f"{PARTS}"
            )


class TokenArguments:
    """Refuses arguments of a call that presuppose the number or the order of all tokens, while patches are dropped.

    A mask over all tokens would have to lose the rows of the dropped ones in every block, also when a block is
    recomputed. A causal attention is right as long as the kept tokens keep their order.
    """

    def __init__(self, drop: PatchDropout, host_name: str, masks: tuple[str, ...]) -> None:
        self.drop = drop
        self.host_name = host_name
        self.masks = masks

    def check(self, kwargs: dict[str, Any]) -> None:
        """Of a call of the tower, or of its first block."""
        if not self.drop.active:
            return
        for name in self.masks:
            if kwargs.get(name) is not None:
                self.refuse(name)
        if kwargs.get("is_causal") and not self.drop.ordered:
            raise UnsupportedModelError(
                f"{self.host_name} was called with is_causal, for which the kept patches have to be in their order: "
                "set drop.ordered = True"
            )

    def refuse(self, name: str) -> None:
        raise UnsupportedModelError(
            f"{self.host_name} was called with an {name} over all its tokens, which does not follow the drop: leave it "
            "out, or turn the drop off (drop.eval())"
        )

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if kwargs:
            self.check(kwargs)


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
