"""Collect rollouts in a simulator into a rollout store: ``python -m data collect``.

Every episode is one job with an id made from what determines it, so that a run that was killed, split over workers or
extended by another call ends with exactly the episodes it should have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.envs import load_tasks, make_env
from data.envs.base import Instructable, Privileged, Task
from data.images import UPRIGHT
from data.parallel import chunks, run_groups
from data.rollout import ActionNoise, rollout
from data.student import Student
from spvla.assemble import accelerate
from spvla.cli import NonNegativeFloat, NonNegativeInt, PositiveInt
from spvla.episodes import RolloutWriter
from spvla.errors import InputError
from spvla.export import fingerprint, load_export
from spvla.steps import episode_stats
from spvla.vlas.registry import free_memory, load_vla, needs_images, needs_wrist_image, second_vla, weights_stamp

ROUND = 4  # episodes of one task that a student plays before the next task's turn


def parse_range(text: str, what: str = "init_states") -> list[int]:
    """``"0-19"``, ``"3"`` or ``"0-4,10,12-14"`` to a list of numbers. Raises :class:`InputError` for anything else."""
    out: list[int] = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise InputError(f"{what} {text!r}: expected numbers and ranges such as 0-19 or 0-4,10")
        out += range(int(first), int(last) + 1)
    return out


def require_init_states(task: Task, states: Sequence[int], text: str) -> None:
    """Raise :class:`InputError` if ``task`` lacks one of the official initial states, which ``text`` asked for."""
    available = task.init_states
    if max(states) >= available:
        raise InputError(f"init_states {text}: {task.suite} task {task.index} has {available} initial states")


@dataclass(frozen=True)
class Setting:
    """What determines an episode beside task, initial state and repetition."""

    vla: str
    checkpoint: str | None
    export: str | None
    shadow: bool
    risk: float | None
    generator: str | None
    gate: str | None
    max_generated_run: int | None
    noise: float
    seed: int
    images: bool = False
    instructions: str = "task"
    student: str | None = None
    student_checkpoint: str | None = None
    vla_options: dict[str, Any] | None = None
    pruning: dict[str, Any] | str | None = None
    max_steps: int | None = None
    shuffle: bool = False
    weights: str | None = None

    @property
    def tag(self) -> str:
        """A short hash that tells settings apart in job ids; an export counts by its content, not its folder's name."""
        unset = {f.name: f.default for f in fields(self)}
        values = {k: v for k, v in asdict(self).items() if v != unset[k]}  # options added later change no earlier id
        if self.export is not None:
            values["export"] = fingerprint(self.export)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Job:
    """One episode."""

    id: str
    init_state: int | None
    repetition: int
    seed: int


@dataclass(frozen=True)
class Group:
    """Jobs of one task: a worker process makes the environment once for all of them."""

    task: Task
    jobs: tuple[Job, ...]
    setting: Setting
    output: str


def episode_seed(seed: int | str, task: Task, init_state: int | None, repetition: int) -> int:
    """The seed of an episode, from what identifies it; another ``seed`` makes another episode of the same initial state."""
    text = f"{seed}/{task.suite}/{task.name}/{init_state}/{repetition}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") & 0x7FFFFFFF


def choose_instruction(options: Sequence[str], seed: int) -> str:
    """Half of the time the first of a scene's instructions, which is its task's own, else one of the others."""
    rng = np.random.default_rng([seed, 1])
    own = len(options) == 1 or rng.random() < 0.5
    return options[0] if own else options[int(rng.integers(1, len(options)))]


