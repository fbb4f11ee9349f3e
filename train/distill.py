"""The whole chain from rollout stores to an exported folder: ``python -m train distill``.

Generators are distilled, then each generator (the linear one included) gets its own gate, trained on cross-fitted
residuals and calibrated on episodes that neither has seen. Every finished stage is kept under ``<output>/.stages``, named
by what determines it, so that an interrupted run continues; on several cores stages are trained side by side.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from zlib import crc32

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data.parallel import run_groups
from data.relabel import relabel_into
from data.store import RolloutStore
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.export import check_risk, require_export_folder, save_export
from spvla.fields import check_values, naming
from spvla.files import writing
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.generators import GENERATORS, is_learned, make_baseline
from spvla.generators.base import ActionGenerator
from spvla.generators.features import FeatureConfig
from spvla.generators.learned import LearnedGenerator
from spvla.pruning.pruner import make_pruner
from train.calibrate import calibrated_export, print_evidence
from train.datamodules import RolloutData, fit_generator, fold_of_frames, quick_fit
from train.modules import ClassifierModule, GeneratorModule

N = TypeVar("N", bound=nn.Module)
LEARNED_GENERATORS = ("mlp", "transformer")
LEAST = {
    **dict.fromkeys(("history", "horizon", "steps", "gate_steps", "batch_size", "max_generated_run", "threads"), 1),
    **dict.fromkeys(("state_dims", "hide", "calibration_fraction", "weights", "seed"), 0),
    "folds": 2,
}
LEAST_OF_TRAINING = {"learning_rate": 0, "weight_decay": 0, "later_weight": 0, "tolerance": 0, "batch_size": 1}


@dataclass(frozen=True)
class Stage:
    """One training whose weights are kept.

    Args:
        kind: ``generator`` or ``gate``.
        name: of the generator, or of the one that the gate belongs to.
        without: the fold that the generator does not see; None: it sees every training episode.
    """

    kind: str
    name: str
    without: int | None = None

    def __str__(self) -> str:
        fold = "" if self.without is None else f" without fold {self.without + 1}"
        return f"{'gate of ' if self.kind == 'gate' else ''}{self.name}{fold}"


@dataclass(frozen=True)
class Plan:
    """Everything that determines the weights of every stage, so that a worker process can make any of them.

    Args:
        data: arguments of :class:`train.datamodules.RolloutData`.
        folder: where finished stages are kept.
        learned: per learned generator, arguments of :class:`train.modules.GeneratorModule`, and its own ``batch_size``.
        gate: arguments of :class:`train.modules.ClassifierModule`.
        steps, gate_steps: optimiser steps.
        folds: of the cross-fit.
        tolerance: of a step that does not deviate.
    """

    data: dict[str, Any]
    folder: Path
    learned: dict[str, dict[str, Any]]
    gate: dict[str, Any]
    steps: int
    gate_steps: int
    folds: int
    tolerance: float

    @cached_property
    def rollouts(self) -> RolloutData:
        """The windows, in this process."""
        return RolloutData(**self.data)

    @cached_property
    def fold(self) -> NDArray[np.uint8]:
        """Fold of every global frame."""
        return fold_of_frames(self.rollouts.split, self.folds, len(self.rollouts.windows), self.rollouts.seed)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What all stages depend on. A store of calibration episodes alone changes no weights."""
        windows = self.rollouts.windows
        firsts = {first for first, _ in self.rollouts.split.train}
        trained_on = {store for store, first, _ in windows.episodes if first in firsts}
        data = {k: v for k, v in self.data.items() if k not in ("data", "calibration_data")}
        data["scale"] = [windows.space.q01, windows.space.q99]
        stores = [s.fingerprint for i, s in enumerate(windows.stores) if i in trained_on]
        rollouts = self.rollouts
        inputs = {"features": asdict(rollouts.features), "residual": rollouts.residual}
        return {"stores": stores, **inputs, "data": data, "folds": self.folds}

    def path(self, stage: Stage) -> Path:
        """The stage's weights; the name changes with whatever they depend on."""
        options: list[Any] = [self.learned.get(stage.name), self.steps]
        if stage.kind == "gate":
            options += [self.gate, self.gate_steps, self.tolerance]
        text = json.dumps({"stage": str(stage), "options": options, **self.key}, sort_keys=True, default=str)
        return self.folder / f"{str(stage).replace(' ', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    def train(self, stage: Stage, position: int = 0) -> None:
        """Train a stage and keep its weights; gates need their generators' stages. Its seed is its own."""
        L.seed_everything((self.rollouts.seed + crc32(str(stage).encode())) % 2**32, workers=True, verbose=False)
        data = self.rollouts
        network: nn.Module
        if stage.kind == "gate":
            judges, fold = self.judges(stage.name)
            module = ClassifierModule(data.features, judges, fold, data.space, **self.gate, tolerance=self.tolerance)
            quick_fit(module, data.stream(data.split.train, batches=self.gate_steps), str(stage), position)
            network = module.network
        else:
            options = dict(self.learned[stage.name])
            batch = options.pop("batch_size", None)
            spans = [span for span in data.split.train if self.fold[span[0]] != stage.without]
            network = fit_generator(data, spans, options, self.steps, str(stage), batch, position)
        with writing(self.path(stage)) as temporary:
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, temporary)

    def generator(self, name: str, without: int | None = None) -> LearnedGenerator:
        """A generator as its stage left it."""
        options = {k: v for k, v in self.learned[name].items() if k != "batch_size"}
        data = self.rollouts
        network = GeneratorModule(data.features, data.space, residual=data.residual, **options).network
        return load_stage(network, self.path(Stage("generator", name, without)))

    def classifier(self, name: str) -> ActionTypeClassifier:
        """A gate as its stage left it."""
        fields = {k: v for k, v in self.gate.items() if k in ("width", "depth", "dropout")}
        network = ActionTypeClassifier(ClassifierConfig(self.rollouts.features, **fields))
        return load_stage(network, self.path(Stage("gate", name)))

    def judges(self, name: str) -> tuple[list[ActionGenerator], NDArray[np.uint8]]:
        """Who judges each fold's frames, the generator itself last; and the folds."""
        space = self.rollouts.space
        if name not in self.learned:
            return [make_baseline(name, space)], np.zeros(len(self.rollouts.windows), np.uint8)
        return [self.generator(name, k).bind(space) for k in [*range(self.folds), None]], self.fold


