"""VLAs by name: a built-in, an entry point of the group ``spvla.vlas``, or ``package.module:factory``.

A factory is called as ``factory(checkpoint, **options)`` and returns a :class:`~spvla.vlas.base.VLA`; ``checkpoint`` is a
path, hf://owner/name or None. One that declares a parameter ``suite`` is given the simulator's suite that it will act in, if
any.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from spvla.errors import InputError
from spvla.fields import check_options, naming
from spvla.registry import Registry
from spvla.vlas.base import VLA, PrunableVLA, Weighted

BUILT_IN = {
    "openvla": "spvla.vlas.openvla:load",
    "openvla_oft": "spvla.vlas.openvla_oft:load",
    "nano_vla": "spvla.vlas.nano:load",
    "nano_oft": "spvla.vlas.nano:load_oft",
    "lerobot": "spvla.vlas.foreign:load_lerobot",
    "remote": "spvla.vlas.remote:load",
}
REPOSITORY = {"expert": "data.envs:expert"}  # the package `data` comes with a checkout, not with an installed spvla


def _in_repository() -> bool:
    try:
        return find_spec("data.envs") is not None
    except ModuleNotFoundError:  # there is no package `data` at all
        return False


VLAS = Registry("VLA", "spvla.vlas", {**BUILT_IN, **(REPOSITORY if _in_repository() else {})})


def load_vla(
    name: str,
    checkpoint: str | None = None,
    options: Mapping[str, Any] | None = None,
    suite: str | None = None,
) -> VLA:
    """The VLA called ``name``.

    Args:
        name: a built-in, an entry point, or ``package.module:factory``.
        checkpoint: path or hf://owner/name, for the factory.
        options: keyword arguments for the factory.
        suite: the simulator's suite that it will act in, for factories that take it.

    Raises:
        InputError: an unknown name or option; the message lists the known ones.
    """
    if name in REPOSITORY and not _in_repository():
        raise InputError(
            f"VLA {name!r} needs the project's repository: clone it and run there; an installed spvla has no simulators",
            code="needs-repository",
            field="vla",
        )
    factory = VLAS.get(name)
    target = VLAS.targets.get(name, name)
    if not callable(factory):
        raise InputError(f"VLA {name!r}: {target} is of type {type(factory).__name__}, not a factory")
    keywords = dict(options or {})
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    takes = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    takes_any = len(takes) < len(parameters)
    for option in keywords:
        if option not in takes and not takes_any:
            raise InputError(f"VLA {name!r} takes no option {option!r}; it takes: {', '.join(takes) or 'none'}")
    if suite is not None and "suite" in takes:
        keywords.setdefault("suite", suite)
    with naming(f"VLA {name!r}"):
        check_options(factory, keywords)
    try:
        vla = factory(checkpoint, **keywords)
    except TypeError as error:  # not a factory, or one that passes options on to a function that does not take them
        raise InputError(f"VLA {name!r}: {target}(checkpoint, ...): {error}") from error
    if not isinstance(vla, VLA):
        raise InputError(f"VLA {name!r}: {target} returned {type(vla).__name__}, which lacks reset() or predict()")
    return vla


@dataclass(frozen=True)
class VLASource:
    """Where a VLA comes from: the arguments of :func:`load_vla`."""

    name: str
    checkpoint: str | None = None
    options: Mapping[str, Any] | None = None
    suite: str | None = None

    def load(self) -> VLA:
        """See :func:`load_vla`."""
        return load_vla(self.name, self.checkpoint, self.options, self.suite)

    def second(self, vla: VLA) -> VLA:
        """A second VLA like ``vla``, which came from here: unpruned, with an episode of its own.

        A VLA that can share its weights does; another one is loaded again.
        """
        return vla.with_pruner(None) if isinstance(vla, PrunableVLA) else self.load()


def weights_stamp(vla: VLA) -> str | None:
    """A short hash of a few values of each of a VLA's tensors: tells whether results are of the same weights, wherever they
    were loaded from. None where the weights cannot be seen."""
    if not isinstance(vla, Weighted):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(vla.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 16)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
