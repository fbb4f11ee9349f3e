"""Action generators by name. To add one, write its class in a file and name it here or as an entry point of the group
``spvla.generators``.

A :class:`~spvla.generators.learned.LearnedGenerator` is trained by ``python -m train distill`` and lives in an export; any
other is called with the action space and returns an :class:`~spvla.generators.base.ActionGenerator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.generators.base import ActionGenerator
from spvla.registry import Registry

if TYPE_CHECKING:
    from spvla.generators.learned import LearnedGenerator

BASELINES = {
    "ridge": "spvla.generators.ridge:ridge",
    "ridge_paper": "spvla.generators.ridge:ridge_paper",
    "last": "spvla.generators.ridge:LastActionGenerator",
    "plan": "spvla.generators.plan:PlanGenerator",
}
LEARNED = {
    "mlp": "spvla.generators.learned:MLPGenerator",
    "transformer": "spvla.generators.transformer:TransformerGenerator",
}
GENERATORS = Registry("generator", "spvla.generators", {**LEARNED, **BASELINES})


def is_learned(name: str) -> bool:
    """Whether the generator called ``name`` has to be trained."""
    from spvla.generators.learned import LearnedGenerator

    found = GENERATORS.get(name)
    return isinstance(found, type) and issubclass(found, LearnedGenerator)


def names_of(learned: bool) -> list[str]:
    """The generators that have to be trained, or those that need no training."""
    return [name for name in GENERATORS.names() if is_learned(name) == learned]


def make_baseline(name: str, space: ActionSpace) -> ActionGenerator:
    """The generator called ``name`` for a robot of ``space``, without an export. One that has to be trained is refused."""
    if is_learned(name):
        raise InputError(
            f"generator {name!r} must be trained: give an export that holds it; available without export: "
            + ", ".join(names_of(learned=False)),
            code="not-trained",
            field="generator",
        )
    made: ActionGenerator = GENERATORS.get(name)(space)
    return made


def make_network(config: Mapping[str, Any]) -> LearnedGenerator:
    """An untrained network from the fields of its configuration, ``kind`` among them (the form of an export's config.json)."""
    kind = config.get("kind", "mlp")
    if not is_learned(kind):
        raise InputError(f"generator {kind!r} is not a learned kind", code="not-trained", field="kind")
    network = GENERATORS.get(kind)
    made: LearnedGenerator = network(network.config_class(**config))
    return made
