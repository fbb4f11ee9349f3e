"""The stages of a distillation: one training each, whose weights are kept.

A stage's file is named by what determines its weights, so that an interrupted run continues; on several cores stages are
trained side by side.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from data.parallel import run_groups
from spvla.errors import InputError
from spvla.export import fingerprint, load_export
from spvla.files import write_bytes
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.gates.eyes import eyes_config
from spvla.generators import make_baseline
from spvla.generators.base import ActionGenerator
from spvla.generators.learned import LearnedGenerator
from train.datamodules import RolloutData, fit_generator, fold_of_frames, quick_fit
from train.modules import ClassifierModule, GeneratorModule

N = TypeVar("N", bound=nn.Module)


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
        base: an export whose generators are judged as they are, or None.
    """

    data: dict[str, Any]
    folder: Path
    learned: dict[str, dict[str, Any]]
    gate: dict[str, Any]
    steps: int
    gate_steps: int
    folds: int
    tolerance: float
    base: str | None = None

    @cached_property
    def rollouts(self) -> RolloutData:
        """The windows, in this process."""
        inputs = {name: self.gate[name] for name in ("eyes", "last_disagreement") if name in self.gate}
        return RolloutData(**self.data, **inputs)

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
            options += [] if self.base is None else [fingerprint(self.base)]
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
            windows = data.judged(judges, data.split.train, fold)
            stream = data.stream(data.split.train, batches=self.gate_steps, windows=windows)
            quick_fit(module, stream, str(stage), position)
            network = module.network
        else:
            options = dict(self.learned[stage.name])
            batch = options.pop("batch_size", None)
            spans = [span for span in data.split.train if self.fold[span[0]] != stage.without]
            network = fit_generator(data, spans, options, self.steps, str(stage), batch, position)
        # Not save_file: its own temporary file would be left over if this process is killed meanwhile.
        write_bytes(self.path(stage), save({k: v.contiguous() for k, v in network.state_dict().items()}))

    def generator(self, name: str, without: int | None = None) -> LearnedGenerator:
        """A generator as its stage left it."""
        options = {k: v for k, v in self.learned[name].items() if k != "batch_size"}
        data = self.rollouts
        network = GeneratorModule(data.features, data.space, residual=data.residual, **options).network
        return load_stage(network, self.path(Stage("generator", name, without)))

    def classifier(self, name: str) -> ActionTypeClassifier:
        """A gate as its stage left it."""
        fields = {k: v for k, v in self.gate.items() if k in ("width", "depth", "dropout", "last_disagreement")}
        config = ClassifierConfig(self.rollouts.features, **fields, eyes=eyes_config(self.gate.get("eyes")))
        network = ActionTypeClassifier(config)
        return load_stage(network, self.path(Stage("gate", name)))

    def judges(self, name: str) -> tuple[list[ActionGenerator], NDArray[np.uint8]]:
        """Who judges each fold's frames, the generator itself last; and the folds."""
        space = self.rollouts.space
        if name not in self.learned:
            judge = make_baseline(name, space) if self.base is None else load_export(self.base).generator(name, space)
            return [judge], np.zeros(len(self.rollouts.windows), np.uint8)
        return [self.generator(name, k).bind(space) for k in [*range(self.folds), None]], self.fold


def load_stage(network: N, path: Path) -> N:
    """``network`` with a stage's weights. Raises :class:`InputError` naming a damaged file."""
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: incomplete stage weights ({reason}); delete it to train that stage again") from None
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
