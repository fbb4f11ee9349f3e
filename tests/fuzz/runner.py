"""One child process per input, with limits on memory and time, and a word for what came of it.

The parent imports everything and then forks, so that an input costs milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spvla.errors import InputError
from tests.fuzz.kinds import KINDS, Outcome
from tests.fuzz.mutations import damage, scramble

MEMORY = 2 * 2**30  # bytes beyond what the parent has mapped
SECONDS = 20
CLASSES = {
    "same": "read as before",
    "error": "InputError that names the path",
    "problem": "read, and named as a problem or a note",
    "accepted": "read as something else; no check sum covers it",
    "changed": "read as something else although check sums cover it",
    "unnamed": "InputError that does not name the path, or of several lines",
    "exception": "another exception",
    "hang": f"more than {SECONDS} seconds",
    "blow-up": f"more than {MEMORY // 2**30} GiB, or killed",
}
BAD = ("changed", "unnamed", "exception", "hang", "blow-up")


@dataclass(frozen=True)
class Result:
    """One input: its number, which file was damaged and how, what came of it."""

    kind: str
    number: int
    file: str
    how: str
    result: str
    message: str = ""


def run(kind: str, numbers: range, seed: int, deadline: float = float("inf")) -> Iterator[Result]:
    """Damage and read inputs ``numbers`` of ``kind``; they depend on ``seed``, ``kind`` and their number alone."""
    import pyarrow as pa
    import torch

    import spvla.registry as registry

    vars(registry)["entry_points"] = functools.cache(vars(registry)["entry_points"])  # most of an export's time
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    chosen = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        os.environ["FUZZ_OUTSIDE"], os.environ["SPVLA_CACHE"] = f"{top}/outside", f"{top}/cache"
        Path(top, "outside").mkdir()
        seeds = chosen.make(Path(top) / "whole")
        chosen.read(shutil.copytree(seeds[0], Path(top) / "warm" / seeds[0].name))  # imports what reading imports
        meanings = [_child(kind, _copy(folder, Path(top) / "input")) for folder in seeds]
        for number in numbers:
            if time.monotonic() > deadline:
                return
            rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
            at = int(rng.integers(len(seeds)))
            folder = _copy(seeds[at], Path(top) / "input")
            if kind == "wire":
                file = folder / "message.msgpack"
                content, how = scramble(file.read_bytes(), rng)
                file.unlink()
                file.write_bytes(content)
            else:
                file, how = damage(folder, rng)
            found = _child(kind, folder)
            result, message = _judge(kind, found, meanings[at], folder, file, how)
            yield Result(kind, number, str(file.relative_to(folder)), how, result, message)


def _copy(folder: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(folder, target / folder.name, copy_function=os.link)


def _judge(kind: str, found: dict[str, Any], whole: dict[str, Any], folder: Path, file: Path, how: str) -> tuple[str, str]:
    if "class" in found:
        message = found.get("message", "")
        if found["class"] == "error" and kind != "wire":
            named = str(folder) in message or file.name in message
            return ("error" if named and "\n" not in message else "unnamed"), message
        return found["class"], message
    if found["meaning"] == whole["meaning"]:
        return "same", ""
    if new := [p for p in found["problems"] if p not in whole["problems"]]:
        return "problem", new[0]
    rewritten = ":" in how or how in ("another file", "gone", "link out")  # with check sums that fit
    return ("changed" if KINDS[kind].summed(file) and not rewritten else "accepted"), ""


def _child(kind: str, folder: Path) -> dict[str, Any]:
    """What reading ``folder`` comes to, in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(_read(kind, folder)).encode("utf-8", "replace")[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status)
        return {"class": "hang" if killed == signal.SIGALRM else "blow-up", "message": signal.Signals(killed).name}
    try:
        return dict(json.loads(data))
    except ValueError:
        return {"class": "blow-up", "message": f"ended without a word, {len(data)} bytes"}


def _read(kind: str, folder: Path) -> dict[str, Any]:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    signal.alarm(SECONDS)  # nobody handles it: the process ends
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    try:
        found: Outcome = KINDS[kind].read(folder)
        return {"meaning": found.meaning, "problems": [p[:300] for p in found.problems][:20]}
    except InputError as error:
        return {"class": "error", "message": str(error)[:2000]}
    except MemoryError as error:
        return {"class": "blow-up", "message": repr(error)}
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in last if "site-packages" not in f.filename][-3:]
        return {"class": "exception", "message": f"{type(error).__name__}: {str(error)[:300]} at {' '.join(own)}"}
