"""Files are written whole or not at all: first beside the place where they belong, then moved there. Reading JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from spvla.errors import InputError
from spvla.machine import machine_fault


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever the machine refuses inside, such as space on the disk, is an :class:`InputError` that names ``path``."""
    try:
        yield
    except Exception as error:
        fault = machine_fault(error, path)
        if fault is None:
            raise
        raise fault from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary path for the block to write a file to; it becomes ``path`` when the block ends without an error.

    What was written is on the disk before it takes the place of an older file, so that a power cut leaves one of the two.
    After an error or Ctrl-C nothing of it is left.

    Raises:
        InputError: the machine refuses (``cannot-write``); the field is ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, see :func:`writing`."""
    with writing(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file whole or not at all, see :func:`writing`."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. A byte order mark, and line breaks inside strings, are accepted.

    Raises:
        InputError: naming the file: it is not there, cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes(), strict=False)
    except FileNotFoundError:
        raise InputError(f"{path}: missing", code="missing", field=str(path)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", field=str(path)) from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})", field=str(path)) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object", field=str(path))
    return content


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all, see :func:`writing`."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def is_running(process: str) -> bool:
    """Whether ``process``, a number as in a temporary file's name, runs on this machine. What it left is in use then."""
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` for the block to fill and to move; what is left of it at the end is removed."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    with explained(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def open_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """A new array on disk, its space reserved: writing to a mapped file on a full disk would kill the process (SIGBUS)."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    size = path.stat().st_size
    if size and hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    return array


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
