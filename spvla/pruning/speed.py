"""Speed responses: how much of the visual tokens' scores to keep, given the last motion (SP-VLA, arXiv 2506.12723).

The published sources disagree on the direction, so both are here: the released code (and the paper's formula) keeps fewer
tokens in fast motion, the released README keeps fewer in slow motion. Both read the last action's translation, in environment
units per control step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming


class SpeedResponse(Protocol):
    """How much the next VLA call keeps. Belongs to the policy, which knows what was executed last."""

    translations: ClassVar[int]
    """How many translational dimensions of the action are read."""

    def __call__(self, last_action: FloatArray | None, space: ActionSpace) -> float:
        """What to keep, in (0, 1]; 1 prunes nothing, as before the first action of an episode.

        Args:
            last_action: the action executed last, (D,), environment units; None at an episode's beginning.
            space: its action space.
        """


@dataclass(frozen=True)
class Constant:
    """``constant``: the same at every speed.

    Args:
        keep: in (0, 1).
    """

    keep: float
    translations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        with naming("pruning"):
            check_fields(self)
        if not 0 < self.keep < 1:
            raise InputError(
                f"pruning: keep must lie between 0 and 1, got {self.keep} (to prune nothing, use 'none')",
                code="cannot-matter" if self.keep == 1 else "invalid",
                field="keep",
            )

    def __call__(self, last_action: FloatArray | None, space: ActionSpace) -> float:
        return self.keep


@dataclass(frozen=True)
class _Thresholds:
    """Constants of the published responses, by default those for LIBERO-Object.

    Args:
        z_threshold: the speed at which pruning begins, in (0, 1), environment units per control step.
        z_min: the most that is pruned, in (0, 1); at least 1 - z_min is kept.
    """

    z_threshold: float = 0.5
    z_min: float = 0.9

    def __post_init__(self) -> None:
        with naming("pruning"):
            check_fields(self)
        for name in ("z_threshold", "z_min"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"pruning: {name} must lie in (0, 1), got {getattr(self, name)}", field=name)


@dataclass(frozen=True)
class FastFewer(_Thresholds):
    """``fast_fewer``: fast vertical motion keeps fewer tokens; published as SP-VLA's code (the release)."""

    translations: ClassVar[int] = 3

    def __call__(self, last_action: FloatArray | None, space: ActionSpace) -> float:
        require_translations(self, space)
        return 1.0 if last_action is None else fast_fewer(last_action[space.translation[2]], self.z_threshold, self.z_min)


@dataclass(frozen=True)
class SlowFewer(_Thresholds):
    """``slow_fewer``: slow motion keeps fewer tokens; published as the README of SP-VLA's code."""

    translations: ClassVar[int] = 1

    def __call__(self, last_action: FloatArray | None, space: ActionSpace) -> float:
        require_translations(self, space)
        return 1.0 if last_action is None else slow_fewer(last_action[list(space.translation)], self.z_threshold, self.z_min)


SPEEDS: dict[str, type[Constant] | type[FastFewer] | type[SlowFewer]] = {
    "constant": Constant,
    "fast_fewer": FastFewer,
    "slow_fewer": SlowFewer,
}


def require_translations(speed: SpeedResponse, space: ActionSpace) -> None:
    """Raise :class:`InputError` (code ``no-translation``) if ``space`` lacks a dimension that ``speed`` reads."""
    if len(space.translation) < speed.translations:
        name = next(name for name, kind in SPEEDS.items() if isinstance(speed, kind))
        what = "a vertical translation (translation[2])" if speed.translations == 3 else "a translation"
        raise InputError(
            f"pruning: speed {name!r} needs {what}, which action space {space.name!r} lacks; use speed 'constant'",
            code="no-translation",
            field="speed",
        )


def fast_fewer(z: float, z_threshold: float, z_min: float) -> float:
    """``z``: vertical translation of the last action.

    With v = |z|: 1 if v < z_threshold, else 1 - (min(v, 1) - z_threshold) z_min / (1 - z_threshold). In [1 - z_min, 1].
    """
    v = min(abs(float(z)), 1.0)
    return 1.0 if v < z_threshold else 1.0 - (v - z_threshold) * z_min / (1.0 - z_threshold)


def slow_fewer(translation: ArrayLike, z_threshold: float, z_min: float) -> float:
    """``translation``: all translational dimensions of the last action, (3,) or fewer.

    With v = min(norm, 1): 1 if v >= z_threshold, else 1 - (z_threshold - v) z_min / z_threshold. In [1 - z_min, 1].
    """
    v = min(float(np.linalg.norm(np.asarray(translation, np.float64))), 1.0)
    return 1.0 if v >= z_threshold else 1.0 - (z_threshold - v) * z_min / z_threshold
