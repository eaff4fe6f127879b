"""What makes a token more than a linear map of its patch and something common to all images: no dropping of pixels.

Each function returns the reason, or None.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..drops.base import PatchDropout
from .link import Linked

LIBRARIES = (__name__.partition(".")[0], "open_clip", "timm", "torch", "transformers")
PROJECTIONS = (nn.Conv2d, nn.Conv3d, nn.Linear)
# What may lie between a projection and the tokens besides: none of it changes them, or all of it is position.
HARMLESS = ("Identity", "Embedding", "InterpolateInitialPositionEmbeddings")

# The hook by which transformers turns the gradients of embeddings on for checkpointing and adapters.
GRADIENTS_ON = "make_inputs_require_grads"


def obstacle_in_projection(projection: nn.Module, *, expected: nn.Module) -> str | None:
    """In what should be one plain convolution or linear layer, the one that was there at attach."""
    kind = type(projection)
    if kind.__name__.startswith("FSDP"):
        return "its projection is sharded by itself: shard it together with the model around it"
    if kind not in PROJECTIONS:
        return f"its projection is a {kind.__module__}.{kind.__name__}, and no plain Conv2d, Conv3d or Linear of torch"
    if projection is not expected:
        return "its projection was replaced after attach: attach again"
    if "forward" in vars(projection) or any(foreign_hooks(projection)):
        return "its projection carries hooks or a forward of somebody else's, which would not see the kept patches"
    if kind is not nn.Linear:
        conv: Any = projection
        plain = {"groups": 1, "dilation": (1,) * len(conv.kernel_size), "padding_mode": "zeros"}
        for name, value in plain.items():
            if getattr(conv, name) != value:
                return f"its projection has {name}={getattr(conv, name)!r}"
        if conv.padding == "same":
            return "its projection has padding='same'"
    return None


def obstacle_in_methods(host: nn.Module, names: Sequence[str]) -> str | None:
    """In the methods of the host on the way from the image to the tokens."""
    for name in names:
        if is_foreign(host, name):
            return f"its {name} is not the one of its library, and gaussmask does not know what that does to tokens"
    return None


def obstacle_on_the_way(host: nn.Module, paths: Sequence[str], projection: nn.Module) -> str | None:
    """In the modules of the host, at `paths` and below, from the image to the tokens."""
    for path in paths:
        for name, module in host.get_submodule(path).named_modules(prefix=path):
            composite = any(module.children())
            if "forward" in vars(module) or (composite and is_foreign(module, "forward")):
                return f"the forward of its {type(module).__name__} is not the one of its library"
            if any(foreign_hooks(module)):
                return (
                    f"its {name or type(module).__name__} carries hooks of somebody else's, which would see one blank "
                    "image in place of the batch"
                )
            if module is not host and type(module).__name__.startswith("FSDP"):
                return f"its {name} is sharded by itself: shard it together with the model around it"
            if isinstance(module, _DropoutNd):
                if module.p > 0:
                    return (
                        f"its {name} is a dropout with p={module.p:g}, of which all images would share one draw: "
                        f"set {name}.p to 0"
                    )
            elif not (
                module is projection
                or composite
                or isinstance(module, PatchDropout)
                or type(module).__name__ in HARMLESS
            ):
                return f"its patches pass through {type(module).__name__} besides their linear projection"
    return None


class Obstacle(NamedTuple):
    """What was found, if anything, and what it depends on."""

    reason: str | None
    modules: list[nn.Module]
    state: list[Any]


SETTINGS = ("p", "groups", "dilation", "padding", "padding_mode")  # of a dropout and of a convolution


def state_of(host: nn.Module, methods: Sequence[str], modules: Sequence[nn.Module]) -> list[Any]:
    """All that the functions above look at and somebody may change between two forwards; to be compared."""
    state: list[Any] = [getattr(host, name, None) for name in methods]
    for module in modules:
        own = module.__dict__
        state += (
            type(module),
            module.forward,
            "forward" in own,
            *own["_modules"].values(),
            *map(own.get, SETTINGS),
        )
        state += (*own["_forward_hooks"], None, *own["_forward_pre_hooks"], None, *own["_backward_hooks"])
        state += (None, *own["_backward_pre_hooks"])
    return state


def foreign_hooks(module: nn.Module) -> list[Any]:
    """The hooks of `module` that are not this library's and may look at what passes, or change it.

    Those of transformers that turn gradients on and those of torch.distributed do neither.
    """
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for hooks in kinds if hooks for hook in hooks.values() if not is_harmless(hook)]


def is_harmless(hook: Any) -> bool:
    if isinstance(getattr(hook, "__self__", None), Linked):
        return True
    defined_in = type(getattr(hook, "__self__", hook)).__module__
    if defined_in == "builtins":  # a plain function
        defined_in = getattr(hook, "__module__", None) or ""
    return defined_in.startswith("torch.distributed.") or getattr(hook, "__name__", "") == GRADIENTS_ON


def is_foreign(module: nn.Module, name: str) -> bool:
    """Whether a method of a host was written by somebody else than its library, if it has one of that name at all."""
    method = getattr(type(module), name, None)
    return name in vars(module) or (method is not None and method.__module__.partition(".")[0] not in LIBRARIES)
