"""Relative position biases, which lie beside the tokens with a row and a column for each.

A bias per layer is made inside the layer. With gradient checkpointing the layer runs again in the backward pass, when
the seam may hold the draw of a later forward already. So the draw travels through the arguments that the host itself
hands to its layers, and a recomputation finds the one that it belongs to.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .call import Argument, Draw
from .guards import in_backward
from .host import Follower
from .link import Helper, Link, Linked
from .unsupported import UnsupportedModelError

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

    def __radd__(self, other: object) -> Any:
        raise UnsupportedModelError("a block was replaced after attach: attach again")

    @classmethod
    def over(cls, seam: Any, bias: Tensor | None) -> "Handed | Tensor | None":
        """A shared bias as a timm model hands it to its blocks; a part that was copied by itself has no seam."""
        if seam is None or not seam.drop.active:
            return bias
        draw = seam.current_draw()
        return cls(draw, None if bias is None else kept_bias(bias, draw))


def raise_for_parts(helper: Helper) -> None:
    """Raise where a layer makes its bias without a draw while patches are dropped, unless a backward runs it again."""
    if helper.active and not torch.compiler.is_compiling() and not in_backward():
        raise UnsupportedModelError(
            f"a layer of {helper.host_name} was called by itself, without the position biases of the kept patches: "
            "call the model; or a module was replaced after attach: attach again"
        )


class HandedFlag(Follower):
    """transformers: the draw travels with `interpolate_pos_encoding`, from the model to what makes the biases."""

    needed = "the position biases that the model makes beside it"
    needs_call = True
    name = "interpolate_pos_encoding"

    def install(self, module: nn.Module) -> None:
        self.argument: Argument = Argument.of(module, self.name)
        self.link.before(module, self.before)

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not self.active:
            return None
        value = self.argument.read(args, kwargs)
        return self.argument.write(args, kwargs, Handed(self.now.draw, value))


class BiasModule(Follower):
    """transformers: a module called with (window_size, interpolate_pos_encoding, dim_size) that returns a bias."""

    what = "relative position biases"

    def install(self, module: nn.Module) -> None:
        self.window: Argument = Argument.of(module, "window_size")
        self.flag: Argument = Argument.of(module, HandedFlag.name)
        self.size: Argument = Argument.of(module, "dim_size")
        self.link.before(module, self.before)
        self.link.after(module, self.after)

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        handed = self.flag.read(args, kwargs)
        draw = self.now.bias_draw = handed.draw if isinstance(handed, Handed) else None
        if draw is None:
            raise_for_parts(self)
            return None
        # The host passes the length of its sequence as the size of the bias: here that of all tokens.
        num_tokens = math.prod(self.window.read(args, kwargs)) + draw.num_prefix_tokens
        return self.size.write(*self.flag.write(args, kwargs, handed.value), num_tokens)

    def after(self, module: nn.Module, args: Args, output: Tensor) -> Tensor:
        draw, self.now.bias_draw = self.now.bias_draw, None
        return output if draw is None else kept_bias(output, draw)


class BlockBiases(Follower):
    """timm: the model hands a bias that all blocks share, or None, to its blocks, and from here on the draw with it."""

    what = "relative position biases"
    slot: str  # attribute of the model that makes the shared bias
    name: str  # argument of the attention that takes it

    def install(self, module: Any) -> None:
        shared = getattr(module, self.slot)
        if shared is None:
            self.link.put(module, self.slot, HandsDraw(self.link))
        elif hasattr(shared, "get_bias"):
            self.link.put(shared, "get_bias", HandsDraw(self.link, shared))
        else:
            self.link.after(shared, self.hand)
        for block in module.blocks:
            self.stand_before_bias(block.attn)
            self.link.before(block.attn, Receives(self.link, block.attn, self.name).before)

    def hand(self, module: nn.Module, args: Args, output: Tensor) -> Any:
        return Handed.over(self.seam, output)

    def stand_before_bias(self, attention: Any) -> None:
        """Stand before the method that makes the bias of one block, if it has one of its own."""
        raise NotImplementedError

    def stand_before(self, owner: nn.Module, method: str) -> None:
        self.link.put(owner, method, BiasMethod(self.link, owner, method))


class BeitBiases(BlockBiases):
    slot = "rel_pos_bias"
    name = "shared_rel_pos_bias"

    def stand_before_bias(self, attention: Any) -> None:
        if attention.relative_position_bias_table is not None:
            self.stand_before(attention, "_get_rel_pos_bias")


class RelPosBiases(BlockBiases):
    slot = "shared_rel_pos"
    name = "shared_rel_pos"

    def stand_before_bias(self, attention: Any) -> None:
        if attention.rel_pos is not None:
            self.stand_before(attention.rel_pos, "get_bias")


class HandsDraw(Linked):
    """Makes the shared bias of a timm model, or stands where there is none."""

    def __init__(self, link: Link, shared: Any = None) -> None:
        self.link = link
        self.shared = shared

    def __call__(self) -> Any:
        bias = None if self.shared is None else type(self.shared).get_bias(self.shared)
        return Handed.over(self.link.seam, bias)

    get_bias = __call__

    def set_window_size(self, window_size: Any) -> None:
        """timm's `set_input_size` calls it on whatever makes a shared bias."""


class BiasMethod(Linked):
    """Makes the bias of one block, of the kept tokens alone in a call that `Receives` a draw."""

    def __init__(self, link: Link, owner: Any, method: str) -> None:
        self.link = link
        self.owner = owner
        self.method = method

    def __call__(self) -> Tensor:
        now = self.link.now
        draw, now.bias_draw = now.bias_draw, None
        bias = getattr(type(self.owner), self.method)(self.owner)
        return bias if draw is None else kept_bias(bias, draw)


class Receives(Helper):
    """Takes the draw out of the argument of an attention, for the bias that it is about to make, if it makes one."""

    def __init__(self, link: Link, attention: nn.Module, name: str) -> None:
        super().__init__(link)
        self.argument: Argument = Argument.of(attention, name)

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        handed = self.argument.read(args, kwargs)
        if not isinstance(handed, Handed):
            raise_for_parts(self)
            return None
        self.now.bias_draw = handed.draw
        return self.argument.write(args, kwargs, handed.value)
