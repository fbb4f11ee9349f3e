"""The episodes of an evaluation: what every cell shares, where they start, and one raw row for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.envs.base import HandTracking, RenderMode, Task
from data.envs.perturb import Nudge, RealTime
from data.jobs import Group, Setting, environment, episode_seed, parse_range, parts_for, require_init_states, split
from data.rollout import Rollout, deviations, rollout
from eval.cells import Cell, cell_pruner
from eval.film import write_film
from eval.motion import motion
from eval.rerun import log_rollout
from eval.summary import LIVE
from spvla.assemble import accelerate
from spvla.errors import InputError
from spvla.export import Export, fingerprint, load_export
from spvla.gates import GATES, has_risk
from spvla.gates.base import eyes_of
from spvla.history import UNSEEN, Source
from spvla.recording import Policy
from spvla.steps import StepInfo, audit_steps, run_lengths
from spvla.vlas.base import VLA, Viewing, VLAOutput, needs_images
from spvla.vlas.conventions import decode_image
from spvla.vlas.registry import weights_stamp


@dataclass(frozen=True, kw_only=True)
class Evaluation(Setting):
    """What all cells share."""

    rules: dict[str, dict[str, int | float]]
    label: bool
    pruning: dict[str, dict[str, Any]] | None = None
    real_time: RealTime | None = None
    nudge: Nudge | None = None
    render: RenderMode = "full"

    def time_of(self, cell: Cell) -> RealTime | None:
        """How time goes by for ``cell``; None: the world stands still while its policy thinks."""
        if self.real_time is None or cell.mode is None:
            return self.real_time
        return None if cell.mode == "paused" else replace(self.real_time, mode=cell.mode)

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise :class:`InputError` for unknown rules and prunings, and for cells in another time than there is."""
        for cell in cells:
            if cell.mode is not None and self.real_time is None:
                raise InputError(
                    f"cell {cell.name}: has a mode, which applies in real time; add --real_time true", field="cells"
                )
            self.time_of(cell)
        for name in self.rules:
            if name not in GATES:
                message = f"rules: gate {name!r} is unknown; available: {', '.join(GATES.names())}"
                raise InputError(message, field="rules")
        for name in self.pruning or {}:
            cell_pruner(name, self.pruning or {})


@dataclass(frozen=True)
class Job:
    """One episode of one cell; ``film`` and ``rerun`` are the folders for its film and its Rerun recording. ``learned`` is what
    the cell's live gate had learned when an earlier run was stopped."""

    cell: Cell
    init_state: int | None
    seed: int
    film: Path | None = None
    rerun: Path | None = None
    learned: dict[str, Any] | None = None


Row = dict[str, Any]
Starts = dict[Task, list[tuple[int | None, int]]]  # initial state or None, and seed, of each task's episodes


def starts_of(tasks: Sequence[Task], init_states: str | None, random_resets: int, seed: int) -> Starts:
    """Where the episodes of every task start. Raises :class:`InputError` if there are none, or a task lacks a state."""
    states = parse_range(init_states) if init_states else []
    if not states and random_resets < 1:
        raise InputError("closed_loop: there are no episodes; give init_states, random_resets, or both")
    starts: Starts = {}
    for task in tasks:
        require_init_states(task, states, str(init_states))
        resets = f"evaluation/{seed}"  # seeds that collecting never uses
        starts[task] = [(s, episode_seed(seed, task, s, 0)) for s in states]
        starts[task] += [(None, episode_seed(resets, task, None, i)) for i in range(random_resets)]
    return starts


