"""The whole chain from rollout stores to an exported folder: ``python -m train distill``.

Generators are distilled, then each generator (the linear one included) gets its own gate, trained on cross-fitted
residuals and calibrated on episodes that neither has seen. Every finished stage is kept under ``<output>/.stages``, keyed
by what determines it, so that an interrupted run continues.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from data.relabel import relabel_into
from data.windows import blocks_of
from spvla.errors import InputError
from spvla.export import Export, built_in_generator, save_export
from spvla.generators.base import ActionGenerator
from spvla.generators.learned import LearnedGenerator
from spvla.pruning.pruner import make_pruner
from spvla.scheduling.calibration import Calibration, calibrate, worst_of
from spvla.scheduling.learned import ActionTypeClassifier, ClassifierConfig
from train.datamodules import RolloutData, cross_fit, fit_generator, quick_fit
from train.modules import ClassifierModule, GeneratorModule

M = TypeVar("M", bound=nn.Module)


class Stages:
    """Weights of finished stages, so that a run that was stopped redoes nothing."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, fit: Callable[[], M], options: Any, blank: Callable[[], M]) -> M:
        """``fit()``, or what an earlier run with the same data and options left of it."""
        text = json.dumps({"stage": name, "options": options, **self.key}, sort_keys=True, default=str)
        path = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        if path.exists():
            module = blank()
            module.load_state_dict(load_file(path))
            return module.eval()
        module = fit()
        temporary = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, temporary)
        temporary.replace(path)
        return module


def calibration_curve(
    data: RolloutData, generator: ActionGenerator, gate: ActionTypeClassifier, tolerance: float
) -> Calibration:
    """The gate's risk curve on the calibration episodes. Teacher rollouts and the rollouts of accelerated policies at each
    risk are separate pools, since they visit different states, and the bound holds in the worst of them."""
    pools: dict[tuple[Any, ...], tuple[list[NDArray[np.float64]], list[NDArray[np.bool_]]]] = {}
    facts = {first: (store, info.metadata) for store, first, info in data.windows.episodes}
    for first, length in data.split.calibration:
        p, deviates = judge_episode(data, generator, gate, first, length, tolerance)
        store, metadata = facts[first]
        accelerated = bool(metadata.get("accelerated"))
        pool = pools.setdefault((accelerated, store, metadata.get("risk") or 0.0) if accelerated else (False,), ([], []))
        pool[0].append(p)
        pool[1].append(deviates)
    everything = np.concatenate([p for pool in pools.values() for p in pool[0]])
    finite = everything[np.isfinite(everything)]
    thresholds = np.unique(np.quantile(finite, np.linspace(0, 1, 512)))
    return worst_of([calibrate(*pools[k], thresholds) for k in sorted(pools)])


def judge_episode(
    data: RolloutData, generator: ActionGenerator, gate: ActionTypeClassifier, first: int, length: int, tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Per step of an episode: the gate's probability of deviating (infinite at the first step, and where the teacher was
    not asked), and whether the generator's proposal deviates, (T,) each."""
    batch = data.windows.batch(np.arange(first, first + length, dtype=np.int64))
    proposals = generator.propose_windows(batch.window)[:, 0]
    with torch.inference_mode():
        p = torch.sigmoid(gate(batch.window, torch.from_numpy(proposals))).numpy().astype(np.float64)
    known = batch.valid[:, 0] > 0
    deviates = data.space.deviation(proposals, batch.targets[:, 0], tolerance) & known
    p[~known] = np.inf
    p[0] = np.inf
    return p, deviates


def fit_gate(
    data: RolloutData,
    judges: list[ActionGenerator],
    fold: NDArray[np.uint8],
    options: dict[str, Any],
    steps: int,
    name: str,
) -> ActionTypeClassifier:
    """Train the gate of the generator that ``judges`` stand for, on the training episodes."""
    module = ClassifierModule(data.features, judges, fold, data.space, **options)
    quick_fit(module, data.stream(data.split.train, batches=steps), f"gate of {name}")
    return module.network.eval()


