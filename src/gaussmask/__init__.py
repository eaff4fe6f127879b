"""Random (FLIP) and centred (GLIP) patch dropout for any vision transformer."""

from importlib.metadata import version

from . import functional, plot
from .attach import attach, attached, detach
from .dropout import GaussianPatchDropout, PatchDropout, RandomPatchDropout
from .functional import keep_probability
from .hosts import UnsupportedModelError

__version__ = version("gaussmask")

__all__ = [
    "GaussianPatchDropout",
    "PatchDropout",
    "RandomPatchDropout",
    "UnsupportedModelError",
    "attach",
    "attached",
    "detach",
    "functional",
    "keep_probability",
    "plot",
]
