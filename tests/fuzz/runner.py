"""Damage inputs and read them in child processes with limits on memory and time, and a word for what came of each.

The parent imports everything and makes the whole folders once. A child, forked from it, takes many inputs in turn, each in a
folder of its own, so that an input costs little more than reading it. One that ends its child is the last of that child, and a
new child goes on behind it. What is bad is read once more by a new child, so that no earlier input can be the reason.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from spvla.errors import InputError
from tests.fuzz.base import Outcome
from tests.fuzz.kinds import FILES, KINDS
from tests.fuzz.mutations import damage

MEMORY = 2 * 2**30  # bytes of address space beyond what the parent has mapped
SECONDS = 20
CLASSES = {
    "same": "read as before",
    "error": "InputError that names the path (of a message: on one line)",
    "problem": "read, and named as a problem or a note",
    "accepted": "read as something else; no check sum covers it",
    "changed": "read as something else although check sums cover it",
    "unnamed": "InputError that does not name the path, or of several lines",
    "exception": "another exception",
    "hang": f"more than {SECONDS} seconds",
    "death": "the process ended",
    "blow-up": f"more than {MEMORY // 2**30} GiB",
}
BAD = ("changed", "unnamed", "exception", "hang", "death", "blow-up")


@dataclass(frozen=True)
class Result:
    """One input: its number, which file was damaged and how, what came of it, and by how many MiB the process grew at most."""

    kind: str
    number: int
    file: str
    how: str
    result: str
    message: str = ""
    memory: float = 0.0


@dataclass(frozen=True)
class Whole:
    """A whole folder, the copy of it that was read, and what it means."""

    folder: Path
    read_at: Path
    outcome: Outcome


class Fuzzer:
    """Inputs of one kind, which depend on ``seed``, ``kind`` and their number alone; its folders last for the context."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Fuzzer:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.top = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory)))
        (self.top / "outside").mkdir()
        folders = {"FUZZ_OUTSIDE": f"{self.top}/outside", "SPVLA_CACHE": f"{self.top}/cache"}
        self._open.enter_context(patch.dict(os.environ, folders))
        made = KINDS[self.kind].make(self.top / "whole")
        copies = [self._copy(whole, f"whole-{k}") for k, whole in enumerate(made)]
        self.whole = [Whole(whole, copy, KINDS[self.kind].read(copy)) for whole, copy in zip(made, copies, strict=True)]
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.top / "input" / name / folder.name, copy_function=os.link))

    def run(self, numbers: Iterable[int]) -> Iterator[Result]:
        """Damage and read these inputs."""
        left = list(numbers)
        while left:
            done = 0
            for result in self._child(left):
                done += 1
                if result.result in BAD and done > 1:
                    result = next(iter(self._child([result.number])))
                yield result
            left = left[done:]

    def _child(self, numbers: list[int]) -> Iterator[Result]:
        """Results of a child process, up to the input that ended it."""
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            with contextlib.suppress(BaseException):
                self._read_all(numbers, writing)
            os._exit(0)
        os.close(writing)
        begun: dict[str, Any] | None = None
        with os.fdopen(reading, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                told = json.loads(line)
                begun = None if "result" in told else told
                if begun is None:
                    yield Result(**told)
        _, status = os.waitpid(process, 0)
        shutil.rmtree(self.top / "input", ignore_errors=True)
        if begun is not None:
            hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
            yield Result(**begun, result="hang" if hung else "death", message=f"wait status {status}")

    def _read_all(self, numbers: list[int], pipe: int) -> None:
        mapped, resident = (pages * resource.getpagesize() for pages in map(int, _statm()[:2]))
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        _hurry()
        for number in numbers:
            rng = np.random.default_rng([self.seed, list(KINDS).index(self.kind), number])
            whole = self.whole[rng.integers(len(self.whole))]
            folder = self._copy(whole.folder, f"{number}")
            file, how = damage(folder, rng)
            about = {"kind": self.kind, "number": number, "file": str(file.relative_to(folder)), "how": how}
            _tell(pipe, about)
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the input before
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody handles it: the process ends
            result, message = self._judge(whole, folder, file, how)
            signal.setitimer(signal.ITIMER_REAL, 0)
            memory = round((_peak() - resident) / 2**20, 1)
            _tell(pipe, about | {"result": result, "message": message[:500], "memory": memory})
            shutil.rmtree(folder.parent, ignore_errors=True)

    def _judge(self, whole: Whole, folder: Path, file: Path, how: str) -> tuple[str, str]:
        """Read a folder: the class of what came of it, and its message."""
        try:
            found = KINDS[self.kind].read(folder)
        except InputError as error:
            said = str(error)
            named = self.kind not in FILES or str(folder) in said or file.name in said
            return ("error" if named and "\n" not in said else "unnamed"), said
        except MemoryError as error:
            return "blow-up", repr(error)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            own = [f"{Path(f.filename).name}:{f.lineno}" for f in last if "site-packages" not in f.filename][-3:]
            return "exception", f"{type(error).__name__}: {str(error)[:300]} at {' '.join(own)}"
        if found.meaning == whole.outcome.meaning:
            return "same", ""
        known = {p.replace(str(whole.read_at), "") for p in whole.outcome.problems}
        if new := [p for p in found.problems if p.replace(str(folder), "") not in known]:
            return "problem", new[0]
        rewritten = ":" in how or how in ("another file", "gone", "link out")  # with check sums that fit
        return ("changed" if KINDS[self.kind].summed(file) and not rewritten else "accepted"), ""


def _hurry() -> None:
    """Leave out what costs time in a child process and changes nothing that is read."""
    import pyarrow as pa
    import torch

    import spvla.registry as registry

    vars(registry)["entry_points"] = functools.cache(vars(registry)["entry_points"])  # most of an export's time
    vars(os)["fsync"] = lambda handle: None  # what is written here need not outlive a power cut
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    logging.disable()
    warnings.simplefilter("ignore")
    gc.freeze()


def _tell(pipe: int, content: dict[str, Any]) -> None:
    data = (json.dumps(content) + "\n").encode("utf-8", "replace")
    while data:
        data = data[os.write(pipe, data) :]


def _statm() -> list[str]:
    return Path("/proc/self/statm").read_text().split()


def _peak() -> int:
    """Bytes that were resident at most since the peak was reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status[status.index("VmHWM:") :].split()[1])


def found(results: Iterable[Result]) -> list[dict[str, Any]]:
    """What is bad, as JSON."""
    return [asdict(result) for result in results if result.result in BAD]
