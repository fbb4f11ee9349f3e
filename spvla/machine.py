"""Faults of the machine as input errors: a full disk, no permission, a missing system library, no way to render.

Libraries report these in many ways (pyarrow and safetensors by their own types, PyTorch as RuntimeError, mujoco while it is
imported). :func:`machine_fault` recognises them in one place, for the command line and for worker processes.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from spvla.errors import InputError

ADVICE = {
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.EDQUOT: "free some space, or name a folder on another disk",
    errno.EFBIG: "the file system or `ulimit -f` allows no larger files",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EMFILE: "raise the limit on open files with `ulimit -n`",
    errno.ENFILE: "close other programs, this machine has too many files open",
    errno.EIO: "the disk or its connection fails",
}
FULL = re.compile(r"No space left on device|os error 28\b|Disk quota exceeded|PytorchStreamWriter failed writing")
LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
PACKAGES = {"libGL.so.1": "libgl1", "libEGL.so.1": "libegl1", "libGLESv2.so.2": "libgles2", "libOpenGL.so.0": "libopengl0"}
RENDERING = ("mujoco.egl", "mujoco.osmesa", "mujoco.glfw", "mujoco.gl_context", "OpenGL")  # modules that open a context


def machine_fault(error: BaseException, path: Path | None = None) -> InputError | None:
    """``error`` as an :class:`InputError` if it, or one that it came from, is a fault of the machine; else None.

    Args:
        error: what a library raised.
        path: the file that was being written, for libraries that do not say which.
    """
    for cause in _causes(error):
        if isinstance(cause, InputError):
            return None  # someone has explained it already
        if missing := LIBRARY.search(str(cause)):
            return _missing_library(missing[1])
        if _while_rendering(cause):
            return InputError(
                f"rendering: no OpenGL context with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({_line(cause)}); "
                "on Debian or Ubuntu install libegl1 and libgl1, set MUJOCO_GL=egl PYOPENGL_PLATFORM=egl and unset "
                "MUJOCO_EGL_DEVICE_ID, or use what needs no images",
                code="no-rendering",
                field="MUJOCO_GL",
            )
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and isinstance(cause, Exception) and FULL.search(str(cause)):
            number = errno.ENOSPC
        if number in ADVICE:
            return _refused(number, path or _named(cause))
        if path is not None and isinstance(cause, OSError):
            return InputError(f"{path}: cannot be written ({_line(cause)})", code="cannot-write", field=str(path))
        if (name := _named(cause)) is not None:  # a folder where a file should be, ...
            return InputError(f"{name}: {getattr(cause, 'strerror', None) or _line(cause)}", code="cannot-open", field=name)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it was explicitly raised from; what merely came before it may be unrelated."""
    while error is not None:
        yield error
        error = error.__cause__


def _named(error: BaseException) -> str | None:
    name = error.filename if isinstance(error, OSError) else None
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split())[:200] if text else type(error).__name__


def _refused(number: int, path: Path | str | None) -> InputError:
    where = path or "a file of --output, of the cache ($SPVLA_CACHE) or of the temporary folder ($TMPDIR)"
    reason = os.strerror(number)
    field = None if path is None else str(path)
    return InputError(f"{where}: {reason}; {ADVICE[number]}", code="cannot-write", field=field)


def _missing_library(name: str) -> InputError:
    known = f": apt-get install {PACKAGES[name]}" if name in PACKAGES else " with the system's package manager"
    return InputError(f"{name}: this system library is missing; install it{known}", code="missing-library", field=name)


def _while_rendering(error: BaseException) -> bool:
    """Whether ``error`` comes from opening an OpenGL context: mujoco does so while it is imported, too."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return False
    if type(error).__module__.startswith("mujoco") and "gl" in str(error).lower():  # FatalError: gladLoadGL error
        return True
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if any(module == name or module.startswith(f"{name}.") for name in RENDERING):
            return True
        trace = trace.tb_next
    return False
