"""The whole chain from rollout stores to an exported folder: ``python -m train distill``.

Generators are distilled, then each generator (the linear one included) gets its own gate, trained on cross-fitted
residuals and calibrated on episodes that neither has seen. Every finished stage is kept under ``<output>/.stages``, so that
an interrupted run continues.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import nn

from data.relabel import relabel_into
from spvla.errors import InputError
from spvla.export import check_risk, load_export, require_export_folder, save_export
from spvla.fields import check_values, naming
from spvla.files import locked
from spvla.gates.classifier import ClassifierConfig
from spvla.generators import is_learned, make_network, names_of
from spvla.generators.features import FeatureConfig
from spvla.pruning.pruner import make_pruner
from train.calibrate import calibrated_export, print_evidence
from train.modules import ClassifierModule, GeneratorModule
from train.stages import Plan, Stage, train_stages

LEAST = {
    **dict.fromkeys(("history", "horizon", "steps", "gate_steps", "batch_size", "max_generated_run", "threads"), 1),
    **dict.fromkeys(("state_dims", "hide", "calibration_fraction", "weights", "seed"), 0),
    "folds": 2,
}
LEAST_OF_TRAINING = {"learning_rate": 0, "weight_decay": 0, "later_weight": 0, "tolerance": 0, "batch_size": 1}
LINKED = {"features", "space", "kind", "residual", "judges", "fold", "return"}  # arguments that come from the data


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` for what :func:`distill` cannot be ``given``, before hours of labelling and training."""
    check_values(given, get_type_hints(distill), LEAST)
    for name in ("hide", "calibration_fraction"):
        if given[name] > 1:
            raise InputError(f"{name} must be at most 1, got {given[name]}")
    if given["tolerance"] <= 0:
        raise InputError(f"tolerance must be positive, got {given['tolerance']}")
    with naming("default_risk"):
        check_risk(given["default_risk"])
    generators, baselines = given["generators"], given["baselines"]
    base = None if given["base"] is None else load_export(given["base"])
    stores = [p.resolve() for p in (*given["data"], *given["calibration_data"])]
    for name, learned in (("generators", True), ("baselines", False)):
        known = names_of(learned)
        if learned and base is not None:
            known = list(base.generators)
        if unknown := [n for n in given[name] if n not in known and (":" not in n or is_learned(n) != learned)]:
            raise InputError(f"{name}: {unknown[0]!r} is unknown; available: {', '.join(known)}", field=name)
    names = [export_name(kind) for kind in generators]
    for name, items in (("generators", names), ("baselines", baselines), ("data", stores)):
        if twice := [i for i in items if items.count(i) > 1]:
            raise InputError(f"{name}: {str(twice[0])!r} is given twice")
    features = FeatureConfig(1, given["history"])
    options = {"mlp": given["mlp"], "transformer": given["transformer"], **given["networks"]}
    for kind in generators if base is None else ():
        check_training(kind, options.get(kind, {}), GeneratorModule, partial(check_network, kind=kind, features=features))
    check_training("gate", given["gate"], ClassifierModule, partial(ClassifierConfig, features))
    default = given["default_generator"]
    if default is not None and default not in (*names, *baselines):
        raise InputError(f"default_generator {default!r} is not among the distilled ones: {', '.join([*names, *baselines])}")
    if not (generators or baselines):
        raise InputError("nothing to distil: give generators or baselines")
    make_pruner(given["default_pruning"], "default_pruning")
    require_export_folder(given["output"])


def export_name(kind: str) -> str:
    """What an export calls a generator: ``Mine`` for ``my_package.module:Mine``."""
    return kind.rpartition(":")[2]


def check_training(name: str, options: Mapping[str, Any], module: type[nn.Module], make: Callable[..., object]) -> None:
    """Raise :class:`InputError` unless ``options`` are arguments of the training ``module``, and what they say of the network's
    size passes ``make``."""
    types = get_type_hints(module.__init__) | ({"batch_size": int} if module is GeneratorModule else {})
    known = types.keys() - LINKED - (set() if module is GeneratorModule else {"tolerance"})
    for option in options:
        if option not in known:
            raise InputError(f"{name}: {option!r} is unknown; available: {', '.join(sorted(known))}")
    with naming(name):
        check_values(options, types, LEAST_OF_TRAINING)
        make(**{k: v for k, v in options.items() if k not in LEAST_OF_TRAINING})


def check_network(**config: Any) -> None:
    """Raise :class:`InputError` if a generator refuses its configuration; no memory is taken for its weights."""
    more = config.pop("more", {})
    with torch.device("meta"):
        make_network({**config, **more})


