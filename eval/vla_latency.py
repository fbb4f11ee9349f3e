"""What a VLA's own pass costs, stage by stage, with and without token pruning: part of ``python -m eval latency``.

All prunings run in one process and take turns within every round, so that whatever else the machine does falls on all of
them alike; ratios are taken within a round. Pruning's overhead is counted in every total.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.bandwidth import bytes_read, memory_bandwidth
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.pruning.pruner import Pruner, make_pruner
from spvla.pruning.speed import Constant
from spvla.vlas.base import VLA, PrunableVLA, ReadsState, VLAOutput, cameras_of
from spvla.vlas.openvla.policy import PRUNING_STAGES, OpenVLA

WARM_UP = 2
FULL, EAGER, VERIFIED = "none", "none, eager", "none, verified"
IMAGE_SIZE = 256  # pixels, as LIBERO renders


def picture(seed: int) -> NDArray[np.uint8]:
    """A scene of its own for each seed: boxes of several colours before a shaded wall, uint8 (256, 256, 3)."""
    g = np.random.default_rng(seed)
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = np.linspace(90, 150, IMAGE_SIZE)[:, None, None]
    for _ in range(8):
        (top, left), (height, width) = g.integers(0, IMAGE_SIZE - 20, 2), g.integers(12, 70, 2)
        image[top : top + height, left : left + width] = g.integers(0, 256, 3)
    return image


def observation_for(vla: VLA, seed: int) -> Observation:
    """A picture of its own for each camera that the VLA looks through, and a state of zeros if it reads one."""
    images = {camera: picture(seed + 1000 * i) for i, camera in enumerate(cameras_of(vla))}
    size = vla.state_dim if isinstance(vla, ReadsState) else None
    return Observation(images, None if size is None else np.zeros(size, np.float32))


def keep_exactly(ratio: float) -> Pruner | None:
    """A pruner that runs every stage, contours included, and keeps just that fraction of the tokens, rounded up."""
    if not 0 < ratio < 1:
        raise InputError(f"keep_ratios: expected numbers between 0 and 1, got {ratio}")
    return make_pruner({"speed": "constant", "keep": ratio, "measure": "ratio", "contour_fraction": 0.5})


def prunings_of(
    vla: VLA, observation: Observation, keep_ratios: Sequence[float], named: Mapping[str, Mapping[str, Any]]
) -> dict[str, Pruner | None]:
    """What is to be compared: no pruning, each ratio, each named one. A VLA that cannot prune has the first alone."""
    out: dict[str, Pruner | None] = {FULL: None}
    if not isinstance(vla, PrunableVLA):
        if named:
            raise InputError(f"pruning: {type(vla).__name__} cannot run on fewer visual tokens (it has no with_pruner())")
        return out
    visual = vla.predict(observation).visual_tokens
    if visual is None:
        raise InputError(f"{type(vla).__name__} does not say how many visual tokens it has")
    out |= {f"keep {ratio:g}": keep_exactly(ratio) for ratio in keep_ratios}
    for name, fields in named.items():
        pruner = make_pruner(fields, f"pruning {name!r}")
        if pruner is None or not isinstance(pruner.speed, Constant):
            raise InputError(f"pruning {name!r}: nothing moves here, so only speed 'constant' can be timed")
        out[name] = pruner
    return out


def time_vla(
    vla: VLA, instruction: str, keep_ratios: Sequence[float], named: Mapping[str, Mapping[str, Any]], repeats: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time ``repeats`` rounds after two of warm-up; every round has a picture of its own.

    An OpenVLA is timed by transformers' forward pass as well (``eager``), and where it verifies a proposal that is right
    (``verified``); both unpruned. ``limit_ms`` is what reading the weights from memory takes alone, at the bandwidth that was
    measured in the same run, and ``limit_ratio`` how many times that the median is; ``same_tokens`` is the fraction of rounds
    in which all action tokens are the unpruned pass's.

    Returns:
        one row per pruning (tokens, totals, ratios to the unpruned pass of the same round), and one per pruning and stage:
        milliseconds at the 50th, 95th and 99th percentile, and the least.
    """
    if repeats < 3:
        raise InputError(f"repeats: at least 3 are needed, got {repeats}")
    observations = [observation_for(vla, seed + i) for i in range(repeats + WARM_UP)]
    vla.reset(instruction)
    prunings = prunings_of(vla, observations[0], keep_ratios, named)
    policies = {name: _with(vla, pruner) for name, pruner in prunings.items()}
    for policy in policies.values():
        policy.reset(instruction)
    passes: dict[str, Callable[[Observation], VLAOutput]] = {
        name: partial(policy.predict, keep_mass=_keep(prunings[name])) for name, policy in policies.items()
    }
    if isinstance(vla, OpenVLA):
        answers = {id(observation): vla.predict(observation).actions[0] for observation in observations}
        passes |= {EAGER: partial(_eager, vla), VERIFIED: lambda o: vla.verify(o, answers[id(o)])}
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in passes}
    tokens: dict[str, list[int]] = {name: [] for name in passes}
    answered: dict[str, list[NDArray[np.int64] | None]] = {name: [] for name in passes}
    total_tokens: int | None = None
    for i, observation in enumerate(tqdm(observations, desc="timing", unit="round")):
        order = list(passes)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            start = perf_counter()
            output = passes[name](observation)
            total = 1e3 * (perf_counter() - start)
            if i >= WARM_UP:
                overhead = sum(output.timings.get(stage, 0.0) for stage in PRUNING_STAGES)
                given_qk = overhead - output.timings.get(PRUNING_STAGES[0], 0.0)
                answered[name].append(output.tokens)
                laps[name].append({**output.timings, "overhead": overhead, "overhead_given_qk": given_qk, "total": total})
                if output.visual_tokens is not None:
                    tokens[name].append(output.visual_tokens[0])
                    total_tokens = output.visual_tokens[1]
    bandwidth = memory_bandwidth(vla.model.device) if isinstance(vla, OpenVLA) else 0.0
    stages = [
        {"pruning": name, "stage": stage, **_percentiles([lap[stage] for lap in of])}
        for name, of in laps.items()
        for stage in dict.fromkeys(stage for lap in of for stage in lap)
    ]
    rows = []
    for name, of in laps.items():
        row: dict[str, Any] = {"pruning": name}
        if tokens[name]:
            row |= {"visual_tokens_mean": float(np.mean(tokens[name])), "visual_tokens_total": total_tokens}
        row |= {f"total_ms_{k}": v for k, v in _percentiles([lap["total"] for lap in of]).items()}
        if isinstance(vla, OpenVLA):
            reads = 1 if name == VERIFIED else vla.action_space.dim
            row["limit_ms"] = 1e3 * bytes_read(vla, reads) / bandwidth
            row["limit_ratio"] = row["total_ms_p50"] / row["limit_ms"]
        row |= _against(of, laps[FULL])
        if all(a is not None for a in answered[FULL]):
            pairs = zip(answered[name], answered[FULL], strict=True)
            row["same_tokens"] = float(np.mean([np.array_equal(a, b) for a, b in pairs]))  # type: ignore[arg-type]
        row["gflop"] = _gflop(partial(passes[name], observations[0]))
        rows.append(row)
    return rows, stages


