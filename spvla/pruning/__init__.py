"""Spatio-semantic token pruning (SP-VLA, arXiv 2506.12723): keep what is attended, plus what lies on contours."""

from spvla.pruning.attention import attention_received
from spvla.pruning.contours import contour_patches
from spvla.pruning.pruner import TokenPruner, make_pruner, select
from spvla.pruning.speed import readme_keep_mass, release_keep_mass

__all__ = [
    "TokenPruner",
    "attention_received",
    "contour_patches",
    "make_pruner",
    "readme_keep_mass",
    "release_keep_mass",
    "select",
]
