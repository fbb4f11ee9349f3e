"""Spatio-semantic token pruning (SP-VLA, arXiv 2506.12723): keep what is attended, plus what lies on contours."""

from spvla.pruning.pruner import Pruner, make_pruner
from spvla.pruning.selector import Scorer, TokenSelector
from spvla.pruning.speed import SpeedResponse

__all__ = ["Pruner", "Scorer", "SpeedResponse", "TokenSelector", "make_pruner"]
