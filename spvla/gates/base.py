"""The role of a gate: label the coming step deliberative (the VLA acts) or intuitive (the generator may)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
    """

    intuitive: bool
    reason: str
    probability: float | None = None
    refused: bool = False


@runtime_checkable
class Gate(Protocol):
    """Stateless apart from what the history holds."""

    @property
    def history_length(self) -> int:
        """Steps of history this gate reads."""

    def decide(self, history: ActionHistory, proposal: Proposal) -> Decision:
        """Label the coming step."""