def distill(
    data: list[Path],
    output: Path,
    calibration_data: list[Path] = [],  # noqa: B006
    generators: list[str] = ["mlp"],  # noqa: B006
    baselines: list[str] = ["ridge"],  # noqa: B006
    history: int = 12,
    state_dims: list[int] | None = None,
    vla_confidence: bool = False,
    vla_features: bool = False,
    vla_plan: bool = False,
    horizon: int = 4,
    mlp: dict[str, Any] = {"width": 256, "depth": 3},  # noqa: B006
    transformer: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "batch_size": 256},  # noqa: B006
    networks: dict[str, dict[str, Any]] = {},  # noqa: B006
    gate: dict[str, Any] = {"width": 128, "depth": 3},  # noqa: B006
    steps: int = 3000,
    gate_steps: int = 1500,
    batch_size: int = 1024,
    hide: float = 0.5,
    folds: int = 2,
    tolerance: float = 0.2,
    calibration_fraction: float = 0.2,
    default_generator: str | None = None,
    default_risk: float = 0.05,
    max_generated_run: int = 20,
    default_pruning: str | dict[str, Any] | None = None,
    relabel: list[dict[str, Any]] = [],  # noqa: B006
    weights: list[float] | None = None,
    threads: int = 2,
    seed: int = 0,
    base: str | None = None,
) -> None:
    """Distil generators and gates from rollouts, calibrate the gates and export everything as one folder.

    Args:
        data: rollout stores; teacher rollouts and accelerated rollouts labelled by the teacher.
        output: the export to write.
        calibration_data: more rollout stores, of scenes that data does not train on: all their episodes calibrate.
        generators: generators to train: mlp, transformer, or one of your own by name or as package.module:Class.
        baselines: built-in generators that get a gate too: ridge, ridge_paper, last.
        history: executed actions to look back on.
        state_dims: entries of proprioception to use; all if omitted.
        vla_confidence: use the VLA's confidence as an input.
        vla_features: use the VLA's pooled features as an input.
        vla_plan: use the rest of the VLA's plan as an input, and let the gate decide at every step between keeping the plan,
            the generator, and planning again; the stores must have whole plans (data collect --plans true, or relabel).
        horizon: teacher actions ahead that generators learn to predict.
        mlp: width, depth, dropout, learning_rate, ... of the MLP (see train.modules.GeneratorModule), and its own
            batch_size.
        transformer: the same for the transformer.
        networks: the same for generators of other packages, by name.
        gate: width, depth, dropout, learning_rate, ... of the gates (see train.modules.ClassifierModule).
        steps: optimiser steps per generator.
        gate_steps: optimiser steps per gate.
        batch_size: windows per step.
        hide: fraction of the training windows whose last actions count as the generator's.
        folds: folds of the cross-fit that makes the gates' labels.
        tolerance: largest error of a step that does not deviate, normalised units.
        calibration_fraction: fraction of the episodes kept for calibration where the simulator does not say which.
        default_generator: which generator acts unless another is named; if omitted, the one that acts on most steps of the
            calibration episodes at default_risk (of equals, the one with the smallest error).
        default_risk: the export's default risk.
        max_generated_run: the export's longest run of generated actions.
        default_pruning: visual tokens that the VLA keeps by default: fast_fewer, slow_fewer, or fields.
        relabel: data sets to label with a VLA first, each with the options of python -m data relabel; the stores are kept
            under output and come after those of data.
        weights: fraction of each store in the training batches, in their order; by their numbers of frames if omitted.
        threads: stages to train side by side, one core each; the result does not depend on it.
        seed: of everything.
        base: an export whose generators stay as they are: only gates are trained and calibrated, for example to give them eyes.
            Then generators are names of its own, and its scale is kept.
    """
    check_arguments(locals())
    with locked(output):
        sizes = {"mlp": mlp, "transformer": transformer, **networks}
        kept = None if base is None else load_export(base)
        kinds = {export_name(kind): kind for kind in generators} if kept is None else {}
        fixed = {} if kept is None else {name: kept.generators[name] for name in generators}
        data = [*data, *(relabel_into(output / ".relabelled", options) for options in relabel)]
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", module="lightning")
        plan = Plan(
            data={
                **{"data": data, "calibration_data": calibration_data},
                **{"history": history, "state_dims": state_dims, "horizon": horizon, "batch_size": batch_size},
                **{"vla_confidence": vla_confidence, "vla_features": vla_features, "hide": hide},
                **({"vla_plan": True} if vla_plan else {}),
                **({} if kept is None else {"space": kept.space.to_dict()}),
                **{"seed": seed, "weights": weights},
                "calibration_fraction": calibration_fraction,
            },
            folder=output / ".stages",
            learned={
                name: {"kind": kind, "horizon": horizon, "tolerance": tolerance, **sizes.get(kind, {})}
                for name, kind in kinds.items()
            },
            gate=gate,
            steps=steps,
            gate_steps=gate_steps,
            folds=folds,
            tolerance=tolerance,
            base=base,
        )
        rollouts, split = plan.rollouts, plan.rollouts.split
        if not folds <= min(len(split.train), np.iinfo(np.uint8).max):
            raise InputError(f"folds must be at most the {len(split.train)} training episodes and 255, got {folds}")
        print(f"{len(split.train)} training and {len(split.calibration)} calibration episodes, split by {split.by}")
        if recorded := [str(s.folder) for s in rollouts.windows.stores if not s.labelled_by_teacher]:
            whose = "all data" if len(recorded) == len(rollouts.windows.stores) else ", ".join(recorded)
            print(f"{whose}: no teacher's labels, so the recorded actions are learned instead")
        fits = [Stage("generator", name, without) for name in kinds for without in [*range(folds), None]]
        train_stages(plan, [*fits, *(Stage("gate", name) for name in [*fixed, *baselines])], threads)
        train_stages(plan, [Stage("gate", name) for name in kinds], threads)
        learned = {name: plan.generator(name) for name in kinds} | fixed
        gates = {name: plan.classifier(name) for name in [*learned, *baselines]}
        defaults = {
            "generator": default_generator,
            "gate": "learned",
            "risk": default_risk,
            "max_generated_run": max_generated_run,
            **({} if default_pruning is None else {"pruning": default_pruning}),
        }
        export = calibrated_export(rollouts, learned, gates, tolerance, defaults)
        save_export(export, output)
        print_evidence(export)
        print(f"exported to {output}")
