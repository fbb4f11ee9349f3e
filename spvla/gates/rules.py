"""SP-VLA's hand-set rules in their two published forms (arXiv 2506.12723 and its released code).

A step that the robot held, waiting for the VLA, counts as the VLA's.

Thresholds act on actions in environment units, read as velocity per control step. They are data: presets per suite live
in ``configs/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.gates.base import Decisions
from spvla.history import Window


def _require_translation(space: ActionSpace, rule: str, dims: int) -> None:
    if len(space.translation) < dims:
        raise InputError(
            f"rule {rule!r} reads {dims} translation dimensions, but action space {space.name!r} has {len(space.translation)}"
        )


def _count(window: Window, buffer: int) -> tuple[FloatArray, FloatArray]:
    """How many of the last ``buffer`` steps there are, and how many of them count as the VLA's, (B,) each."""
    mask = window.mask[:, -buffer:]
    generated = (window.sources if window.credited is None else window.credited)[:, -buffer:]
    return mask.sum(1), ((generated == 0) * mask).sum(1)


def _first_objection(objections: Mapping[str, NDArray[np.bool_]]) -> Decisions:
    """Intuitive where nothing objects, (B,); else the first of the ``objections`` (B,) is the reason."""
    held = np.array(list(objections.values()))  # (reasons, B)
    against = np.asarray(held.any(0))
    names = np.array([*objections, "intuitive"])
    return Decisions(~against, names[np.where(against, held.argmax(0), len(objections))])


@dataclass(frozen=True)
class PaperRule:
    """Intuitive iff every |translation| of the last action lies in [v_min, v_max] and N_G / N_A > tau, where N_G counts
    the VLA's actions in the buffer and N_A all of them.

    Args:
        v_min, v_max: not published; environment units per step.
        tau, buffer: published values 0.5 and 6.
    """

    space: ActionSpace
    v_min: float = 0.02
    v_max: float = 0.9
    tau: float = 0.5
    buffer: int = 6

    def __post_init__(self) -> None:
        _require_translation(self.space, "paper", 1)
        with naming("rule 'paper'"):
            check_fields(self, at_least={"buffer": 1})

    @property
    def history_length(self) -> int:
        """Steps of history this rule reads."""
        return self.buffer

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Label the steps that follow B windows; the proposals do not matter."""
        steps, by_vla = _count(window, self.buffer)
        speed = np.abs(self.space.denormalize(window.actions[:, -1])[:, list(self.space.translation)])
        return _first_objection(
            {
                "no history": steps == 0,
                "VLA fraction": ~(by_vla > self.tau * steps),
                "slow": np.any(speed < self.v_min, axis=1),
                "fast": ~np.all(speed <= self.v_max, axis=1),
            }
        )


@dataclass(frozen=True)
class ReleaseRule:
    """Intuitive iff each of the last ``step_skip`` actions is planar, |z| / max(|x|, |y|, 1e-4) < z_xy_rate and
    |z| < z_max, and the VLA made at least 4 of the 6 buffered actions.

    The cap that follows is the pattern V V V V G G G: at most 3/7 of the steps are generated, so scheduling by this rule
    can never pass 1.75x.
    """

    space: ActionSpace
    step_skip: int = 2
    z_xy_rate: float = 0.6
    z_max: float = 0.5
    buffer: int = 6
    vla_fraction: float = 4 / 6

    def __post_init__(self) -> None:
        _require_translation(self.space, "release", 3)
        with naming("rule 'release'"):
            check_fields(self, at_least={"step_skip": 1, "buffer": 1})

    @property
    def history_length(self) -> int:
        """Steps of history this rule reads."""
        return max(self.buffer, self.step_skip)

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Label the steps that follow B windows; the proposals do not matter."""
        _, by_vla = _count(window, self.buffer)
        actions = self.space.denormalize(window.actions[:, -self.step_skip :])
        xyz = np.abs(actions[..., list(self.space.translation[:3])])  # (B, step_skip, 3)
        planar = (xyz[..., 2] / np.maximum(xyz[..., :2].max(-1), 1e-4) < self.z_xy_rate) & (xyz[..., 2] < self.z_max)
        return _first_objection(
            {
                "no history": window.mask[:, -self.step_skip :].sum(1) < self.step_skip,
                "VLA fraction": by_vla / self.buffer < self.vla_fraction - 1e-9,
                "not planar": ~np.all(planar, axis=1),
            }
        )


@dataclass(frozen=True)
class Never:
    """No step is intuitive: the VLA is asked at every one, and proposals serve to be verified."""

    space: ActionSpace
    history_length: int = 1

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Label every step deliberative."""
        return Decisions(np.zeros(len(proposals), bool), np.full(len(proposals), "never"))
