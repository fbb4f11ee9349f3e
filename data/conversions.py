"""What a field of the conventions may do to its entries: units, grippers, rotations and differences, (T, D) each.

Rotations are angles, not numbers: their difference is the turn from one step to the next, however it was recorded. A part
with the role rotation is roll, pitch, yaw in radians, unless ``axis_angle``, ``degrees`` or a quaternion conversion says
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spvla.actions import FloatArray
from spvla.errors import InputError


def apply(role: str, convert: Sequence[str], x: FloatArray) -> FloatArray:
    """``x`` (T, D) of a part with this role after the conversions ``convert``, in order.

    Raises:
        ValueError: a width that a conversion does not fit, or quaternions of length zero.
    """
    for name in convert:
        if name == "difference" and role == "rotation":
            x = _turn(x, convert)
        else:
            x = CONVERSIONS[name](x)
    return x


def require_form(role: str, convert: Sequence[str], width: int) -> None:
    """Raise :class:`InputError` if a part of ``width`` entries cannot be converted as ``convert`` says."""
    for name in convert:
        if "quaternion" in name and width != 4:
            raise InputError(
                f"{name} needs the 4 entries of a quaternion, but index has {width}", code="rotation-form", field=name
            )
    quaternion = any("quaternion" in name for name in convert)
    if role == "rotation" and "difference" in convert and not quaternion and width % 3:
        raise InputError(
            f"the difference of a rotation needs roll, pitch, yaw or an axis angle (3 entries), but index has {width}; for a "
            "quaternion write difference_quaternion (x, y, z, w) or difference_quaternion_wxyz",
            code="rotation-form",
            field="difference",
        )


def invert(x: FloatArray) -> FloatArray:
    """1 - x: a gripper that counts from open to closed, counted the other way."""
    return 1 - x


def clip(x: FloatArray) -> FloatArray:
    """Clipped to 0 .. 1."""
    return np.clip(x, 0, 1)


def binarize(x: FloatArray) -> FloatArray:
    """An opening from 0 to 1 as 0 or 1: what lies between (0.05, 0.95) becomes the end that is reached next; after the
    last such end, the last value itself stays."""
    out = np.empty_like(x)
    carry = x[-1]
    for t in range(len(x) - 1, -1, -1):
        carry = np.where(x[t] > 0.95, 1, np.where(x[t] < 0.05, 0, carry))
        out[t] = carry
    return out


def relative(x: FloatArray) -> FloatArray:
    """A gripper that is told to close (> 0.1) or to open (< -0.1), as whether it is open: (0 closed, 1 open). Before the
    first command it is in the other state; without any it is open."""
    command = np.where(x < -0.1, 1.0, np.where(x > 0.1, -1.0, 0.0))
    out = np.empty_like(x)
    for d in range(x.shape[1]):
        given = command[command[:, d] != 0, d]
        carry = -given[0] if len(given) else 1.0
        for t in range(len(x)):
            carry = command[t, d] or carry
            out[t, d] = carry / 2 + 0.5
    return out


def difference(x: FloatArray) -> FloatArray:
    """What the next step's value adds to this one's; unknown (NaN) at the last step, which is then left out."""
    return _before_last(x[1:] - x[:-1])


def difference_rotvec(x: FloatArray) -> FloatArray:
    """The turn from each step to the next between rotation vectors (axis times angle, radians), as rotation vectors in the
    frame that the earlier step's rotation describes: R_t^-1 R_t+1. Several (T, 3 K) are taken one by one."""
    from scipy.spatial.transform import Rotation

    turns = [(r[:-1].inv() * r[1:]).as_rotvec() for r in (Rotation.from_rotvec(part) for part in _threes(x))]
    return _before_last(np.concatenate(turns, axis=1))


def difference_quaternion(x: FloatArray) -> FloatArray:
    """The turn between quaternions x, y, z, w (T, 4) as rotation vectors (T, 3), see :func:`difference_rotvec`. A
    quaternion and its negative are the same rotation."""
    from scipy.spatial.transform import Rotation

    rotations = Rotation.from_quat(x)
    return _before_last((rotations[:-1].inv() * rotations[1:]).as_rotvec())


def difference_quaternion_wxyz(x: FloatArray) -> FloatArray:
    """:func:`difference_quaternion` of quaternions w, x, y, z."""
    return difference_quaternion(np.roll(x, -1, axis=1))


def quaternion_to_euler(x: FloatArray) -> FloatArray:
    """Quaternions x, y, z, w (T, 4) as roll, pitch, yaw about fixed axes (T, 3), radians."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_quat(x).as_euler("xyz").astype(np.float32)


def wrap(angles: FloatArray, turn: float) -> FloatArray:
    """Angles by whole turns brought to (-turn / 2, turn / 2]."""
    angles = np.asarray(angles, np.float64)
    return np.asarray(angles - turn * np.ceil(angles / turn - 0.5), np.float32)  # exactly as it was where no turn is taken


def _turn(x: FloatArray, convert: Sequence[str]) -> FloatArray:
    """The difference of a rotation in the form that the other conversions state."""
    if "axis_angle" in convert:
        if "degrees" in convert:
            return np.rad2deg(difference_rotvec(np.deg2rad(x)))
        return difference_rotvec(x)
    if x.shape[1] % 3:
        raise ValueError(f"a rotation of {x.shape[1]} entries is neither roll, pitch, yaw nor an axis angle")
    return wrap(difference(x), 360.0 if "degrees" in convert else 2 * np.pi)


def _threes(x: FloatArray) -> list[FloatArray]:
    if x.shape[1] % 3:
        raise ValueError(f"rotation vectors have 3 entries, here there are {x.shape[1]}")
    return [x[:, i : i + 3] for i in range(0, x.shape[1], 3)]


def _before_last(changes: FloatArray) -> FloatArray:
    """Changes (T - 1, D) as (T, D) with an unknown last one."""
    return np.concatenate([changes, np.full((1, changes.shape[1]), np.nan)]).astype(np.float32)


def _unchanged(x: FloatArray) -> FloatArray:
    return x


CONVERSIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "invert": invert,
    "clip": clip,
    "binarize": binarize,
    "relative": relative,
    "difference": difference,
    "difference_rotvec": difference_rotvec,
    "difference_quaternion": difference_quaternion,
    "difference_quaternion_wxyz": difference_quaternion_wxyz,
    "quaternion_to_euler": quaternion_to_euler,
    "zlib": _unchanged,  # packed float32; unpacked before the others
    "axis_angle": _unchanged,  # says which form a rotation has; roll, pitch, yaw otherwise
    "degrees": _unchanged,
    "millimetres": _unchanged,
}
"""What a field may do to its entries, or say of them."""
