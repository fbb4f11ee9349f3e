"""Worker processes that load once and then work off groups of jobs, results as they come.

A simulator wants all jobs of a scene together: that is a *group*. Workers are spawned and use one thread each.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from spvla.errors import InputError
from spvla.machine import machine_fault

F = TypeVar("F")
G = TypeVar("G")
R = TypeVar("R")


def chunks(items: Sequence[G], count: int) -> list[list[G]]:
    """``items`` in at most ``count`` consecutive parts of nearly equal size, none empty."""
    count = min(count, len(items))
    bounds = [len(items) * i // count for i in range(count + 1)] if count else [0]
    return [list(items[a:b]) for a, b in pairwise(bounds)]


def _end_with_parent() -> None:
    """Ends this process when its parent is killed: nobody is there to read what it would compute for minutes."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(load: Callable[[], tuple[Callable[[Any], Iterator[Any]], Any]], connection: Connection) -> None:
    """A worker process: loads, then works off one group after another until none is left, or its parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(1)
        work, facts = load()
        connection.send(("facts", facts))
        while (group := connection.recv()) is not None:
            for result in work(group):
                connection.send(("result", result))
            connection.send(("done", None))
    except BaseException as error:
        parent = mp.parent_process()
        if isinstance(error, KeyboardInterrupt) or (parent is not None and not parent.is_alive()):
            return  # stopped, or the parent was killed and nobody reads the results
        fault = error if isinstance(error, InputError) else machine_fault(error)
        if fault is None:
            connection.send(("crash", traceback.format_exc()))
        else:
            connection.send(("input", (str(fault), fault.code, fault.field)))


class Workers(Generic[G, R, F]):
    """Processes that share the groups of a run. Use it in a ``with`` block: at its end they are stopped.

    Each process is started when there is a group for it, and stays for further ones.

    Args:
        load: called once in each process. Returns the function that yields the results of a group, and what this process is
            to know of what was loaded. Must pickle, as must groups, results and facts.
        count: most processes at a time.
    """

    def __init__(self, load: Callable[[], tuple[Callable[[G], Iterator[R]], F]], count: int) -> None:
        if count < 1:
            raise InputError(f"workers must be at least 1, got {count}", field="workers")
        self._load, self._count = load, count
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> Workers[G, R, F]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes.values():
            process.terminate()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def facts(self) -> F:
        """What the first process says about what it loaded; once, before :meth:`run`. Raises what :meth:`run` raises."""
        facts: F = self._receive(self._start())[1]
        return facts

    def run(self, groups: Iterable[G]) -> Iterator[R]:
        """Yield the results of every group as they come; groups begin in their order.

        Raises:
            InputError: a worker raised it.
            RuntimeError: a worker crashed (its traceback is in the message) or was killed.
        """
        waiting, idle, busy = deque(groups), deque(self._processes), set[Connection]()
        while waiting or busy:
            while waiting and (idle or len(busy) < self._count):
                connection = idle.popleft() if idle else self._start()
                try:
                    connection.send(waiting.popleft())
                except OSError:
                    raise self._died(connection) from None
                busy.add(connection)
            ready: Any = wait(busy)
            for connection in ready:
                kind, value = self._receive(connection)
                if kind == "result":
                    yield value
                elif kind == "done":
                    busy.remove(connection)
                    idle.append(connection)

    def _start(self) -> Connection:
        context = mp.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._load, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a dead worker ends the connection
        self._processes[mine] = process
        return mine

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            raise self._died(connection) from None
        if kind == "input":
            message, code, field = value
            raise InputError(message, code=code, field=field)
        if kind == "crash":
            raise RuntimeError(f"a worker process failed:\n{value}")
        return kind, value

    def _died(self, connection: Connection) -> RuntimeError:
        self._processes[connection].join(timeout=5)
        return RuntimeError(f"a worker process died with exit code {self._processes[connection].exitcode}")


def _loaded(work: Callable[[G], Iterator[R]]) -> tuple[Callable[[G], Iterator[R]], None]:
    return work, None


def run_groups(work: Callable[[G], Iterator[R]], groups: Sequence[G], workers: int) -> Iterator[R]:
    """Yield what ``work(group)`` yields for every group, where there is nothing to load; see :class:`Workers`."""
    with Workers(partial(_loaded, work), workers) as pool:
        yield from pool.run(groups)
