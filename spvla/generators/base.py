"""The role of an action generator: continue the motion from history alone (with the VLA's last features), never an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from spvla.actions import FloatArray
from spvla.history import ActionHistory, Window


@dataclass(frozen=True)
class Proposal:
    """What a generator would do next.

    Args:
        actions: float32 (H, D), environment units; only the first is ever executed, the rest show where it leads.
    """

    actions: FloatArray


@runtime_checkable
class ActionGenerator(Protocol):
    """Generators are interchangeable everywhere: they see the history, never the image."""

    @property
    def history_length(self) -> int:
        """Steps of history this generator reads."""

    def propose(self, history: ActionHistory) -> Proposal:
        """Propose the next actions. At the start of an episode, with nothing executed yet, the proposal means nothing; the
        policy never executes that one, since the VLA always acts first."""

    def propose_windows(self, window: Window) -> FloatArray:
        """The same for B histories at once: normalised actions (B, H, D)."""
