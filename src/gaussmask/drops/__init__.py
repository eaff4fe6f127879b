"""What is kept: one rule per file, each from its paper, on the layer of base.py.

    tokens (B, P + N, D) --> base.py: coordinates --> scores, by the rule --> the K highest --> (B, P + K, D)
                                asking.py: pixels, tokens, the grid --^

random.py is FLIP, gaussian.py GLIP; cluster.py, grid.py and block.py are named by what they do. The next paper's rule
is the next file.
"""

from .base import PatchDropout
from .block import BlockPatchDropout
from .cluster import ClusterPatchDropout
from .gaussian import GaussianPatchDropout
from .grid import GridPatchDropout
from .random import RandomPatchDropout

__all__ = [
    "BlockPatchDropout",
    "ClusterPatchDropout",
    "GaussianPatchDropout",
    "GridPatchDropout",
    "PatchDropout",
    "RandomPatchDropout",
]
