"""Guards against calls of a host in which fewer tokens would go unnoticed or be taken for a whole image."""

import sys
import threading
from typing import Any

import torch
from torch import nn

from .link import Helper, Link, Linked
from .unsupported import UnsupportedModelError

PARTS = (
    "its forward is overridden, or its parts are called one by one. Detach, and call the drop on the tokens there, "
    "x = drop(x); or turn it off with drop.eval()"
)


class MustReachDrop(Helper):
    """Sees to it that the patches of a forward come to the drop, and raises where they go on without it.

    In a forward of the tower, at its end; where its parts are called one by one, before the first block.
    """

    def watch_parts(self, patch_embedding: nn.Module, first_block: nn.Module | None) -> None:
        self.link.after(patch_embedding, self.embedded)
        if first_block is not None:
            self.link.before(first_block, self.before_block)

    def watch_forward(self, outermost: nn.Module, tower: nn.Module) -> None:
        """To be installed last, for then the hooks at the end are the last to run; those in front are the first."""
        self.link.before(tower, self.begin_tower, first=True)
        self.link.after(tower, self.end_tower)
        if outermost is not tower:
            self.link.before(outermost, self.begin, first=True)
            self.link.after(outermost, self.end)

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model: what an earlier forward left behind, which broke off, is none of this one."""
        self.claim()
        self.now.pending = False

    def begin_tower(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.claim()
        now = self.now
        now.pending, now.expected = False, self.active
        if now.expected and vars(module).get("_is_replica"):
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
        active = self.active
        if active:
            self.claim()
            self.demand()
        self.now.pending = active

    def claim(self) -> None:
        """One forward at a time: raise where another thread is in the middle of one."""
        if not self.active or torch.compiler.is_compiling():
            return
        thread, last = threading.get_ident(), self.now.thread
        if last not in (None, thread) and is_in_a_forward(last, self.seam):
            raise UnsupportedModelError(
                f"{self.host_name} is called by two threads at once, which would mix up their masks: give each thread "
                "a model of its own, copy.deepcopy(model), or let them take turns"
            )
        self.now.thread = thread

    def before_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the first block."""
        self.demand()

    def reached(self) -> None:
        """What was embedded has come to the drop."""
        now = self.now
        now.pending = now.expected = False

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model."""
        self.demand()

    def end_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.demand()
        if self.now.expected:
            self.now.expected = False
            raise UnsupportedModelError(
                f"{self.host_name} ran without the patch dropout and the patch embedding that it had at attach, so "
                f"that no patches were dropped: if they were replaced after attach, attach again; otherwise {PARTS}"
            )

    def demand(self) -> None:
        now = self.now
        if now.pending:
            now.pending = now.expected = False
            raise UnsupportedModelError(
                f"{self.host_name} embedded patches and went on without its patch dropout, so that none were dropped: "
                f"{PARTS}"
            )


def is_in_a_forward(thread: int, seam: nn.Module) -> bool:
    """Whether a thread is in the middle of a forward of a module that holds the seam; one may also have broken off."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "forward", "forward_features"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and any(part is seam for part in module.modules()):
                return True
        frame = frame.f_back
    return False


class TokenArguments(Helper):
    """Refuses arguments of a call that presuppose the number or the order of all tokens, while patches are dropped.

    A mask over all tokens would have to lose the rows of the dropped ones in every block, also when a block is
    recomputed. A causal attention is right as long as the kept tokens keep their order.
    """

    def check(self, kwargs: dict[str, Any]) -> None:
        """Of a call of the tower, or of its first block."""
        if not self.active:
            return
        for name in self.seam.masks_refused:
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


class NoDenseMaps(Linked):
    """Stands before `forward_intermediates`, whose (B, D, H, W) maps would be scrambled by a shorter sequence."""

    def __init__(self, link: Link, host: Any) -> None:
        self.link = link
        self.host = host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seam = self.link.seam
        as_tokens = any(isinstance(value, str) and value == "NLC" for value in (*args, *kwargs.values()))
        if seam is not None and seam.drop.active and not as_tokens:
            raise UnsupportedModelError(
                f"{type(self.host).__name__}.forward_intermediates lays its tokens out as a dense map, which dropped "
                'patches leave with holes: pass output_fmt="NLC", or call it in eval mode'
            )
        if self.was.value is not None:  # somebody's on the instance, before the class's
            return self.was.value(*args, **kwargs)
        return type(self.host).forward_intermediates(self.host, *args, **kwargs)
