"""Parts by name: a built-in, an entry point of the role's group, or ``package.module:attribute``. Nothing is imported before
it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from spvla.errors import InputError


@dataclass
class Registry:
    """The parts that can play one role.

    Args:
        role: what they are, for errors: "generator".
        group: the entry point group in which other packages register theirs.
        built_in: ``module:attribute`` by name.
    """

    role: str
    group: str
    built_in: Mapping[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> dict[str, str]:
        """``module:attribute`` of every name in this installation; a built-in name cannot be taken over."""
        return {**{point.name: point.value for point in entry_points(group=self.group)}, **self.built_in}

    def names(self) -> list[str]:
        """Every name, the built-in ones first."""
        return [*self.built_in, *sorted(self.targets.keys() - self.built_in.keys())]

    def __contains__(self, name: str) -> bool:
        return self._target(name) is not None

    def _target(self, name: str) -> str | None:
        """``module:attribute`` of a name, or None. What is installed is looked through only for names that are not known here:
        that takes milliseconds."""
        if name in self.built_in:
            return self.built_in[name]
        return name if ":" in name else self.targets.get(name)

    def get(self, name: str) -> Any:
        """What ``name`` stands for.

        Raises:
            InputError: an unknown name (code ``unknown-<role>``; the message lists the known ones), or one that cannot be
                imported (code ``import-failed``).
        """
        target = self._target(name)
        if target is None:
            raise InputError(
                f"{self.role} {name!r} is unknown; available: {', '.join(self.names())}, or name a 'package.module:attribute'",
                code=f"unknown-{self.role.lower()}",
                field=self.role,
            )
        module, _, attribute = target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: not the name of a module
            message = f"{self.role} {name!r}: cannot import {target} ({error})"
            raise InputError(message, code="import-failed", field=self.role) from None
