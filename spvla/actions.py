"""What a robot's action vector means: which dimensions are what, their scale, bounds and rate.

Everything that depends on a robot's conventions is data in an :class:`ActionSpace`. Generators and gates work on
*normalised* actions (q01/q99 of the training data mapped to [-1, 1], as in Open-X and OpenVLA), so that one set of
weights and one set of thresholds carries over between robots and data sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.files import read_json

FloatArray = NDArray[np.float32]

FAR_FACTOR = 3.0  # scales of the same robot, measured on other episodes, differ by less

KINDS = ("eef_delta", "eef_absolute", "joint_velocity", "joint_position", "joint_delta")
"""What an action can be. Efforts (torques, currents) are not among them: no effort is known to keep an arm where it is."""


@dataclass(frozen=True)
class ActionSpace:
    """Layout, scale and bounds of an action vector of ``dim`` entries.

    Args:
        name: a readable name, for example ``"libero"``.
        kind: what the non-gripper dimensions are, one of :data:`KINDS`.
        control_rate: control steps per second (Hz).
        q01, q99: per dimension, the values that normalise to -1 and +1 (environment units).
        low, high: per dimension, the bounds of an admissible action (environment units).
        translation, rotation, gripper: indices of the dimensions with these roles; any may be empty, and dimensions
            in none of them (joints) are plain continuous ones.
        binary_gripper: gripper dimensions only ever take their two end values.
        max_jump: per dimension, the largest change between consecutive actions seen in training (normalised units);
            None leaves jumps unchecked.
        motions: indices of the dimensions that are velocities or changes, and therefore zero when the robot is to stand
            still; the others are targets, which are repeated. None: all but the gripper's where ``kind`` is a delta or a
            velocity, and none where it is absolute. A mobile base's velocities beside joint positions, or a gripper that
            is commanded by its change, have to be listed.
    """

    name: str
    kind: str
    control_rate: float
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    translation: tuple[int, ...] = ()
    rotation: tuple[int, ...] = ()
    gripper: tuple[int, ...] = ()
    binary_gripper: bool = True
    max_jump: tuple[float, ...] | None = None
    motions: tuple[int, ...] | None = None
    _offset: FloatArray = field(init=False, repr=False, compare=False)
    _scale: FloatArray = field(init=False, repr=False, compare=False)
    _admissible: tuple[FloatArray, FloatArray, FloatArray] = field(init=False, repr=False, compare=False)
    _two_sided: NDArray[np.bool_] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        with naming(f"action space {self.name!r}"):
            check_fields(self, at_least={"max_jump": 0}, infinite=("low", "high", "max_jump"))
        for name in ("q01", "q99", "low", "high", "max_jump"):
            value = getattr(self, name)
            if value is None:
                continue
            object.__setattr__(self, name, tuple(float(v) for v in value))
            if len(value) != self.dim:
                raise InputError(f"action space {self.name!r}: {name} has {len(value)} entries, q01 has {self.dim}")
        for name in ("translation", "rotation", "gripper", "motions"):
            if any(not 0 <= i < self.dim for i in getattr(self, name) or ()):
                raise InputError(f"action space {self.name!r}: {name} names a dimension outside 0..{self.dim - 1}")
        if self.kind not in KINDS:
            raise InputError(f"action space {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.control_rate > 0:
            raise InputError(f"action space {self.name!r}: control_rate must be positive, got {self.control_rate}")
        q01, q99 = np.asarray(self.q01, np.float64), np.asarray(self.q99, np.float64)
        if not (q99 >= q01).all():
            raise InputError(f"action space {self.name!r}: q01 and q99 must be finite with q99 >= q01")
        if not (np.asarray(self.high) >= np.asarray(self.low)).all():
            raise InputError(f"action space {self.name!r}: high must not lie below low")
        if not self.dim:
            raise InputError(f"action space {self.name!r}: q01 has no entries")
        # A dimension that never moves (q01 == q99) has no scale of its own: unit scale keeps it finite.
        half = np.where(q99 > q01, (q99 - q01) / 2, 1.0)
        object.__setattr__(self, "_offset", ((q01 + q99) / 2).astype(np.float32))
        object.__setattr__(self, "_scale", half.astype(np.float32))
        sides = np.isin(np.arange(self.dim), self.gripper) & self.binary_gripper
        object.__setattr__(self, "_two_sided", sides)
        # Least and largest admissible action and jump, environment units; nothing limits a gripper's jump.
        slack = 1e-4 * self._scale
        jump = np.full(self.dim, np.inf) if self.max_jump is None else (np.asarray(self.max_jump) + 1e-4) * half
        jump[list(self.gripper)] = np.inf
        finite = np.finfo(np.float32)  # infinite bounds admit every finite action
        low, high = np.maximum(np.asarray(self.low) - slack, finite.min), np.minimum(np.asarray(self.high) + slack, finite.max)
        object.__setattr__(self, "_admissible", tuple(b.astype(np.float32) for b in (low, high, jump)))

    @property
    def dim(self) -> int:
        """Number of action dimensions D."""
        return len(self.q01)

    @property
    def continuous(self) -> tuple[int, ...]:
        """Indices of all dimensions but the gripper's."""
        return tuple(i for i in range(self.dim) if i not in self.gripper)

    @property
    def moving(self) -> tuple[int, ...]:
        """Indices of the dimensions that are zero when the robot stands still: ``motions``, or what ``kind`` implies."""
        if self.motions is not None:
            return tuple(sorted(self.motions))
        return () if self.kind in ("eef_absolute", "joint_position") else self.continuous

    def role(self, dimension: int) -> str:
        """What a dimension is: translation, rotation, gripper or joint."""
        return next((r for r in ("translation", "rotation", "gripper") if dimension in getattr(self, r)), "joint")

    def normalize(self, actions: ArrayLike) -> FloatArray:
        """Environment units (..., D) to normalised units: q01 -> -1, q99 -> +1; values beyond are not clipped."""
        return (np.asarray(actions, np.float32) - self._offset) / self._scale

    def denormalize(self, actions: ArrayLike) -> FloatArray:
        """Normalised units (..., D) back to environment units."""
        return np.asarray(actions, np.float32) * self._scale + self._offset

    def clip(self, actions: ArrayLike) -> FloatArray:
        """Actions (..., D) clipped to the bounds, environment units."""
        return np.clip(np.asarray(actions, np.float32), np.asarray(self.low, np.float32), np.asarray(self.high, np.float32))

    def stop(self, last: FloatArray) -> FloatArray:
        """The action (D,) that keeps a robot where it is, given the ``last`` one, environment units.

        Velocities and changes (:attr:`moving`) are zero; targets, the gripper's among them, stay the last ones.
        """
        out = np.array(last, np.float32)
        out[list(self.moving)] = 0.0
        return out

    def snap_gripper(self, normalized: FloatArray) -> FloatArray:
        """Normalised actions (..., D) with binary gripper dimensions set to the nearer end, -1 or +1.

        A gripper of which only one end was ever seen (q01 == q99) stays there.
        """
        if not (self.binary_gripper and self.gripper):
            return normalized
        out = normalized.copy()
        g = list(self.gripper)
        apart = np.array([self.q99[d] > self.q01[d] for d in g])
        out[..., g] = np.where(apart, np.where(out[..., g] >= 0, 1.0, -1.0), 0.0)
        return out

    def deviation(self, proposed: ArrayLike, reference: ArrayLike, tolerance: float) -> NDArray[np.bool_]:
        """Whether normalised ``proposed`` actions (..., D) deviate from the teacher's ``reference``.

        A step deviates if the largest absolute error over the continuous dimensions exceeds ``tolerance`` (normalised
        units) or a gripper is wrong: on the other side of the middle if it is binary, beyond the tolerance if not.
        """
        return np.asarray(self.deviating(proposed, reference, tolerance).any(-1))

    def deviating(self, proposed: ArrayLike, reference: ArrayLike, tolerance: float) -> NDArray[np.bool_]:
        """In which dimensions (..., D) actions deviate; arguments as for :meth:`deviation`."""
        proposed, reference = np.asarray(proposed, np.float32), np.asarray(reference, np.float32)
        wrong = np.abs(proposed - reference) > tolerance
        np.copyto(wrong, (proposed >= 0) != (reference >= 0), where=self._two_sided)
        return wrong

    def admissible(self, action: FloatArray, previous: FloatArray | None) -> bool:
        """Whether a proposed action (D,) may be executed: finite, in bounds and no larger jump than seen in training.

        Args:
            action: proposed action, environment units.
            previous: the last executed action, environment units, or None at the start of an episode.
        """
        return False not in self._allowed(action, previous).tolist()  # for so few values faster than all()

    def all_admissible(self, actions: FloatArray, previous: FloatArray | None) -> NDArray[np.bool_]:
        """:meth:`admissible` of many actions (..., D): bool (...)."""
        return np.asarray(np.logical_and.reduce(self._allowed(actions, previous), -1))

    def _allowed(self, actions: FloatArray, previous: FloatArray | None) -> NDArray[np.bool_]:
        """In which dimensions (..., D) actions are admissible."""
        low, high, jump = self._admissible
        allowed = (actions >= low) & (actions <= high)  # never for NaN or infinity
        if previous is not None:
            allowed &= np.abs(actions - previous) <= jump
        return allowed

    def toward(self, action: FloatArray, previous: FloatArray) -> FloatArray:
        """The action (D,) nearest to ``action`` that is no larger jump from ``previous``, (D,), than seen in training; all in
        environment units. Without jump limits that is ``action``."""
        jump = self._admissible[2]
        return np.clip(action, previous - jump, previous + jump).astype(np.float32)

    def require_compatible(self, other: ActionSpace, what: str) -> None:
        """Raise :class:`InputError` (code ``space-mismatch``) unless ``other`` describes the same kind of action vector.

        Names, scales (q01/q99) and bounds may differ: numbers are converted through environment units, see :meth:`rescaling`.
        """
        for name in ("dim", "kind", "control_rate", "translation", "rotation", "gripper", "moving", "binary_gripper"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise InputError(
                    f"{what}: action space {other.name!r} has {name} = {theirs}, but {self.name!r} has {name} = {mine}",
                    code="space-mismatch",
                    field=name,
                )

    def scaled_like(self, other: ActionSpace) -> ActionSpace:
        """This space with the scale of ``other``: bounds stay its own, and no jump is limited."""
        return replace(self, q01=other.q01, q99=other.q99, max_jump=None)

    def rescaling(self, other: ActionSpace) -> tuple[FloatArray, FloatArray] | None:
        """How normalised actions of this space become those of ``other``: factors (D,) and summands (D,); None: they are
        the same. Both stand for the same actions in environment units."""
        if (self.q01, self.q99) == (other.q01, other.q99):
            return None
        mine, theirs = self._scale.astype(np.float64), other._scale.astype(np.float64)
        shift = (self._offset.astype(np.float64) - other._offset) / theirs
        return (mine / theirs).astype(np.float32), shift.astype(np.float32)

    def scale_difference(self, other: ActionSpace) -> list[str]:
        """The dimensions in which the scale of ``other`` is far from this one's, a readable line each: wider or narrower by
        more than :data:`FAR_FACTOR`, or its middle off by more than half of this one's width."""
        out = []
        for d in range(self.dim):
            factor = float(other._scale[d] / self._scale[d])
            off = abs(float(other._offset[d] - self._offset[d])) / (2 * float(self._scale[d]))
            if not 1 / FAR_FACTOR <= factor <= FAR_FACTOR or off > 0.5:
                mine, theirs = (f"{s.q01[d]:.4g} to {s.q99[d]:.4g}" for s in (self, other))
                out.append(f"dimension {d} ({self.role(d)}): {mine} against {theirs}")
        return out

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; :meth:`from_dict` reads it back."""
        return {k: v for k, v in asdict(self).items() if not k.startswith("_")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "action_space") -> ActionSpace:
        """Read :meth:`to_dict`'s form. Raises :class:`InputError` naming ``where`` and the wrong or missing field."""
        with naming(where):
            return cls(**values)

    def with_max_jump(self, max_jump: ArrayLike) -> ActionSpace:
        """A copy that refuses larger jumps between consecutive actions than ``max_jump`` (D,), normalised units."""
        return replace(self, max_jump=tuple(np.asarray(max_jump, np.float64).tolist()))


LIBERO = ActionSpace(
    name="libero",
    kind="eef_delta",
    control_rate=20.0,
    q01=(-1.0,) * 7,
    q99=(1.0,) * 7,
    low=(-1.0,) * 7,
    high=(1.0,) * 7,
    translation=(0, 1, 2),
    rotation=(3, 4, 5),
    gripper=(6,),
)
"""LIBERO's 7-D OSC_POSE delta at 20 Hz: 0.05 m and 0.5 rad per unit and step; gripper -1 opens, +1 closes."""


def read_space(value: ActionSpace | Mapping[str, Any] | str | Path) -> ActionSpace:
    """An action space as configurations write it: ``libero``, its fields, or a JSON file with them, such as an export's.

    Raises:
        InputError: no such name or file, or fields that do not fit.
    """
    if isinstance(value, ActionSpace):
        return value
    if isinstance(value, Mapping):
        return ActionSpace.from_dict(value)
    if value == LIBERO.name:
        return LIBERO
    try:
        fields = read_json(Path(value))
        return ActionSpace.from_dict(fields.get("action_space", fields), str(value))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"action space {str(value)!r}: expected 'libero' or a JSON file describing one ({error})") from None


