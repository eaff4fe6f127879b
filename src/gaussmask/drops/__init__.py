"""What is kept: one rule per file, each from its paper, on the layer of base.py.

    tokens (B, P + N, D) --> base.py: coordinates --> scores, by the rule --> the K highest --> (B, P + K, D)

random.py is FLIP: any patch. gaussian.py is GLIP: the centre more often.
"""

from .base import PatchDropout
from .gaussian import GaussianPatchDropout
from .random import RandomPatchDropout

__all__ = ["GaussianPatchDropout", "PatchDropout", "RandomPatchDropout"]