def load_stage(network: N, path: Path) -> N:
    """``network`` with a stage's weights. Raises :class:`InputError` naming a damaged file."""
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not the whole weights of a stage ({reason}); delete it to train that stage again") from None
    return network.eval()


def _train_stage(job: tuple[Plan, Stage, int]) -> Iterator[None]:
    plan, stage, position = job
    warnings.filterwarnings("ignore", module="lightning")
    plan.train(stage, position)
    yield


def train_stages(plan: Plan, stages: Sequence[Stage], threads: int) -> None:
    """Train the stages that no earlier run left: on CPUs side by side, else one after the other. Each has one thread:
    sums over two differ in their last bits, and what is trained must not depend on the number of cores."""
    missing = [stage for stage in stages if not plan.path(stage).exists()]
    workers = 1 if torch.cuda.is_available() else min(threads, len(missing))
    if workers > 1:
        blank = replace(plan)  # without what this process has read
        for _ in run_groups(_train_stage, [(blank, s, i % workers) for i, s in enumerate(missing)], workers):
            pass
    else:
        for stage in missing:
            plan.train(stage)


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
    stores = [p.resolve() for p in (*given["data"], *given["calibration_data"])]
    for name, learned in (("generators", True), ("baselines", False)):
        known = [n for n in GENERATORS.names() if is_learned(n) == learned]
        if unknown := [n for n in given[name] if n not in known and (":" not in n or is_learned(n) != learned)]:
            raise InputError(f"{name}: {unknown[0]!r} is unknown; there are: {', '.join(known)}", field=name)
    for name, items in (("generators", generators), ("baselines", baselines), ("data", stores)):
        if twice := [i for i in items if items.count(i) > 1]:
            raise InputError(f"{name}: {str(twice[0])!r} is there twice")
    features = FeatureConfig(LIBERO.dim, given["history"])
    for kind in generators:
        check_network(kind, given[kind], GeneratorModule, features=features, space=LIBERO, kind=kind, residual=())
    check_network(
        "gate", given["gate"], ClassifierModule, features=features, space=LIBERO, judges=[], fold=np.zeros(0), tolerance=1
    )
    default = given["default_generator"]
    if default is not None and default not in (*generators, *baselines):
        raise InputError(
            f"default_generator {default!r} is not among the distilled ones: {', '.join([*generators, *baselines])}"
        )
    if not (generators or baselines):
        raise InputError("generators and baselines: there is none to distil")
    make_pruner(given["default_pruning"], "default_pruning")
    require_export_folder(given["output"])


