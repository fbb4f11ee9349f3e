"""Learned against linear on held-out rollouts, without a simulator: ``python -m eval offline``.

Every step of a recorded teacher rollout is judged as the policy would in shadow mode: the history is what was executed,
the generator's proposal is compared with the teacher's action, and the gate says whether the step would be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.disagreement import frame_errors
from data.floor import noise_floor
from data.store import RolloutStore
from data.windows import Windows
from eval.output import table, write_csv, write_summary
from eval.statistics import mean_and_error
from spvla.actions import ActionSpace
from spvla.cli import OpenUnitInterval, PositiveInt
from spvla.errors import InputError
from spvla.export import Export, load_export
from spvla.files import write_text
from spvla.gates.calibration import Calibration
from spvla.gates.classifier import Verdicts, judge

QUANTILES = 101
Row = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """Every step of the held-out episodes but the first of each, N in all.

    Args:
        proposals: per generator, normalised actions (N, H, D).
        verdicts: per generator with a gate, the decision about its proposals (N,).
        targets: the teacher's normalised actions (N, H, D).
        valid: where they are known (N, H).
        episode: index of each step's episode (N,).
    """

    proposals: dict[str, NDArray[np.float32]]
    verdicts: dict[str, Verdicts]
    targets: NDArray[np.float32]
    valid: NDArray[np.bool_]
    episode: NDArray[np.int64]


def judge_store(windows: Windows, export: Export, names: Sequence[str]) -> Judged:
    """What the generators called ``names`` propose along the episodes in ``windows``, and what their gates decide."""
    space, horizon = windows.space, windows.horizon
    limits = {n: export.limits(n, space) for n in names}
    generators = {n: export.generator(n, space) for n in names}
    proposals: dict[str, list[NDArray[np.float32]]] = {n: [] for n in names}
    verdicts: dict[str, list[Verdicts]] = {n: [] for n in names if n in export.gates}
    spans = [(first, info.length) for _, first, info in windows.episodes]
    seen = windows.seen(export.eyes)
    told = {  # what a gate sees that reads its own generator's errors
        n: seen.knowing(frame_errors(windows, [generators[n]], spans))
        for n in verdicts
        if export.gates[n].config.last_disagreement
    }
    targets, valid, episode = [], [], []
    for e, (_, first, info) in enumerate(windows.episodes):
        if info.length < 2:
            continue
        frames = np.arange(first + 1, first + info.length, dtype=np.int64)
        batch = seen.batch(frames)
        for name, generator in generators.items():
            actions = generator.propose(batch.window)[:, :horizon]
            rest = np.repeat(actions[:, -1:], horizon - actions.shape[1], axis=1)  # short horizons hold their last action
            proposals[name].append(np.concatenate([actions, rest], axis=1))
            if name in verdicts:
                first_actions = np.ascontiguousarray(actions[:, 0])
                window = told[name].batch(frames).window if name in told else batch.window
                verdicts[name].append(judge(export.gates[name], limits[name], window, first_actions))
        targets.append(batch.targets)
        valid.append(batch.valid > 0)
        episode.append(np.full(len(batch.valid), e))
    return Judged(
        {k: np.concatenate(v) for k, v in proposals.items()},
        {k: Verdicts.join(v) for k, v in verdicts.items()},
        np.concatenate(targets),
        np.concatenate(valid),
        np.concatenate(episode),
    )


def roc(score: NDArray[np.float64], positive: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """False and true positive rates at :data:`QUANTILES` thresholds, and the area under the whole curve (ties averaged)."""
    order = np.argsort(score, kind="stable")
    ranks = np.empty(len(score))
    _, start, counts = np.unique(score[order], return_index=True, return_counts=True)
    ranks[order] = np.repeat(start + (counts + 1) / 2, counts)
    n1, n0 = int(positive.sum()), int((~positive).sum())
    area = float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)) if n1 and n0 else float("nan")
    thresholds = np.quantile(score, np.linspace(1, 0, QUANTILES))
    fpr = np.array([(score[~positive] >= t).mean() if n0 else np.nan for t in thresholds])
    tpr = np.array([(score[positive] >= t).mean() if n1 else np.nan for t in thresholds])
    return fpr, tpr, area


def errors_of(name: str, judged: Judged, space: ActionSpace) -> list[Row]:
    """Mean errors of a generator's proposals, a row per step ahead."""
    off, out = np.abs(judged.proposals[name] - judged.targets), []
    for h in range(off.shape[1]):
        mine = off[judged.valid[:, h], h]
        worst = float(mine[:, list(space.continuous)].max(1).mean())
        errors = {f"error_{d}": float(mine[:, d].mean()) for d in range(space.dim)}
        out.append({"generator": name, "horizon": h + 1, "max_abs_error": worst, **errors})
    return out


