"""Images of a LIBERO scene, pixel for pixel robosuite's, without its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.envs.render import Renderer
from spvla.observation import MAIN, WRIST

CAMERA = "agentview"
CAMERAS = {MAIN: CAMERA, WRIST: "robot0_eye_in_hand"}  # others go by the names that robosuite gives them


class LiberoRenderer:
    """Renders one simulation's cameras with robosuite's settings: collision geoms hidden. Images are upright.

    In fast mode the main camera's view of all that rests is kept, colour and depth; only the robot and bodies that
    have moved since are drawn, and composed with it by depth. LIBERO's lights cast no shadows, so nothing else changes.
    """

    HIDDEN, RESTING, MOVING = 0, 3, 4  # geom groups: robosuite's collision geoms, and two that its models do not use
    MOVED = (5e-4, 5e-3)  # metres, quaternion entries: both under half a pixel

    def __init__(self, model: Any, data: Any, size: int, cameras: Sequence[str], fast: bool) -> None:
        import mujoco

        self._model, self._data, self._fast = model, data, fast
        self._renderer = Renderer(model, data, size)
        self._cameras = {name: self._renderer.require(CAMERAS.get(name, name)) for name in cameras}
        self._everything = mujoco.MjvOption()
        self._everything.geomgroup[self.HIDDEN] = 0
        if fast:
            self._everything.geomgroup[[self.RESTING, self.MOVING]] = 1
            self._resting, self._moving = mujoco.MjvOption(), mujoco.MjvOption()
            self._resting.geomgroup[:] = np.arange(6) == self.RESTING
            self._moving.geomgroup[:] = np.arange(6) == self.MOVING
            self._moving.sitegroup[:] = 0
            self._visible = (model.geom_group > self.HIDDEN) & (model.geom_group < self.RESTING)
            free = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
            # The arm is drawn every time; what is welded to the world never; loose things once they have moved.
            self._always = (model.body_weldid != 0) & ~np.isin(model.body_rootid, model.jnt_bodyid[free])
            self._background: tuple[NDArray[np.uint8], NDArray[np.float32]] | None = None
            self._in_motion = self._always
            self._poses = (data.xpos.copy(), data.xquat.copy())

    def images(self) -> dict[str, NDArray[np.uint8]]:
        """What each camera sees, (H, W, 3)."""
        return {
            name: _upright(
                self._composed() if self._fast and camera == CAMERA else self._renderer.draw(camera, self._everything)[0]
            )
            for name, camera in self._cameras.items()
        }

    def forget_background(self) -> None:
        """Call after a reset: everything may be somewhere else."""
        self._background = None

    def close(self) -> None:
        """Free the buffers on the graphics side."""
        self._renderer.close()

    def _composed(self) -> NDArray[np.uint8]:
        if self._background is None:
            self._in_motion = self._always
            self._poses = (self._data.xpos.copy(), self._data.xquat.copy())
        moved = (
            self._in_motion
            | (np.abs(self._data.xpos - self._poses[0]) > self.MOVED[0]).any(1)
            | (np.abs(self._data.xquat - self._poses[1]) > self.MOVED[1]).any(1)
        )
        if self._background is None or (moved != self._in_motion).any():
            self._in_motion = moved
            groups = np.where(moved[self._model.geom_bodyid], self.MOVING, self.RESTING)
            self._model.geom_group[self._visible] = groups[self._visible]
            self._background = self._renderer.draw(CAMERA, self._resting)
        colour, depth = self._renderer.draw(CAMERA, self._moving)
        nearer = depth < self._background[1]
        return np.where(nearer[..., None], colour, self._background[0])


def _upright(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """OpenGL's rows begin at the bottom; turned by 180 degrees, an image is as LIBERO's published data sets hold it."""
    return np.ascontiguousarray(image[::-1, ::-1])
