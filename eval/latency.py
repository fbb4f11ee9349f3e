"""What a step costs beside the VLA: ``python -m eval latency``.

Histories are filled by replaying a recorded episode or, without data, smooth random motion; every stage is timed on the
same histories in one process with one thread, warm-up excluded.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from eval.output import table, write_summary
from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.export import Export, accelerate, load_export
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput

WARM_UP = 200


class _FreeVLA:
    """Returns prepared actions at no cost, so that what is measured is everything but the VLA."""

    needs_images = False

    def __init__(
        self, space: ActionSpace, actions: FloatArray, confidence: FloatArray | None, features: FloatArray | None
    ) -> None:
        self.action_space = space
        self.outputs = [VLAOutput(a[None], confidence=confidence, features=features) for a in actions]
        self.step = 0

    def reset(self, instruction: str) -> None:
        self.step = 0

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        self.step += 1
        return self.outputs[self.step % len(self.outputs)]


def smooth_motion(export: Export, steps: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Smooth random actions (T, D), environment units, and states (T, S) that follow them."""
    g = np.random.default_rng(seed)
    space = export.space
    knots = g.uniform(-1, 1, (steps // 20 + 3, space.dim))
    t = np.arange(steps) / 20
    normalized = np.stack([np.interp(t, np.arange(len(knots)), k) for k in knots.T], axis=1).astype(np.float32)
    dims = [d for m in export.gates.values() for d in m.config.features.state_dims]
    states = np.cumsum(g.normal(0, 0.01, (steps, max(dims, default=-1) + 1)), axis=0).astype(np.float32)
    return space.clip(space.denormalize(space.snap_gripper(normalized))), states


def latency(
    export: Path,
    output: Path,
    generators: list[str] | None = None,
    steps: int = 3000,
    seed: int = 0,
) -> None:
    """Time proposal, gate and bookkeeping of every generator on one core.

    Args:
        export: exported folder.
        output: folder for summary.json.
        generators: which; by default the exported ones and those with a gate.
        steps: control steps measured per generator, after 200 steps of warm-up.
        seed: of the motion.
    """
    if steps < 10:
        raise InputError(f"steps: at least 10 are needed, got {steps}")
    loaded = load_export(export)
    torch.set_num_threads(1)
    names = generators or list(dict.fromkeys([*loaded.generators, *loaded.gates]))
    actions, states = smooth_motion(loaded, steps + WARM_UP, seed)
    rows = []
    for name in names:
        features = loaded.gates[name].config.features if name in loaded.gates else None
        confidence = np.full(loaded.space.dim, 0.5, np.float32) if features and features.vla_confidence else None
        pooled = np.zeros(features.vla_features, np.float32) if features and features.vla_features else None
        vla = _FreeVLA(loaded.space, actions, confidence, pooled)
        policy = accelerate(vla, loaded, risk=1.0, generator=name, scheduler="learned")
        policy.reset("latency")
        observation = [Observation(state=s) for s in states]
        for o in observation:
            policy.select_action(o)
        measured = policy.steps[WARM_UP:]
        total = np.array([s.milliseconds["total"] - s.milliseconds.get("vla", 0.0) for s in measured])
        assert policy.generator is not None and policy.scheduler is not None
        proposal = policy.generator.propose(policy.history)
        stages: dict[str, Callable[[], Any]] = {
            "proposal": lambda p=policy: p.generator.propose(p.history),  # type: ignore[misc]
            "gate": lambda p=policy, q=proposal: p.scheduler.decide(p.history, q),  # type: ignore[misc]
        }
        row: dict[str, Any] = {"generator": name, "parameters": _parameters(loaded, name)}
        row |= {f"step_ms_p{q}": float(np.percentile(total, q)) for q in (50, 95, 99)}
        for stage, call in stages.items():
            row |= {f"{stage}_ms_p{q}": v for q, v in zip((50, 99), _time(call, min(steps, 1000)), strict=True)}
        row["bookkeeping_ms_p50"] = max(0.0, row["step_ms_p50"] - row["proposal_ms_p50"] - row["gate_ms_p50"])
        rows.append(row)
    output.mkdir(parents=True, exist_ok=True)
    facts = {"device": "cpu", "threads": 1, "dtype": "float32", "steps": steps, "warm_up": WARM_UP}
    path = write_summary(output, "latency", rows, **facts, platform=platform.platform())
    columns = ["generator", "parameters", "step_ms_p50", "step_ms_p95", "step_ms_p99", "proposal_ms_p50", "gate_ms_p50"]
    print(table(rows, [*columns, "bookkeeping_ms_p50"]))
    print(f"one thread on the CPU, float32, {steps} steps after {WARM_UP} of warm-up; written: {path}")


def _parameters(export: Export, name: str) -> int:
    modules = [m for m in (export.generators.get(name), export.gates.get(name)) if m is not None]
    return sum(p.numel() for m in modules for p in m.parameters())


def _time(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and 99th percentile of a call, milliseconds, after a tenth as warm-up."""
    for _ in range(max(10, repeats // 10)):
        call()
    ms = np.empty(repeats)
    for i in range(repeats):
        start = perf_counter()
        call()
        ms[i] = 1e3 * (perf_counter() - start)
    return float(np.percentile(ms, 50)), float(np.percentile(ms, 99))