def check_network(name: str, options: Mapping[str, Any], module: type[nn.Module], **others: Any) -> None:
    """Raise :class:`InputError` unless ``module`` can be made with ``options`` beside ``others``."""
    types = get_type_hints(module.__init__)
    known = types.keys() - others.keys() - {"return"} | ({"batch_size"} if name in LEARNED_GENERATORS else set())
    for option in options:
        if option not in known:
            raise InputError(f"{name}: {option!r} is unknown; there are: {', '.join(sorted(known))}")
    with naming(name):
        check_values(options, {**types, "batch_size": int}, LEAST_OF_TRAINING)
        module(**others, **{k: v for k, v in options.items() if k != "batch_size"})


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
    default_risk: float = 0.05,
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
        calibration_data: more rollout stores, of scenes that data does not train on: all their episodes calibrate.
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
        default_generator: which generator acts unless another is named; if omitted, the one that acts on most steps of the
            calibration episodes at default_risk (of equals, the one with the smallest error).
        default_risk: the export's default risk.
        max_generated_run: the export's longest run of generated actions.
        default_pruning: visual tokens that the VLA keeps by default: release, readme, or fields of TokenPruner.
        relabel: data sets to label with a VLA first, each with the options of python -m data relabel; the stores are kept
            under output and come after those of data.
        weights: share of each store in the training batches, in their order; by their numbers of frames if omitted.
        threads: stages to train side by side, one core each; the result does not depend on it.
        seed: of everything.
    """
    check_arguments(locals())
    sizes = {"mlp": mlp, "transformer": transformer}
    data = [*data, *(relabel_into(output / ".relabelled", options) for options in relabel)]
    width = RolloutStore(data[0]).arrays["states"].shape[1] if data and state_dims else 0
    if state_dims and max(state_dims) >= width:
        raise InputError(f"state_dims: {max(state_dims)} is no entry of the state in {data[0]}, which has {width}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    plan = Plan(
        data={
            **{"data": data, "calibration_data": calibration_data},
            **{"history": history, "state_dims": state_dims, "horizon": horizon, "batch_size": batch_size},
            **{"vla_confidence": vla_confidence, "vla_features": vla_features, "hide": hide, "seed": seed, "weights": weights},
            "calibration_fraction": calibration_fraction,
        },
        folder=output / ".stages",
        learned={name: {"kind": name, "horizon": horizon, "tolerance": tolerance, **sizes[name]} for name in generators},
        gate=gate,
        steps=steps,
        gate_steps=gate_steps,
        folds=folds,
        tolerance=tolerance,
    )
    rollouts, split = plan.rollouts, plan.rollouts.split
    if not folds <= min(len(split.train), np.iinfo(np.uint8).max):
        raise InputError(f"folds must be at most the {len(split.train)} training episodes and 255, got {folds}")
    print(f"{len(split.train)} training and {len(split.calibration)} calibration episodes, split by {split.by}")
    if recorded := [str(s.folder) for s in rollouts.windows.stores if not s.labelled_by_teacher]:
        whose = "all data" if len(recorded) == len(rollouts.windows.stores) else ", ".join(recorded)
        print(f"{whose}: without a teacher's labels, so that the recorded actions are what is learned")
    fits = [Stage("generator", name, without) for name in generators for without in [*range(folds), None]]
    train_stages(plan, [*fits, *(Stage("gate", name) for name in baselines)], threads)
    train_stages(plan, [Stage("gate", name) for name in generators], threads)
    learned = {name: plan.generator(name) for name in generators}
    gates = {name: plan.classifier(name) for name in [*generators, *baselines]}
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
