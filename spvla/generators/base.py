"""The role of an action generator: continue the motion from history alone (with the VLA's last features), never an image."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from spvla.actions import ActionSpace, FloatArray
from spvla.history import Window


@runtime_checkable
class ActionGenerator(Protocol):
    """Generators are interchangeable everywhere: they see the history, never the image."""

    @property
    def space(self) -> ActionSpace:
        """The action space in whose scale its normalised actions are."""

    @property
    def history_length(self) -> int:
        """Steps of history this generator reads."""

    def propose(self, window: Window) -> FloatArray:
        """The next H actions after each of B windows of at least ``history_length`` steps: normalised, float32 (B, H, D).

        Only the first is ever executed; the others show where it leads. A window without any executed action gives a proposal
        that means nothing: the policy never executes that one, since the VLA always acts first.
        """
