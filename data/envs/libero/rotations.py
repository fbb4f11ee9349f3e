"""Rotations of single poses, as robosuite and MuJoCo define them. SciPy's take many times as long for one at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


def scalar_last(wxyz: Float64Array) -> Float64Array:
    """MuJoCo's quaternions (..., 4) with the scalar last."""
    return np.roll(wxyz, -1, axis=-1)


def axis_angle(xyzw: Float64Array) -> Float64Array:
    """robosuite's ``quat2axisangle``: (x, y, z, w) to (3,), the angle up to 2 pi, antipodes not folded together."""
    w = float(np.clip(xyzw[3], -1.0, 1.0))
    scale = np.sqrt(1.0 - w * w)
    if np.isclose(scale, 0.0):
        return np.zeros(3)
    return np.asarray(xyzw[:3] * 2.0 * np.arccos(w) / scale)


def rotation_matrix(xyzw: Float64Array) -> Float64Array:
    """Unit quaternion (4,), scalar last, to a rotation matrix (3, 3)."""
    x, y, z, w = xyzw
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def yaw_matrix(yaw: float) -> Float64Array:
    """Rotation (3, 3) by ``yaw`` radians about the vertical axis."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def quaternion(matrix: Float64Array) -> Float64Array:
    """Rotation matrix (3, 3) to a unit quaternion (4,), scalar last."""
    import mujoco

    wxyz = np.empty(4)
    mujoco.mju_mat2Quat(wxyz, np.ascontiguousarray(matrix).ravel())
    return scalar_last(wxyz)
