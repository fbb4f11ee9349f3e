"""SIGKILL at moments spread over a command's life; the next run must come to what an undisturbed one comes to.

Every run is a process group of its own, forked from this process, which has imported everything; the workers of a command are
forked too. Its files are written as always, fsync included.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

from spvla import load_export, save_export
from spvla.gates.calibration import Calibration
from tests.soak.commands import COMMANDS, Command, Result, files
from tests.test_export import make_export

CLASSES = {
    "same": "the next run came to the same files, to the byte where no times are among them",
    "failed": "the next run ended with an error, or what it wrote cannot be read or holds something twice",
    "lost": "a file is missing after the next run",
    "left over": "a file is there after the next run that an undisturbed one does not leave",
    "other": "a file has another content after the next run",
}
LONGEST = 120.0  # seconds of a run
GOLDEN = (5**0.5 - 1) / 2  # its multiples, less their whole parts, are spread evenly however many there are
OPERATIONS = ("os.rename", "os.rmdir", "os.remove", "os.mkdir", "shutil.rmtree", "open")  # audit events of a save


def compare(found: Result, whole: Result) -> tuple[str, str]:
    """The class, and the first file of which it is so."""
    for name, odd in (
        ("lost", whole.keys() - found.keys()),
        ("left over", found.keys() - whole.keys()),
        ("other", {k for k in whole.keys() & found.keys() if whole[k] != found[k]}),
    ):
        if odd:
            return name, min(odd)
    return "same", ""


def start(run: Callable[[], None], log: Path) -> int:
    """Run it in a process group of its own; its process id. It ends with code 0, or 1 after an error."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    with log.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        code = 1
        try:
            with fork_workers():
                run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)


def fork_workers() -> Any:
    """Workers are forked instead of spawned, which spares them the imports."""
    context = multiprocessing.get_context("fork")
    return patch("data.parallel.mp.get_context", lambda kind: context)


def wait(process: int, seconds: float) -> int | None:
    """The exit code of a process that ends within so many seconds; None if it still runs."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if (left := end - time.monotonic()) <= 0:
            return None
        time.sleep(min(0.001, left))


def kill(process: int) -> None:
    """End a process and all of its group. On a busy machine its workers, which are forked here and so hold its locks, too, end
    a little later than itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, 0)
    end = time.monotonic() + LONGEST
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process, 0)  # raises once nobody of the group is left
            time.sleep(0.001)


def undisturbed(command: Command, inputs: Path, output: Path, log: Path) -> float:
    """Run a command to its end; the seconds that it took. Raises RuntimeError with what it said if it fails."""
    began = time.monotonic()
    process = start(lambda: command.run(inputs, output), log)
    if wait(process, LONGEST) != 0:
        kill(process)
        raise RuntimeError(log.read_text()[-1500:])
    return time.monotonic() - began


