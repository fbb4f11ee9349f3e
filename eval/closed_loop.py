"""Every cell of generator x gate x pruning in the simulator, paired: ``python -m eval closed_loop``.

All cells run the same tasks, initial states and seeds. Success is counted over workers in parallel; policy time is taken
afterwards in one uncontended process with one thread.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data.collect import episode_seed, parse_range, require_init_states
from data.envs import load_tasks, make_env
from data.envs.base import Env, RenderMode, Task
from data.envs.perturb import Nudge, RealTime
from data.parallel import chunks, run_groups
from data.rollout import Rollout, deviations, rollout
from eval.film import write_film
from eval.output import append, continued, table, write_csv, write_summary
from eval.statistics import mcnemar, mean_and_error, paired_difference, wilson
from spvla.assemble import accelerate
from spvla.cli import NonNegativeFloat, NonNegativeInt, PositiveInt
from spvla.errors import InputError
from spvla.export import Export, fingerprint, load_export
from spvla.files import write_text
from spvla.gates import GATES, has_risk
from spvla.history import Source
from spvla.pruning.pruner import PRESETS, TokenPruner, make_pruner
from spvla.recording import Policy
from spvla.steps import run_lengths
from spvla.vlas.base import VLA, VLAOutput
from spvla.vlas.conventions import decode_image
from spvla.vlas.registry import free_memory, load_vla, needs_images, needs_wrist_image, second_vla, weights_stamp

COLUMNS = (
    *(
        "generator",
        "gate",
        "pruning",
        "risk",
        "episodes",
        "success_rate",
        "paired_delta",
        "paired_delta_ci95",
        "vla_call_rate",
    ),
    *("vla_calls_per_episode", "steps_per_episode", "deviation_rate", "generated_run_length_mean", "fallbacks"),
    *("visual_tokens_mean", "policy_ms_per_step_p50", "policy_seconds_per_episode", "policy_speedup"),
)
LIVE = ("live_risk", "live_risk_bound95", "threshold", "live_steps", "drift_alarms")
UNTIMED = dict.fromkeys([*(f"policy_ms_per_step_p{q}" for q in (50, 95, 99)), "policy_seconds_per_episode"])


@dataclass(frozen=True)
class Cell:
    """One configuration of the policy. ``none`` as generator leaves every step to the VLA, as pruning every token."""

    generator: str
    gate: str
    risk: float | None = None
    pruning: str = "none"

    @property
    def name(self) -> str:
        """Readable and unique."""
        scheduling = "vla" if self.generator == "none" else f"{self.generator}+{self.gate}"
        pruning = "" if self.pruning == "none" else f"+{self.pruning}"
        return scheduling + pruning + ("" if self.risk is None else f"@{self.risk:g}")

    @property
    def live(self) -> bool:
        """The gate learns from episode to episode: all episodes of the cell are one deployment, in order."""
        return self.gate == "live"


def parse_cells(cells: Sequence[str], risks: Sequence[float | None]) -> list[Cell]:
    """Cells from their names; the VLA alone always leads.

    ``vla``, ``ridge+release``, ``mlp+learned`` (once per risk), ``mlp+learned@0.05``; each with a pruning after it:
    ``vla+readme``, ``ridge+release+release``, ``mlp+learned+budget@0.05``.
    """
    out = [Cell("none", "none")]
    for text in cells:
        parts, at, risk = text.partition("@")
        names = parts.split("+")
        if names[0] == "vla":
            names = ["none", "none", *names[1:]]
        if not (2 <= len(names) <= 3 and all(names)) or (at and names[0] == "none"):
            raise InputError(f"cell {text!r}: expected vla or generator+gate, then +pruning and @risk if wanted")
        if at and not has_risk(names[1]):
            raise InputError(f"cell {text!r}: the gate {names[1]!r} has no risk")
        try:
            asked = [float(risk)] if at else (list(risks) if has_risk(names[1]) else [None])
        except ValueError:
            raise InputError(f"cell {text!r}: {risk!r} is not a risk") from None
        out += [Cell(names[0], names[1], r, *names[2:]) for r in asked]
    return list(dict.fromkeys(out))


def cell_pruner(name: str, named: Mapping[str, Mapping[str, Any]]) -> TokenPruner | None:
    """The pruner called ``name`` among the ``named`` ones; ``release`` and ``readme`` need no entry, an entry changes them."""
    if name in named:
        speed = {"speed": name} if name in PRESETS else {}
        return make_pruner({**speed, **named[name]}, f"pruning {name!r}")
    if name not in ("none", *PRESETS):
        raise InputError(f"pruning {name!r} is unknown; there are: {', '.join(dict.fromkeys((*named, *PRESETS)))}")
    return make_pruner(name)


@dataclass(frozen=True)
class Setting:
    """What all cells share."""

    vla: str
    checkpoint: str | None
    export: str | None
    rules: dict[str, dict[str, int | float]]
    max_generated_run: int | None
    label: bool
    vla_options: dict[str, Any] | None = None
    pruning: dict[str, dict[str, Any]] | None = None
    max_steps: int | None = None
    real_time: RealTime | None = None
    nudge: Nudge | None = None
    render: RenderMode = "full"


@dataclass(frozen=True)
class Group:
    """Episodes of one task, for one worker process."""

    task: Task
    jobs: tuple[tuple[Cell, int | None, int], ...]  # cell, initial state, seed
    setting: Setting
    films: Path | None = None  # where films of the episode below go, of every cell
    filmed: tuple[int | None, int] | None = None  # initial state, seed
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)  # by cell, what its live gate has learned before


def make_policy(cell: Cell, vla: VLA, export: Export | None, setting: Setting) -> Policy:
    """The policy of a cell around ``vla``. Raises :class:`InputError` that names the cell if there can be none."""
    try:
        return accelerate(
            vla,
            export,
            cell.risk,
            generator=cell.generator,
            gate=None if cell.gate == "none" else cell.gate,
            rule=setting.rules.get(cell.gate),
            pruning=cell_pruner(cell.pruning, setting.pruning or {}) or "none",
            max_generated_run=setting.max_generated_run,
        )
    except InputError as error:
        hint = "; learned cells need --export" if export is None and cell.gate != "none" and has_risk(cell.gate) else ""
        raise InputError(f"cell {cell.name}: {error}{hint}") from None


def _environment(task: Task, setting: Setting, vla: VLA) -> Env:
    render = setting.render if needs_images(vla) else None
    return make_env(task, render=render, wrist_camera=needs_wrist_image(vla))


def _run_deployment(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Groups one after another; each goes on with what the live gates have learned in those before."""
    learned: dict[str, dict[str, Any]] = {}
    for group in groups:
        for row in _run_group(replace(group, learned=group.learned | learned)):
            if row["live"] is not None:
                learned[row["cell"]] = row["live"]
            yield row


