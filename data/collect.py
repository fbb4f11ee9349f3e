"""Collect rollouts in a simulator into a rollout store: ``python -m data collect``.

Every episode is one job with an id made from what determines it, so that a run that was killed, split over workers or
extended by another call ends with exactly the episodes it should have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.envs import load_tasks, stamp
from data.envs.base import Env, Instructable, Privileged, Task
from data.envs.perturb import Nudge, RealTime
from data.images import UPRIGHT
from data.jobs import Group, Setting, environment, episode_seed, parse_range, parts_for, require_init_states, split
from data.parallel import Workers
from data.rollout import ActionNoise, Rollout, rollout
from data.student import Student
from spvla.actions import ActionSpace
from spvla.assemble import accelerate
from spvla.cli import NonNegativeFloat, NonNegativeInt, PositiveInt
from spvla.errors import InputError
from spvla.files import locked
from spvla.gates.base import eyes_of
from spvla.gates.live import LiveGate
from spvla.steps import episode_stats
from spvla.store import RolloutWriter, finalize
from spvla.vlas.registry import VLASource, weights_stamp

MAX_PLAN = 1000  # actions
ROUND = 4  # episodes of one task that a student plays before the next task's turn


@dataclass(frozen=True, kw_only=True)
class Collecting(Setting):
    """What determines an episode besides task, initial state and repetition: the options of :func:`collect`."""

    shadow: bool
    risk: float | None
    generator: str | None
    gate: str | None
    noise: float
    seed: int
    images: bool = False
    instructions: str = "task"
    student: str | None = None
    student_checkpoint: str | None = None
    pruning: dict[str, Any] | str | None = None
    shuffle: bool = False
    weights: str | None = None
    real_time: RealTime | None = None
    label: bool = True
    plans: bool = False
    nudge: Nudge | None = None

    def check(self) -> None:
        """Raise :class:`InputError` for options that need another option that is missing."""
        for name in ("shadow", "risk", "generator", "gate", "max_generated_run"):
            if getattr(self, name) not in (None, False) and self.export is None:
                raise InputError(f"{name}: applies only to an accelerated policy; give --export too", field=name)
        if self.real_time is not None:
            if self.export is None:
                raise InputError("real_time: applies only to an accelerated policy; give --export too", field="real_time")
            apart = {"noise": self.noise, "student": self.student, "images": self.images, "shadow": self.shadow}
            for name in (name for name, value in apart.items() if value):
                raise InputError(f"{name}: cannot be joined with real_time", field=name)
        if self.plans and (self.real_time is not None or not self.label):
            raise InputError("plans: needs the teacher's labels, and time that stands still", field="plans")
        if not self.label:
            if self.export is None:
                raise InputError("label: applies only to an accelerated policy; give --export too", field="label")
            for name in (name for name in ("noise", "student", "shadow") if getattr(self, name)):
                raise InputError(f"{name}: needs the teacher's labels; leave out --label false", field=name)
        if self.student_checkpoint is not None and self.student is None:
            raise InputError("student_checkpoint: give --student too", field="student_checkpoint")


@dataclass(frozen=True)
class Job:
    """One episode."""

    id: str
    init_state: int | None
    repetition: int
    seed: int


def choose_instruction(options: Sequence[str], seed: int) -> str:
    """Half of the time the first of a scene's instructions, which is its task's own, else one of the others."""
    rng = np.random.default_rng([seed, 1])
    own = len(options) == 1 or rng.random() < 0.5
    return options[0] if own else options[int(rng.integers(1, len(options)))]


class Collector:
    """What a worker process keeps: the policy, its teacher and the store. Loading happens here, once."""

    def __init__(self, setting: Collecting, output: Path) -> None:
        self.setting = setting
        self.vla = setting.source.load()
        perturbed = bool(setting.noise) or setting.student is not None
        labelled = perturbed or setting.plans or (setting.export is not None and setting.label)
        self.teacher = setting.source.second(self.vla) if labelled else None
        parts: dict[str, Any] = {"generator": "none"}
        if setting.plans:
            parts = {"generator": "plan", "gate": "horizon", "rule": {"steps": MAX_PLAN}, "max_generated_run": MAX_PLAN}
        if setting.export is not None:
            names = ("export", "risk", "generator", "gate", "max_generated_run", "shadow")
            parts = {name: getattr(setting, name) for name in names}
        if setting.real_time is not None:
            parts["mode"] = setting.real_time.mode
        self.policy = accelerate(self.vla, pruning=setting.pruning, **parts)
        self.noise = ActionNoise(setting.noise) if setting.noise else None
        self.student: Student | None = None
        if setting.student is not None:
            self.student = Student(setting.student, setting.student_checkpoint, self.policy.space)
        self.output = output

    @property
    def live(self) -> bool:
        """Whether all episodes are one deployment, which a live gate learns from."""
        return isinstance(self.policy.gate, LiveGate)

    def run(self, groups: Sequence[Group[Job]]) -> Iterator[dict[str, Any]]:
        """Play and store the episodes of one task after another; yields what they came to."""
        learned = self.output / ".live" / f"{self.setting.tag}.json"
        if self.live and learned.exists():
            self.policy.live.load(learned)
        for group in groups:
            for result in self._play(group):
                if self.live:
                    learned.parent.mkdir(parents=True, exist_ok=True)
                    self.policy.live.save(learned)
                yield result

    def _play(self, group: Group[Job]) -> Iterator[dict[str, Any]]:
        setting, task = self.setting, group.task
        writer = RolloutWriter(self.output, self.policy.space, policy=setting.source.name)
        rendered = setting.images or self.student is not None
        with environment(task, self.vla, "fast", rendered, eyes_of(self.policy.gate)) as env:
            asked = self._instructions(env, group.jobs[0]) if setting.instructions == "scene" else []
            for job in group.jobs:
                result = rollout(
                    env,
                    self.policy,
                    init_state=job.init_state,
                    seed=job.seed,
                    noise=self.noise,
                    teacher=self.teacher,
                    driver=self.student,
                    instruction=choose_instruction(asked, job.seed) if asked else task.instruction,
                    images=setting.images,
                    shuffle=setting.shuffle,
                    plans=setting.plans,
                    real_time=setting.real_time,
                    nudge=setting.nudge,
                )
                result.episode.metadata = self._metadata(job, env, result)
                writer.write(job.id, [result.episode])
                yield {"success": result.episode.success, **episode_stats(result.steps)}

    def _instructions(self, env: Env, job: Job) -> list[str]:
        if not isinstance(env, Instructable):
            told = f"instructions: scenes of {env.task.suite} have only the task's own instruction; use task"
            raise InputError(told, code="unsupported", field="instructions")
        env.reset(job.init_state)
        return list(env.instructions())

    def _metadata(self, job: Job, env: Env, result: Rollout) -> dict[str, Any]:
        setting, task = self.setting, env.task
        metadata: dict[str, Any] = {
            "suite": task.suite,
            "task": task.index,
            "task_name": task.name,
            "init_state": job.init_state,
            "repetition": job.repetition,
            "seed": job.seed,
            "accelerated": setting.export is not None and not setting.shadow,
            "risk": setting.risk,
            "noise": setting.noise,
        }
        if setting.shuffle:
            metadata["shuffled"] = True
        if setting.images:
            metadata["images"] = UPRIGHT
            if isinstance(env, Privileged):
                metadata["scene"] = env.scene_facts(result.episode.instruction)
        if setting.nudge is not None:
            metadata["nudge"] = {"distance": setting.nudge.distance, "step": result.nudged}
        if self.student is not None:
            metadata["student"] = {"policy": setting.student, "helped": self.student.helped}
        return metadata


def _load(setting: Collecting, output: Path) -> tuple[Any, tuple[str | None, ActionSpace, bool]]:
    collector = Collector(setting, output)
    return collector.run, (weights_stamp(collector.vla), collector.vla.action_space, collector.live)


def jobs_of(task: Task, states: Sequence[int], random_resets: int, count: int, setting: Collecting) -> list[Job]:
    """``count`` episodes of a task: seeded random resets, or ``states`` in turn."""
    jobs = []
    for i in range(count):
        if random_resets:
            init, repetition, name = None, i, f"random{i:04d}"
        else:
            init, repetition = states[i % len(states)], i // len(states)
            name = f"init{init:02d}-{repetition:02d}"
        id = f"{task.suite}-{task.index:02d}-{name}-{setting.tag}"
        jobs.append(Job(id, init, repetition, episode_seed(setting.seed, task, init, repetition)))
    return jobs


def collect(
    suite: str,
    output: Path,
    vla: str = "expert",
    checkpoint: str | None = None,
    vla_options: dict[str, Any] = {},  # noqa: B006
    export: str | None = None,
    shadow: bool = False,
    tasks: list[int | str] | None = None,
    init_states: str = "0-19",
    random_resets: NonNegativeInt = 0,
    episodes_per_task: PositiveInt | None = None,
    noise: NonNegativeFloat = 0.0,
    risk: float | None = None,
    generator: str | None = None,
    gate: str | None = None,
    pruning: dict[str, Any] | str | None = None,
    max_generated_run: PositiveInt | None = None,
    max_steps: PositiveInt | None = None,
    images: bool = False,
    instructions: Literal["task", "scene"] = "task",
    student: str | None = None,
    student_checkpoint: str | None = None,
    shuffle: bool = False,
    real_time: bool = False,
    vla_ms: NonNegativeFloat | None = None,
    mode: Literal["wait", "bridge"] = "bridge",
    label: bool = True,
    plans: bool = False,
    nudge: NonNegativeFloat = 0.0,
    workers: PositiveInt = 2,
    seed: NonNegativeInt = 0,
) -> None:
    """Roll a policy out in a simulator and store the episodes with the teacher's labels.

    Call it again with the same options to continue after an interruption, or with others to extend the store.

    Args:
        suite: the simulator's suite of tasks, for example libero_object, or a YAML file that describes a Gymnasium environment.
        output: rollout store to make or extend.
        vla: teacher: expert (scripted, sees poses), nano_vla, openvla, lerobot, remote, an entry point of spvla.vlas, or
            package.module:factory.
        checkpoint: the VLA's folder or hf://owner/name.
        vla_options: the VLA's other options, for openvla such as {dtype: bfloat16} (see spvla.vlas.openvla.load).
        export: exported folder; the accelerated policy acts, and the teacher labels every visited state.
        shadow: with export, the teacher acts and the accelerated policy only says what it would have done.
        tasks: task indices or names; all if omitted.
        init_states: official initial states, such as 0-19; 0-19 train, 20-29 calibrate, 30-49 are for evaluation only.
        random_resets: so many seeded random resets of each task, in place of official initial states.
        episodes_per_task: stop after this many per task, walking through init_states again if there are more.
        noise: largest standard deviation of the noise on executed actions (normalised units); labels stay clean.
        risk: allowed risk of the accelerated policy; the export's default if omitted.
        generator: generator of the accelerated policy; the export's default if omitted.
        gate: gate of the accelerated policy; the export's default if omitted.
        pruning: visual tokens that the VLA keeps where it acts: fast_fewer, slow_fewer, none, or fields (see
            spvla.pruning.make_pruner); the export's default if omitted.
        max_generated_run: longest run of generated actions; the export's default if omitted.
        max_steps: step limit of an episode; the suite's if omitted.
        images: store what the camera saw at every step, as JPEG.
        instructions: task asks for the task's own object; scene asks in half of the episodes for another object of the
            scene, chosen by the episode's seed (the policy must be the expert, or understand such instructions).
        student: another policy, which acts while the teacher labels every state it visits; the teacher takes over at
            random moments and when the student stalls. Its weights are read again before each episode, so that a
            training run may go on beside this command.
        student_checkpoint: passed to the student.
        shuffle: the scene's objects trade places, as the episode's seed decides.
        real_time: with export, the simulated world moves on while the VLA thinks: generator and gate learn the states in which
            they act then.
        vla_ms: real time: milliseconds of a call of the VLA.
        mode: real time: bridge, the generator acts while the VLA thinks, or wait for it where it is asked.
        label: with export, ask the teacher at every step. Otherwise the store has what a robot would know: the VLA's actions
            where it was asked and, with a live gate, how probable that was.
        plans: for a VLA that plans in chunks: ask for a fresh plan at every visited state, and store it whole. What distill
            --vla_plan learns from. Where the VLA plans in any case it is asked twice, to see whether it would say the same.
        nudge: metres by which the asked object is moved while the hand is on its way, as in eval closed_loop; 0: not at all.
        workers: processes, one thread each. With a live gate all episodes are one deployment, in one process.
        seed: of resets and noise.
    """
    if vla_ms is not None and not real_time:
        raise InputError("vla_ms: applies in real time only; add --real_time true", field="vla_ms")
    states = parse_range(init_states)
    count = random_resets or episodes_per_task or len(states)
    setting = Collecting(
        source=VLASource(vla, checkpoint, vla_options, suite),
        export=export,
        shadow=shadow,
        risk=risk,
        generator=generator,
        gate=gate,
        pruning=pruning,
        max_generated_run=max_generated_run,
        max_steps=max_steps,
        noise=noise,
        images=images,
        instructions=instructions,
        student=student,
        student_checkpoint=student_checkpoint,
        shuffle=shuffle,
        real_time=RealTime(vla_ms, mode=mode) if real_time else None,
        label=label,
        plans=plans,
        nudge=Nudge(nudge) if nudge else None,
        seed=seed,
        environment=stamp(suite),
    )
    setting.check()
    chosen = load_tasks(suite, tasks, max_steps)
    for task in chosen if not random_resets else ():
        require_init_states(task, states[:count], init_states)
    from tqdm import tqdm

    with locked(output), Workers[Sequence[Group[Job]], dict[str, Any], Any](partial(_load, setting, output), workers) as pool:
        weights, space, live = pool.facts()
        setting = replace(setting, weights=weights)
        writer = RolloutWriter(output, space)
        by_task: list[list[Group[Job]]] = []
        total, left = 0, 0
        for task in chosen:
            jobs = jobs_of(task, states, random_resets, count, setting)
            waiting = [job for job in jobs if not writer.finished(job.id)]
            total, left = total + len(jobs), left + len(waiting)
            pieces = 1 if live else parts_for(len(waiting), workers) if student is None else ceil(len(waiting) / ROUND)
            by_task.append(split(task, waiting, pieces))
        groups = [group for parts in zip_longest(*by_task) for group in parts if group is not None]  # tasks in turn
        successes = 0
        with tqdm(total=total, initial=total - left, desc=f"collect {suite}", unit="episode") as bar:
            work = [groups] if live and groups else [[group] for group in groups]
            for i, result in enumerate(pool.run(work)):
                successes += bool(result["success"])
                bar.set_postfix(success=f"{successes / (i + 1):.0%}", calls=int(result["vla_calls"]))
                bar.update()
        finalize(output)
    print(f"{output}: {total} episodes of this call, {left} of them new; finalised")