def groups_of(
    starts: Starts, cells: Sequence[Cell], done: Sequence[Row], workers: int, films: Path | None, rerun: Path | None = None
) -> list[tuple[Group[Job], ...]]:
    """What is left to run, in parts for one worker each. Into ``films`` and ``rerun`` goes each cell's first episode.

    All episodes of a cell with a live gate are one part, task after task, so that it does not depend on the workers what the
    gate has learned.
    """
    have = {(e["cell"], e["task"], e["init_state"], e["seed"]) for e in done}
    so_far = sorted((e for e in done if e.get("live")), key=lambda e: e["live_steps"])
    learned: dict[str, dict[str, Any]] = {e["cell"]: e["live"] for e in so_far}
    deployments: dict[Cell, list[Group[Job]]] = {cell: [] for cell in cells if cell.live}
    parts: list[tuple[Group[Job], ...]] = []
    for task, episodes in starts.items():
        jobs = []
        for init, seed in episodes:
            first = task == next(iter(starts)) and (init, seed) == episodes[0]
            missing = [c for c in cells if (c.name, task.index, init, seed) not in have]
            shown = (films, rerun) if first else (None, None)
            jobs += [Job(cell, init, seed, *shown, learned.get(cell.name)) for cell in missing]
        apart = [job for job in jobs if not job.cell.live]
        parts += [(group,) for group in split(task, apart, parts_for(len(apart), workers))]
        for cell, deployment in deployments.items():
            if own := tuple(job for job in jobs if job.cell == cell):
                deployment.append(Group(task, own))
    return parts + [tuple(deployment) for deployment in deployments.values() if deployment]


def in_turn(starts: Starts) -> list[tuple[Task, int | None, int]]:
    """The first episode of every task, then the second of every task, and so on."""
    return [(task, *episodes[i]) for i in range(len(next(iter(starts.values())))) for task, episodes in starts.items()]


def belonging(done: Sequence[Row], cells: Sequence[Cell], starts: Starts) -> list[Row]:
    """The rows of ``cells`` and ``starts``, in their order."""
    order = {cell.name: i for i, cell in enumerate(cells)}
    keys = {(task.index, *episode) for task, episodes in starts.items() for episode in episodes}
    mine = [e for e in done if e["cell"] in order and (e["task"], e["init_state"], e["seed"]) in keys]
    return sorted(mine, key=lambda e: (order[e["cell"]], e["task"], e["init_state"] or 0, e["seed"]))


def make_policy(cell: Cell, vla: VLA, export: Export | None, setting: Evaluation) -> Policy:
    """The policy of a cell around ``vla``. Raises :class:`InputError` that names the cell if there can be none."""
    try:
        return accelerate(
            vla,
            export,
            cell.risk,
            generator=cell.generator,
            gate=None if cell.gate == "none" else cell.gate,
            rule=setting.rules.get(cell.gate) if cell.horizon is None else {"steps": cell.horizon},
            pruning=cell_pruner(cell.pruning, setting.pruning or {}) or "none",
            max_generated_run=setting.max_generated_run if cell.horizon is None else cell.horizon,
            verify=cell.verify,  # type: ignore[arg-type]
            mode="bridge" if (time := setting.time_of(cell)) is not None and time.mode == "bridge" else "wait",
        )
    except InputError as error:
        hint = "; learned cells need --export" if export is None and cell.gate != "none" and has_risk(cell.gate) else ""
        raise InputError(f"cell {cell.name}: {error}{hint}") from None


