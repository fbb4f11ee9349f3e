"""The role of a gate: label the coming step deliberative (the VLA acts) or intuitive (the generator may)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from spvla.actions import FloatArray
from spvla.generators.base import Proposal
from spvla.history import ActionHistory


@dataclass(frozen=True)
class Decision:
    """A gate's answer.

    Args:
        intuitive: the generator may act.
        reason: what decided, in a word or two, for records and reports.
        probability: estimated probability that the proposal deviates from the VLA's action, or None for rules.
        refused: intuitive, but the proposal is known not to be admissible: the VLA acts. The policy holds the proposals of
            every gate to its limits, whether or not the gate has checked them.
        audit: the VLA is asked as well, whoever acts: an intuitive step that is audited is executed as proposed.
    """

    intuitive: bool
    reason: str
    probability: float | None = None
    refused: bool = False
    audit: bool = False


@runtime_checkable
class Gate(Protocol):
    """Stateless apart from what the history holds."""

    @property
    def history_length(self) -> int:
        """Steps of history this gate reads."""

    def decide(self, history: ActionHistory, proposal: Proposal) -> Decision:
        """Label the coming step."""


@runtime_checkable
class Learning(Gate, Protocol):
    """A gate that learns while it runs."""

    def begin(self, instruction: str) -> None:
        """An episode starts."""

    def observe(self, proposal: FloatArray | None, answer: FloatArray | None) -> None:
        """A step is over: the generator's first action and the VLA's (D,), environment units; None where there is none. Steps
        on which the VLA could not be asked are not reported."""

    def stats(self) -> dict[str, float]:
        """What the gate has learned, for :meth:`~spvla.policy.SPVLAPolicy.stats`."""
