"""What hooks in a host work with: the arguments of a call, and the forward that it is part of, with its draw."""

import inspect
import sys
from collections.abc import MutableMapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..sampling.tokens import token_indices
from .unsupported import UnsupportedModelError


class Argument(NamedTuple):
    """An argument of a module's forward, wherever a call puts it."""

    name: str
    position: int

    @staticmethod
    def known(module: nn.Module, name: str) -> bool:
        """Whether `module.forward` takes an argument of this name."""
        return name in inspect.signature(module.forward).parameters

    @classmethod
    def of(cls, module: nn.Module, name: str) -> "Argument":
        """The argument `name` of `module.forward`; raises UnsupportedModelError where it has none."""
        if not cls.known(module, name):
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward takes no argument {name!r}, which gaussmask needs: this version of "
                "its library is not supported yet"
            )
        return cls(name, list(inspect.signature(module.forward).parameters).index(name))

    @classmethod
    def of_any(cls, module: nn.Module, name: str) -> "Argument | None":
        """The same, but None where it has none."""
        return cls.of(module, name) if cls.known(module, name) else None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call passes, or None."""
        return kwargs.get(self.name) if len(args) <= self.position else args[self.position]

    def write(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with another value."""
        if len(args) <= self.position:
            return args, {**kwargs, self.name: value}
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs


def is_in_method_of(*modules: nn.Module) -> bool:
    """Whether this is called from a method of one of the modules, however far above."""
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        frame = back
        caller = frame.f_locals.get("self")
        if caller is not None and any(caller is module for module in modules):
            return True
    return False


class Draw:
    """What one forward of a host keeps."""

    num_patches: int = 0
    keep_indices: Tensor | None = None
    used: bool = False  # by something that lies beside the tokens
    over: bool = False  # the forward of the tower has ended
    ambiguous: bool = False  # made outside of a forward, while another had not been used yet

    def __init__(self, num_prefix_tokens: int, num_suffix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.num_suffix_tokens = num_suffix_tokens

    def rows(self, length: int) -> Tensor | None:
        """The rows (B, M) that stay of a table of `length`, one row per patch or per token; None for all of them."""
        if self.keep_indices is None or length == self.num_patches:
            return self.keep_indices
        num_tokens = self.num_patches + self.num_prefix_tokens + self.num_suffix_tokens
        if length != num_tokens:
            raise UnsupportedModelError(
                f"a table of {length} rows lies beside {num_tokens} tokens, {self.num_patches} of them patches, so the "
                "rows of the kept ones are unknown: detach, and please report the model"
            )
        return token_indices(self.keep_indices, self.num_patches, self.num_prefix_tokens, self.num_suffix_tokens)


class Forward:
    """What the forward that is running leaves for its later steps.

    Not by thread: of what is set on a `threading.local`, torch.compile forgets all at the end of a graph.
    """

    thread: int | None = None  # that is in a masked forward of the model or of its tower
    running: bool = False  # a masked forward of the tower has begun, and not ended
    expected: bool = False  # the tower was called, and its patches have not come to the drop yet
    pending: bool = False  # patches were embedded, and have not come to the drop yet
    grid_size: tuple[int, ...] | None = None  # of all images, as the patch embedding shows it
    grids: list[tuple[int, ...]] | None = None  # of each image, where they are packed
    facts: dict[str, Any] | None = None  # what `PatchDropout.draw` is told of images with grids of their own
    padding_mask: Tensor | None = None  # on its way to the embeddings
    images: Tensor | None = None  # at stage "pixels", on their way round the projection
    blank: Tensor | None = None  # what the projection was given in their place
    entering: Tensor | None = None  # what entered the projection, for a rule that asks for pixels
    begun: Draw | None = None  # one that is handed on before it is drawn
    obstacle: Any = None  # to dropping pixels, as it was found last, with what it depends on
    bias_draw: Draw | None = None  # of the bias that is being made

    def __init__(self) -> None:
        self.known: set[int] = set()  # the ids of modules that are known to hold a part of the host
        self.draw: Draw = Draw(0, 0)  # the latest
        # By the tokens that came out of the tower, where something behind it asks for them.
        self.drawn: MutableMapping[Tensor, Draw] = WeakIdKeyDictionary()

    def forget(self) -> None:
        """Everything but what holds for other forwards too."""
        known, obstacle, drawn = self.known, self.obstacle, self.drawn
        self.__dict__.clear()
        self.known, self.obstacle, self.drawn, self.draw = known, obstacle, drawn, Draw(0, 0)
