"""Random (FLIP) and centred (GLIP) patch dropout for any vision transformer."""

from importlib.metadata import version

from . import functional, plot
from .attach import attach, attached, detach
from .describe import Description, describe
from .drops import GaussianPatchDropout, PatchDropout, RandomPatchDropout
from .functional import keep_probability
from .seams.unsupported import UnsupportedModelError

__version__ = version("gaussmask")

__all__ = [
    "Description",
    "GaussianPatchDropout",
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
