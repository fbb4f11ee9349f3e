"""What the commands that simulate share: initial states, seeds, what identifies an episode, and groups for the workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Generic, TypeVar

from data.envs import make_env
from data.envs.base import Env, RenderMode, Task
from data.parallel import chunks
from spvla.errors import InputError
from spvla.export import fingerprint
from spvla.gates.eyes import EyesConfig
from spvla.observation import MAIN
from spvla.vlas.base import VLA, cameras_of
from spvla.vlas.registry import VLASource

J = TypeVar("J")


def parse_range(text: str, what: str = "init_states") -> list[int]:
    """``"0-19"``, ``"3"`` or ``"0-4,10,12-14"`` to a list of numbers. Raises :class:`InputError` for anything else."""
    out: list[int] = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise InputError(f"{what} {text!r}: expected numbers and ranges such as 0-19 or 0-4,10", field=what)
        out += range(int(first), int(last) + 1)
    return out


def require_init_states(task: Task, states: Sequence[int], text: str) -> None:
    """Raise :class:`InputError` if ``task`` lacks one of the official initial ``states``, given as the option ``text``."""
    available = task.init_states
    if states and max(states) >= available:
        message = f"init_states {text}: {task.suite} task {task.index} has {available} initial states"
        raise InputError(message, field="init_states")


def episode_seed(seed: int | str, task: Task, init_state: int | None, repetition: int) -> int:
    """The seed of an episode, from what identifies it; another ``seed`` makes another episode of the same initial state."""
    text = f"{seed}/{task.suite}/{task.name}/{init_state}/{repetition}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") & 0x7FFFFFFF


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What determines an episode besides task, initial state and seed. Commands add fields of their own.

    ``environment`` is the stamp of a simulator that a user's file describes, see :func:`data.envs.stamp`.
    """

    source: VLASource
    export: str | None
    max_generated_run: int | None
    max_steps: int | None = None
    environment: str | None = None

    def facts(self) -> dict[str, Any]:
        """Every field by the name of its option; those of the VLA's source too, except the suite. ``environment`` only where
        there is one."""
        values = asdict(self)
        if values["environment"] is None:
            del values["environment"]
        source = values.pop("source")
        options = source["options"] or None
        return {"vla": source["name"], "checkpoint": source["checkpoint"], "vla_options": options, **values}

    @property
    def tag(self) -> str:
        """A short hash that tells settings apart in job ids. An export counts by its content, not its folder's name.

        A field with a default counts only where it differs: options that are added later change no earlier id.
        """
        unset = {f.name: f.default for f in fields(self) if f.default is not MISSING} | {"vla_options": None}
        values = {k: v for k, v in self.facts().items() if k not in unset or v != unset[k]}
        values["export"] = fingerprint(self.export)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Group(Generic[J]):
    """Jobs of one task: a worker makes the environment once for all of them."""

    task: Task
    jobs: tuple[J, ...]


def split(task: Task, jobs: Sequence[J], parts: int) -> list[Group[J]]:
    """``jobs`` of a task in at most ``parts`` groups."""
    return [Group(task, tuple(part)) for part in chunks(jobs, parts)]


def parts_for(jobs: int, workers: int) -> int:
    """Into how many groups to split the jobs of a task: enough to keep the workers busy, few environments to make."""
    return max(1, min(workers, jobs // 10))


def environment(task: Task, vla: VLA, render: RenderMode, images: bool = False, eyes: EyesConfig | None = None) -> Env:
    """The simulation of ``task``, rendered if ``vla`` or a gate's ``eyes`` look at images, or they are wanted anyway."""
    wanted = [*([MAIN] if images else []), *cameras_of(vla), *([] if eyes is None else [eyes.camera])]
    cameras = tuple(dict.fromkeys(wanted))
    return make_env(task, render=render if cameras else None, cameras=cameras)
