"""Gates by name. To add one, write its class in a file and name it here or as an entry point of the group ``spvla.gates``.

A class with ``from_export`` (:class:`~spvla.gates.base.TrainedGate`) has an allowed risk and needs an export; any other is
called with the action space and its constants, as the hand-set rules are.
"""

from __future__ import annotations

from spvla.registry import Registry

GATES = Registry(
    "gate",
    "spvla.gates",
    {
        "learned": "spvla.gates.classifier:LearnedGate",
        "live": "spvla.gates.live:LiveGate",
        "release": "spvla.gates.rules:ReleaseRule",
        "paper": "spvla.gates.rules:PaperRule",
        "horizon": "spvla.gates.plans:HorizonGate",
        "pace": "spvla.gates.plans:PaceGate",
        "reuse": "spvla.gates.plans:ReuseGate",
        "never": "spvla.gates.rules:Never",
    },
)


def has_risk(name: str) -> bool:
    """Whether the gate called ``name`` comes from an export and takes an allowed risk; a hand-set rule and ``none`` do not."""
    return name != "none" and hasattr(GATES.get(name), "from_export")
