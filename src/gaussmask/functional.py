"""Scores, sampling and token gathering as pure functions.

The way of the data: a grid of patches has coordinates, coordinates and noise give scores, the patches with the highest
scores are kept, and the kept rows are taken from the tokens. Everything here works without the modules.

Sources: FLIP (Li et al., *Scaling Language-Image Pre-training via Masking*, arXiv 2212.00794) and GLIP (Liang and
Larson, *Centered Masking for Language-Image Pre-Training*, arXiv 2403.15837).
"""

from .sampling.draw import gaussian_patch_dropout, sample_keep_indices
from .sampling.frequency import keep_frequency
from .sampling.grids import patch_coordinates
from .sampling.patches import cut_patches, take_patches
from .sampling.probability import keep_probability
from .sampling.scores import gaussian_density, gaussian_scores, uniform_scores
from .sampling.tokens import take_tokens
from .sampling.top import num_kept_patches, top_packed_patches, top_patches

__all__ = [
    "cut_patches",
    "gaussian_density",
    "gaussian_patch_dropout",
    "gaussian_scores",
    "keep_frequency",
    "keep_probability",
    "num_kept_patches",
    "patch_coordinates",
    "sample_keep_indices",
    "take_patches",
    "take_tokens",
    "top_packed_patches",
    "top_patches",
    "uniform_scores",
]