def _run_group(group: Group) -> Iterator[dict[str, Any]]:
    setting = group.setting
    export = load_export(setting.export) if setting.export else None
    source = (setting.vla, setting.checkpoint, setting.vla_options, group.task.suite)
    vla = load_vla(*source)
    teacher = second_vla(vla, *source) if setting.label else None
    policies: dict[Cell, Policy] = {}
    tolerance = export.tolerance if export else 0.2
    content = fingerprint(setting.export)
    with _environment(group.task, setting, vla) as env:
        for cell, init_state, seed in group.jobs:
            if cell not in policies:
                policies[cell] = make_policy(cell, vla, export, setting)
                if cell.name in group.learned:
                    policies[cell].live.restore(group.learned[cell.name])
            policy = policies[cell]
            film = group.films is not None and (init_state, seed) == group.filmed
            result = rollout(
                env,
                policy,
                init_state=init_state,
                seed=seed,
                teacher=teacher,
                images=film,
                real_time=setting.real_time,
                nudge=setting.nudge,
            )
            if film and group.films is not None:
                _film(group.films, cell, policy, result)
            episode, stats = result.episode, policy.stats()
            generated = np.array([s.source == Source.GENERATOR for s in result.steps])
            deviating = deviations(episode, policy.space, tolerance) if teacher else None
            yield {
                "cell": cell.name,
                **asdict(cell),
                "export": content,
                "suite": group.task.suite,
                "task": group.task.index,
                "task_name": group.task.name,
                "init_state": init_state,
                "seed": seed,
                "success": bool(episode.success),
                "steps": len(result.steps),
                "vla_calls": int(stats["vla_calls"]),
                "generated": int(generated.sum()),
                "deviating": None if deviating is None else int(deviating.sum()),
                "held": int(stats["held"]),
                "seconds": len(result.steps) / policy.space.control_rate,
                "nudged": result.nudged,
                "reaction": result.reaction,
                "fallbacks": int(stats["fallbacks"]),
                "switches": int(stats["switches"]),
                "audits": int(stats["audits"]),
                **{k: stats.get(k) for k in LIVE},
                "live": policy.live.to_dict() if cell.live else None,
                "visual_tokens_mean": stats.get("visual_tokens_mean"),
                "visual_tokens_total": max((s.visual_tokens[1] for s in result.steps if s.visual_tokens), default=None),
                "generated_run_lengths": run_lengths(generated).tolist(),
                "kept": None if policy.pruner is None else kept_counts(result.outputs),
                "trace": {
                    "actions": np.round(episode.actions, 3).tolist(),
                    "generated": generated.astype(int).tolist(),
                    "held": [int(s.source == Source.HELD) for s in result.steps],
                    "visual_tokens": [s.visual_tokens and s.visual_tokens[0] for s in result.steps],
                    "probability": [None if s.probability is None else round(s.probability, 3) for s in result.steps],
                },
            }


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
    view = getattr(policy.vla, "view", lambda image: image)
    images = [view(decode_image(frame)) for frame in frames]
    write_film(folder, cell.name, images, result.steps, result.outputs, policy.space.control_rate)


