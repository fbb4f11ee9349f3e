"""Conventions of robot data sets as data: which feature is which part of the action, its unit, sign and rate.

``configs/openx/datasets.yaml`` is the table: one entry for each Open-X data set that OpenVLA and Octo train on, in the
forms that their published statistics were computed in (translation, rotation, gripper with 0 closed and 1 open). A
user's own data set is a YAML file with the fields of one entry. Public sources of the table: the transforms of
https://github.com/openvla/openvla and https://github.com/octo-models/octo, control rates of the Open-X overview sheet.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.conversions import CONVERSIONS, apply, require_form
from data.parts import Problem
from spvla.actions import KINDS, ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.files import read_yaml
from spvla.store import Episode

TABLE = Path(__file__).parents[1] / "configs" / "openx" / "datasets.yaml"
ROLES = ("translation", "rotation", "gripper", "joint")
SLOWEST, FASTEST = 0.2, 1000.0  # Hz: what robots are controlled at; beyond, it is another unit or a mistake


Steps = Mapping[str, NDArray[Any]]
"""An episode as its file holds it: arrays (T, ...) by feature; images and text as bytes."""


@dataclass(frozen=True)
class Field:
    """Some entries of an action or a state.

    Args:
        role: what they are: translation, rotation, gripper or joint.
        key: the feature they come from; None for a constant.
        index: which of its entries, negative ones from the end; all if empty.
        convert: names of :data:`CONVERSIONS`, applied in order.
        zeros: for a constant, how many zeros.
        stop: ``zero`` for velocities and changes, which are zero when the robot is to stand still, ``hold`` for targets,
            which are repeated; None: as the kind of the action implies (see :class:`~spvla.actions.ActionSpace`).
    """

    role: str = "joint"
    key: str | None = None
    index: tuple[int, ...] = ()
    convert: tuple[str, ...] = ()
    zeros: int = 0
    stop: Literal["zero", "hold"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", tuple(int(i) for i in self.index))
        object.__setattr__(self, "convert", tuple(self.convert))
        if self.role not in ROLES:
            raise InputError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        if (self.key is None) == (self.zeros == 0):
            raise InputError("a field needs either a key or a number of zeros")
        for name in self.convert:
            if name not in CONVERSIONS:
                raise InputError(f"conversion {name!r} is unknown; available: {', '.join(CONVERSIONS)}")
        if self.stop not in (None, "zero", "hold"):
            raise InputError(f"stop is {self.stop!r}, expected zero or hold")
        if self.index:
            require_form(self.role, self.convert, len(self.index))

    @property
    def takes_difference(self) -> bool:
        """Whether it is a difference to the next step, which the last step lacks."""
        return any(name.startswith("difference") for name in self.convert)

    def read(self, steps: Steps) -> FloatArray:
        """These entries over an episode, float32 (T, width)."""
        if self.key is None:
            return np.zeros((len(next(iter(steps.values()))), self.zeros), np.float32)
        value = steps[self.key]
        if "zlib" in self.convert:
            value = np.stack([np.frombuffer(zlib.decompress(v), np.float32) for v in value])
        if value.dtype.kind not in "fiub":
            raise TypeError(f"its values are {value.dtype}, not numbers")
        x = value.astype(np.float32).reshape(len(value), -1)
        if self.index:
            x = x[:, list(self.index)]
        return apply(self.role, self.convert, x)


@dataclass(frozen=True)
class Conventions:
    """What a data set's features mean.

    Args:
        kind: what the action's dimensions are, one of :data:`spvla.actions.KINDS`.
        control_rate: control steps per second (Hz).
        action: the parts of the action, in order.
        state: the parts of proprioception, in order; may be empty.
        camera: the image feature of the main camera, or None.
        instruction: the text feature with the instruction, or None where the data set's own task table has it.
        binary_gripper: grippers only take their two end values.
        skip_first: leave out this many steps at an episode's start (Bridge begins with an empty action).
    """

    kind: str
    control_rate: float
    action: tuple[Field, ...]
    state: tuple[Field, ...] = ()
    camera: str | None = None
    instruction: str | None = "language_instruction"
    binary_gripper: bool = True
    skip_first: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Conventions:
        """From the mapping of a YAML file. Raises :class:`InputError` naming ``where`` and the field."""
        known = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: expected a mapping with the fields {', '.join(known)}")
        for name in values:
            if name not in known:
                raise InputError(f"{where}: field {name!r} is unknown; available: {', '.join(known)}")
        for name in ("kind", "control_rate", "action"):
            if name not in values:
                raise InputError(f"{where}: field {name!r} is missing")
        out = dict(values)
        for name in ("action", "state"):
            parts = []
            for i, part in enumerate(values.get(name) or ()):
                try:
                    parts.append(Field(**part))
                except (TypeError, InputError) as error:
                    raise InputError(f"{where}: {name}[{i}]: {error}") from None
            out[name] = tuple(parts)
        if not out["action"]:
            raise InputError(f"{where}: action has no fields")
        if out["kind"] not in KINDS:
            raise InputError(f"{where}: kind {out['kind']!r} is not one of {', '.join(KINDS)}")
        out["control_rate"] = require_rate(out["control_rate"], f"{where}: control_rate")
        return cls(**out)

    @property
    def left_out(self) -> str | None:
        """Which steps of every episode are left out and why, in words, or None."""
        first = f"the first {self.skip_first} of each episode" if self.skip_first else ""
        last = "the last, whose difference to the next is unknown" if self.has_difference else ""
        told = " and ".join(t for t in (first, last) if t)
        return f"these steps are left out: {told}" if told else None

    @property
    def has_difference(self) -> bool:
        """Whether a part is the difference to the next step, which the last step lacks."""
        return any(f.takes_difference for f in (*self.action, *self.state))

    def kept(self, length: int) -> slice:
        """Which steps of an episode of this length are kept; none where it is too short."""
        first = min(self.skip_first, length)
        return slice(first, max(length - self.has_difference, first))

    @property
    def keys(self) -> list[str]:
        """The features that actions, states and the instruction need."""
        keys = [f.key for f in (*self.action, *self.state)] + [self.instruction]
        return [k for k in dict.fromkeys(keys) if k is not None]

    def space(self, name: str, widths: Mapping[str, int] | None = None) -> ActionSpace:
        """The action space; its q01, q99 and bounds are -1 and 1 until somebody measures them.

        Args:
            name: of the data set.
            widths: sizes of features that a field takes whole.
        """
        roles: dict[str, list[int]] = {role: [] for role in ROLES}
        held: dict[str | None, list[int]] = {None: [], "zero": [], "hold": []}
        at = 0
        for part in self.action:
            width = part.zeros or len(part.index) or (widths or {}).get(part.key or "", 0)
            if not width:
                raise InputError(f"conventions of {name}: action field {part.key!r} must list its entries as index")
            width = 3 if any("quaternion" in name for name in part.convert) else width
            roles[part.role] += range(at, at + width)
            held[part.stop] += range(at, at + width)
            at += width
        space = ActionSpace(
            name=name,
            kind=self.kind,
            control_rate=float(self.control_rate),
            q01=(-1.0,) * at,
            q99=(1.0,) * at,
            low=(-1.0,) * at,
            high=(1.0,) * at,
            translation=tuple(roles["translation"]),
            rotation=tuple(roles["rotation"]),
            gripper=tuple(roles["gripper"]),
            binary_gripper=self.binary_gripper,
        )
        motions = tuple(sorted({*held["zero"], *(d for d in space.moving if d in held[None])}))
        return space if motions == space.moving else replace(space, motions=motions)


def require_rate(rate: Any, where: str) -> float:
    """``rate`` (Hz), if robots are controlled at such a one.

    Raises:
        InputError: naming ``where`` it is from.
    """
    if isinstance(rate, int | float) and SLOWEST <= rate <= FASTEST:
        return float(rate)
    shown = f"{rate:.4g}" if isinstance(rate, float) else rate
    told = f"{where} is {shown} Hz; control rates must lie between {SLOWEST:g} and {FASTEST:g} Hz"
    raise InputError(told, code="control-rate", field=where)


def load_table(path: Path = TABLE) -> dict[str, Conventions]:
    """All entries of a table of conventions, by name."""
    return {name: Conventions.read(entry, f"{path}: {name}") for name, entry in read_yaml(path).items()}


def find_conventions(wanted: str | Path | None, name: str) -> Conventions:
    """The conventions called ``wanted``, in the YAML file ``wanted``, or, for None, those of the data set ``name``.

    Raises:
        InputError: there are none; the message says what to write.
    """
    if wanted is not None and Path(wanted).suffix in (".yaml", ".yml"):
        return Conventions.read(read_yaml(Path(wanted)), str(wanted))
    key = str(wanted or name)
    table = _known(TABLE) if TABLE.is_file() else {}
    if key not in table:
        raise InputError(
            f"no conventions for data set {key!r}; available: {', '.join(sorted(table)) or 'none'}; for another one write a "
            f"YAML file with {', '.join(f.name for f in fields(Conventions))} and pass it as --conventions"
        )
    return Conventions.read(table[key], f"{TABLE.name}: {key}")


@functools.cache
def _known(table: Path) -> dict[str, Any]:
    return read_yaml(table)  # takes a tenth of a second


# ------------------------------------------------------------------------------------------------------------- an episode


def standardize(
    steps: Steps,
    conventions: Conventions,
    file: str,
    number: int,
    facts: Mapping[str, Any],
    cameras: Mapping[str, str] = {},
    instruction: str | None = None,
    timestamps: NDArray[np.float64] | None = None,
    images: Mapping[str, Sequence[Any]] = {},
) -> Episode | Problem:
    """An episode under its conventions, or what is wrong with it.

    Args:
        steps: the episode as its file holds it.
        conventions: what its features mean.
        file, number: where it came from, for messages.
        facts: metadata for the result.
        cameras: image features to keep encoded, by the name to give them.
        instruction: where no feature holds it.
        timestamps: seconds (T,), or None: by the control rate.
        images: frames (T) by camera that ``steps`` does not hold.
    """
    length = len(next(iter(steps.values())))
    kept = conventions.kept(length)
    if kept.stop <= kept.start:
        return Problem(file, f"has {length} steps, and none of them is left", number)
    values: dict[str, FloatArray] = {}
    for name, parts in (("action", conventions.action), ("state", conventions.state)):
        for part in parts:
            try:
                read = part.read(steps)
            except KeyError:
                return Problem(file, "there is no such feature", number, part.key)
            except (ValueError, IndexError, TypeError, zlib.error) as error:
                shape = steps[part.key].shape if part.key in steps else ()  # type: ignore[index]
                return Problem(file, f"does not fit the conventions, its shape is {shape} ({error})", number, part.key)
            values[name] = np.concatenate([values[name], read], axis=1) if name in values else read
    for name, value in values.items():
        bad = ~np.isfinite(value[kept]).all(1)
        if bad.any():
            return Problem(file, f"contains NaN or infinity at step {int(bad.argmax()) + kept.start}", number, name)
    if conventions.instruction is not None:
        if conventions.instruction not in steps:
            return Problem(file, "there is no such feature", number, conventions.instruction)
        instruction = as_text(steps[conventions.instruction][kept.start])
    pictures: dict[str, Sequence[Any]] = {name: list(steps[key][kept]) for name, key in cameras.items()}
    pictures |= {name: frames[kept] for name, frames in images.items()}
    if timestamps is None:
        timestamps = np.arange(length) / conventions.control_rate
    return Episode(
        actions=np.ascontiguousarray(values["action"][kept]),
        instruction=instruction or "",
        timestamps=np.asarray(timestamps[kept], np.float64),
        states=np.ascontiguousarray(values["state"][kept]) if "state" in values else None,
        images=pictures,
        metadata=dict(facts),
    )


def as_text(value: Any) -> str:
    """A text feature's value."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def first_action_note(where: str, episodes: Sequence[Episode], space: ActionSpace) -> list[str]:
    """A note if the first action of all these episodes is empty, though the second ones are not; else nothing.

    Args:
        where: the data set, for the note.
        episodes, space: under its conventions.
    """
    moves = [np.abs(e.actions[:2, list(space.continuous)]).max(1) for e in episodes if len(e) > 1 and space.continuous]
    if not moves:
        return []
    first, second = np.array(moves).T
    if first.max() > 0.1 * np.median(second):
        return []
    return [f"{where}: the first action of every episode is (almost) zero; skip_first: 1 in its conventions would leave it out"]
