"""Speed responses: how much attention mass to keep, given the end effector's last motion (SP-VLA, arXiv 2506.12723).

The published sources disagree on the direction, so both are here: ``release`` (code and formula) keeps fewer tokens in
fast motion, ``readme`` (prose) keeps fewer in slow motion. Both are pure functions of the last action's translation, in
environment units per control step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spvla.errors import InputError


def check_thresholds(z_threshold: float, z_min: float) -> None:
    """Raise :class:`InputError` unless 0 < z_threshold < 1 and 0 <= z_min < 1 (so that the kept mass stays positive)."""
    if not 0 < z_threshold < 1:
        raise InputError(f"pruner: z_threshold must lie in (0, 1), got {z_threshold}")
    if not 0 <= z_min < 1:
        raise InputError(f"pruner: z_min must lie in [0, 1), got {z_min}")


def release_keep_mass(z: float, z_threshold: float, z_min: float) -> float:
    """Fast means fewer tokens. ``z``: vertical translation of the last action.

    With v = |z|: 1 if v < z_threshold, else 1 - (min(v, 1) - z_threshold) z_min / (1 - z_threshold). In [1 - z_min, 1].
    """
    v = min(abs(float(z)), 1.0)
    return 1.0 if v < z_threshold else 1.0 - (v - z_threshold) * z_min / (1.0 - z_threshold)


def readme_keep_mass(translation: ArrayLike, z_threshold: float, z_min: float) -> float:
    """Slow means fewer tokens. ``translation``: all translational dimensions of the last action, (3,) or fewer.

    With v = min(norm, 1): 1 if v >= z_threshold, else 1 - (z_threshold - v) z_min / z_threshold. In [1 - z_min, 1].
    """
    v = min(float(np.linalg.norm(np.asarray(translation, np.float64))), 1.0)
    return 1.0 if v >= z_threshold else 1.0 - (z_threshold - v) * z_min / z_threshold
