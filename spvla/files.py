"""Files are written whole or not at all: first beside the place where they belong, then moved there.

Reading what others wrote: JSON, and paths that stay inside a folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from spvla.errors import InputError
from spvla.machine import machine_fault

TEMPORARY = re.compile(r"\..+\.(\d+-[0-9a-f]{8})\.tmp")
BUILDING = re.compile(r"\..+\.(\d+-[0-9a-f]{8})")
ABANDONED = 86_400  # seconds after which what another machine left unfinished is not in use any more


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
    temporary = path.with_name(f".{path.name}.{process_mark()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent)
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


def parse_json(text: str | bytes, what: str) -> Any:
    """The value that JSON text stands for. A byte order mark in bytes, and line breaks inside strings, are accepted.

    Raises:
        InputError: naming ``what`` (code ``not-json``): not JSON, nested too deep, a number with thousands of digits.
    """
    try:
        return json.loads(text, strict=False)
    except ValueError as error:
        raise InputError(f"{what}: not valid JSON ({error})", code="not-json", field=what) from None
    except RecursionError:
        raise InputError(f"{what}: not valid JSON (nested too deep)", code="not-json", field=what) from None


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The object that JSON text stands for. Errors as for :func:`parse_json`, and for any other value."""
    content = parse_json(text, what)
    if not isinstance(content, dict):
        raise InputError(f"{what}: expected a JSON object", code="not-json", field=what)
    return content


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        InputError: naming the file: it is not there (code ``missing``), is no file, or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever, a device never end
            raise InputError(f"{path}: is not a file", code="not-a-file", field=str(path))
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: missing", code="missing", field=str(path)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", code="unreadable", field=str(path)) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors as for :func:`read_bytes` and :func:`parse_object`, naming the file."""
    return parse_object(read_bytes(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Errors as for :func:`read_bytes`, and for what is no mapping (code ``not-yaml``)."""
    import yaml

    try:
        values = yaml.safe_load(read_bytes(path))
    except (yaml.YAMLError, RecursionError) as error:
        told = f"{path}: not a readable YAML file ({' '.join(str(error).split())})"
        raise InputError(told, code="not-yaml", field=str(path)) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping", code="not-yaml", field=str(path))
    return values


def inside(folder: Path, path: str | Path) -> Path:
    """``path``, seen from ``folder``, as one that may be read: links and ``..`` do not lead out of the folder.

    In the hub's cache, where files are links, the folder is the whole repository.

    Raises:
        InputError: it leads out (code ``outside-folder``), or is neither a file nor a folder (code ``not-a-file``).
    """
    whole = folder / path
    try:
        root = folder.resolve()
        root = root.parent.parent if root.parent.name == "snapshots" else root
        if not whole.resolve().is_relative_to(root):
            raise InputError(f"{whole}: leads out of {folder}; copy the file there", code="outside-folder", field=str(whole))
        if whole.exists() and not (whole.is_file() or whole.is_dir()):
            raise InputError(f"{whole}: is not a file", code="not-a-file", field=str(whole))
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle, a null character
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(whole)!r}: not a usable path ({error})", code="outside-folder", field=str(folder)) from None
    return whole


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Nobody else writes to ``folder`` meanwhile: the block holds its ``.lock``, which ends with this process at the latest.

    Raises:
        InputError: another run holds it (code ``in-use``), or the machine refuses.
    """
    folder = Path(folder)
    path = folder / ".lock"
    made = not folder.exists()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(stream.fileno()), path.stat())  # else the one before has just removed it
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            stream.seek(0)
            who = stream.read().strip() or "another one"
            told = f"is in use by another run (process {who}); wait for it to end, or choose another output"
            raise InputError(f"{folder}: {told}", code="in-use", field=str(folder))
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # what came of it is kept
                    folder.rmdir()


@functools.cache
def _tidy(folder: Path) -> None:
    """Remove temporary files that processes left which run no more, once per folder."""
    for path in folder.glob(".*.tmp"):
        if (found := TEMPORARY.fullmatch(path.name)) and is_left_over(path, found[1]):
            with contextlib.suppress(OSError):
                path.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all, see :func:`writing`."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


@functools.cache
def _here() -> str:
    """What numbers processes: this start of this machine, and this container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return hashlib.sha256(f"{boot} {Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:8]
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def process_mark() -> str:
    """This process, in the names of what it has not finished writing."""
    return f"{os.getpid()}-{_here()}"


def is_left_over(path: Path, mark: str) -> bool:
    """Whether nobody writes to ``path`` any more. A process of this machine has ended then; of those of another one that shares
    the disk, or of an earlier start of this one, nothing is known here: what they left counts as such after a day."""
    process, _, where = mark.partition("-")
    if where == _here():
        try:
            os.kill(int(process), 0)
        except (ValueError, OverflowError, ProcessLookupError):
            return True
        except PermissionError:
            pass
        return False
    try:
        return time.time() - max(p.lstat().st_mtime for p in (path, *path.rglob("*"))) > ABANDONED
    except OSError:  # it goes at this moment
        return False


@contextlib.contextmanager
def building(folder: Path, named: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside ``folder`` for the block to fill and to move; what is left of it at the end is removed, and so
    is what dead processes left there. Errors name ``folder``, or the path ``named``."""
    temporary = folder.with_name(f".{folder.name}.{process_mark()}")
    with explained(folder if named is None else named):
        for left_over in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
            found = BUILDING.fullmatch(left_over.name)
            if left_over == temporary or (found and is_left_over(left_over, found[1])):
                shutil.rmtree(left_over, ignore_errors=True)
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
