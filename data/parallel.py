"""Groups of jobs over a few worker processes, results as they come.

A simulator wants a process of its own per scene, and all jobs of a scene together: that is a *group*. Workers are
spawned, use one thread each, and end with their group.
"""

from __future__ import annotations

import multiprocessing as mp
import queue
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from spvla.errors import InputError
from spvla.machine import machine_fault

G = TypeVar("G")
R = TypeVar("R")


def chunks(items: Sequence[G], count: int) -> list[list[G]]:
    """``items`` in at most ``count`` consecutive parts of nearly equal size, none empty."""
    count = min(count, len(items))
    bounds = [len(items) * i // count for i in range(count + 1)] if count else [0]
    return [list(items[a:b]) for a, b in pairwise(bounds)]


def _work(function: Callable[[Any], Iterator[Any]], group: Any, index: int, results: Any) -> None:
    try:
        import torch

        torch.set_num_threads(1)
        parent = mp.parent_process()
        for result in function(group):
            if parent is not None and not parent.is_alive():  # killed: nobody reads the results
                results.cancel_join_thread()
                return
            results.put(("result", index, result))
        results.put(("done", index, None))
    except InputError as error:
        results.put(("input", index, (str(error), error.code, error.field)))
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        fault = machine_fault(error)
        if fault is None:
            results.put(("crash", index, traceback.format_exc()))
        else:
            results.put(("input", index, (str(fault), fault.code, fault.field)))


def run_groups(function: Callable[[G], Iterator[R]], groups: Sequence[G], workers: int) -> Iterator[R]:
    """Yield what ``function(group)`` yields for every group, at most ``workers`` groups at a time.

    ``function`` and the groups must pickle. Raises :class:`InputError` if a worker raised it, RuntimeError with the
    worker's traceback if it crashed; the other workers are stopped then, and when the caller stops iterating.
    """
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    waiting = deque(enumerate(groups))
    running: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, group = waiting.popleft()
                process = context.Process(target=_work, args=(function, group, index, results), daemon=True)
                process.start()
                running[index] = process
            try:
                kind, index, value = results.get(timeout=1.0)
            except queue.Empty:
                dead = [i for i, p in running.items() if not p.is_alive()]
                if dead and results.empty():
                    code = running[dead[0]].exitcode
                    raise RuntimeError(f"a worker process died with exit code {code}") from None
                continue
            if kind == "result":
                yield value
            elif kind == "done":
                running.pop(index).join()
            elif kind == "input":
                message, code, field = value
                raise InputError(message, code=code, field=field)
            else:
                raise RuntimeError(f"a worker process failed:\n{value}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