@dataclass(frozen=True)
class ActionTokenizer:
    """OpenVLA's action tokens: the last ``bins`` ids below ``vocab`` stand for 256 uniform edges on [-1, 1].

    Args:
        vocab: token ids in use, without padding (32000 for the published checkpoints).
        bins: number of bin edges; there are ``bins - 1`` bin centres.
    """

    vocab: int
    bins: int = 256

    @property
    def centers(self) -> FloatArray:
        """Centres (bins - 1,) of the bins on [-1, 1]."""
        edges = np.linspace(-1.0, 1.0, self.bins)
        return ((edges[:-1] + edges[1:]) / 2).astype(np.float32)

    def encode(self, normalized: ArrayLike) -> NDArray[np.int64]:
        """Normalised actions (...) to token ids (...): digitised on the edges, counted down from ``vocab``."""
        x = np.clip(np.asarray(normalized, np.float64), -1.0, 1.0)
        return (self.vocab - np.digitize(x, np.linspace(-1.0, 1.0, self.bins))).astype(np.int64)

    def decode(self, tokens: ArrayLike) -> FloatArray:
        """Token ids (...) to normalised actions (...): b = clip(vocab - t - 1, 0, bins - 2), then its centre."""
        b = np.clip(self.vocab - np.asarray(tokens, np.int64) - 1, 0, self.bins - 2)
        return self.centers[b]
