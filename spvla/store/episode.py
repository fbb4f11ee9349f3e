"""One recorded episode in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.history import Source

VECTOR_COLUMNS = {  # Episode field -> feature name of the store
    "actions": "action",
    "states": "observation.state",
    "environment_states": "observation.environment_state",
    "vla_actions": "vla_action",
    "vla_confidence": "vla_confidence",
    "vla_features": "vla_features",
    "vla_plans": "vla_plan",
    "vla_again": "vla_again",
}


@dataclass
class Episode:
    """One rollout of T steps.

    Args:
        actions: executed actions, float32 (T, D), environment units.
        instruction: what the policy was asked to do.
        timestamps: seconds since the episode's start, float64 (T,).
        states: proprioception before each action, float32 (T, S), or None.
        sources: who made each executed action (:class:`~spvla.history.Source`), uint8 (T,).
        vla_actions: the teacher's action at each visited state, (T, D), or None for demonstrations; NaN rows where the
            teacher was not asked.
        vla_confidence: its confidence, (T, D), or None.
        vla_features: its pooled features, (T, F), or None.
        vla_plans: its whole plan of P actions at each visited state, made there and then, (T, P D), the first action's entries
            first, or None for one that answers with a single action; NaN rows where it was not asked.
        vla_again: the first action of a second plan for the same state, (T, D), or None; NaN rows where there is none. It tells
            how far two answers to the same question differ.
        vla_ages: control steps from the state that the VLA had last answered about to each step, int64 (T,), 0 before its first
            answer; None where it answers in the step in which it is asked, so that ``sources`` say it.
        vla_propensities: probability with which each step was to get the teacher's action, given everything before it, float32
            (T,): 1 where the VLA was asked in any case, less where a coin decided, whatever it said; None where no coin
            decides (see :class:`~spvla.gates.live.LiveGate`).
        environment_states: privileged simulator state, (T, E), or None; never an input of generators and gates.
        images: per camera, T encoded images (JPEG or PNG bytes).
        success: whether the task was solved, or None if unknown.
        metadata: JSON-ready facts: suite, task, init_state, seed, ...
    """

    actions: FloatArray
    instruction: str
    timestamps: NDArray[np.float64]
    states: FloatArray | None = None
    sources: NDArray[np.uint8] | None = None
    vla_actions: FloatArray | None = None
    vla_confidence: FloatArray | None = None
    vla_features: FloatArray | None = None
    vla_plans: FloatArray | None = None
    vla_again: FloatArray | None = None
    vla_ages: NDArray[np.int64] | None = None
    vla_propensities: NDArray[np.float32] | None = None
    environment_states: FloatArray | None = None
    images: dict[str, Sequence[bytes]] = field(default_factory=dict)
    success: bool | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)

    def check(self, space: ActionSpace, what: str) -> None:
        """Raise :class:`InputError` naming ``what`` and the field unless shapes agree and executed values are finite."""
        steps = len(self.actions)
        if steps == 0:
            raise InputError(f"{what}: the episode has no steps")
        if not isinstance(self.instruction, str):
            raise InputError(f"{what}: instruction is {self.instruction!r}, expected text")
        for name in VECTOR_COLUMNS:
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != 2 or len(value) != steps:
                raise InputError(f"{what}: {name} has shape {value.shape}, expected ({steps}, ...)")
            allow_gaps = name.startswith("vla_")
            bad = ~(np.isfinite(value) | (np.isnan(value) if allow_gaps else False)).all(1)
            if bad.any():
                raise InputError(f"{what}: {name} contains NaN or infinity at step {int(bad.argmax())}")
        for name in ("actions", "vla_actions", "vla_again"):
            value = getattr(self, name)
            if value is not None and value.shape[1] != space.dim:
                raise InputError(f"{what}: {name} have {value.shape[1]} dimensions; the action space has {space.dim}")
        if self.vla_plans is not None and self.vla_plans.shape[1] % space.dim:
            told = f"{what}: vla_plans have {self.vla_plans.shape[1]} entries, no multiple of the action space's {space.dim}"
            raise InputError(told, code="damaged", field="vla_plan")
        if self.timestamps.shape != (steps,) or not np.isfinite(self.timestamps).all():
            raise InputError(f"{what}: timestamps, shape {self.timestamps.shape}: expected {steps} finite values")
        if self.sources is not None:
            if self.sources.shape != (steps,):
                raise InputError(f"{what}: sources has shape {self.sources.shape}, expected ({steps},)")
            require_sources(self.sources, f"{what}: sources")
        if self.vla_ages is not None:
            if self.vla_ages.shape != (steps,):
                raise InputError(f"{what}: vla_ages has shape {self.vla_ages.shape}, expected ({steps},)")
            require_ages(self.vla_ages, np.arange(steps), f"{what}: vla_ages")
        if self.vla_propensities is not None:
            if self.vla_propensities.shape != (steps,):
                raise InputError(f"{what}: vla_propensities has shape {self.vla_propensities.shape}, expected ({steps},)")
            require_propensities(self.vla_propensities, f"{what}: vla_propensities")
        for camera, frames in self.images.items():
            if len(frames) != steps:
                raise InputError(f"{what}: camera {camera!r} has {len(frames)} images for {steps} steps")


def require_ages(ages: NDArray[np.integer], steps: NDArray[np.integer], what: str) -> None:
    """Raise :class:`InputError` naming ``what`` unless each age lies in 0 .. its step in the episode; (N,) each."""
    bad = (ages < 0) | (ages > steps)
    if bad.any():
        k = int(bad.argmax())
        raise InputError(f"{what} is {ages[k]} at step {steps[k]}, expected 0 to {steps[k]}", code="damaged", field="vla_age")


def require_propensities(propensities: NDArray[np.floating], what: str) -> None:
    """Raise :class:`InputError` naming ``what`` unless each (N,) lies in (0, 1]."""
    bad = ~((propensities > 0) & (propensities <= 1))
    if bad.any():
        k = int(bad.argmax())
        told = f"{what} is {propensities[k]:g} at step {k}, expected more than 0 and at most 1"
        raise InputError(told, code="damaged", field="vla_propensity")


def require_sources(sources: NDArray[np.integer], what: str) -> None:
    """Raise :class:`InputError` naming ``what`` unless all are a :class:`~spvla.history.Source`."""
    bad = ~np.isin(sources, list(Source))
    if bad.any():
        k = int(bad.argmax())
        raise InputError(f"{what} is {sources[k]} at step {k}, expected one of {', '.join(str(int(s)) for s in Source)}")
