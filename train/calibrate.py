"""What the calibration episodes say of generators and their gates: risk curves, errors, and which generator is the default."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.floor import noise_floor
from data.windows import Windows, blocks_of
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.export import Export
from spvla.gates.calibration import Calibration, calibrate, quantile_grid, worst_of
from spvla.gates.classifier import ActionTypeClassifier, judge
from spvla.gates.floor import NoiseFloor
from spvla.generators.base import ActionGenerator
from spvla.generators.learned import LearnedGenerator
from spvla.history import UNSEEN, Source
from train.datamodules import RolloutData, teacher_changes

Judged = tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float32] | None]  # an episode's thresholds, deviations, coins


def calibration_curve(
    data: RolloutData, generator: ActionGenerator, gate: ActionTypeClassifier, tolerance: float, limits: ActionSpace
) -> Calibration:
    """The gate's risk curve on the calibration episodes.

    A step in an unfamiliar state, or whose proposal the ``limits`` that will act refuse, is the VLA's: it adds to neither risk
    nor coverage. Teacher rollouts and the rollouts of accelerated policies at each risk are separate pools, since they
    visit different states, and the bound holds in the worst of them. Where the generator acted without the teacher's label,
    the steps that a coin chose for a label stand for the others; without a coin such episodes are left out.
    """
    pools: dict[tuple[Any, ...], list[Judged]] = {}
    facts = {first: (store, info) for store, first, info in data.windows.episodes}
    unlabelled = 0
    windows = data.judged([generator], data.split.calibration)
    for first, length in data.split.calibration:
        store, info = facts[first]
        frames = slice(info.start, info.start + length)
        propensities = data.windows.stores[store].propensities(frames)
        if propensities is None and data.windows.stores[store].unlabelled(frames):
            unlabelled += 1
            continue
        judged = judge_episode(windows, generator, gate, first, length, tolerance, limits)
        metadata = info.metadata
        generated = data.windows.stores[store].arrays["sources"][frames] == Source.GENERATOR
        coin = propensities is not None
        accelerated = bool(metadata.get("accelerated")) or coin or bool(generated.any())
        key = (accelerated, store, metadata.get("risk") or 0.0, coin) if accelerated else (False,)
        pools.setdefault(key, []).append((*judged, propensities))
    if unlabelled:
        what = (
            f"{unlabelled} of {len(data.split.calibration)} calibration episodes have generated steps without the VLA's label"
        )
        advice = "record the VLA alone or in shadow mode"
        if not pools:
            raise InputError(f"calibration: {what}; {advice}")
        print(f"{what} and are left out; {advice}")
    thresholds = quantile_grid([p for pool in pools.values() for p, *_ in pool])
    curves = []
    for key in sorted(pools):
        p, deviates, chances = zip(*pools[key], strict=True)
        curves.append(calibrate(p, deviates, thresholds, None if chances[0] is None else chances))
    return worst_of(curves)


def judge_episode(
    windows: Windows,
    generator: ActionGenerator,
    gate: ActionTypeClassifier,
    first: int,
    length: int,
    tolerance: float,
    limits: ActionSpace,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Per step of an episode in ``windows`` as the gate sees them: the lowest threshold at which the gate's candidate is
    executed, the generator's proposal or the plan's next action (infinite where the VLA acts at any, and where nobody acted),
    and whether it is known to deviate."""
    batch = windows.batch(np.arange(first, first + length, dtype=np.int64))
    proposals = np.ascontiguousarray(generator.propose(batch.window)[:, 0])
    verdicts = judge(gate, limits, batch.window, proposals)
    threshold = verdicts.lowest_threshold
    known = batch.valid[:, 0] > 0
    at = int(np.searchsorted(windows.offsets, first, side="right")) - 1
    start = first - int(windows.offsets[at])
    unseen = np.isin(windows.stores[at].arrays["sources"][start : start + length], UNSEEN)
    threshold[~known & ~unseen] = np.inf
    return threshold, windows.space.deviation(verdicts.actions, batch.targets[:, 0], tolerance) & known


def calibration_error(data: RolloutData, generator: ActionGenerator) -> float:
    """The largest error over the continuous dimensions of a proposal, normalised, mean over the steps of the calibration
    episodes that have the teacher's label and in which a generator could act."""
    error, steps = 0.0, 0
    for part in blocks_of(data.split.calibration, 65536):
        batch = data.windows.batch(part)
        rows = (batch.valid[:, 0] > 0) & (batch.window.vla_age > 0)
        off = np.abs(generator.propose(batch.window)[rows, 0] - batch.targets[rows, 0])
        error += float(off[:, list(data.space.continuous)].max(1, initial=0.0).sum(dtype=np.float64))
        steps += int(rows.sum())
    return error / max(steps, 1)


