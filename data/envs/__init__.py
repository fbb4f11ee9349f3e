"""Simulators by the names of their suites: ``libero_object`` belongs to the simulator ``libero``.

Another one is a module with a :class:`~data.envs.base.Simulator`, and its name: in :data:`SIMULATORS`, or as an entry point
of the group ``spvla.envs``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from data.envs.base import Env, RenderMode, Simulator, Task
from spvla.errors import InputError
from spvla.registry import Registry
from spvla.vlas.base import VLA

SIMULATORS = Registry(
    "simulator",
    "spvla.envs",
    {"libero": "data.envs.libero.simulator:Libero", "metaworld": "data.envs.metaworld:MetaWorld"},
)


@functools.cache
def simulator(suite: str) -> Simulator:
    """The simulator that a suite belongs to: the one of that name, or whose name and ``_`` the suite begins with.

    Raises:
        InputError: there is none (code ``unknown-suite``), or its package is not installed.
    """
    known = SIMULATORS.names()
    name = max((n for n in known if suite == n or suite.startswith(f"{n}_")), key=len, default=None)
    if name is None:
        listing = ", ".join(sorted(known))
        raise InputError(
            f"suite {suite!r} belongs to no known simulator; suites begin with the name of one: {listing}",
            code="unknown-suite",
            field="suite",
        )
    made: Simulator = SIMULATORS.get(name)()
    return made


def load_tasks(suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> list[Task]:
    """See :meth:`data.envs.base.Simulator.tasks`."""
    return list(simulator(suite).tasks(suite, tasks, max_steps))


def make_env(task: Task, *, render: RenderMode | None = None, wrist_camera: bool = False) -> Env:
    """See :meth:`data.envs.base.Simulator.make`."""
    return simulator(task.suite).make(task, render=render, wrist_camera=wrist_camera)


def expert(checkpoint: str | None = None, *, suite: str | None = None) -> VLA:
    """The VLA ``expert``: the scripted one of the simulator that ``suite`` belongs to; it has no checkpoint."""
    if checkpoint is not None:
        raise InputError(f"VLA 'expert' takes no checkpoint, got {checkpoint!r}")
    if suite is None:
        raise InputError("VLA 'expert' belongs to a simulator: name the suite", code="missing", field="suite")
    return simulator(suite).expert()
