"""Relative position biases, which lie beside the tokens with a row and a column for each.

A bias per layer is made inside the layer. With gradient checkpointing the layer runs again in the backward pass, when
the seam may hold the draw of a later forward already. So the draw travels through the arguments that the host itself
hands to its layers, and a recomputation finds the one that it belongs to.
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .call import Argument, Draw
from .host import Follower
from .seam import Seam

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def kept_bias(bias: Tensor, draw: Draw) -> Tensor:
    """The bias (B, heads, M, M) among the kept tokens, of a bias (heads, L, L) or (1, heads, L, L) among all."""
    rows = draw.rows(bias.shape[-1])
    if rows is None:
        return bias
    bias = bias.squeeze(0) if bias.ndim == 4 else bias
    return bias[:, rows.unsqueeze(2), rows.unsqueeze(1)].transpose(0, 1)


class Handed:
    """The value of an argument, and with it the draw of the forward that it is passed in."""

    def __init__(self, draw: Draw, value: Any) -> None:
        self.draw = draw
        self.value = value

    def __bool__(self) -> bool:
        return bool(self.value)

    @classmethod
    def over(cls, seam: Seam, bias: Tensor | None) -> "Handed | Tensor | None":
        """A shared bias as a timm model hands it to its blocks."""
        if not seam.drop.active:
            return bias
        draw = seam.current_draw()
        return cls(draw, None if bias is None else kept_bias(bias, draw))


class HandedFlag(Follower):
    """transformers: the draw travels with `interpolate_pos_encoding`, from the model to what makes the biases."""

    needed = "the position biases that the model makes beside it"
    name = "interpolate_pos_encoding"

    def install(self) -> list[RemovableHandle]:
        self.argument: Argument = Argument.of(self.module, self.name)
        return [self.module.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not self.seam.drop.active:
            return None
        value = self.argument.read(args, kwargs)
        return self.argument.write(args, kwargs, Handed(self.seam.draw, value))


class BiasModule(Follower):
    """transformers: a module called with (window_size, interpolate_pos_encoding, dim_size) that returns a bias."""

    what = "relative position biases"

    def install(self) -> list[RemovableHandle]:
        self.draw: Draw | None = None  # of the call that is running
        self.window: Argument = Argument.of(self.module, "window_size")
        self.flag: Argument = Argument.of(self.module, HandedFlag.name)
        self.size: Argument = Argument.of(self.module, "dim_size")
        return [
            self.module.register_forward_pre_hook(self.before, with_kwargs=True),
            self.module.register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        handed = self.flag.read(args, kwargs)
        self.draw = handed.draw if isinstance(handed, Handed) else None
        if self.draw is None:
            return None
        # The host passes the length of its sequence as the size of the bias: here that of all tokens.
        num_tokens = math.prod(self.window.read(args, kwargs)) + self.draw.num_prefix_tokens
        return self.size.write(*self.flag.write(args, kwargs, handed.value), num_tokens)

    def after(self, module: nn.Module, args: Args, output: Tensor) -> Tensor:
        draw, self.draw = self.draw, None
        return output if draw is None else kept_bias(output, draw)


class BlockBiases(Follower):
    """timm: the model hands a bias that all blocks share, or None, to its blocks, and from here on the draw with it."""

    what = "relative position biases"
    slot: str  # attribute of the model that makes the shared bias
    name: str  # argument of the attention that takes it

    def install(self) -> list[RemovableHandle]:
        model: Any = self.module
        shared, handles = getattr(model, self.slot), []
        if shared is None:
            self.seam.changes.put(model, self.slot, HandsDraw(self.seam))
        elif hasattr(shared, "get_bias"):
            self.seam.changes.put(shared, "get_bias", HandsDraw(self.seam, shared))
        else:
            handles.append(shared.register_forward_hook(self.hand))
        for block in model.blocks:
            hook = Receives(block.attn, self.name, self.bias_of(block.attn))
            handles.append(block.attn.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def hand(self, module: nn.Module, args: Args, output: Tensor) -> Any:
        return Handed.over(self.seam, output)

    def bias_of(self, attention: Any) -> "BiasMethod | None":
        """Stand before the method that makes the bias of one block; None if it has none of its own."""
        raise NotImplementedError

    def stand_before(self, owner: nn.Module, method: str) -> "BiasMethod":
        bias = BiasMethod(owner, method)
        self.seam.changes.put(owner, method, bias)
        return bias


class BeitBiases(BlockBiases):
    slot = "rel_pos_bias"
    name = "shared_rel_pos_bias"

    def bias_of(self, attention: Any) -> "BiasMethod | None":
        has_one = attention.relative_position_bias_table is not None
        return self.stand_before(attention, "_get_rel_pos_bias") if has_one else None


class RelPosBiases(BlockBiases):
    slot = "shared_rel_pos"
    name = "shared_rel_pos"

    def bias_of(self, attention: Any) -> "BiasMethod | None":
        return None if attention.rel_pos is None else self.stand_before(attention.rel_pos, "get_bias")


class HandsDraw:
    """Makes the shared bias of a timm model, or stands where there is none."""

    def __init__(self, seam: Seam, shared: Any = None) -> None:
        self.seam = seam
        self.shared = shared

    def __call__(self) -> Any:
        bias = None if self.shared is None else type(self.shared).get_bias(self.shared)
        return Handed.over(self.seam, bias)

    get_bias = __call__

    def set_window_size(self, window_size: Any) -> None:
        """timm's `set_input_size` calls it on whatever makes a shared bias."""


class BiasMethod:
    """Makes the bias of one block, of the kept tokens alone in a call that `Receives` a draw."""

    def __init__(self, owner: Any, method: str) -> None:
        self.owner = owner
        self.method = method
        self.draw: Draw | None = None

    def __call__(self) -> Tensor:
        draw, self.draw = self.draw, None
        bias = getattr(type(self.owner), self.method)(self.owner)
        return bias if draw is None else kept_bias(bias, draw)


class Receives:
    """Forward pre-hook of an attention: takes the draw out of its argument, for the bias that it is about to make."""

    def __init__(self, attention: nn.Module, name: str, bias: BiasMethod | None) -> None:
        self.argument: Argument = Argument.of(attention, name)
        self.bias = bias

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        handed = self.argument.read(args, kwargs)
        if not isinstance(handed, Handed):
            return None
        if self.bias is not None:
            self.bias.draw = handed.draw
        return self.argument.write(args, kwargs, handed.value)