def calibrated_export(
    data: RolloutData,
    learned: Mapping[str, LearnedGenerator],
    gates: Mapping[str, ActionTypeClassifier],
    tolerance: float,
    defaults: Mapping[str, Any],
) -> Export:
    """Everything as one export, the gates calibrated with the limits that will act.

    Args:
        data: the calibration episodes.
        learned: learned generators by name.
        gates: gates by the name of their generator, learned or built in.
        tolerance: of a step that does not deviate.
        defaults: those of the export; a ``generator`` of None is chosen by the calibration episodes.
    """
    limits = data.space.with_max_jump(max_jump(data))
    floor = noise_floor(data.windows, data.split.calibration, tolerance)
    facts = provenance(data) | ({} if floor is None else {"noise_floor": floor.to_dict()})
    export = Export(limits, tolerance, learned, {}, {}, {**defaults, "generator": "none"}, facts)
    generators = {name: export.generator(name, data.space) for name in dict.fromkeys([*learned, *gates, "last"])}
    errors = {name: calibration_error(data, generator) for name, generator in generators.items()}
    curves = {
        name: calibration_curve(data, generators[name], gate, tolerance, export.limits(name, data.space))
        for name, gate in gates.items()
    }
    chosen = defaults["generator"] or choose_default(curves, errors, defaults["risk"])
    return replace(
        export,
        gates=gates,
        calibration=curves,
        defaults={**defaults, "generator": chosen},
        provenance={**export.provenance, "calibration_error": errors},
    )


def choose_default(curves: Mapping[str, Calibration], errors: Mapping[str, float], risk: float) -> str:
    """The generator that acts on most steps of the calibration episodes at an allowed ``risk``; of those within a tenth of a
    percent of it, the one with the smallest error. A risk that the episodes are too few for allows no steps."""
    coverage = {name: curve.coverage_at(risk) if risk >= curve.smallest_risk else 0.0 for name, curve in curves.items()}
    best = max(coverage.values())
    return min((name for name in curves if coverage[name] >= best - 1e-3), key=lambda name: errors[name])


def max_jump(data: RolloutData) -> NDArray[np.float32]:
    """The largest change per dimension from an executed action to the teacher's next one in training, normalised (D,)."""
    jump = np.zeros(data.space.dim, np.float32)
    for changes in teacher_changes(data.windows, data.split):
        jump = np.maximum(jump, changes.max(0, initial=0.0))
    return jump


def provenance(data: RolloutData) -> dict[str, Any]:
    """Teacher, data, commit and versions, for the export's config and model card."""
    teachers: set[str] = set()
    stores = []
    for store in data.windows.stores:
        names = {str(e.metadata.get("policy") or "unknown") for e in store.episodes}
        teachers |= names
        stores.append(
            {
                "name": store.folder.name,
                "episodes": len(store.episodes),
                "frames": store.frames,
                "fingerprint": store.fingerprint,
                "labels": "teacher" if store.labelled_by_teacher else "demonstrations",
            }
        )
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    demonstrations = any(s["labels"] == "demonstrations" for s in stores)
    return {
        "teacher": "demonstrations" if demonstrations else ", ".join(sorted(teachers)),
        "stores": stores,
        "split": data.split.by,
        "training_episodes": len(data.split.train),
        "calibration_episodes": len(data.split.calibration),
        "commit": git.stdout.strip() or None,
        "versions": {name: version(name) for name in ("spvla", "torch", "lightning", "numpy")},
    }


def print_evidence(export: Export, risks: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.3)) -> None:
    """The calibrated coverage of every gate at some risks, as a table; why the default is the default, and notes."""
    if floor := NoiseFloor.of(export.provenance):
        print("\n".join(floor.lines()))
    kept = " or kept from a plan" if any(gate.arms for gate in export.gates.values()) else ""
    errors, chosen, risk = export.provenance["calibration_error"], export.defaults["generator"], export.defaults["risk"]
    print(
        f"share of steps that are generated{kept}, by allowed risk (calibration episodes; unfamiliar and refused steps are the "
        "VLA's)"
    )
    print("  " + f"{'generator':12s}" + "".join(f"{risk:>8g}" for risk in risks) + f"{'error':>8}")
    for name, curve in export.calibration.items():
        cells = []
        for r in risks:
            cells.append(f"{'n/a':>8}" if r < curve.smallest_risk else f"{curve.coverage_at(r):8.1%}")
        print("  " + f"{name:12s}" + "".join(cells) + f"{errors[name]:8.4f}")
    smallest = max(c.smallest_risk for c in export.calibration.values())
    if smallest > min(risks):
        print(f"  n/a: too few calibration episodes; the smallest possible risk is {smallest:.3f}")
    if smallest > risk:
        least = int(np.ceil(1 / risk)) - 1
        print(f"note: the default risk {risk:g} needs {least} calibration episodes: record more, or allow more risk")

    def evidence(name: str) -> str:
        curve = export.calibration[name]
        covers = "no coverage" if risk < curve.smallest_risk else f"{curve.coverage_at(risk):.1%} of the steps"
        return f"{name} ({covers} at risk {risk:g}, error {errors[name]:.4f})"

    others = "; ".join(evidence(name) for name in export.calibration if name != chosen)
    print(f"default generator: {evidence(chosen)}" + (f"; others: {others}" if others else ""))
    best = choose_default(export.calibration, errors, risk)
    if best != chosen:
        print(f"note: the calibration episodes favour {best} over {chosen}, which was asked for")
    for note in export.notes():
        print(f"note: {note}")
