"""What lies beside the tokens with one row for each: rotary tables, positions of the layers, attention masks."""

import inspect
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn

from .call import Argument, Draw
from .host import Follower
from .unsupported import UnsupportedModelError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class RotaryTables(Follower):
    """A module that returns rotary tables (L, D), which stay one for all images where nothing is dropped."""

    what = "rotary tables"
    needed = "the rotary positions that the model makes beside it"

    def install(self, module: nn.Module) -> None:
        self.link.after(module, self.keep)

    def keep(self, module: nn.Module, args: Args, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = self.current_draw().rows(len(output[0]))
        return output if rows is None else tuple(table[rows].unsqueeze(1) for table in output)  # (B, 1, M, D)


class PositionsPerLayer(Follower):
    """A module that returns the positions (layers, 1, L, D) which are added between the layers."""

    what = "positions added between the layers"

    def install(self, module: nn.Module) -> None:
        self.link.after(module, self.keep)

    def keep(self, module: nn.Module, args: Args, output: Tensor) -> Tensor:
        rows = self.current_draw().rows(output.shape[2])
        return output if rows is None else output[:, 0, rows]  # (layers, B, M, D)


class PassedArgument(Follower):
    """Something with a row per token that the model passes to its encoder."""

    name: str

    def install(self, module: nn.Module) -> None:
        self.argument: Argument = Argument.of(module, self.name)
        self.link.before(module, self.before)

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        value = self.argument.read(args, kwargs)
        if value is None:
            return None
        draw = self.draw(args, kwargs)
        if draw.keep_indices is None:
            return None
        return self.argument.write(args, kwargs, self.kept(value, draw))

    def draw(self, args: Args, kwargs: Kwargs) -> Draw:
        """The draw that the call is about."""
        return self.current_draw()

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
                f"{self.host_name} passes its attention mask as {type(value).__name__}, which gaussmask cannot "
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
    behind = True

    def draw(self, args: Args, kwargs: Kwargs) -> Draw:
        return Draw(0, 0) if self.seam is None else self.seam.draw_of(*args, *kwargs.values())


class CrossMask(KeyMaskIfAny):
    """The mask of a decoder over the tokens of the encoder."""

    name = "encoder_attention_mask"


class TokenCount(Follower):
    """A module that holds the number of image tokens, by which its model parts them from the text."""

    what = "number of image tokens"

    def install(self, module: nn.Module) -> None:
        self.all_tokens: int = cast("Any", module).image_patch_tokens
        self.link.before(module, self.before)

    def leave(self, module: Any) -> None:
        module.image_patch_tokens = self.all_tokens

    def before(self, module: Any, args: Args) -> None:
        if not self.active:
            module.image_patch_tokens = self.all_tokens
            return
        draw = self.now.draw
        if draw.num_patches == 0:  # no image yet
            return
        always, kept = draw.num_prefix_tokens, draw.keep_indices
        share = 1 if kept is None else Fraction(always + kept.shape[1], always + draw.num_patches)
        module.image_patch_tokens = int(self.all_tokens * share)  # of all images of a video


class PositionMask(Follower):
    """An encoder whose layers count their tokens 0, 1, 2, ... unless they are told the positions.

    The draw travels to the layers as a keyword of the encoder's (why: see `biases`); transformers before 5.6 has none.
    """

    what = "rotary positions of every layer"
    needed = "the encoder whose layers compute the positions"
    name = "gaussmask_draw"

    def install(self, module: nn.Module) -> None:
        layers: Any = module.layer
        self.argument: Argument = Argument.of(layers[0], "position_mask")
        self.takes_keywords: bool = "kwargs" in inspect.signature(layers[0].forward).parameters
        self.link.before(module, self.hand)
        for layer in layers:
            self.link.before(layer, self.before)

    def hand(self, module: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not self.active:
            return None
        if not torch.compiler.is_compiling() and not all(self.is_on(layer) for layer in module.layer):
            raise UnsupportedModelError(f"a layer of {self.host_name} was replaced after attach: attach again")
        if not self.takes_keywords:
            return None
        return args, {**kwargs, self.name: self.now.draw}

    def is_on(self, layer: nn.Module) -> bool:
        return any(getattr(hook, "__self__", None) is self for hook in layer._forward_pre_hooks.values())

    def before(self, layer: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        draw = kwargs.get(self.name)
        if draw is None:
            draw = self.current_draw()
            if draw.keep_indices is not None and layer.gradient_checkpointing and layer.training:
                raise UnsupportedModelError(
                    f"{self.host_name} with gradient checkpointing would be recomputed with the positions of a "
                    "later forward in this version of transformers: upgrade to 5.6, or turn checkpointing off"
                )
        if draw.keep_indices is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != self.name}
        return self.argument.write(args, kwargs, draw.keep_indices)


class CountsPatches(Follower):
    """A model with arguments that count the patches of the whole image."""

    names: tuple[str, ...]

    def install(self, module: nn.Module) -> None:
        self.counting: list[Argument] = [Argument.of(module, name) for name in self.names]
        self.link.before(module, self.before)

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        for argument in self.counting if self.active else ():
            if argument.read(args, kwargs) is not None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} was called with {argument.name}, which counts the patches of the whole "
                    "image, and some are dropped: leave it out, or call the model in eval mode"
                )


class ContextAndTarget(CountsPatches):
    """V-JEPA 2: which tokens its predictor sees and foretells."""

    names: tuple[str, ...] = ("context_mask", "target_mask")


class NeedsAllPatches(Follower):
    """A module that would read the kept patches as if they were all patches in their order."""

    def install(self, module: nn.Module) -> None:
        self.link.before(module, self.before)

    def before(self, module: nn.Module, args: Args) -> None:
        if self.active and self.now.draw.keep_indices is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} needs every patch of the image, and some were dropped: leave it out "
                "(skip_predictor=True), or call the model in eval mode"
            )