class Runner:
    """What a worker process keeps: the VLA, and every cell's policy around it. Loading happens here, once."""

    def __init__(self, setting: Evaluation, cells: Sequence[Cell]) -> None:
        self.setting = setting
        self.vla = setting.source.load()
        export = load_export(setting.export) if setting.export else None
        self.tolerance = export.tolerance if export else 0.2
        self.sees = needs_images(self.vla) and setting.real_time is None
        self.content = fingerprint(setting.export)
        self.policies = {cell: make_policy(cell, self.vla, export, setting) for cell in cells}
        self.eyes = next((eyes for p in self.policies.values() if (eyes := eyes_of(p.gate)) is not None), None)
        self.teacher = setting.source.second(self.vla) if setting.label else None

    def run(self, groups: Sequence[Group[Job]]) -> Iterator[Row]:
        """Play groups of episodes one after another; yields the row of each episode."""
        for i, group in enumerate(groups):
            learned = {job.cell: job.learned for job in group.jobs if job.learned is not None} if i == 0 else {}
            for cell, state in learned.items():
                self.policies[cell].live.restore(state)
            yield from self._play(group)

    def _play(self, group: Group[Job]) -> Iterator[Row]:
        with environment(group.task, self.vla, self.setting.render, eyes=self.eyes) as env:
            for job in group.jobs:
                policy = self.policies[job.cell]
                result = rollout(
                    env,
                    policy,
                    init_state=job.init_state,
                    seed=job.seed,
                    teacher=self.teacher,
                    images=job.film is not None or (job.rerun is not None and self.sees),
                    real_time=self.setting.time_of(job.cell),
                    nudge=self.setting.nudge,
                )
                if job.rerun is not None:
                    log_rollout(job.rerun / f"{job.cell.name}.rrd", policy, result, self.tolerance)
                if job.film is not None:
                    _film(job.film, job.cell, policy, result)
                task = group.task
                hand = env.hand_position if isinstance(env, HandTracking) else None
                yield {
                    "cell": job.cell.name,
                    **asdict(job.cell),
                    "export": self.content,
                    **{"suite": task.suite, "task": task.index, "task_name": task.name},
                    **{"init_state": job.init_state, "seed": job.seed},
                    **self._measured(policy, result),
                    **motion(result.episode, policy.space, hand),
                    "live": policy.live.to_dict() if job.cell.live else None,
                }

    def _measured(self, policy: Policy, result: Rollout) -> dict[str, Any]:
        episode, stats, steps = result.episode, policy.stats(), result.steps
        generated, kept = (np.array([s.source == who for s in steps]) for who in UNSEEN)
        deviating = deviations(episode, policy.space, self.tolerance) if self.teacher else None
        return {
            "success": bool(episode.success),
            "steps": len(steps),
            "vla_calls": int(stats["vla_calls"]),
            "generated": int(generated.sum()),
            "kept": int(kept.sum()),
            "deviating": None if deviating is None else int(deviating.sum()),
            "held": int(stats["held"]),
            "seconds": len(steps) / policy.space.control_rate,
            "nudged": result.nudged,
            "reaction": result.reaction,
            "fallbacks": int(stats["fallbacks"]),
            "switches": int(stats["switches"]),
            "audits": int(stats["audits"]),
            "audit_steps": audit_steps(steps),
            **{name: stats.get(name) for name in LIVE},
            "accepted": accepted_counts(steps, policy.space.dim),
            "visual_tokens_mean": stats.get("visual_tokens_mean"),
            "visual_tokens_total": max((s.visual_tokens[1] for s in steps if s.visual_tokens), default=None),
            "generated_run_lengths": run_lengths(generated | kept).tolist(),
            "kept_tokens": None if policy.pruner is None else kept_counts(result.outputs),
            "trace": {
                "actions": np.round(episode.actions, 3).tolist(),
                "generated": generated.astype(int).tolist(),
                "kept": kept.astype(int).tolist(),
                "held": [int(s.source == Source.HELD) for s in steps],
                "visual_tokens": [s.visual_tokens and s.visual_tokens[0] for s in steps],
                "probability": [None if s.probability is None else round(s.probability, 3) for s in steps],
            },
        }


@dataclass(frozen=True)
class Facts:
    """What the command needs to know of the VLA that the workers loaded."""

    weights: str | None
    needs_images: bool


def load_runner(setting: Evaluation, cells: Sequence[Cell]) -> tuple[Any, Facts]:
    """For :class:`~data.parallel.Workers`. Raises :class:`InputError` for a cell that cannot be made."""
    runner = Runner(setting, cells)
    return runner.run, Facts(weights_stamp(runner.vla), needs_images(runner.vla))


def accepted_counts(steps: Sequence[StepInfo], dim: int) -> list[int] | None:
    """How often the VLA agreed with 0, 1, ... ``dim`` leading dimensions of a proposal; None if it never verified one."""
    accepted = [s.accepted for s in steps if s.accepted is not None]
    return np.bincount(accepted, minlength=dim + 1).tolist() if accepted else None


def kept_counts(outputs: Sequence[VLAOutput | None]) -> list[int] | None:
    """How often each visual token reached the language model, (N,); None if the VLA does not say."""
    counts: NDArray[np.int64] | None = None
    for output in outputs:
        if output is not None and output.visual_tokens is not None:
            counts = np.zeros(output.visual_tokens[1], np.int64) if counts is None else counts
            counts[slice(None) if output.kept_tokens is None else output.kept_tokens] += 1
    return None if counts is None else counts.tolist()


def _film(folder: Path, cell: Cell, policy: Policy, result: Rollout) -> None:
    """Write the film of an episode, as the VLA sees it where it says how."""
    (frames,) = result.episode.images.values()
    images = [decode_image(frame) for frame in frames]
    if isinstance(policy.vla, Viewing):
        images = [policy.vla.view(image) for image in images]
    write_film(folder, cell.name, images, result.steps, result.outputs, policy.space.control_rate)
