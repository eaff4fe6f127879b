"""What lies beside the tokens with one row for each: rotary tables, relative position biases, attention masks."""

import inspect
import math
from fractions import Fraction
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .seams import Argument, Beside, Draw, Seam, UnsupportedModelError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def kept_bias(bias: Tensor, draw: Draw) -> Tensor:
    """The bias (B, heads, M, M) among the kept tokens, of a bias (heads, L, L) or (1, heads, L, L) among all."""
    rows = draw.rows(bias.shape[-1])
    if rows is None:
        return bias
    bias = bias.squeeze(0) if bias.ndim == 4 else bias
    return bias[:, rows.unsqueeze(2), rows.unsqueeze(1)].transpose(0, 1)


class RotaryTables(Beside):
    """A module that returns rotary tables (L, D), which stay one for all images where nothing is dropped."""

    what = "rotary tables"
    needed = "the rotary positions that the model makes beside it"

    def install(self) -> list[RemovableHandle]:
        return [self.module.register_forward_hook(self.keep)]

    def keep(self, module: nn.Module, args: Args, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = self.seam.current_draw().rows(len(output[0]))
        return output if rows is None else tuple(table[rows].unsqueeze(1) for table in output)  # (B, 1, M, D)


class PositionsPerLayer(Beside):
    """A module that returns the positions (layers, 1, L, D) which are added between the layers."""

    what = "positions added between the layers"

    def install(self) -> list[RemovableHandle]:
        return [self.module.register_forward_hook(self.keep)]

    def keep(self, module: nn.Module, args: Args, output: Tensor) -> Tensor:
        rows = self.seam.current_draw().rows(output.shape[2])
        return output if rows is None else output[:, 0, rows]  # (layers, B, M, D)


class PassedArgument(Beside):
    """Something with a row per token that the model passes to its encoder."""

    name: str

    def install(self) -> list[RemovableHandle]:
        self.argument = Argument.of(self.module, self.name)
        return [self.module.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        draw, value = self.seam.current_draw(), self.argument.read(args, kwargs)
        if value is None or draw.keep_indices is None:
            return None
        return self.argument.write(args, kwargs, self.kept(value, draw))

    def kept(self, value: Any, draw: Draw) -> Any:
        raise NotImplementedError


class RotaryArgument(PassedArgument):
    """A pair of rotary tables (L, D), to which the attention itself adds an axis for the batch."""

    what = "rotary tables"
    needed = "the rotary positions that the model makes beside it"
    name = "position_embeddings"

    def kept(self, value: Any, draw: Draw) -> Any:
        return tuple(Batched(table[draw.rows(len(table))]) for table in value)


class Batched:
    """A table (B, M, D) where a host expects one (M, D) for all images, and unsqueezes it before any use."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def unsqueeze(self, dim: int) -> Tensor:
        if dim != 0:
            raise UnsupportedModelError(
                f"a rotary table is unsqueezed at dim {dim} where gaussmask knows dim 0 only: this version of the "
                "model's library is not supported yet"
            )
        return self.table


class KeyMask(PassedArgument):
    """A mask over the keys of the attention, (B, L) or (B, 1, queries, L); of the queries, 1, the kept ones or all."""

    what = "attention mask"
    needed = "the encoder whose attention mask has to follow"
    name = "attention_mask"

    def kept(self, value: Any, draw: Draw) -> Any:
        if not isinstance(value, Tensor):
            raise UnsupportedModelError(
                f"{self.seam.host_name} passes its attention mask as {type(value).__name__}, which gaussmask cannot "
                "shorten: build the model with attn_implementation='sdpa'"
            )
        num_keys = value.shape[-1]
        rows = draw.rows(num_keys)
        if rows is None or value.ndim == 2:
            return value if rows is None else value.gather(1, rows)
        if value.shape[2] == num_keys:
            value = value.take_along_dim(rows[:, None, :, None], dim=2)
        return value.take_along_dim(rows[:, None, None, :], dim=3)


class KeyMaskIfAny(KeyMask):
    """The same behind the encoder, where a whole model has one and its vision tower alone has not."""

    needed = ""


class CrossMask(KeyMaskIfAny):
    """The mask of a decoder over the tokens of the encoder."""

    name = "encoder_attention_mask"


class TokenCount(Beside):
    """A module that holds the number of image tokens, by which its model parts them from the text."""

    what = "number of image tokens"

    def install(self) -> list[RemovableHandle]:
        self.all_tokens: int = cast("Any", self.module).image_patch_tokens
        self.seam.put(self.module, "image_patch_tokens", self.all_tokens)
        return [self.module.register_forward_pre_hook(self.before)]

    def before(self, module: Any, args: Args) -> None:
        draw = self.seam.draw
        if draw.num_patches == 0:  # no image yet
            return
        always, kept = draw.num_prefix_tokens, draw.keep_indices
        share = 1 if kept is None else Fraction(always + kept.shape[1], always + draw.num_patches)
        module.image_patch_tokens = int(self.all_tokens * share)  # of all images of a video


class PositionMask(Beside):
    """An encoder whose layers count their tokens 0, 1, 2, ... unless they are told the positions.

    The draw travels to the layers as a keyword of the encoder's (why, see below); transformers before 5.6 passes none.
    """

    what = "rotary positions of every layer"
    needed = "the encoder whose layers compute the positions"
    name = "gaussmask_draw"

    def install(self) -> list[RemovableHandle]:
        layers: Any = self.module.layer
        self.argument = Argument.of(layers[0], "position_mask")
        self.takes_keywords = "kwargs" in inspect.signature(layers[0].forward).parameters
        return [
            self.module.register_forward_pre_hook(self.hand, with_kwargs=True),
            *(layer.register_forward_pre_hook(self.before, with_kwargs=True) for layer in layers),
        ]

    def hand(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not (self.seam.drop.active and self.takes_keywords):
            return None
        return args, {**kwargs, self.name: self.seam.draw}

    def before(self, layer: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        draw = kwargs.get(self.name)
        if draw is None:
            draw = self.seam.current_draw()
            if draw.keep_indices is not None and layer.gradient_checkpointing and layer.training:
                raise UnsupportedModelError(
                    f"{self.seam.host_name} with gradient checkpointing would be recomputed with the positions of a "
                    "later forward in this version of transformers: upgrade to 5.6, or turn checkpointing off"
                )
        if draw.keep_indices is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != self.name}
        return self.argument.write(args, kwargs, draw.keep_indices)


class NeedsAllPatches(Beside):
    """A module that would read the kept patches as if they were all patches in their order."""

    what = "refused while patches are dropped"

    def install(self) -> list[RemovableHandle]:
        return [self.module.register_forward_pre_hook(self.before)]

    def before(self, module: nn.Module, args: Args) -> None:
        if self.seam.draw.keep_indices is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} needs every patch of the image, and some were dropped: leave it out "
                "(skip_predictor=True), or call the model in eval mode"
            )


# Relative position biases
#
# A bias per layer is made inside the layer. With gradient checkpointing the layer runs again in the backward pass, when
# the seam may hold the draw of a later forward already. So the draw travels through the arguments that the host itself
# hands to its layers, and a recompute finds the one that it belongs to.


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


class HandedFlag(Beside):
    """transformers: the draw travels with `interpolate_pos_encoding`, from the model to what makes the biases."""

    needed = "the position biases that the model makes beside it"
    name = "interpolate_pos_encoding"

    def install(self) -> list[RemovableHandle]:
        self.argument = Argument.of(self.module, self.name)
        return [self.module.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not self.seam.drop.active:
            return None
        value = self.argument.read(args, kwargs)
        return self.argument.write(args, kwargs, Handed(self.seam.draw, value))


class BiasModule(Beside):
    """transformers: a module called with (window_size, interpolate_pos_encoding, dim_size) that returns a bias."""

    what = "relative position biases"

    def install(self) -> list[RemovableHandle]:
        self.draw: Draw | None = None  # of the call that is running
        self.window = Argument.of(self.module, "window_size")
        self.flag = Argument.of(self.module, HandedFlag.name)
        self.size = Argument.of(self.module, "dim_size")
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


class BlockBiases(Beside):
    """timm: the model hands a bias that all blocks share, or None, to its blocks, and from here on the draw with it."""

    what = "relative position biases"
    slot: str  # attribute of the model that makes the shared bias
    name: str  # argument of the attention that takes it

    def install(self) -> list[RemovableHandle]:
        model: Any = self.module
        shared, handles = getattr(model, self.slot), []
        if shared is None:
            self.seam.put(model, self.slot, HandsDraw(self.seam))
        elif hasattr(shared, "get_bias"):
            self.seam.put(shared, "get_bias", HandsDraw(self.seam, shared))
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
        self.seam.put(owner, method, bias)
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
        self.argument = Argument.of(attention, name)
        self.bias = bias

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        handed = self.argument.read(args, kwargs)
        if not isinstance(handed, Handed):
            return None
        if self.bias is not None:
            self.bias.draw = handed.draw
        return self.argument.write(args, kwargs, handed.value)