def _collect_group(group: Group) -> Iterator[dict[str, Any]]:
    setting = group.setting
    source = (setting.vla, setting.checkpoint, setting.vla_options, group.task.suite)
    vla = load_vla(*source)
    perturbed = bool(setting.noise) or setting.student is not None
    teacher = second_vla(vla, *source) if perturbed or setting.export is not None else None
    if setting.export is None:
        policy = accelerate(vla, generator="none", pruning=setting.pruning)
    else:
        policy = accelerate(
            vla,
            setting.export,
            setting.risk,
            generator=setting.generator,
            gate=setting.gate,
            pruning=setting.pruning,
            max_generated_run=setting.max_generated_run,
            shadow=setting.shadow,
        )
    writer = RolloutWriter(group.output, policy.space, policy=setting.vla)
    noise = ActionNoise(setting.noise) if setting.noise else None
    student = None if setting.student is None else Student(setting.student, setting.student_checkpoint, policy.space)
    rendered = setting.images or student is not None or needs_images(vla)
    with make_env(group.task, render="fast" if rendered else None, wrist_camera=needs_wrist_image(vla)) as env:
        asked: list[str] = []
        if setting.instructions == "scene":
            if not isinstance(env, Instructable):
                told = f"instructions: in scenes of {group.task.suite} only the task's own can be given; use task"
                raise InputError(told, code="unsupported", field="instructions")
            env.reset(group.jobs[0].init_state)
            asked = env.instructions()
        for job in group.jobs:
            instruction = choose_instruction(asked, job.seed) if asked else group.task.instruction
            result = rollout(
                env,
                policy,
                init_state=job.init_state,
                seed=job.seed,
                noise=noise,
                teacher=teacher,
                driver=student,
                instruction=instruction,
                images=setting.images,
                shuffle=setting.shuffle,
            )
            result.episode.metadata = {
                "suite": group.task.suite,
                "task": group.task.index,
                "task_name": group.task.name,
                "init_state": job.init_state,
                "repetition": job.repetition,
                "seed": job.seed,
                "accelerated": setting.export is not None and not setting.shadow,
                "risk": setting.risk,
                "noise": setting.noise,
            }
            if setting.shuffle:
                result.episode.metadata["shuffled"] = True
            if setting.images:
                result.episode.metadata["images"] = UPRIGHT
                if isinstance(env, Privileged):
                    result.episode.metadata["scene"] = env.scene_facts(instruction)
            if student is not None:
                result.episode.metadata["student"] = {"policy": setting.student, "helped": student.helped}
            writer.write(job.id, [result.episode])
            yield {"job": job.id, "success": result.episode.success, **episode_stats(result.steps)}


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
    workers: PositiveInt = 2,
    seed: NonNegativeInt = 0,
) -> None:
    """Roll a policy out in a simulator and store the episodes with the teacher's labels.

    Call it again with the same options to continue after an interruption, or with others to extend the store.

    Args:
        suite: the simulator's suite of tasks, for example libero_object.
        output: rollout store to make or extend.
        vla: teacher: expert (scripted, sees poses), nano_vla, openvla, lerobot, remote, an entry point of spvla.vlas, or
            package.module:factory.
        checkpoint: the VLA's folder or hub id.
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
        pruning: visual tokens that the VLA keeps where it acts: release, readme, none, or fields of
            spvla.pruning.TokenPruner; the export's default if omitted.
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
        workers: processes, one thread each.
        seed: of resets and noise.
    """
    states = parse_range(init_states)
    count = random_resets or episodes_per_task or len(states)
    setting = Setting(vla, checkpoint, export, shadow, risk, generator, gate, max_generated_run, noise, seed)
    setting = replace(
        setting,
        images=images,
        instructions=instructions,
        student=student,
        student_checkpoint=student_checkpoint,
        shuffle=shuffle,
    )
    setting = replace(setting, vla_options=dict(vla_options) or None, pruning=pruning, max_steps=max_steps)
    accelerated = {"shadow": shadow or None, "risk": risk, "generator": generator, "gate": gate}
    for name, value in (*accelerated.items(), ("max_generated_run", max_generated_run)):
        if value is not None and export is None:
            raise InputError(f"{name}: belongs to an accelerated policy; name its --export")
    if student_checkpoint is not None and student is None:
        raise InputError("student_checkpoint: whose? name the --student")
    teacher = load_vla(vla, checkpoint, vla_options, suite)  # a VLA that cannot be made is told before any worker starts
    setting, space = replace(setting, weights=weights_stamp(teacher)), teacher.action_space
    del teacher
    free_memory()
    if export is not None:
        load_export(export)
    shards = output / ".shards"
    by_task: list[list[Group]] = []
    total, left = 0, 0
    for task in load_tasks(suite, tasks, max_steps):
        if not random_resets:
            require_init_states(task, states[:count], init_states)
        jobs = []
        for i in range(count):
            state, repetition = states[i % len(states)], i // len(states)
            if random_resets:
                state_id, repetition, init = f"random{i:04d}", i, None
            else:
                state_id, init = f"init{state:02d}-{repetition:02d}", state
            name = f"{suite}-{task.index:02d}-{state_id}-{setting.tag}"
            jobs.append(Job(name, init, repetition, episode_seed(seed, task, init, repetition)))
        total += len(jobs)
        waiting = [job for job in jobs if not (shards / f"{job.id}.parquet").exists()]
        left += len(waiting)
        # Enough parts to keep every worker busy, few enough that making environments stays cheap.
        parts = max(1, min(workers, len(waiting) // 10)) if waiting else 0
        if student is not None:
            parts = ceil(len(waiting) / ROUND)
        by_task.append([Group(task, tuple(part), setting, str(output)) for part in chunks(waiting, parts)])
    RolloutWriter(output, space)  # a folder that cannot be a store of this robot is told now too
    groups = [group for parts in zip_longest(*by_task) for group in parts if group is not None]  # tasks in turn
    from tqdm import tqdm

    successes = 0
    with tqdm(total=total, initial=total - left, desc=f"collect {suite}", unit="episode") as bar:
        for i, result in enumerate(run_groups(_collect_group, groups, workers)):
            successes += bool(result["success"])
            bar.set_postfix(success=f"{successes / (i + 1):.0%}", calls=int(result["vla_calls"]))
            bar.update()
    from spvla.episodes import finalize

    finalize(output)
    print(f"{output}: {total} episodes of this call, {left} of them new; finalised")