def measure_time(
    cells: Sequence[Cell], jobs: Sequence[tuple[Task, int | None, int]], setting: Setting
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Milliseconds inside ``select_action`` per cell, and one raw row per episode: one process, one thread, cells in turn on
    every episode.

    Rendering is the simulator's time, not the policy's, and left out. Where the VLA reports its stages, each one's median
    over its calls is beside them. The first episode runs twice, for warm-up, and counts once.
    """
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    vla = load_vla(setting.vla, setting.checkpoint, setting.vla_options, jobs[0][0].suite)
    export = load_export(setting.export) if setting.export else None
    policies = {cell: make_policy(cell, vla, export, setting) for cell in cells}
    milliseconds: dict[Cell, list[list[float]]] = {cell: [] for cell in cells}
    stages: dict[Cell, dict[str, list[float]]] = {cell: {} for cell in cells}
    raw: list[dict[str, Any]] = []
    with tqdm(total=len(jobs), desc="timing, one thread", unit="episode") as bar:
        for task in dict.fromkeys(task for task, _, _ in jobs):
            mine = [(init, seed) for t, init, seed in jobs if t == task]
            warm_up = mine[:1] if task == jobs[0][0] else []
            with _environment(task, setting, vla) as env:
                for i, (init, seed) in enumerate([*warm_up, *mine]):
                    for cell, policy in policies.items():
                        rollout(env, policy, init_state=init, seed=seed)
                        if i < len(warm_up):
                            continue
                        ms = [s.milliseconds["total"] - s.milliseconds.get("capture", 0.0) for s in policy.steps]
                        milliseconds[cell].append(ms)
                        facts = {"cell": cell.name, "task": task.index, "init_state": init, "seed": seed, "steps": len(ms)}
                        raw.append({**facts, "vla_calls": policy.stats()["vla_calls"], "policy_seconds": sum(ms) / 1e3})
                        for stage, took in ((k, v) for s in policy.steps for k, v in s.milliseconds.items()):
                            if stage.startswith("vla"):
                                stages[cell].setdefault(stage.replace("/", "_"), []).append(took)
                    bar.update(i >= len(warm_up))
    torch.set_num_threads(threads)
    out = {}
    for cell, episodes in milliseconds.items():
        steps = np.concatenate(episodes)
        out[cell.name] = {f"policy_ms_per_step_p{q}": float(np.percentile(steps, q)) for q in (50, 95, 99)}
        out[cell.name]["policy_seconds_per_episode"] = float(np.mean([sum(e) for e in episodes]) / 1e3)
        out[cell.name] |= {f"{stage}_ms_p50": float(np.median(ms)) for stage, ms in stages[cell].items()}
    return out, raw


def summarise(episodes: Sequence[dict[str, Any]], timing: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row per cell, paired against the VLA alone."""
    cells = list(dict.fromkeys(e["cell"] for e in episodes))
    by_cell = {c: {(e["suite"], e["task"], e["init_state"], e["seed"]): e for e in episodes if e["cell"] == c} for c in cells}
    control = by_cell.get("vla", {})
    rows = []
    for name, found in by_cell.items():
        es = list(found.values())
        successes, n = sum(e["success"] for e in es), len(es)
        steps, calls = np.array([e["steps"] for e in es]), np.array([e["vla_calls"] for e in es])
        generated = np.array([e["generated"] for e in es])
        decided = steps - np.array([e["held"] for e in es])  # without those that only went by
        row: dict[str, Any] = {k: es[0][k] for k in ("cell", "generator", "gate", "pruning", "risk")}
        row |= {
            "episodes": n,
            "successes": successes,
            "success_rate": successes / n,
            "success_ci95": wilson(successes, n),
        }
        pairs = [key for key in found if key in control]
        if pairs:
            treated, base = [found[k]["success"] for k in pairs], [control[k]["success"] for k in pairs]
            delta, interval = paired_difference(treated, base)
            row |= {
                "pairs": len(pairs),
                "paired_delta": delta,
                "paired_delta_ci95": interval,
                "mcnemar_p": mcnemar(treated, base),
                "vla_calls_ratio": float(sum(control[k]["vla_calls"] for k in pairs) / max(1, calls.sum())),
            }
        official = [e["success"] for e in es if e["init_state"] is not None]
        if 0 < len(official) < n:
            resets = n - len(official)
            row |= {"official_successes": sum(official), "reset_successes": successes - sum(official), "resets": resets}
        runs = [r for e in es for r in e["generated_run_lengths"]]
        row |= {
            "vla_call_rate": float(calls.sum() / steps.sum()),
            "skipped": float(generated.sum() / decided.sum()),
            "vla_calls_per_episode": float(calls.mean()),
            "steps_per_episode": float(steps.mean()),
            "seconds_per_episode": float(np.mean([e["seconds"] for e in es])),
            "held_per_episode": float(np.mean([e["held"] for e in es])),
            "generated_run_length_mean": float(np.mean(runs)) if runs else 0.0,
            "fallbacks": int(sum(e["fallbacks"] for e in es)),
            "switches": int(sum(e["switches"] for e in es)),
        }
        if nudged := [e for e in es if e["nudged"] is not None]:
            reactions = [e["reaction"] for e in nudged if e["reaction"] is not None]
            row |= {
                "nudged": len(nudged),
                "nudged_successes": sum(e["success"] for e in nudged),
                "reaction_steps_mean": float(np.mean(reactions)) if reactions else None,
                "reaction_steps_max": max(reactions, default=None),
            }
        seeing = [e for e in es if e["visual_tokens_mean"] is not None]
        if seeing:
            weights = [e["vla_calls"] for e in seeing]
            row["visual_tokens_mean"] = float(np.average([e["visual_tokens_mean"] for e in seeing], weights=weights))
            row["visual_tokens_total"] = seeing[0]["visual_tokens_total"]
        if counted := [e for e in seeing if e.get("kept") is not None]:
            kept = np.sum([e["kept"] for e in counted], axis=0)
            row["kept_share"] = (kept / sum(e["vla_calls"] for e in counted)).round(3).tolist()
        if (last := max(es, key=lambda e: e.get("live_steps") or 0)).get("live_steps") is not None:
            row |= {"audits_per_episode": float(np.mean([e["audits"] for e in es])), **{k: last[k] for k in LIVE}}
        row["deviation_rate"] = None
        labelled = [e for e in es if e["deviating"] is not None]
        if labelled:
            mean, error = mean_and_error([e["deviating"] / (e["steps"] - e["held"]) for e in labelled])
            row |= {
                "deviation_rate": mean,
                "deviation_rate_standard_error": error,
                "deviating_among_generated": float(sum(e["deviating"] for e in labelled) / max(1, generated.sum())),
            }
        row |= UNTIMED | dict(timing.get(name, {}))
        if "vla" in timing and name in timing:
            of = "policy_seconds_per_episode"
            row["policy_speedup"] = timing["vla"][of] / timing[name][of]
        rows.append(row)
    return rows


def closed_loop(
    suite: str,
    output: Path,
    vla: str = "expert",
    checkpoint: str | None = None,
    vla_options: dict[str, Any] = {},  # noqa: B006
    export: str | None = None,
    tasks: list[int | str] | None = None,
    init_states: str | None = "30-49",
    random_resets: NonNegativeInt = 0,
    cells: list[str] = ["ridge+release", "mlp+learned"],  # noqa: B006
    risk: list[float] | None = None,
    rules: dict[str, dict[str, int | float]] = {},  # noqa: B006
    pruning: dict[str, dict[str, Any]] = {},  # noqa: B006
    max_generated_run: PositiveInt | None = None,
    max_steps: PositiveInt | None = None,
    label: bool = True,
    real_time: bool = False,
    vla_ms: NonNegativeFloat | None = None,
    hold: Literal["stop", "last"] = "stop",
    nudge: NonNegativeFloat = 0.0,
    render: RenderMode = "full",
    films: bool = True,
    timing_episodes: NonNegativeInt = 5,
    workers: PositiveInt = 2,
    seed: NonNegativeInt = 0,
) -> None:
    """Evaluate cells of generator x gate x pruning in closed loop, paired against the VLA alone.

    Stopped, it continues where it was when called again with the same output. With another export there, only the cells
    that use it run anew. All episodes of a cell with a live gate are one deployment: its tasks one after another, in one
    worker, whatever the number of workers.

    Args:
        suite: the simulator's suite of tasks, for example libero_object.
        output: folder for summary.json, episodes.csv.gz, traces and timing.
        vla: the VLA: nano_vla, openvla, lerobot, remote, expert (scripted, sees poses), an entry point of spvla.vlas, or
            package.module:factory.
        checkpoint: the VLA's folder or hub id.
        vla_options: the VLA's other options, for openvla such as {dtype: bfloat16} (see spvla.vlas.openvla.load).
        export: exported folder; needed by learned cells.
        tasks: task indices or names; all if omitted.
        init_states: official initial states; 30-49 are for evaluation; null for none.
        random_resets: seeded random resets of each task, beside them.
        cells: what to compare with the VLA alone: generator+gate, generator+gate+pruning or vla+pruning; a risk
            of its own goes last, as in mlp+learned+half@0.05.
        risk: allowed risks at which learned gates are evaluated; the export's default if omitted.
        rules: constants of the hand-set rules, by rule.
        pruning: prunings by name, fields of spvla.pruning.TokenPruner; release and readme need no entry.
        max_generated_run: longest run of generated actions; the export's default if omitted.
        max_steps: step limit of an episode; the suite's if omitted.
        label: ask the VLA for its action on generated steps too, outside the policy's time, to measure deviation.
        real_time: the simulated world moves on while the policy thinks, at the robot's control rate.
        vla_ms: real time: milliseconds of a step that asks the VLA, such as 240 for OpenVLA on an RTX 4090; as measured if
            omitted.
        hold: real time: what the robot does meanwhile: stop, or repeat the last action.
        nudge: metres by which the asked object is moved while the hand is on its way; 0: not at all.
        render: full draws everything for each image; fast draws what stands still once an episode, takes half the time, and
            differs at the edges of what moves.
        films: where the policy sees images, film the first episode of every cell (not in real time).
        timing_episodes: episodes for the timing after the success cells, the tasks in turn; 0 skips it.
        workers: processes, one thread each.
        seed: of resets.
    """
    loaded = load_export(export) if export else None
    model = load_vla(vla, checkpoint, vla_options, suite)
    default_risk = None if loaded is None else float(loaded.defaults["risk"])
    wanted = parse_cells(cells, risk or [default_risk])
    setting = Setting(
        *(vla, checkpoint, export, dict(rules), max_generated_run, label),
        vla_options=dict(vla_options) or None,
        pruning=dict(pruning) or None,
        max_steps=max_steps,
        real_time=RealTime(vla_ms, hold) if real_time else None,
        nudge=Nudge(nudge) if nudge else None,
        render=render,
    )
    if vla_ms is not None and not real_time:
        raise InputError("vla_ms: counts in real time only; add --real_time true")
    if hold != "stop" and not real_time:
        raise InputError("hold: counts in real time only; add --real_time true")
    for name in rules:
        if name not in GATES:
            raise InputError(f"rules: gate {name!r} is unknown; there are: {', '.join(GATES.names())}")
    for name in pruning:
        cell_pruner(name, pruning)
    for cell in wanted:
        make_policy(cell, model, loaded, setting)  # a cell that cannot be made is told before anything runs
    films = films and needs_images(model) and not real_time
    weights = weights_stamp(model)
    del model
    free_memory()
    output.mkdir(parents=True, exist_ok=True)
    states = parse_range(init_states) if init_states else []
    if not states and random_resets < 1:
        raise InputError("closed_loop: there are no episodes; name init_states, random_resets, or both")
    chosen = load_tasks(suite, tasks, max_steps)
    jobs: dict[Task, list[tuple[int | None, int]]] = {}
    for task in chosen:
        if states:
            require_init_states(task, states, str(init_states))
        jobs[task] = [(s, episode_seed(seed, task, s, 0)) for s in states]
        resets = f"evaluation/{seed}"  # seeds that no collecting has
        jobs[task] += [(None, episode_seed(resets, task, None, i)) for i in range(random_resets)]
    fixed = {
        "suite": suite,
        "seed": seed,
        "weights": weights,
        **{k: v for k, v in asdict(setting).items() if k != "export"},
    }
    raw = output / "episodes.jsonl"
    content = fingerprint(export)
    done = [e for e in continued(raw, output / "setting.json", fixed) if e["generator"] == "none" or e["export"] == content]
    have = {(e["cell"], e["task"], e["init_state"], e["seed"]) for e in done}
    groups: list[tuple[Group, ...]] = []  # each for one worker
    deployments: dict[str, list[Group]] = {c.name: [] for c in wanted if c.live}
    learned = {e["cell"]: e["live"] for e in sorted(done, key=lambda e: e.get("live_steps") or 0) if e.get("live")}
    left = 0
    for task, episodes in jobs.items():
        waiting = [(c, i, s) for i, s in episodes for c in wanted if (c.name, task.index, i, s) not in have]
        left += len(waiting)
        filmed = films and task == chosen[0]
        group = Group(task, (), setting, output / "films" if filmed else None, episodes[0] if filmed else None, learned)
        apart = [job for job in waiting if not job[0].live]
        parts = max(1, min(workers, len(apart) // 10))
        groups += [(replace(group, jobs=tuple(part)),) for part in chunks(apart, parts)] if apart else []
        for name, deployment in deployments.items():
            if own := tuple(job for job in waiting if job[0].name == name):
                deployment.append(replace(group, jobs=own))
    groups += [tuple(deployment) for deployment in deployments.values() if deployment]
    from tqdm import tqdm

    total = len(wanted) * sum(map(len, jobs.values()))
    with tqdm(total=total, initial=total - left, desc=f"closed loop {suite}", unit="episode") as bar:
        for result in run_groups(_run_deployment, groups, workers):
            append(raw, result)
            done.append(result)
            bar.update()
    names = {c.name: i for i, c in enumerate(wanted)}
    keys = {(t.index, i, s) for t, episodes in jobs.items() for i, s in episodes}
    mine = [e for e in done if e["cell"] in names and (e["task"], e["init_state"], e["seed"]) in keys]
    mine.sort(key=lambda e: (names[e["cell"]], e["task"], e["init_state"] or 0, e["seed"]))
    timing: dict[str, dict[str, float]] = {}
    beside: dict[str, Any] = {}
    if timing_episodes:
        turns = [
            (task, *episode)
            for episodes in zip(*jobs.values(), strict=True)
            for task, episode in zip(jobs, episodes, strict=True)
        ]
        beside = {"load_average_before": os.getloadavg()[0]}  # timings taken beside other work say little
        timing, timed = measure_time(wanted, sorted(turns[:timing_episodes], key=lambda turn: turn[0].index), setting)
        write_csv(output / "timing.csv.gz", timed)
    rows = summarise(mine, timing)
    write_csv(output / "episodes.csv.gz", [{k: v for k, v in e.items() if k not in ("trace", "kept", "live")} for e in mine])
    _write_traces(output / "traces.json.gz", mine)
    facts = {"init_states": init_states, "random_resets": random_resets, "tasks": [t.name for t in chosen], **fixed}
    path = write_summary(output, "closed_loop", rows, export=content, **facts, timing_episodes=timing_episodes, **beside)
    extra = ["seconds_per_episode", "held_per_episode"] if real_time else []
    extra += ["audits_per_episode", "live_risk", "live_risk_bound95"] if deployments else []
    extra += ["nudged", "nudged_successes", "reaction_steps_mean"] if nudge else []
    text = table(rows, [*COLUMNS, *extra])
    write_text(output / "table.txt", text + "\n")
    print(text)
    print(f"written: {path} and, beside it, episodes.csv.gz, traces.json.gz, table.txt{', films' if films else ''}")


def _write_traces(path: Path, episodes: Sequence[dict[str, Any]]) -> None:
    """One episode's actions per cell and task, coloured by who acted in the report."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for e in episodes:
        first.setdefault((e["cell"], e["task"]), e)
    keep = ("cell", "suite", "task", "task_name", "init_state", "success", "trace")
    rows = [{k: e[k] for k in keep} for e in first.values()]
    path.write_bytes(gzip.compress(json.dumps(rows).encode(), mtime=0))
