"""Policies by name: a built-in, an entry point of the group ``spvla.vlas``, or ``package.module:factory``.

A factory takes ``checkpoint`` (a path, a hub id or None) and returns a :class:`~spvla.vlas.base.VLA`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from spvla.errors import InputError
from spvla.vlas.base import VLA

BUILT_IN = {"expert": "data.expert:load"}
GROUP = "spvla.vlas"


def load_vla(name: str, checkpoint: str | None = None) -> VLA:
    """The policy called ``name``, made from ``checkpoint``. Raises :class:`InputError` for an unknown name."""
    target = BUILT_IN.get(name)
    if target is None:
        target = next((e.value for e in entry_points(group=GROUP) if e.name == name), None)
    if target is None and ":" in name:
        target = name
    if target is None:
        known = sorted({*BUILT_IN, *(e.name for e in entry_points(group=GROUP))})
        raise InputError(f"policy {name!r} is unknown; there are: {', '.join(known)}, or name a 'package.module:factory'")
    module, _, attribute = target.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"policy {name!r}: cannot import {target} ({error})") from None
    vla = factory(checkpoint)
    if not isinstance(vla, VLA):
        raise InputError(f"policy {name!r}: {target} returned {type(vla).__name__}, which lacks reset() or predict()")
    return vla


def needs_images(vla: VLA) -> bool:
    """Whether a policy looks at images. One that declares ``needs_images = False`` runs without rendering."""
    return bool(getattr(vla, "needs_images", True))
