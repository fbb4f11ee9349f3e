"""Where a value lies in what an environment returns: ``obs/robot/joints[0:7]``, ``info/is_success``, ``reward``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError
from spvla.wire import shorten

ROOTS = ("obs", "info", "reward", "return", "terminated", "survived")
RENDER = "render"  # the place of an image that is drawn by the environment's render()
MAX_LISTED = 1500  # characters of a message that lists what there is


@dataclass(frozen=True)
class Moment:
    """What an environment said last.

    Args:
        obs: its observation, of any form.
        info: its info.
        reward: of the last step; 0 after a reset.
        total: the sum of the episode's rewards.
        terminated: the environment ended the episode.
        survived: the episode is over, and the environment did not end it.
    """

    obs: Any
    info: Mapping[Any, Any] = field(default_factory=dict)
    reward: float = 0.0
    total: float = 0.0
    terminated: bool = False
    survived: bool = False

    def value(self, root: str) -> Any:
        """What one of :data:`ROOTS` stands for."""
        return self.total if root == "return" else getattr(self, root)


@dataclass(frozen=True)
class Place:
    """A value in a :class:`Moment`: its root, the keys below it joined by ``/``, and which entries.

    Keys may contain ``/`` themselves; entries are those of the flattened array.
    """

    text: str
    root: str
    keys: str
    entries: slice | int | None

    @classmethod
    def read(cls, text: str, where: str) -> Place:
        """From its text. Raises :class:`InputError` (code ``bad-place``) that names ``where``."""
        match = re.fullmatch(r"(\w+)(?:/(.+?))?(?:\[(?:(-?\d+)|(-?\d*):(-?\d*))\])?", str(text).strip())
        if match is None or match[1] not in ROOTS or (match[2] and match[1] not in ("obs", "info")):
            raise InputError(
                f"{where}: {text!r} names no place; it begins with one of {', '.join(ROOTS)}, as in obs/agent/pos, "
                "obs[0:7] or info/is_success",
                code="bad-place",
                field=where,
            )
        entries: slice | int | None = None
        if match[3] is not None:
            entries = int(match[3])
        elif match[4] is not None:
            entries = slice(*(int(n) if n else None for n in (match[4], match[5])))
        return cls(str(text), match[1], match[2] or "", entries)

    def find(self, moment: Moment, where: str) -> Any:
        """The value there.

        Raises:
            InputError: there is none (code ``missing-key``); the message lists what there is.
        """
        found = list(_walk(moment.value(self.root), self.keys))
        if not found:
            there = shorten("; ".join(listing(moment.value(self.root), self.root)), MAX_LISTED) or "nothing"
            raise InputError(f"{where}: there is no {self.text!r}; there is: {there}", code="missing-key", field=where)
        if self.entries is None:
            return found[0]
        flat = np.asarray(found[0]).ravel()
        chosen = flat[self.entries] if isinstance(self.entries, slice) else flat[self.entries : self.entries + 1 or None]
        if not chosen.size:
            told = f"{where}: {self.text!r} is empty: there are {flat.size} entries"
            raise InputError(told, code="missing-key", field=where)
        return chosen

    def numbers(self, moment: Moment, where: str) -> NDArray[np.float64]:
        """The value there as a flat array. Raises :class:`InputError`: no such value, or no numbers (``not-numbers``)."""
        value = np.asarray(self.find(moment, where))
        if value.dtype.kind not in "fiub":
            told = f"{where}: {self.text!r} holds no numbers, but {_form(self.find(moment, where))}"
            raise InputError(told, code="not-numbers", field=where)
        return value.astype(np.float64).ravel()


def _walk(value: Any, keys: str) -> Iterator[Any]:
    """What lies at ``keys`` below ``value``: the longest key goes first where keys contain ``/``."""
    if not keys:
        yield value
        return
    cuts = [len(keys), *(m.start() for m in reversed(list(re.finditer("/", keys))))]
    for cut in cuts:
        head, rest = keys[:cut], keys[cut + 1 :]
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if str(key) == head:
                    yield from _walk(inner, rest)
        elif isinstance(value, list | tuple) and head.isdecimal() and int(head) < len(value):
            yield from _walk(value[int(head)], rest)


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every value inside ``value`` with its place, which ``place`` begins."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{place}/{key}")
    elif isinstance(value, tuple) and value:
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{place}/{i}")
    elif not isinstance(value, Mapping):
        yield place, value


def listing(value: Any, place: str) -> list[str]:
    """Every place inside ``value`` with the form of what is there."""
    return [f"{name} {_form(inner)}" for name, inner in leaves(value, place)]


def _form(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{value.shape} {value.dtype}"
    return type(value).__name__


def as_image(value: Any, where: str) -> NDArray[np.uint8]:
    """An upright picture as uint8 (H, W, 3): channels may come first, grey is spread, transparency left out, and floats that do
    not exceed 1 are scaled. Of a list of frames it is the last.

    Raises:
        InputError: it is no picture (code ``not-an-image``).
    """
    value = value[-1] if isinstance(value, list | tuple) and value else value
    image = np.asarray(value)
    if image.dtype.kind in "fiub":
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim == 3 and image.shape[2] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
            image = image.transpose(1, 2, 0)
        if image.ndim == 3 and image.shape[2] in (1, 3, 4) and image.size:
            image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]
            if image.dtype != np.uint8:
                scale = 255.0 if image.dtype.kind in "fb" and image.max() <= 1 else 1.0
                image = np.clip(np.nan_to_num(image) * scale + 0.5, 0, 255).astype(np.uint8)
            return np.ascontiguousarray(image)
    told = f"{where}: expected a picture (H, W, 3), got {_form(value)}"
    raise InputError(told, code="not-an-image", field=where)