def coverage_of(name: str, judged: Judged, deviates: NDArray[np.bool_], space: ActionSpace) -> list[Row]:
    """Errors among the steps that the gate is surest about, from 5 % of them to all."""
    known, p = judged.valid[:, 0], judged.verdicts[name].probability
    size = np.abs(judged.proposals[name] - judged.targets)[:, 0][:, list(space.continuous)].max(1)
    out = []
    for q in np.linspace(0.05, 1, 20):
        chosen = known & (p <= np.quantile(p[known], q))
        row = {"max_abs_error": float(size[chosen].mean()), "deviating": float(deviates[chosen].mean())}
        out.append({"generator": name, "coverage": float(q), **row})
    return out


@dataclass(frozen=True)
class Found:
    """What is known of one generator's steps, (N,), and the length of each episode, (E,)."""

    verdicts: Verdicts
    known: NDArray[np.bool_]
    deviates: NDArray[np.bool_]
    episode: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def per_episode(self, steps: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Of each episode's steps, the first one included, the fraction that ``steps`` (N,) marks, (E,)."""
        fraction = (1.0 / self.lengths)[self.episode]
        out: NDArray[np.float64] = np.bincount(self.episode, steps * fraction, minlength=len(self.lengths)).astype(np.float64)
        return out


def at_risk(r: float, curve: Calibration, found: Found) -> Row:
    """What is skipped at an allowed risk, and the risk that was measured."""
    if r < curve.smallest_risk:
        return {"note": f"smallest possible risk is {curve.smallest_risk:.4f}"}
    threshold = curve.threshold(r)
    skipped = found.known & found.verdicts.generated(threshold)
    refused = found.known & found.verdicts.refused(threshold)
    mean, error = mean_and_error(found.per_episode(skipped & found.deviates))
    return {
        "skipped": float(found.per_episode(skipped).mean()),
        "refused": float(found.per_episode(refused).mean()),
        "measured_risk": mean,
        "measured_risk_standard_error": error,
        "within_risk": bool(mean <= r + 2 * (0.0 if np.isnan(error) else error)),
        "deviating_among_skipped": float(found.deviates[skipped].mean()) if skipped.any() else 0.0,
    }


def offline(
    data: Path,
    export: Path,
    output: Path,
    generators: list[str] | None = None,
    risk: list[OpenUnitInterval] = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3],  # noqa: B006
    horizon: PositiveInt = 4,
) -> None:
    """Judge an export's generators and gates on held-out rollouts of its teacher, as in shadow mode, in the export's scale.

    A step counts as skipped if the generator would act in it on a robot: the VLA has acted in the episode, the state is
    familiar, the gate calls the step intuitive and the proposal is admissible. The limit of generated actions in a row does
    not count here.

    Args:
        data: rollout store with the teacher's labels that nothing was trained or calibrated on.
        export: exported folder.
        output: folder for summary.json, tables and curves.
        generators: which; by default the exported ones, ridge and last.
        risk: allowed risks to report.
        horizon: steps ahead at which errors are reported.
    """
    loaded = load_export(export)
    store = RolloutStore(data)
    if store.unlabelled():
        raise InputError(f"{data}: has generated steps without the VLA's label; record the VLA alone or in shadow mode")
    if store.fingerprint in {s.get("fingerprint") for s in loaded.provenance.get("stores", [])}:
        print(f"note: {export} was distilled from {data}: these are no held-out episodes")
    names = generators or list(dict.fromkeys([*loaded.generators, *loaded.gates, "ridge", "last"]))
    for name in names:
        loaded.generator(name, loaded.space)  # reports an unknown name first
    features = [m.config.features for m in loaded.generators.values()] + [m.config.features for m in loaded.gates.values()]
    windows = Windows(
        [store],
        history=max([6] + [f.history for f in features]),
        horizon=horizon,
        confidence=any(f.vla_confidence for f in features),
        features=any(f.vla_features for f in features),
        space=loaded.space,
        plans=any(f.vla_plan for f in features),
    )
    for line in loaded.space.scale_difference(store.space):
        print(f"note: scale of the export against that of {data}: {line}; do both have the same units?")
    judged = judge_store(windows, loaded, names)
    known = judged.valid[:, 0]
    if not known.any():
        raise InputError(f"{data}: no step has a teacher's label")
    output.mkdir(parents=True, exist_ok=True)
    lengths = np.array([e.length for e in store.episodes])
    floor = noise_floor(windows, [(first, info.length) for _, first, info in windows.episodes], loaded.tolerance)
    errors: list[Row] = []
    rows: list[Row] = []
    curves: list[Row] = []
    raw: list[Row] = []
    for name in names:
        by_horizon = errors_of(name, judged, windows.space)
        errors += by_horizon
        deviates = windows.space.deviation(judged.proposals[name][:, 0], judged.targets[:, 0], loaded.tolerance)
        deviating = float(deviates[known].mean())
        base = {"generator": name, "max_abs_error": by_horizon[0]["max_abs_error"], "deviating": deviating}
        if name not in judged.verdicts:
            rows.append(base)
            continue
        deviates = windows.space.deviation(judged.verdicts[name].actions, judged.targets[:, 0], loaded.tolerance)
        p = judged.verdicts[name].probability
        fpr, tpr, area = roc(p[known], deviates[known])
        names_of = ("false_positive_rate", "true_positive_rate")
        curves += [{"generator": name, **dict(zip(names_of, point, strict=True))} for point in zip(fpr, tpr, strict=True)]
        raw += coverage_of(name, judged, deviates, windows.space)
        found = Found(judged.verdicts[name], known, deviates, judged.episode, lengths)
        rows += [{**base, "roc_auc": area, "risk": r, **at_risk(r, loaded.calibration[name], found)} for r in risk]
    write_csv(output / "errors.csv.gz", errors)
    write_csv(output / "coverage.csv.gz", raw)
    write_csv(output / "roc.csv.gz", curves)
    facts = {
        "data": data.name,
        "episodes": len(store.episodes),
        "steps": int(known.sum()),
        "tolerance": loaded.tolerance,
        **({} if floor is None else {"noise_floor": floor.to_dict()}),
    }
    calibration = {k: c.to_dict() for k, c in loaded.calibration.items()}
    path = write_summary(output, "offline", rows, **facts, errors=errors, roc=curves, coverage=raw, calibration=calibration)
    columns = [
        "generator",
        "max_abs_error",
        "deviating",
        "roc_auc",
        "risk",
        "skipped",
        "refused",
        "measured_risk",
        "within_risk",
    ]
    text = table(rows, [*columns, "measured_risk_standard_error", "deviating_among_skipped"])
    write_text(output / "table.txt", text + "\n")
    print("\n".join([*(floor.lines() if floor is not None else []), text]))
    print(f"written: {path} and, beside it, errors.csv.gz, coverage.csv.gz, roc.csv.gz, table.txt")
