"""A family of models, and where one of it was found: what a row of `hosts` says, and what a seam is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from .link import Helper
from .pixels import PixelStage
from .unsupported import UnsupportedModelError

OWN_GRIDS = "A Gaussian on each image's own grid; padding is kept last."


class Follower(Helper):
    """Hooks at something that has one row per patch or per token, and loses the rows of the dropped patches."""

    what = ""  # in words, for `describe`
    needed = ""  # what a host lacks without it
    needs_call = False  # whether it depends on the hooks of the tower itself

    def install(self, module: nn.Module) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Host:
    """How one family of models takes a drop: a row of a table in `hosts`.

    Args:
        seam: the mechanism, a class of `patch_dropout`, `embeddings` or `own_grids`.
        patch_embedding: path, below the host, of the module that embeds the patches; its forward shows the true grid.
        prefix, suffix: the number of tokens in front of and behind the patches, or how to read it off the host.
        tokens: path, below the host, of the module whose hook drops tokens.
        patch_dropout: attribute of the host's own patch dropout, whose place the seam takes, or that it adds.
        followers: by class name, the modules that hold something with one row per token beside the tokens.
        refuse: the reason why a host of this family cannot be masked as it is configured, or None.
        pixels: how it drops before its projection, or why it cannot; None is what its seam says.
        size: reads the size of the input off a config, for `describe`: (H, W), with frames in front for videos.
        note: what a user has to know about the family.
    """

    seam: type[Any]
    patch_embedding: str
    prefix: int | Callable[[Any], int] = 0
    suffix: int | Callable[[Any], int] = 0
    tokens: str = ""
    patch_dropout: str = "patch_drop"
    followers: Mapping[str, type[Follower]] = field(default_factory=dict)
    refuse: Callable[[Any], str | None] = lambda host: None
    pixels: type[PixelStage] | str | None = None
    size: Callable[[Any], Any] = lambda config: config.image_size
    note: str = ""

    @staticmethod
    def count(tokens: int | Callable[[Any], int], module: nn.Module) -> int:
        return tokens if isinstance(tokens, int) else tokens(module)


class Place(NamedTuple):
    """Where in a model a host was found."""

    host: Host
    key: str  # of the row
    module: nn.Module
    owners: tuple[nn.Module, ...]  # outermost first
    path: str  # of the module in the outermost owner

    @property
    def is_embedding(self) -> bool:
        """Whether the host is the embedding module of a tower, and not the tower itself."""
        return self.key.endswith("Embeddings") and bool(self.owners)

    @property
    def tower(self) -> nn.Module:
        """The module whose forward is one pass through the host."""
        if not self.is_embedding:
            return self.module
        return next(owner for owner in reversed(self.owners) if type(owner).__name__ != "ModulesToSaveWrapper")

    @property
    def outermost(self) -> nn.Module:
        """The model that attach was called with."""
        return self.owners[0] if self.owners else self.module

    def first_block(self) -> nn.Module | None:
        """The first block of the tower, or None where there is no list of blocks outside of its embeddings."""
        embeddings = self.module if self.is_embedding else self.module.get_submodule(self.host.patch_embedding)
        within = set(embeddings.modules())
        for module in self.tower.modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0 and module not in within:
                return module[0]
        return None

    @property
    def name(self) -> str:
        """The class that a user knows."""
        return type(self.tower).__name__

    def at(self, path: str) -> str:
        """The path of something below the host, seen from the outermost owner."""
        return ".".join(part for part in (self.path, path) if part) or type(self.module).__name__

    def configured_size(self) -> tuple[int, ...]:
        """(H, W) of the images that the host is configured for, with the frames in front for videos."""
        for module in (self.module, *reversed(self.owners)):
            for source in (module, getattr(module, "config", None)):
                try:
                    size = self.host.size(source)
                except AttributeError:
                    continue
                return (size, size) if isinstance(size, int) else tuple(size)
        raise UnsupportedModelError(f"{self.name} does not tell the size of its images")

    def paths_within(self, class_name: str) -> list[str]:
        """The paths, below the tower, of the modules of a class in it."""
        found = {id(module) for module in self.within(class_name)}
        return [path for path, module in self.tower.named_modules() if path and id(module) in found]

    def within(self, class_name: str) -> list[nn.Module]:
        """The modules of a class, in the whole model."""
        return [
            module
            for module in self.outermost.modules()
            if class_name in (cls.__name__ for cls in type(module).__mro__)
        ]
