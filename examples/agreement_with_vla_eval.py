"""vla-eval's LIBERO benchmark beside our own closed loop, episode by episode: ``python examples/agreement_with_vla_eval.py``.

The harness drives the served policy and records what was executed; this command runs the same policy in our own loop from
the same initial states and compares every action. results/vla_eval has the commands and what came of them.

The one thing that differs between the two loops is the age of an observation: robosuite samples its sensors and renders
before a control step's last simulation steps, our loop shows the end of the step. :class:`LiberoAtStepEnd` is vla-eval's
benchmark with observations taken at the end; with it the actions of nearly every episode are the same bit for bit.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepResult
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

from data.envs import load_tasks, make_env
from data.envs.libero.env import LiberoEnv
from data.envs.libero.render import CAMERA, CAMERAS
from data.envs.libero.scene import LiberoObservation, Poses, PrivilegedState, Scene
from data.envs.libero.tasks import LiberoTask
from data.jobs import episode_seed
from data.rollout import rollout
from spvla.actions import LIBERO
from spvla.assemble import accelerate
from spvla.errors import InputError
from spvla.files import write_text
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput, cameras_of
from spvla.vlas.registry import load_vla


class LiberoFrom(LIBEROBenchmark):
    """vla-eval's LIBERO benchmark, its episodes counted from another initial state than the first.

    Args:
        first_init_state: the official initial state of each task's first episode; ours for evaluation are 30-49.
        tasks: their indices in the suite; None: all.
        poses: send every pose behind the proprioception, and no picture but a black one: what the scripted expert needs
            (:class:`ExpertFromPoses`), and much faster.
    """

    def __init__(
        self, *args: Any, first_init_state: int = 0, tasks: list[int] | None = None, poses: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.first_init_state, self.tasks, self.poses = first_init_state, tasks, poses

    def get_tasks(self) -> list[dict[str, Any]]:
        """As the benchmark's own, or those that were asked for."""
        found: list[dict[str, Any]] = super().get_tasks()
        return found if self.tasks is None else [found[i] for i in self.tasks]

    def reset(self, task: dict[str, Any]) -> Any:
        """As the benchmark's own."""
        out = super().reset({**task, "episode_idx": task.get("episode_idx", 0) + self.first_init_state})
        if self.poses:
            env = self._env.env
            for camera in CAMERAS.values():
                env.modify_observable(f"{camera}_image", "enabled", False)
            self._poses = Poses(env, task["name"])
        return out

    def make_obs(self, raw_obs: Any, task: dict[str, Any]) -> dict[str, Any]:
        """As the benchmark's own, or with poses."""
        if not self.poses:
            out: dict[str, Any] = super().make_obs(raw_obs, task)
            return out
        states = np.concatenate([self._proprio_state(raw_obs), self._poses.read().to_vector()])
        black = np.zeros((256, 256, 3), np.uint8)
        return {"images": {CAMERA: black}, "states": states.astype(np.float32), "task_description": task["name"]}


class LiberoAtStepEnd(LiberoFrom):
    """The same, but observations show the end of the control step."""

    def reset(self, task: dict[str, Any]) -> Any:
        """As the benchmark's own."""
        super().reset(task)
        return self._now()

    def step(self, action: dict[str, Any]) -> StepResult:
        """As the benchmark's own."""
        result = super().step(action)
        return StepResult(obs=self._now(), reward=result.reward, done=result.done, info=result.info)

    def _now(self) -> Any:
        assert self._env is not None
        return self._env.env._get_observations(force_update=True)


class ExpertFromPoses:
    """The scripted expert behind a server: its poses arrive behind the proprioception. Options: ``suite``."""

    action_space = LIBERO
    needs_images = False

    def __init__(self, suite: str) -> None:
        self.expert, self.tasks = load_vla("expert", suite=suite), {task.instruction: task for task in load_tasks(suite)}
        self.scenes: dict[str, Scene] = {}

    def reset(self, instruction: str) -> None:
        """Start an episode. Raises :class:`InputError` if no task of the suite has this instruction."""
        if instruction not in self.tasks:
            raise InputError(f"instruction {instruction!r} belongs to no task of the suite")
        if instruction not in self.scenes:
            task = self.tasks[instruction]
            assert isinstance(task, LiberoTask)
            with LiberoEnv(task) as env:
                self.scenes[instruction] = env.scene
        self.scene = self.scenes[instruction]
        self.expert.reset(instruction)

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """The expert's action."""
        if observation.state is None:
            raise InputError("observation.state: the expert needs the proprioception and every pose")
        poses = PrivilegedState.from_vector(observation.state[8:], self.scene)
        return self.expert.predict(LiberoObservation({}, observation.state[:8], privileged=poses))


