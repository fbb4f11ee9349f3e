"""What is decided about a control step before anybody acts, and what is then done."""

from __future__ import annotations

from dataclasses import dataclass

from spvla.actions import FloatArray
from spvla.gates.base import Decision
from spvla.history import Source
from spvla.vlas.base import VLAOutput


@dataclass(frozen=True)
class Judged:
    """What generator and gate say about a step, before anybody acts.

    Args:
        decision: the gate's label, or why it was not asked.
        proposal: the generator's action, or where the gate would rather keep the VLA's plan its next one, (D,), environment
            units; None if nobody was asked.
        refused: labelled intuitive, but the proposal is not admissible.
        proposed: what the generator itself would do, normalised (D,); None where it was not asked, or knows nothing yet.
    """

    decision: Decision
    proposal: FloatArray | None = None
    refused: bool = False
    proposed: FloatArray | None = None

    @property
    def skips(self) -> bool:
        """The proposal may be executed without a fresh look."""
        return self.decision.intuitive and not self.refused


@dataclass(frozen=True)
class Acted:
    """The action (D,) of a step, environment units, and where it comes from.

    Args:
        output: the VLA's output if it was asked in this step.
        planned: the part of an earlier plan that covers this step, or None.
        keep_mass: attention mass the pruner asked for, or None if the VLA was not asked.
        unavailable: why the VLA could not be asked, or None.
    """

    action: FloatArray
    source: Source
    output: VLAOutput | None = None
    planned: VLAOutput | None = None
    keep_mass: float | None = None
    unavailable: str | None = None
