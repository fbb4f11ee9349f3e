"""The role of a gate: label the coming step deliberative (the VLA acts) or intuitive (the generator may)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.history import Window

if TYPE_CHECKING:
    from spvla.export import Export
    from spvla.gates.eyes import EyesConfig


@dataclass(frozen=True)
class Decision:
    """A gate's label of one step.

    Args:
        intuitive: the generator may act.
        reason: what decided, in a word or two, for records and reports.
        probability: estimated probability that the proposal deviates from the VLA's action, or None for rules.
        refused: intuitive, but the proposal is known not to be admissible: the VLA acts. The policy holds the proposals of
            every gate to its limits, whether or not the gate has checked them.
        audit: the VLA is asked even so, and the gate hears its answer: a silent audit, of which only the answer counts.
        threshold: the largest probability at which the gate labels a step intuitive now, or None for rules.
        propensity: probability with which the VLA is asked in this step, where a coin decided; None: no coin did.
        kept: what may act, and what the probability is about, is the next action of the VLA's plan, not the generator's.
    """

    intuitive: bool
    reason: str
    probability: float | None = None
    refused: bool = False
    audit: bool = False
    threshold: float | None = None
    propensity: float | None = None
    kept: bool = False


@dataclass(frozen=True)
class Decisions:
    """A gate's labels of B steps; the fields are those of :class:`Decision`, (B,) each; ``threshold`` and ``propensity`` are
    one for all."""

    intuitive: NDArray[np.bool_]
    reason: NDArray[np.str_]
    probability: NDArray[np.float64] | None = None
    refused: NDArray[np.bool_] | None = None
    audit: NDArray[np.bool_] | None = None
    threshold: float | None = None
    propensity: float | None = None
    kept: NDArray[np.bool_] | None = None

    def __getitem__(self, step: int) -> Decision:
        """The label of one step."""
        return Decision(
            bool(self.intuitive[step]),
            str(self.reason[step]),
            None if self.probability is None else float(self.probability[step]),
            self.refused is not None and bool(self.refused[step]),
            self.audit is not None and bool(self.audit[step]),
            self.threshold,
            self.propensity,
            self.kept is not None and bool(self.kept[step]),
        )


@runtime_checkable
class Gate(Protocol):
    """Decides from what a window holds: on a robot (B = 1), in evaluation without a simulator and in calibration alike."""

    @property
    def history_length(self) -> int:
        """Steps of history this gate reads."""

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Label the steps that follow B windows.

        Args:
            window: B histories of at least ``history_length`` steps, arrays.
            proposals: what the generator would do next, normalised (B, D).
        """


def reads_plan(part: object) -> bool:
    """Whether a gate or a generator reads the rest of the VLA's plan (its attribute ``reads_plan``): the policy then asks the
    gate at every step, where it otherwise executes a plan to its end."""
    return bool(getattr(part, "reads_plan", False))


def reads_error(part: object) -> bool:
    """Whether a gate reads the generator's error at the VLA's last call (its attribute ``reads_error``): the policy then asks
    the generator also in the VLA's steps about which the gate is not asked."""
    return bool(getattr(part, "reads_error", False))


def eyes_of(part: object) -> EyesConfig | None:
    """The eyes of a gate (its attribute ``eyes``), which needs the camera at every step then; None if it has none."""
    return getattr(part, "eyes", None)


@runtime_checkable
class LearningGate(Gate, Protocol):
    """A gate that learns while it runs: it decides one step at a time and hears how each ended."""

    def begin(self, instruction: str) -> None:
        """An episode starts."""

    def observe(self, proposal: FloatArray | None, answer: FloatArray | None) -> None:
        """A step is over: the generator's action and the VLA's (D,), environment units; None where there is none. A step on
        which the VLA was asked in vain is not reported."""

    def stats(self) -> dict[str, float]:
        """What was learned, for :meth:`~spvla.policy.SPVLAPolicy.stats`."""


@runtime_checkable
class TrainedGate(Protocol):
    """A gate class whose instances come from an export and an allowed risk; any other is made from the action space alone."""

    @classmethod
    def from_export(cls, export: Export, generator: str, risk: float, space: ActionSpace, **options: Any) -> Gate:
        """The gate for ``generator``'s proposals on a robot of ``space``, at an allowed ``risk``."""
