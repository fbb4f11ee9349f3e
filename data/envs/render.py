"""Pictures of a MuJoCo simulation, in the process's one OpenGL context."""

from __future__ import annotations

import atexit
import functools
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError


@functools.cache
def _gl_context() -> Any:
    """The process's one OpenGL context, never freed: after freeing one, the next renders noise without an error."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ["MUJOCO_GL"] == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        from mujoco.egl import GLContext
    GLContext._context = None  # the destructor reads it, even of a context that could not be made
    context = GLContext(0, 0)
    atexit.register(context.free)  # its own destructor comes when the modules that it needs are gone
    return context


class Renderer:
    """Draws a simulation's cameras.

    Args:
        model, data: MuJoCo's.
        size: height and width of the images in pixels.
    """

    def __init__(self, model: Any, data: Any, size: int) -> None:
        import mujoco

        self._mujoco, self._model, self._data = mujoco, model, data
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        limits = model.vis.global_
        limits.offwidth, limits.offheight = max(limits.offwidth, size), max(limits.offheight, size)
        _gl_context().make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)

    def require(self, camera: str) -> str:
        """``camera`` if the model has one of that name; else an :class:`InputError` (code ``unknown-camera``)."""
        known = [self._model.camera(i).name for i in range(self._model.ncam)]
        if camera not in known:
            message = f"camera {camera!r} is unknown to this simulation; it has: {', '.join(known)}"
            raise InputError(message, code="unknown-camera", field="cameras")
        return camera

    def draw(self, camera: str, option: Any) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Colour (H, W, 3) and depth-buffer values (H, W) of a camera, OpenGL's row order; ``option`` is an MjvOption."""
        mujoco = self._mujoco
        _gl_context().make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        every = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, self._data, option, None, self._camera(camera), every, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        colour = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        depth = np.empty(colour.shape[:2], np.float32)
        mujoco.mjr_readPixels(colour, depth, self._viewport, self._context)
        return colour, depth

    def close(self) -> None:
        """Free the buffers on the graphics side."""
        _gl_context().make_current()
        self._context.free()

    def _camera(self, name: str) -> Any:
        camera = self._mujoco.MjvCamera()
        camera.type = self._mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = self._mujoco.mj_name2id(self._model, self._mujoco.mjtObj.mjOBJ_CAMERA, name)
        return camera
