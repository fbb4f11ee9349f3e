"""A full disk, a folder that cannot be written to, a missing library: one line, exit code 2, and no half-written files."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors import SafetensorError

from data.parallel import run_groups
from spvla import InputError, save_export
from spvla.cli import guard
from spvla.files import building, explained, open_array, write_text, writing
from spvla.machine import machine_fault
from tests.test_export import make_export


def raising(error: BaseException) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        raise error

    return call


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    pa.ArrowInvalid("Parquet magic bytes: No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError(
        "[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0: file write failed"
    ),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
]
NOT_WRITABLE = [OSError(errno.EROFS, "Read-only file system"), PermissionError(errno.EACCES, "Permission denied")]


@pytest.mark.parametrize("error", FULL_DISK + NOT_WRITABLE, ids=lambda e: f"{type(e).__name__}-{str(e)[:12]}")
def test_what_a_library_says_of_a_refused_write_names_the_file_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"older")
    with pytest.raises(InputError) as fault, writing(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert (fault.value.code, fault.value.field) == ("cannot-write", str(path))
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt(), InputError("known", code="known")])
def test_other_errors_pass_unchanged_and_leave_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, writing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert raised.value is error
    assert not list(tmp_path.iterdir())


def test_a_block_without_an_error_replaces_the_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        write_text(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_where_the_file_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "there" / "in").mkdir(parents=True)
    with pytest.raises(InputError) as fault:
        write_text(tmp_path / "there", "text")
    assert (fault.value.code, fault.value.field) == ("cannot-write", str(tmp_path / "there"))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_file_where_a_folder_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as fault:
        write_text(tmp_path / "file" / "in" / "it.txt", "text")
    assert fault.value.code == "cannot-write"


def test_a_disk_that_is_really_full_is_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    log = tmp_path / "rows.jsonl"
    with pytest.raises(InputError) as fault, explained(log), Path("/dev/full").open("a") as stream:
        stream.write("row")
    assert (fault.value.code, fault.value.field) == ("cannot-write", str(log))


def test_space_for_a_mapped_array_is_reserved_before_anything_is_written_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = open_array(tmp_path / "a.npy", np.float32, (3, 2))
    array[:] = 1.5
    array.flush()  # type: ignore[attr-defined]  # of a memory map
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.full((3, 2), 1.5, np.float32))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError) as fault, building(tmp_path / "cache") as folder:
        open_array(folder / "b.npy", np.float32, (3, 2))
    assert (fault.value.code, fault.value.field) == ("cannot-write", str(tmp_path / "cache"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_an_older_export_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_export(make_export(), tmp_path / "export")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr("spvla.export.save", raising(FULL_DISK[3]))
    with pytest.raises(InputError) as fault:
        save_export(make_export(), folder)
    assert (fault.value.code, fault.value.field) == ("cannot-write", str(folder))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot-write"),
        (PermissionError(errno.EACCES, "Permission denied", "folder/x"), "cannot-write"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "cannot-open"),
        (ImportError("libGL.so.1: cannot open shared object file: No such file or directory"), "missing-library"),
        (OSError("libfoo-2.so.7: cannot open shared object file: No such file or directory"), "missing-library"),
    ],
)
def test_the_command_line_answers_in_one_line(error: Exception, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    fault = machine_fault(error)
    assert fault is not None and fault.code == code
    assert guard(raising(error)) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {fault}\n" and not captured.out


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("who knows"), ValueError("space"), ImportError("no name x")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        guard(raising(error))


@pytest.mark.parametrize("module", ["mujoco.egl", "mujoco.osmesa", "mujoco.gl_context", "OpenGL.raw.GL"])
def test_whatever_fails_while_a_context_is_opened_is_about_rendering(module: str) -> None:
    library = types.ModuleType(module)
    exec("def start():\n    raise AttributeError(\"'NoneType' object has no attribute 'glGetError'\")", library.__dict__)
    with pytest.raises(AttributeError) as raised:
        library.start()
    fault = machine_fault(raised.value)
    assert fault is not None and (fault.code, fault.field) == ("no-rendering", "MUJOCO_GL")
    assert "\n" not in str(fault)


def _full_in_a_worker(group: str) -> Any:
    yield group
    full()


def test_a_worker_process_reports_the_machines_fault_as_such() -> None:
    with pytest.raises(InputError) as fault:
        list(run_groups(_full_in_a_worker, ["one"], 1))
    assert fault.value.code == "cannot-write"


def _never_done(path: Path) -> Iterator[None]:
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        print("running", file=held, flush=True)
        time.sleep(600)
    yield None


def _waits_for(path: Path) -> None:
    list(run_groups(_never_done, [path], 1))


@pytest.mark.slow
def test_the_workers_of_a_killed_command_end_too(tmp_path: Path) -> None:
    note = tmp_path / "worker"
    command = multiprocessing.get_context("spawn").Process(target=_waits_for, args=(note,))
    command.start()
    while not (note.exists() and note.read_text()):
        assert command.is_alive()
        time.sleep(0.05)
    command.kill()
    for _ in range(600):  # the kernel lets go of the lock when its holder ends
        try:
            with note.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
    pytest.fail("the worker still runs")