def max_jump(data: RolloutData) -> NDArray[np.float32]:
    """The largest change per dimension from an executed action to the teacher's next one in training, normalised (D,)."""
    jump = np.zeros(data.space.dim, np.float32)
    for part in blocks_of(data.split.train, 65536):
        batch = data.windows.batch(part)
        known = (batch.valid[:, 0] > 0) & (batch.window.mask[:, -1] > 0)
        change = np.abs(batch.targets[:, 0] - batch.window.actions[:, -1])[known]
        jump = np.maximum(jump, change.max(0, initial=0.0))
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


def distill(
    data: list[Path],
    output: Path,
    generators: list[str] = ["mlp"],  # noqa: B006
    baselines: list[str] = ["ridge"],  # noqa: B006
    history: int = 12,
    state_dims: list[int] | None = None,
    vla_confidence: bool = False,
    vla_features: bool = False,
    horizon: int = 4,
    mlp: dict[str, Any] = {"width": 256, "depth": 3},  # noqa: B006
    transformer: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "batch_size": 256},  # noqa: B006
    gate: dict[str, Any] = {"width": 128, "depth": 3},  # noqa: B006
    steps: int = 3000,
    gate_steps: int = 1500,
    batch_size: int = 1024,
    hide: float = 0.5,
    folds: int = 2,
    tolerance: float = 0.2,
    calibration_fraction: float = 0.2,
    default_generator: str | None = None,
    default_risk: float = 0.1,
    max_generated_run: int = 20,
    default_pruning: str | dict[str, Any] | None = None,
    relabel: list[dict[str, Any]] = [],  # noqa: B006
    weights: list[float] | None = None,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Distil generators and gates from rollouts, calibrate the gates and export everything as one folder.

    Args:
        data: rollout stores; teacher rollouts and accelerated rollouts labelled by the teacher.
        output: the export to write.
        generators: learned generators: mlp, transformer.
        baselines: built-in generators that get a gate too: ridge, ridge_paper, last.
        history: executed actions to look back on.
        state_dims: entries of proprioception to use; all if omitted.
        vla_confidence: use the VLA's confidence as an input.
        vla_features: use the VLA's pooled features as an input.
        horizon: teacher actions ahead that generators learn to predict.
        mlp: width, depth, dropout, learning_rate, ... of the MLP (see train.modules.GeneratorModule), and its own
            batch_size.
        transformer: the same for the transformer.
        gate: width, depth, dropout, learning_rate, ... of the gates (see train.modules.ClassifierModule).
        steps: optimiser steps per generator.
        gate_steps: optimiser steps per gate.
        batch_size: windows per step.
        hide: share of training windows whose last actions are passed off as the generator's.
        folds: folds of the cross-fit that makes the gates' labels.
        tolerance: largest error of a step that does not deviate, normalised units.
        calibration_fraction: share of episodes kept for calibration where there are no official initial states.
        default_generator: which generator acts unless told otherwise; the first learned one if omitted.
        default_risk: the export's default risk.
        max_generated_run: the export's longest run of generated actions.
        default_pruning: visual tokens that the VLA keeps by default: release, readme, or fields of TokenPruner.
        relabel: data sets to label with a VLA first, each with the options of python -m data relabel; the stores are kept
            under output and come after those of data.
        weights: share of each store in the training batches, in their order; by their numbers of frames if omitted.
        threads: of torch, during training.
        seed: of everything.
    """
    data = [*data, *(relabel_into(output / ".relabelled", options) for options in relabel)]
    torch.set_num_threads(threads)
    L.seed_everything(seed, workers=True, verbose=False)
    warnings.filterwarnings("ignore", module="lightning")
    sizes = {"mlp": mlp, "transformer": transformer}
    for name in generators:
        if name not in sizes:
            raise InputError(f"generators: {name!r} is unknown; there are: {', '.join(sizes)}")
    rollouts = RolloutData(
        data,
        history,
        state_dims,
        vla_confidence=vla_confidence,
        vla_features=vla_features,
        horizon=horizon,
        batch_size=batch_size,
        hide=hide,
        calibration_fraction=calibration_fraction,
        seed=seed,
        weights=weights,
    )
    make_pruner(default_pruning, "default_pruning")  # a wrong one is told before hours of training
    split = rollouts.split
    firsts = {first for first, _ in split.train}
    trained_on = {store for store, first, _ in rollouts.windows.episodes if first in firsts}
    print(f"{len(split.train)} training and {len(split.calibration)} calibration episodes, split by {split.by}")
    if not all(s.labelled_by_teacher for s in rollouts.windows.stores):
        print("distilled from demonstrations: there are no teacher labels in the data")
    key = {  # a store of calibration episodes alone changes no weights
        "stores": [s.fingerprint for i, s in enumerate(rollouts.windows.stores) if i in trained_on],
        "features": asdict(rollouts.features),
        "common": [batch_size, hide, folds, calibration_fraction, seed, *([weights] if weights else [])],
    }
    stages = Stages(output / ".stages", key)

    learned: dict[str, LearnedGenerator] = {}
    gates: dict[str, ActionTypeClassifier] = {}
    curves: dict[str, Calibration] = {}
    for name in [*generators, *baselines]:
        judges: list[ActionGenerator]
        gate_key: Any = [gate, gate_steps, tolerance]
        if name in sizes:
            options = {"kind": name, "horizon": horizon, "tolerance": tolerance, **sizes[name]}
            batch = int(options.pop("batch_size", batch_size))
            blank_generator = partial(_blank_generator, rollouts, options)
            keep = partial(stages.run, options=[options, steps, batch], blank=blank_generator)
            fitted, fold = cross_fit(rollouts, options, steps, folds, name, keep, batch)
            learned[name] = keep(name, partial(fit_generator, rollouts, split.train, options, steps, name, batch))
            judges = [g.bind(rollouts.space) for g in [*fitted, learned[name]]]
            gate_key += [options, steps, batch]
        else:
            judges, fold = [built_in_generator(name, rollouts.space)], np.zeros(len(rollouts.windows), np.uint8)
        gate_options = {**gate, "tolerance": tolerance}

        gates[name] = stages.run(
            f"gate-{name}",
            options=gate_key,
            blank=partial(_blank_gate, rollouts, gate),
            fit=partial(fit_gate, rollouts, judges, fold, gate_options, gate_steps, name),
        )
        curves[name] = calibration_curve(rollouts, judges[-1], gates[name], tolerance)
    default = default_generator or (generators[0] if generators else baselines[0])
    if default not in gates:
        raise InputError(f"default_generator {default!r} is not among the distilled ones: {', '.join(gates)}")
    export = Export(
        space=rollouts.space.with_max_jump(max_jump(rollouts)),
        tolerance=tolerance,
        generators=learned,
        gates=gates,
        calibration=curves,
        defaults={
            "generator": default,
            "scheduler": "learned",
            "risk": default_risk,
            "max_generated_run": max_generated_run,
            **({} if default_pruning is None else {"pruning": default_pruning}),
        },
        provenance=provenance(rollouts),
    )
    save_export(export, output)
    print_curves(export)
    print(f"exported to {output}")


def _blank_generator(data: RolloutData, options: dict[str, Any]) -> LearnedGenerator:
    return GeneratorModule(data.features, data.space, **options).network


def _blank_gate(data: RolloutData, options: dict[str, Any]) -> ActionTypeClassifier:
    fields = {k: v for k, v in options.items() if k in ("width", "depth", "dropout")}
    return ActionTypeClassifier(ClassifierConfig(data.features, **fields))


def print_curves(export: Export, risks: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.3)) -> None:
    """The calibrated coverage of every gate at some risks, as a table."""
    print("share of steps that the gate calls intuitive, by allowed risk (calibration episodes)")
    print("  " + f"{'generator':12s}" + "".join(f"{risk:>8g}" for risk in risks))
    for name, curve in export.calibration.items():
        cells = []
        for risk in risks:
            allowed = np.asarray(curve.risk) <= risk
            coverage = np.asarray(curve.coverage)[allowed][-1] if allowed.any() else 0.0
            cells.append(f"{'n/a':>8}" if risk < curve.smallest_risk else f"{coverage:8.1%}")
        print("  " + f"{name:12s}" + "".join(cells))
    smallest = max(c.smallest_risk for c in export.calibration.values())
    if smallest > min(risks):
        print(f"  n/a: too few calibration episodes; the smallest risk they can vouch for is {smallest:.3f}")
