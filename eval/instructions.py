"""Does the policy do what it is asked? ``python -m eval instructions``.

In a scene with several objects it is asked for its task's own, for every other one, for none and for one that is not
there; what counts is the first object that the hand lifts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.envs import load_tasks
from data.envs.base import Env, Instructable
from data.jobs import Group, environment, episode_seed, parse_range, require_init_states, split
from data.parallel import Workers
from eval.output import append, continued, table, write_csv, write_summary
from eval.statistics import exact_interval
from spvla.cli import NonNegativeInt, PositiveInt
from spvla.errors import InputError
from spvla.files import write_text
from spvla.vlas.base import VLA
from spvla.vlas.registry import VLASource, weights_stamp

LIFTED = 0.03  # metres above where it stood
KINDS = ("own", "other", "nothing", "absent")
COLUMNS = ("asked", "trials", "lifted_asked", "rate", "ci95", "lifted_own", "lifted_another", "lifted_nothing")


@dataclass(frozen=True)
class Job:
    """Trials from one initial state: all its instructions but those that are ``done``."""

    init_state: int
    seed: int
    done: frozenset[str]


def named(instruction: str) -> str:
    """The X of "pick up the X and place it in the Y"; :class:`InputError` for anything else."""
    found = re.match(r"pick up the (.+?) and place it ", instruction)
    if found is None:
        raise InputError(f"{instruction!r}: expected the form 'pick up the X and place it in the Y'")
    return found[1]


def questions(own: str, name: str, others: Sequence[str], absent: Sequence[str], draw: int) -> list[tuple[str, str]]:
    """What is asked for in one initial state, as pairs of kind and words.

    Args:
        own: the task's own instruction.
        name: its object's words in it.
        others: the same for the scene's other objects.
        absent: names of objects that are not in the scene.
        draw: chooses among the last.
    """
    nothing = " ".join(own.replace(name, "").split())
    asked = [("own", own), *(("other", text) for text in others), ("nothing", nothing)]
    return asked + ([("absent", own.replace(name, absent[draw % len(absent)]))] if absent else [])


def first_lifted(env: Env, vla: VLA, instruction: str, init_state: int, seed: int) -> tuple[str | None, int]:
    """What ``vla`` lifts first when it is asked for ``instruction``, None for nothing, and after how many steps."""
    assert isinstance(env, Instructable)
    env.reset(init_state, seed)
    vla.reset(instruction)
    space = vla.action_space
    while env.steps < env.task.max_steps:
        env.step(space.clip(vla.predict(env.observe()).actions[0]))
        lifted = env.lifted()
        highest = max(lifted, key=lambda name: lifted[name])
        if lifted[highest] >= LIFTED:
            return highest, env.steps
    return None, env.steps


class Asker:
    """What a worker process keeps: the VLA, and the names of the objects of all tasks."""

    def __init__(self, source: VLASource, names: Sequence[str]) -> None:
        self.vla, self.names = source.load(), names

    def run(self, group: Group[Job]) -> Iterator[dict[str, Any]]:
        """Ask for everything in the scene of a task; yields the trials."""
        with environment(group.task, self.vla, "full") as env:
            if not isinstance(env, Instructable):
                told = f"suite: in scenes of {group.task.suite} only the task's own object can be asked for"
                raise InputError(told, code="unsupported", field="suite")
            for job in group.jobs:
                env.reset(job.init_state, job.seed)
                own, *others = env.instructions()
                item = env.asked_object(own)
                absent = [n for n in self.names if not any(m.startswith(n.replace(" ", "_")) for m in env.lifted())]
                for kind, text in questions(own, named(own), others, absent, job.init_state):
                    if text in job.done:
                        continue
                    asked = env.asked_object(text) if kind in ("own", "other") else None
                    lifted, steps = first_lifted(env, self.vla, text, job.init_state, job.seed)
                    yield {
                        **{"task": group.task.index, "init_state": job.init_state, "seed": job.seed, "asked": kind},
                        **{"instruction": text, "object": asked, "own_object": item, "lifted": lifted, "steps": steps},
                    }


def _load(source: VLASource, names: Sequence[str]) -> tuple[Any, str | None]:
    asker = Asker(source, names)
    return asker.run, weights_stamp(asker.vla)


def summarise(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind of instruction; for those that name an object of the scene, how often it was the first in the air."""
    rows = []
    for kind in KINDS:
        mine = [t for t in trials if t["asked"] == kind]
        if not mine:
            continue
        row: dict[str, Any] = {"asked": kind, "trials": len(mine), "scenes": len({t["task"] for t in mine})}
        if kind in ("own", "other"):
            right = sum(t["lifted"] == t["object"] for t in mine)
            row |= {"lifted_asked": right, "rate": right / len(mine), "ci95": exact_interval(right, len(mine))}
        row["lifted_own"] = sum(t["lifted"] == t["own_object"] for t in mine)
        row["lifted_nothing"] = sum(t["lifted"] is None for t in mine)
        row["lifted_another"] = sum(t["lifted"] not in (t["object"], t["own_object"], None) for t in mine)
        rows.append(row)
    return rows


