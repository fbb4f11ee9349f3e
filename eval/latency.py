"""What a step costs beside the VLA, and what the VLA's own pass costs: ``python -m eval latency``.

For an export, histories are filled with smooth random motion; every stage is timed on the same histories in one process,
warm-up excluded: networks as arrays, as robots run them, and through torch, as before there were arrays and as networks of
one's own run. A VLA's stages are :mod:`eval.vla_latency`'s.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.output import table, write_summary
from eval.vla_latency import picture, time_vla
from spvla.actions import ActionSpace, FloatArray
from spvla.assemble import accelerate
from spvla.cli import NonNegativeInt, PositiveInt
from spvla.errors import InputError
from spvla.export import Export, load_export
from spvla.gates.classifier import LearnedGate
from spvla.gates.live import LiveGate
from spvla.generators.learned import BoundGenerator
from spvla.observation import Observation
from spvla.recording import Policy
from spvla.vlas.base import Timed, VLAOutput
from spvla.vlas.registry import load_vla

WARM_UP = 200
GATES = ("learned", "live")  # timed on the same steps; the first is what the others are compared with
PATHS = ("arrays", "torch")
POLLUTION = 40 * 2**20  # bytes written between two steps, as a simulator or a camera's pictures would
POLLUTED_STEPS = 500
TURN = 100  # steps


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
    """Smooth random actions (T, D), environment units, and states (T, S) that wander where the export's training data was."""
    g = np.random.default_rng(seed)
    space = export.space
    knots = g.uniform(-1, 1, (steps // 20 + 3, space.dim))
    t = np.arange(steps) / 20
    normalized = np.stack([np.interp(t, np.arange(len(knots)), k) for k in knots.T], axis=1).astype(np.float32)
    read = [m.features for m in export.gates.values()]
    states = np.zeros((steps, max((d for f in read for d in f.state_dims), default=-1) + 1), np.float32)
    wandering = np.clip(np.cumsum(g.normal(0, 0.01, states.shape), axis=0), -1, 1)
    for features in read:
        dims = list(features.state_dims)
        states[:, dims] = features.offset + features.scale * wandering[:, dims]
    return space.clip(space.denormalize(space.snap_gripper(normalized))), states


def latency(
    output: Path,
    export: Path | None = None,
    generators: list[str] | None = None,
    steps: int = 3000,
    vla: str | None = None,
    checkpoint: str | None = None,
    vla_options: dict[str, Any] = {},  # noqa: B006
    suite: str | None = None,
    keep_ratios: list[float] = [0.75, 0.5, 0.25],  # noqa: B006
    pruning: dict[str, dict[str, Any]] = {},  # noqa: B006
    instruction: str = "pick up the black bowl and place it on the plate",
    repeats: int = 20,
    threads: PositiveInt = 1,
    seed: NonNegativeInt = 0,
) -> None:
    """Time what a step costs beside the VLA (give an export), the VLA's own pass by stage (give a VLA), or both.

    Args:
        output: folder for summary.json.
        export: exported folder: proposal, gate and bookkeeping of its generators are timed, under the learned gate and under
            the live one, on arrays and through torch, in turns; ``polluted``: after 40 MB were written between the steps;
            ``more_ms_p50`` is the median of what the live one costs more on steps on which both ask the VLA or neither does.
        generators: which; by default the exported ones and those with a gate.
        steps: control steps measured per generator, after 200 steps of warm-up.
        vla: a VLA such as openvla: its stages are timed, without pruning and with each one below.
        checkpoint: the VLA's folder or hf://owner/name.
        vla_options: the VLA's other options (see spvla.vlas.openvla.load).
        suite: LIBERO suite whose image steps and statistics the policy uses; none if omitted.
        keep_ratios: fractions of the visual tokens to keep, exactly; contours take half of the places.
        pruning: further prunings by name, fields as spvla.pruning.make_pruner takes, with speed constant.
        instruction: given to the policy.
        repeats: rounds measured, after 2 of warm-up; all prunings take turns in each.
        threads: of torch, on the CPU.
        seed: of the motion and the pictures.
    """
    if export is None and vla is None:
        raise InputError("latency: give --export (generators and gates), --vla (a VLA's stages), or both")
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]  # what else the machine was doing: timings taken beside other work say little
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    if vla is not None:
        loaded_vla = load_vla(vla, checkpoint, vla_options, suite)
        rows, stages = time_vla(loaded_vla, instruction, keep_ratios, pruning, repeats, seed)
        facts |= {"vla": vla, "checkpoint": checkpoint, "vla_options": dict(vla_options), "suite": suite}
        facts |= {"instruction": instruction, "repeats": repeats, "stages": stages}
        facts |= loaded_vla.backend if isinstance(loaded_vla, Timed) else {}
        print(table(stages, ["pruning", "stage", "p50", "p95", "p99", "min"]) + "\n")
        print(table(rows, [c for c in dict.fromkeys(k for row in rows for k in row) if c != "visual_tokens_total"]) + "\n")
    if export is not None:
        beside = _time_export(load_export(export), generators, steps, seed)
        rows += beside
        facts |= {"steps": steps, "warm_up": WARM_UP}
        columns = ["generator", "gate", "path", "generated", *(f"step_ms_p{q}" for q in (50, 99)), "polluted_ms_p50"]
        print(table(beside, [*columns, "of_torch", "polluted_of_torch", "proposal_ms_p50", "gate_ms_p50", "more_ms_p50"]))
    output.mkdir(parents=True, exist_ok=True)
    facts |= {"threads": threads, "seed": seed, "platform": platform.platform()}
    facts |= {"cores": os.cpu_count(), "load_average_before": load}
    path = write_summary(output, "latency", rows, **facts)
    named = ", ".join(f"{k}: {facts[k]}" for k in ("device", "dtype", "threads", "attention", "steps", "repeats") if k in facts)
    print(f"{named}; milliseconds; written: {path}")


def _time_export(loaded: Export, generators: list[str] | None, steps: int, seed: int) -> list[dict[str, Any]]:
    """Four rows per generator, under both gates and on both paths: proposal, gate and bookkeeping."""
    if steps < 10:
        raise InputError(f"steps: at least 10 are needed, got {steps}")
    names = generators or list(dict.fromkeys([*loaded.generators, *loaded.gates]))
    actions, states = smooth_motion(loaded, steps + WARM_UP, seed)
    rows = []
    for name in names:
        features = loaded.gates[name].config.features if name in loaded.gates else None
        confidence = np.full(loaded.space.dim, 0.5, np.float32) if features and features.vla_confidence else None
        pooled = np.zeros(features.vla_features, np.float32) if features and features.vla_features else None
        policies = {}
        for gate, path in product(GATES, PATHS):
            free = _FreeVLA(loaded.space, actions, confidence, pooled)
            policies[gate, path] = accelerate(free, loaded, risk=1.0, generator=name, gate=gate)
            if path == "torch":
                _through_torch(policies[gate, path])
        images = {} if loaded.eyes is None else {loaded.eyes.camera: picture(seed)}
        polluted = _take_turns(policies, states[: POLLUTED_STEPS + WARM_UP], images, POLLUTION)
        totals = _take_turns(policies, states, images)
        for (gate, path), policy in policies.items():
            row: dict[str, Any] = {"generator": name, "gate": gate, "path": path, "parameters": _parameters(loaded, name)}
            row["generated"] = policy.stats()["generated"] / len(policy.steps)
            for kind, found in (("step", totals), ("polluted", polluted)):
                row |= {f"{kind}_ms_p{q}": float(np.percentile(found[gate, path], q)) for q in (50, 95, 99)}
            for kind, found in (("", totals), ("polluted_", polluted)):
                row[f"{kind}of_torch"] = row[f"{kind or 'step_'}ms_p50"] / float(np.median(found[gate, "torch"]))
            row |= _stages(policy, min(steps, 1000))
            row["bookkeeping_ms_p50"] = max(0.0, row["step_ms_p50"] - row["proposal_ms_p50"] - row["gate_ms_p50"])
            if gate != GATES[0]:
                other = GATES[0], path
                row["more_ms_p50"] = float(np.median((totals[gate, path] - totals[other])[_alike(policies[other], policy)]))
            rows.append(row)
    return rows


def _through_torch(policy: Policy) -> None:
    """Let a policy's networks run through torch."""
    gate = policy.gate.gate if isinstance(policy.gate, LiveGate) else policy.gate
    for part in (policy.generator, gate):
        if isinstance(part, BoundGenerator | LearnedGate):
            object.__setattr__(part, "without_torch", False)


def _take_turns(
    policies: Mapping[tuple[str, str], Policy],
    states: FloatArray,
    images: dict[str, NDArray[np.uint8]],
    pollution: int = 0,
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Milliseconds of each step (T,) beside the VLA, of policies by gate and path. The paths take turns of :data:`TURN` steps,
    so that the caches are those of one path, and the gates single steps. Before each step so many bytes are written, which
    displace what the caches held. All see the same ``images``."""
    for policy in policies.values():
        policy.reset("latency")
    block = np.zeros(pollution, np.uint8)
    observations = [Observation(images, s) for s in states]
    for turn, start in enumerate(range(0, len(observations), TURN)):
        for path in PATHS[:: 1 if turn % 2 else -1]:
            for i, observation in enumerate(observations[start : start + TURN]):
                for gate in GATES[:: 1 if i % 2 else -1]:
                    block += 1
                    policies[gate, path].select_action(observation)
    spent = {k: [s.milliseconds["total"] - s.milliseconds.get("vla", 0.0) for s in p.steps] for k, p in policies.items()}
    return {k: np.array(ms[WARM_UP:]) for k, ms in spent.items()}


def _alike(one: Policy, other: Policy) -> NDArray[np.bool_]:
    """The measured steps (T,) on which both asked the VLA, or neither did."""
    asked = np.array([[step.called_vla for step in policy.steps[WARM_UP:]] for policy in (one, other)])
    return np.asarray(asked[0] == asked[1])


def _stages(policy: Policy, repeats: int) -> dict[str, float]:
    """Milliseconds of one proposal and one decision after the episode that a policy has just played."""
    assert policy.generator is not None and policy.gate is not None
    generator, gate = policy.generator, policy.gate
    proposal = generator.propose(policy.history.window())[:, 0]

    def propose() -> Any:
        assert policy.history.last_action is not None
        policy.history.amend(policy.history.last_action)  # else the features would be there already
        return generator.propose(policy.history.window())

    stages: dict[str, Callable[[], Any]] = {
        "proposal": propose,
        "gate": lambda: gate.decide(policy.history.window(), proposal),
    }
    times = {stage: _time(call, repeats) for stage, call in stages.items()}
    return {f"{stage}_ms_p{q}": v for stage, found in times.items() for q, v in zip((50, 99), found, strict=True)}


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
