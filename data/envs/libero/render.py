"""Images of a LIBERO scene, pixel for pixel robosuite's, without its cost."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAMERA = "agentview"
WRIST_CAMERA = "robot0_eye_in_hand"


@functools.cache
def _gl_context() -> Any:
    """The process's one OpenGL context, never freed: after freeing one, the next renders noise without an error."""
    if os.environ["MUJOCO_GL"] == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco.egl import GLContext
    return GLContext(0, 0)


class Renderer:
    """Renders one simulation's cameras with robosuite's settings: collision geoms hidden. Images are upright.

    In fast mode the main camera's view of all that rests is kept, colour and depth; only the robot and bodies that
    have moved since are drawn, and composed with it by depth. LIBERO's lights cast no shadows, so nothing else changes.
    """

    HIDDEN, RESTING, MOVING = 0, 3, 4  # geom groups: robosuite's collision geoms, and two that its models do not use
    MOVED = (5e-4, 5e-3)  # metres, quaternion entries: both under half a pixel

    def __init__(self, model: Any, data: Any, size: int, wrist_camera: bool, fast: bool) -> None:
        import mujoco

        self._mujoco, self._model, self._data, self._fast = mujoco, model, data, fast
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._main, self._wrist = (self._camera(name) for name in (CAMERA, WRIST_CAMERA))
        self._has_wrist = wrist_camera
        limits = model.vis.global_
        limits.offwidth, limits.offheight = max(limits.offwidth, size), max(limits.offheight, size)
        _gl_context().make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
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

    def images(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """The main camera's image, and the wrist camera's if there is one."""
        main = self._composed() if self._fast else self._draw(self._main, self._everything)[0]
        return _upright(main), _upright(self._draw(self._wrist, self._everything)[0]) if self._has_wrist else None

    def forget_background(self) -> None:
        """Call after a reset: everything may be somewhere else."""
        self._background = None

    def close(self) -> None:
        """Free the buffers on the graphics side."""
        _gl_context().make_current()
        self._context.free()

    def _camera(self, name: str) -> Any:
        camera = self._mujoco.MjvCamera()
        camera.type = self._mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = self._mujoco.mj_name2id(self._model, self._mujoco.mjtObj.mjOBJ_CAMERA, name)
        return camera

    def _draw(self, camera: Any, option: Any) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Colour (H, W, 3) and depth-buffer values (H, W)."""
        mujoco = self._mujoco
        _gl_context().make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        mujoco.mjv_updateScene(self._model, self._data, option, None, camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        colour = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        depth = np.empty(colour.shape[:2], np.float32)
        mujoco.mjr_readPixels(colour, depth, self._viewport, self._context)
        return colour, depth

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
            self._background = self._draw(self._main, self._resting)
        colour, depth = self._draw(self._main, self._moving)
        nearer = depth < self._background[1]
        return np.where(nearer[..., None], colour, self._background[0])


def _upright(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """OpenGL's rows begin at the bottom; turned by 180 degrees, an image is as LIBERO's published data sets hold it."""
    return np.ascontiguousarray(image[::-1, ::-1])