def kill_command(name: str, count: int, seed: int, minutes: float) -> dict[str, Any]:
    """Kill a command ``count`` times, each time in another folder, and call it again; what came of it."""
    tqdm.set_lock(threading.RLock())  # its own is shared with forked processes: one that is killed may hold it for ever
    tqdm.monitor_interval = 0
    command, offset, counts = COMMANDS[name], np.random.default_rng(seed).random(), Counter[str]()
    findings, kills, moments = [], 0, []
    end = time.monotonic() + 60 * minutes
    with quick_registry(), tempfile.TemporaryDirectory(prefix="kills-") as top:
        inputs, log = Path(top, "inputs"), Path(top, "log")
        inputs.mkdir()
        command.make(inputs)
        with fork_workers(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
            command.run(inputs, Path(top, "warm"))  # imports what it imports
        lives = [undisturbed(command, inputs, Path(top, f"whole-{k}"), log) for k in range(3)]
        whole, again = (command.read(Path(top, f"whole-{k}")) for k in (1, 2))
        if compare(again, whole)[0] != "same":
            raise RuntimeError(f"{name}: two undisturbed runs differ: {compare(again, whole)}")
        output, turn, bar = Path(top, "out"), 0, tqdm(total=count, desc=f"kills of {name}", unit="kill")
        while kills < count and time.monotonic() < end:
            shutil.rmtree(output, ignore_errors=True)
            moment = (offset + turn * GOLDEN) % 1 * statistics.median(lives)
            turn += 1
            process = start(lambda: command.run(inputs, output), log)
            if wait(process, moment) is not None:
                continue  # it was quicker this time
            kill(process)
            kills += 1
            bar.update()
            moments.append(moment)
            try:
                lives = [*lives[-8:], undisturbed(command, inputs, output, log)]
                result, what = compare(command.read(output), whole)
            except Exception as error:
                result, what = "failed", f"{type(error).__name__}: {error}"
            counts[result] += 1
            if result != "same":
                findings.append({"kill": turn - 1, "second": round(moment, 3), "result": result, "what": what[-400:]})
                bar.write(f"{name}: {findings[-1]}")
        bar.close()
    spread = [round(float(x), 3) for x in np.quantile(moments, (0, 0.25, 0.5, 0.75, 1))] if moments else []
    life = round(statistics.median(lives), 3)
    return {"command": name, "kills": kills, **{c: counts[c] for c in CLASSES}, "life": life, "at": spread, "found": findings}


def save_until(export: Any, folder: Path, moment: int) -> bool:
    """Save in a child process that ends before its file operation number ``moment``; False if it had fewer."""
    process = os.fork()
    if not process:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in OPERATIONS and str(folder) in str(arguments[0]):
                count += 1
                if count == moment:
                    os._exit(9)

        sys.addaudithook(hook)
        with contextlib.suppress(BaseException):
            save_export(export, folder)
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code == 1:
        raise RuntimeError(f"saving {folder} failed")
    return code == 9


def kill_save(moment: int, folder: Path, old: Any, new: Any, expected: dict[float, Result]) -> tuple[str, str] | None:
    """Kill the saving of ``new`` over ``old`` before its file operation number ``moment``, load what is there, and save again.
    None: the save has fewer operations.

    ``expected``: the files of the two exports by their tolerance.
    """
    shutil.rmtree(folder, ignore_errors=True)
    save_export(old, folder)
    if not save_until(new, folder, moment):
        return None
    try:
        found = load_export(folder)
        weights = {0.2: old, 0.3: new}[found.tolerance].generators
        for name, network in found.generators.items():
            for key, value in network.state_dict().items():
                if not value.equal(weights[name].state_dict()[key]):
                    return "other", f"{name}.{key} after the kill"
        save_export(new, folder)
        load_export(folder)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    return compare(files(folder), expected[new.tolerance])


def small_export(seed: int, tolerance: float) -> Any:
    """One network, its gate and a risk curve of a few points."""
    export = make_export(seed=seed, tolerance=tolerance)
    curve = Calibration((0.1, 0.5), (0.05, 0.1), (0.2, 0.6), (0.0, 0.1), 60)
    parts = {"generators": export.generators, "gates": export.gates}
    return replace(export, calibration={"mlp": curve}, **{k: {"mlp": v["mlp"]} for k, v in parts.items()})


def kill_exports(count: int, minutes: float) -> list[dict[str, Any]]:
    """Every file operation of a save as the moment of ``count`` kills, in turn; a row for each."""
    old, new = small_export(0, 0.2), small_export(1, 0.3)
    end = time.monotonic() + 60 * minutes
    with quick_registry(), tempfile.TemporaryDirectory(prefix="kills-", dir=shared_memory()) as top:
        expected = {e.tolerance: files(save_export(e, Path(top, f"{e.tolerance}"))) for e in (old, new)}
        moment = 1
        while kill_save(moment, Path(top, "export"), old, new, expected) is not None:
            moment += 1
        rows: list[dict[str, Any]] = [
            {"operation": point, "kills": 0, **dict.fromkeys(CLASSES, 0), "found": []} for point in range(1, moment)
        ]
        for _ in tqdm(range(count), "kills of saving an export", unit="round"):
            for row in rows if time.monotonic() < end else ():
                result = kill_save(row["operation"], Path(top, "export"), old, new, expected)
                assert result is not None
                row["kills"] += 1
                row[result[0]] += 1
                if result[0] != "same":
                    row["found"].append(result[1][-400:])
    return rows


@contextlib.contextmanager
def quick_registry() -> Iterator[None]:
    """Installed plugins are looked up once: that takes most of the time of loading an export."""
    with patch("spvla.registry.entry_points", functools.cache(entry_points)):
        yield


def shared_memory() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
