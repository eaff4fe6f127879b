"""Patch dropout for any vision transformer: random (FLIP), centred (GLIP), by clusters, cells and blocks."""

from importlib.metadata import version

from . import functional, plot
from .attach import attach, attached, detach
from .describe import Description, describe
from .drops import (
    BlockPatchDropout,
    ClusterPatchDropout,
    GaussianPatchDropout,
    GridPatchDropout,
    PatchDropout,
    RandomPatchDropout,
)
from .functional import keep_probability
from .seams.unsupported import UnsupportedModelError

__version__ = version("gaussmask")

__all__ = [
    "BlockPatchDropout",
    "ClusterPatchDropout",
    "Description",
    "GaussianPatchDropout",
    "GridPatchDropout",
    "PatchDropout",
    "RandomPatchDropout",
    "UnsupportedModelError",
    "attach",
    "attached",
    "describe",
    "detach",
    "functional",
    "keep_probability",
    "plot",
]
