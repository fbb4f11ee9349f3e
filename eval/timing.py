"""What a cell's policy costs: milliseconds of every step, measured in one process that nothing else runs beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.envs.base import Task
from data.jobs import environment
from data.rollout import rollout
from eval.cells import Cell
from eval.run import Evaluation, make_policy
from spvla.export import load_export


def measure_time(
    cells: Sequence[Cell], jobs: Sequence[tuple[Task, int | None, int]], setting: Evaluation
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Milliseconds inside ``select_action`` per cell, and one raw row per episode: one process, one thread, cells in turn on
    every episode.

    Rendering is the simulator's time, not the policy's, and left out. Where the VLA reports its stages, each one's median
    over its calls is beside them. The first episode runs twice, for warm-up, and counts once.
    """
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    vla = setting.source.load()
    export = load_export(setting.export) if setting.export else None
    policies = {cell: make_policy(cell, vla, export, setting) for cell in cells}
    milliseconds: dict[Cell, list[list[float]]] = {cell: [] for cell in cells}
    stages: dict[Cell, dict[str, list[float]]] = {cell: {} for cell in cells}
    raw: list[dict[str, Any]] = []
    with tqdm(total=len(jobs), desc="timing, one thread", unit="episode") as bar:
        for task in sorted({task for task, _, _ in jobs}, key=lambda task: task.index):
            mine = [(init, seed) for t, init, seed in jobs if t == task]
            warm_up = [] if raw else mine[:1]
            with environment(task, vla, setting.render) as env:
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