def instructions(
    suite: str,
    output: Path,
    vla: str = "nano_vla",
    checkpoint: str | None = None,
    vla_options: dict[str, Any] = {},  # noqa: B006
    tasks: list[int | str] | None = None,
    init_states: str = "30-49",
    max_steps: PositiveInt = 120,
    workers: PositiveInt = 2,
    seed: NonNegativeInt = 0,
) -> None:
    """Ask for every object of a scene, for none and for an absent one; the first object lifted by 3 cm is the answer.

    Stopped, it continues where it was when called again with the same output.

    Args:
        suite: LIBERO suite whose tasks are "pick up the X and place it in the Y".
        output: folder for summary.json and trials.csv.gz.
        vla: the VLA: nano_vla, openvla, an entry point of spvla.vlas, or package.module:factory.
        checkpoint: the VLA's folder or hf://owner/name.
        vla_options: the VLA's other options.
        tasks: task indices or names, one scene each; all if omitted.
        init_states: official initial states; 30-49 are for evaluation.
        max_steps: steps within which something must be in the air.
        workers: processes, one thread each.
        seed: of resets.
    """
    states = parse_range(init_states)
    names = tuple(named(task.instruction) for task in load_tasks(suite))
    chosen = load_tasks(suite, tasks, max_steps)
    for task in chosen:
        require_init_states(task, states, init_states)
    source = VLASource(vla, checkpoint, dict(vla_options), suite)
    fixed: dict[str, Any] = {"suite": suite, "vla": vla, "checkpoint": checkpoint, "vla_options": dict(vla_options)}
    raw = output / "trials.jsonl"
    from tqdm import tqdm

    with Workers[Group[Job], dict[str, Any], str | None](partial(_load, source, names), workers) as pool:
        fixed |= {"weights": pool.facts(), "max_steps": max_steps, "seed": seed}
        output.mkdir(parents=True, exist_ok=True)
        done = continued(raw, output / "setting.json", fixed)
        whole = {(t["task"], t["init_state"]) for t in done if t["asked"] == KINDS[-1]}  # the last to be asked
        groups: list[Group[Job]] = []
        for task in chosen:
            jobs = []
            for state in states:
                finished = frozenset(t["instruction"] for t in done if (t["task"], t["init_state"]) == (task.index, state))
                if (task.index, state) not in whole:
                    jobs.append(Job(state, episode_seed(seed, task, state, 0), finished))
            groups += split(task, jobs, workers)
        for trial in tqdm(pool.run(groups), f"instructions {suite}", unit="trial", initial=len(done)):
            append(raw, trial)
            done.append(trial)
    asked = {task.index for task in chosen}
    mine = [t for t in done if t["task"] in asked and t["init_state"] in states]
    mine.sort(key=lambda t: (KINDS.index(t["asked"]), t["task"], t["init_state"], t["instruction"]))
    rows = summarise(mine)
    write_csv(output / "trials.csv.gz", mine)
    steps = float(np.mean([t["steps"] for t in mine]))
    path = write_summary(output, "instructions", rows, tasks=sorted(asked), init_states=init_states, steps_mean=steps, **fixed)
    text = table(rows, COLUMNS)
    write_text(output / "table.txt", text + "\n")
    print(text)
    print(f"written: {path} and, beside it, trials.csv.gz, table.txt")
