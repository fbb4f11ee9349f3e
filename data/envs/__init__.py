"""Simulators by the names of their suites: ``libero_object`` belongs to the simulator ``libero``.

Another one is a module with a :class:`~data.envs.base.Simulator`, and its name: in :data:`SIMULATORS`, or as an entry point
of the group ``spvla.envs``. A suite that is a YAML file describes a Gymnasium environment, see :mod:`data.envs.gym`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from data.envs.base import Described, Env, RenderMode, Simulator, SplitPart, Task
from spvla.errors import InputError
from spvla.observation import MAIN
from spvla.registry import Registry
from spvla.vlas.base import VLA

SIMULATORS = Registry(
    "simulator",
    "spvla.envs",
    {
        "libero": "data.envs.libero.simulator:Libero",
        "metaworld": "data.envs.metaworld:MetaWorld",
        "gym": "data.envs.gym.simulator:Gym",
    },
)


@functools.cache
def simulator(suite: str) -> Simulator:
    """The simulator that a suite belongs to: the one of that name, or whose name and ``_`` the suite begins with. A suite may
    also be the YAML file that describes it.

    Raises:
        InputError: there is none (code ``unknown-suite``), its file cannot be used, or its package is not installed.
    """
    if suite.endswith((".yaml", ".yml")):
        described: Simulator = SIMULATORS.get("gym")(suite)
        return described
    known = SIMULATORS.names()
    name = max((n for n in known if suite == n or suite.startswith(f"{n}_")), key=len, default=None)
    if name is None:
        listing = ", ".join(sorted(known))
        raise InputError(
            f"suite {suite!r} belongs to no known simulator; its name must begin with one of: {listing}; or it is a YAML file. "
            "A name of your own is known once its package is installed",
            code="unknown-suite",
            field="suite",
        )
    made: Simulator = SIMULATORS.get(name)()
    return made


@functools.cache
def _known(name: str) -> Simulator | None:
    try:
        return simulator(name)
    except InputError as error:
        if error.code != "unknown-suite":
            raise
        return None


def recorded_by(facts: Mapping[str, Any], space: str) -> Simulator | None:
    """The simulator that an episode was recorded in; None for a robot's, or one that is not known here.

    Args:
        facts: the episode's metadata.
        space: name of its action space, which is the simulator's where old recordings name no suite.
    """
    return _known(str(facts.get("suite") or space))


def training_part(facts: Mapping[str, Any], space: str, where: str) -> SplitPart | None:
    """What the simulator of an episode, see :func:`recorded_by`, says that it may be used for; None if nobody says.

    Raises:
        InputError: it is evaluation data (code ``evaluation-data``); the message begins with ``where``.
    """
    known = recorded_by(facts, space)
    part = None if known is None else known.split(facts)
    if part == "evaluation":
        which = f"initial state {facts['init_state']}" if facts.get("init_state") is not None else f"seed {facts.get('seed')}"
        told = f"{where}: holds an episode of {facts.get('suite') or space}, {which}, which is for evaluation only"
        raise InputError(f"{told}, never for training", code="evaluation-data", field=where)
    return part


def load_tasks(suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> list[Task]:
    """See :meth:`data.envs.base.Simulator.tasks`."""
    return list(simulator(suite).tasks(suite, tasks, max_steps))


def make_env(task: Task, *, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> Env:
    """See :meth:`data.envs.base.Simulator.make`."""
    return simulator(task.suite).make(task, render=render, cameras=cameras)


def stamp(suite: str) -> str | None:
    """See :class:`~data.envs.base.Described`; None for a simulator that does not change."""
    made = simulator(suite)
    return made.stamp if isinstance(made, Described) else None


def expert(checkpoint: str | None = None, *, suite: str | None = None) -> VLA:
    """The VLA ``expert``: the scripted one of the simulator that ``suite`` belongs to; it has no checkpoint."""
    if checkpoint is not None:
        raise InputError(f"VLA 'expert' takes no checkpoint, got {checkpoint!r}")
    if suite is None:
        raise InputError("VLA 'expert' depends on the simulator: give the suite", code="missing", field="suite")
    return simulator(suite).expert()
