"""Guards against calls of a host in which fewer tokens would go unnoticed or be taken for a whole image."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .link import Helper, Link, Linked
from .unsupported import UnsupportedModelError

PARTS = (
    "its forward is overridden, or its parts are called one by one. Detach, and call the drop on the tokens there, "
    "x = drop(x); or turn it off with drop.eval()"
)


MASKS = ("attn_mask", "attention_mask")  # arguments that are masks over all tokens


class MustReachDrop(Helper):
    """Sees to it that the patches of a forward come to the drop, and raises where they go on without it.

    In a forward of the tower, at its end; where its parts are called one by one, before the first block.
    """

    def watch_parts(self, patch_embedding: nn.Module, first_block: nn.Module | None) -> None:
        self.link.after(patch_embedding, self.embedded)
        if first_block is not None:
            self.link.before(first_block, self.before_block)

    def watch_forward(self, outermost: nn.Module, tower: nn.Module, path: str, followers: list[str]) -> None:
        """To be installed last, for then the hooks at the end are the last to run; those in front are the first.

        Args:
            path: of the host, below `outermost`.
            followers: paths, below `tower`, of what has to be hooked.
        """
        self.path: str = path
        self.followers: list[str] = followers
        self.link.before(tower, self.begin_tower, first=True)
        self.link.after(tower, self.end_tower, always=True)
        if outermost is not tower:
            self.link.before(outermost, self.begin, first=True)
            self.link.after(outermost, self.end, always=True)

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model: what an earlier forward left behind, which broke off, is none of this one."""
        self.claim(module)
        self.now.pending = False
        if self.active and not torch.compiler.is_compiling():
            self.check_place(module)

    def check_place(self, outermost: nn.Module) -> None:
        """Raise where the tower was replaced; where it was wrapped, as by torch.compile, it is still the same."""
        host = self.link.host
        try:
            there = outermost.get_submodule(self.path)
        except AttributeError:  # cut off, so that nobody asks for images
            return
        if there is not host and not self.is_known(there, lambda part: part is host):
            raise UnsupportedModelError(
                f"the {self.host_name} that {type(outermost).__name__} had at attach was replaced by another one, so "
                "that no patches would be dropped: attach again"
            )

    def check_followers(self, tower: nn.Module) -> None:
        """Raise where something that lies beside the tokens was replaced, and would keep the rows of all patches."""
        for path in self.followers:
            try:
                there = tower.get_submodule(path)
            except AttributeError:  # cut off: what asks for it says so
                continue
            if not self.is_hooked(there) and not self.is_known(there, self.is_hooked):
                raise UnsupportedModelError(
                    f"the {path} of {self.host_name} was replaced after attach, and its successor would not know which "
                    "patches were dropped: attach again"
                )

    def is_hooked(self, module: nn.Module) -> bool:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        return any(getattr(getattr(hook, "__self__", None), "link", None) is self.link for hook in hooks)

    def is_known(self, wrapper: nn.Module, wanted: Callable[[nn.Module], bool]) -> bool:
        """Whether a module that stands in another's place holds it, as what FSDP and torch.compile make."""
        known = self.now.known
        if id(wrapper) not in known and any(wanted(part) for part in wrapper.modules()):
            known.add(id(wrapper))
        return id(wrapper) in known

    def begin_tower(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.claim(module)
        now = self.now
        now.pending, now.expected = False, self.active
        now.running = now.expected
        if now.expected and self.followers and not torch.compiler.is_compiling():
            self.check_followers(module)

    def embedded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the patch embedding, whose output also shows the grid."""
        if type(output) is not torch.Tensor:
            self.refuse_proxies(output)
        link = self.link
        if (seam := link.seam) is None:
            return
        now = link.now
        now.pending = link.drop.active
        if now.pending and not now.running:
            self.claim(module)
        seam.watch_grid(module, args, output)

    def refuse_proxies(self, output: Any) -> None:
        if any(isinstance(value, torch.fx.Proxy) for value in (output if isinstance(output, tuple) else (output,))):
            raise UnsupportedModelError(
                f"{self.host_name} carries a drop, whose hooks torch.fx cannot trace (nor torchvision's "
                "create_feature_extractor, which uses it): detach first"
            )

    def claim(self, module: nn.Module) -> None:
        """One forward at a time: raise where another thread is, or may be, in the middle of one."""
        if not self.active or torch.compiler.is_compiling():
            return
        if vars(module).get("_is_replica"):
            raise UnsupportedModelError(
                f"{self.host_name} is a replica of torch.nn.DataParallel, whose hooks are those of the original, so "
                "that replicas would mix up their masks: use DistributedDataParallel, with one process per GPU (a "
                "Trainer: start it with torchrun, or show it one GPU)"
            )
        now, thread = self.now, threading.get_ident()
        if now.running and now.thread != thread:
            raise UnsupportedModelError(
                f"{self.host_name} is called by two threads at once, which would mix up their masks: give each thread "
                "a model of its own, copy.deepcopy(model), or let them take turns"
            )
        now.thread = thread

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the first block, unless a backward runs it again."""
        get = kwargs.get
        some = get("is_causal") or get("attn_mask") is not None or get("attention_mask") is not None
        if some and self.active:
            self.seam.arguments.check_block(args, kwargs)
        if self.link.now.pending and self.active and (torch.compiler.is_compiling() or not in_backward()):
            self.demand()

    def reached(self) -> None:
        """What was embedded has come to the drop."""
        now = self.now
        now.pending = now.expected = False

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model."""
        if not torch.compiler.is_compiling() and output is None:  # a graph had better not look at an output
            self.break_off()
        else:
            self.demand()

    def break_off(self) -> None:
        """An error ended a forward: nothing is left of it, if it was this thread's."""
        if self.now.thread == threading.get_ident():
            self.now.forget()

    def end_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and output is None:
            self.break_off()
            return
        now = self.now
        now.running, now.draw.over = False, True
        self.demand()
        if self.link.seam is not None and self.link.seam.remembers and not torch.compiler.is_compiling():
            now.drawn[output if isinstance(output, torch.Tensor) else output[0]] = now.draw
        if now.expected:
            now.expected = False
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


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class TokenArguments(Helper):
    """Refuses arguments of a call that presuppose the number or the order of all tokens, while patches are dropped.

    A mask over all tokens would have to lose the rows of the dropped ones in every block, also when a block is
    recomputed. A causal attention is right as long as the kept tokens keep their order.
    """

    def check(self, kwargs: dict[str, Any], masks: Sequence[str], num_tokens: int | None = None) -> None:
        """Of a call of the tower; or of its first block, whose masks may be of the kept tokens (`num_tokens`)."""
        if not self.active:
            return
        for name in masks:
            mask = kwargs.get(name)
            if mask is not None and (num_tokens is None or mask.shape[-1] != num_tokens):
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

    def check_block(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a call of the first block."""
        num_tokens = args[0].shape[1] if args and self.seam.makes_masks else None
        self.check(kwargs, self.seam.block_masks_refused, num_tokens)


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