def _with(vla: VLA, pruner: Pruner | None) -> VLA:
    return vla.with_pruner(None if pruner is None else pruner.selector) if isinstance(vla, PrunableVLA) else vla


def _keep(pruner: Pruner | None) -> float:
    return pruner.speed.keep if pruner is not None and isinstance(pruner.speed, Constant) else 1.0


def _percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(milliseconds, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "min": float(min(milliseconds))}


def _against(laps: Sequence[Mapping[str, float]], full: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Ratios to the unpruned pass: medians over the rounds, and of the fastest of all rounds."""
    if "prefill" not in full[0] or "vision" not in full[0]:
        return {"speedup": float(np.median([f["total"] / p["total"] for p, f in zip(laps, full, strict=True)]))}

    def least(of: Sequence[Mapping[str, float]], *stages: str) -> float:
        return min(sum(lap[s] for s in stages) for lap in of)

    pairs = list(zip(laps, full, strict=True))
    return {
        "speedup": float(np.median([f["total"] / p["total"] for p, f in pairs])),
        "prefill_ratio": float(np.median([p["prefill"] / f["prefill"] for p, f in pairs])),
        "prefill_ratio_min": least(laps, "prefill") / least(full, "prefill"),
        "overhead_share": float(np.median([p["overhead"] / (f["vision"] + f["prefill"]) for p, f in pairs])),
        "overhead_share_min": least(laps, "overhead") / least(full, "vision", "prefill"),
        "overhead_given_qk_ms_p50": float(np.median([p["overhead_given_qk"] for p in laps])),
        "overhead_given_qk_ms_min": least(laps, "overhead_given_qk"),
    }


def _eager(vla: OpenVLA, observation: Observation) -> VLAOutput:
    """The answer by transformers' forward pass."""
    vla.model.eager, before = True, vla.model.eager
    try:
        return vla.predict(observation)
    finally:
        vla.model.eager = before


def _gflop(run: Callable[[], Any]) -> float:
    """Floating-point operations of one pass in matrix products and attention, 1e9; never a statement about time."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9
