"""Collect rollouts in LIBERO into a rollout store: ``python -m data collect``.

Every episode is one job with an id made from what determines it, so that a run that was killed, split over workers or
extended by another call ends with exactly the episodes it should have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.libero import LiberoEnv, Task, load_tasks
from data.parallel import chunks, run_groups
from data.rollout import ActionNoise, rollout
from spvla.episodes import RolloutWriter
from spvla.errors import InputError
from spvla.export import accelerate
from spvla.policy import episode_stats
from spvla.vlas.registry import load_vla, needs_images


def parse_range(text: str) -> list[int]:
    """``"0-19"``, ``"3"`` or ``"0-4,10,12-14"`` to a list of numbers. Raises :class:`InputError` for anything else."""
    out: list[int] = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise InputError(f"init_states {text!r}: expected numbers and ranges such as 0-19 or 0-4,10")
        out += range(int(first), int(last) + 1)
    return out


@dataclass(frozen=True)
class Setting:
    """What determines an episode beside task, initial state and repetition."""

    policy: str
    checkpoint: str | None
    export: str | None
    shadow: bool
    risk: float | None
    generator: str | None
    scheduler: str | None
    max_generated_run: int | None
    noise: float
    seed: int

    @property
    def tag(self) -> str:
        """A short hash that tells settings apart in job ids; an export counts by its content, not its folder's name."""
        values = asdict(self)
        if self.export is not None:
            config = Path(self.export) / "config.json"
            values["export"] = hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else self.export
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


def episode_seed(seed: int, task: Task, init_state: int | None, repetition: int) -> int:
    """The seed of an episode, from what identifies it."""
    text = f"{seed}/{task.suite}/{task.name}/{init_state}/{repetition}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") & 0x7FFFFFFF


def _collect_group(group: Group) -> Iterator[dict[str, Any]]:
    setting = group.setting
    vla = load_vla(setting.policy, setting.checkpoint)
    teacher = None
    if setting.export is None:
        policy = accelerate(vla, generator="none")
    else:
        policy = accelerate(
            vla,
            setting.export,
            setting.risk,
            generator=setting.generator,
            scheduler=setting.scheduler,
            max_generated_run=setting.max_generated_run,
            shadow=setting.shadow,
        )
        teacher = load_vla(setting.policy, setting.checkpoint)
    writer = RolloutWriter(group.output, policy.space, policy=setting.policy)
    noise = ActionNoise(setting.noise) if setting.noise else None
    with LiberoEnv(group.task, render=needs_images(vla)) as env:
        for job in group.jobs:
            result = rollout(env, policy, init_state=job.init_state, seed=job.seed, noise=noise, teacher=teacher)
            result.episode.metadata = {
                "suite": group.task.suite,
                "task": group.task.index,
                "task_name": group.task.name,
                "init_state": job.init_state,
                "repetition": job.repetition,
                "seed": job.seed,
                "accelerated": setting.export is not None and not setting.shadow,
                "noise": setting.noise,
            }
            writer.write(job.id, [result.episode])
            yield {"job": job.id, "success": result.episode.success, **episode_stats(result.steps)}


def collect(
    suite: str,
    output: Path,
    policy: str = "expert",
    checkpoint: str | None = None,
    export: str | None = None,
    shadow: bool = False,
    tasks: list[int | str] | None = None,
    init_states: str = "0-19",
    random_resets: bool = False,
    episodes_per_task: int | None = None,
    noise: float = 0.0,
    risk: float | None = None,
    generator: str | None = None,
    scheduler: str | None = None,
    max_generated_run: int | None = None,
    workers: int = 2,
    seed: int = 0,
) -> None:
    """Roll a policy out in LIBERO and store the episodes with the teacher's labels.

    Call it again with the same options to continue after an interruption, or with others to extend the store.

    Args:
        suite: LIBERO suite, for example libero_object.
        output: rollout store to make or extend.
        policy: teacher: expert, an entry point of spvla.vlas, or package.module:factory.
        checkpoint: passed to the policy.
        export: exported folder; the accelerated policy acts, and the teacher labels every visited state.
        shadow: with export, the teacher acts and the accelerated policy only says what it would have done.
        tasks: task indices or names; all if omitted.
        init_states: official initial states, such as 0-19; 0-19 train, 20-29 calibrate, 30-49 are for evaluation only.
        random_resets: seeded random resets in place of official initial states; the range then counts repetitions.
        episodes_per_task: stop after this many per task, walking through init_states again if there are more.
        noise: largest standard deviation of the noise on executed actions (normalised units); labels stay clean.
        risk: allowed risk of the accelerated policy; the export's default if omitted.
        generator: generator of the accelerated policy; the export's default if omitted.
        scheduler: scheduler of the accelerated policy; the export's default if omitted.
        max_generated_run: longest run of generated actions; the export's default if omitted.
        workers: processes, one thread each.
        seed: of resets and noise.
    """
    states = parse_range(init_states)
    count = episodes_per_task or len(states)
    setting = Setting(policy, checkpoint, export, shadow, risk, generator, scheduler, max_generated_run, noise, seed)
    load_vla(policy, checkpoint)  # an unknown policy is told before any worker starts
    shards = output / ".shards"
    groups: list[Group] = []
    total, left = 0, 0
    for task in load_tasks(suite, tasks):
        available = len(task.init_states()) if not random_resets else None
        jobs = []
        for i in range(count):
            state, repetition = states[i % len(states)], i // len(states)
            if available is not None and state >= available:
                raise InputError(f"init_states {init_states}: {suite} task {task.index} has {available} initial states")
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
        groups += [Group(task, tuple(part), setting, str(output)) for part in chunks(waiting, parts)]
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