def expert_from_poses(checkpoint: str | None = None, *, suite: str | None = None) -> ExpertFromPoses:
    """The policy ``examples.agreement_with_vla_eval:expert_from_poses``."""
    if suite is None:
        raise InputError("expert_from_poses: say which suite")
    return ExpertFromPoses(suite)


def read_recording(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A vla-eval recording of one benchmark: its parameters, and per episode its facts and executed ``actions`` (T, 7)."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such recording")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        runs = [json.loads(row) for (row,) in database.execute("select metadata from eval_metadata")]
        if len(runs) != 1:
            raise InputError(f"{path}: holds {len(runs)} benchmarks, expected 1")
        episodes = []
        query = "select sid, eid, status, steps, context from episode_results order by rowid"
        for sid, eid, status, steps, context in database.execute(query).fetchall():
            rows = database.execute("select fields from step_rows where sid = ? and eid = ? order by step_id", (sid, eid))
            actions = np.array([json.loads(row)["action"] for (row,) in rows], np.float32)
            episodes.append({**json.loads(context), "status": status, "steps": steps, "actions": actions})
    return runs[0], episodes


def compare(
    recording: str,
    output: str,
    vla: str,
    checkpoint: str | None = None,
    export: str | None = None,
    risk: float | None = None,
    generator: str | None = None,
    gate: str | None = None,
    vla_options: dict[str, Any] | None = None,
) -> None:
    """Run what vla-eval recorded in our own loop, and compare action by action.

    Args:
        recording: the SQLite file that ``vla-eval run`` wrote.
        output: JSON file for the comparison.
        vla, checkpoint, export, risk, generator, gate, vla_options: as the server was started with.
    """
    run, recorded = read_recording(recording)
    episodes = [e for e in recorded if e["status"] != "error"]  # such as one that timed out
    parameters = run["config"]["params"]
    suite, first = parameters["suite"], parameters.get("first_init_state", 0)
    model = load_vla(vla, checkpoint, vla_options, suite)
    joint = accelerate(model, export, risk, generator=generator, gate=gate)
    rows = []
    for episode in episodes:
        (task,) = load_tasks(suite, [episode["task_id"]], run["config"]["max_steps"])
        init_state = episode["episode_idx"] + first
        with make_env(task, render="full" if cameras_of(model) else None, cameras=cameras_of(model)) as env:
            own = rollout(env, joint, init_state=init_state, seed=episode_seed(0, task, init_state, 0)).episode
        theirs = episode["actions"]
        count = min(len(own), len(theirs))
        apart = np.abs(own.actions[:count] - theirs[:count]).max(1)
        differ = np.flatnonzero(apart)
        row = {
            "task": task.index,
            "init_state": init_state,
            "success": {"vla_eval": episode["status"] == "success", "own": bool(own.success)},
            "steps": {"vla_eval": episode["steps"], "own": len(own)},
            "vla_calls": joint.stats()["vla_calls"],
            "first_difference": int(differ[0]) if len(differ) else None if len(own) == len(theirs) else count,
            "largest_difference": round(float(apart.max()), 7),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    same = sum(r["success"]["vla_eval"] == r["success"]["own"] for r in rows)
    steps = sum(r["steps"]["vla_eval"] == r["steps"]["own"] for r in rows)
    identical = sum(r["first_difference"] is None for r in rows)
    summary = {
        "benchmark": run["config"]["benchmark"],
        "harness_version": run["harness_version"],
        "parameters": parameters,
        "max_steps": run["config"]["max_steps"],
        "policy": {"vla": vla, "export": export, "risk": risk, "generator": generator, "gate": gate},
        "episodes": len(rows),
        "errors": len(recorded) - len(episodes),
        "same_success": same,
        "same_steps": steps,
        "identical_actions": identical,
        "rows": rows,
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(summary, indent=1) + "\n")
    print(f"{len(rows)} episodes: the same success in {same}, steps in {steps}, actions in {identical}; written: {output}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    from spvla.cli import guard

    sys.exit(guard(lambda: auto_cli(compare, as_positional=False, description="vla-eval's LIBERO against our own loop.")))
