"""Lightning data modules over rollout stores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from data.disagreement import frame_errors
from data.splits import Split, split_episodes
from data.store import RolloutStore
from data.windows import BatchStream, Windows, blocks_of, mixture
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.gates.eyes import EyesConfig, eyes_config
from spvla.generators import GENERATORS, is_learned, make_baseline
from spvla.generators.base import ActionGenerator
from spvla.generators.features import FeatureConfig
from spvla.generators.learned import LearnedGenerator
from train.modules import GeneratorModule


def feature_config(
    windows: Windows,
    split: Split,
    history: int = 12,
    state_dims: Sequence[int] | None = None,
    state_lags: Sequence[int] = (1, 3, 6),
    vla_output: bool = True,
) -> FeatureConfig:
    """Inputs for models on these windows; state quantiles come from the training episodes.

    Args:
        windows: the data.
        split: its training episodes.
        history: executed actions to look back on (n).
        state_dims: entries of proprioception to use; all if None.
        state_lags: state differences over these many steps.
        vla_output: use the VLA's last action and its age.
    """
    width = windows.stores[0].arrays["states"].shape[1]
    dims = list(range(width)) if state_dims is None else list(state_dims)
    if max(dims, default=0) >= max(width, 1):
        folder = windows.stores[0].folder
        message = f"state_dims: {max(dims)} is no entry of the state in {folder}, which has {width}"
        raise InputError(message, code="state-mismatch", field="state_dims")
    states = training_states(windows, split)
    q01, q99 = np.quantile(states[:, dims], [0.01, 0.99], axis=0) if dims else (np.zeros(0), np.zeros(0))
    features = windows.stores[0].arrays["vla_features"].shape[1] if windows.features else 0
    return FeatureConfig(
        state_size=windows.stores[0].arrays["states"].shape[1],
        state_names=windows.stores[0].state_names,
        action_dim=windows.space.dim,
        history=history,
        state_dims=tuple(dims),
        state_q01=tuple(q01.tolist()),
        state_q99=tuple(q99.tolist()),
        state_lags=tuple(state_lags),
        vla_output=vla_output,
        vla_confidence=windows.confidence,
        vla_features=features,
        vla_plan=windows.plan,
    )


def teacher_changes(windows: Windows, split: Split) -> Iterator[NDArray[np.float32]]:
    """Sizes of the changes from an executed action to the teacher's next one in training, normalised, (k, D) at a time."""
    for frames in blocks_of(split.train, 65536):
        batch = windows.batch(frames)
        rows = (batch.valid[:, 0] > 0) & (batch.window.mask[:, -1] > 0)
        yield np.abs(batch.targets[rows, 0] - batch.window.actions[rows, -1])


def residual_spread(windows: Windows, split: Split, least: float = 1e-3) -> tuple[float, ...]:
    """Per dimension, the mean absolute change of the teacher's action against the last executed one in training, normalised
    (D,), at least ``least`` (joints at rest); zero at binary grippers and where actions are changes or velocities: they vary
    about zero and follow the last one less closely, and predicting the action itself errs less. Empty if all of them are."""
    space = windows.space
    if not set(space.continuous) - set(space.moving):
        return ()
    total, count = np.zeros(space.dim), 0
    for changes in teacher_changes(windows, split):
        total += changes.sum(0, dtype=np.float64)
        count += len(changes)
    spread = np.maximum(total / max(count, 1), least)
    spread[list(space.moving)] = 0.0
    if space.binary_gripper:
        spread[list(space.gripper)] = 0.0
    return tuple(spread.tolist())


def training_states(windows: Windows, split: Split, most: int = 2_000_000) -> NDArray[np.float32]:
    """Proprioception in the training episodes, (frames, S): of every k-th episode where there are more than ``most`` frames."""
    every = 1 + sum(length for _, length in split.train) // most
    out = []
    for first, length in split.train[::every]:
        i = int(np.searchsorted(windows.offsets, first, side="right")) - 1
        at = first - int(windows.offsets[i])
        out.append(windows.stores[i].arrays["states"][at : at + length])
    return np.concatenate(out)


class EpisodeBatches(IterableDataset[Any]):
    """One batch per episode, in order: for validation and calibration."""

    def __init__(self, windows: Windows, spans: Sequence[tuple[int, int]]) -> None:
        self.windows, self.spans = windows, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Any]:
        for first, length in self.spans:
            frames = np.arange(first, first + length, dtype=np.int64)
            yield frames, self.windows.batch(frames)


def loader(dataset: IterableDataset[Any]) -> DataLoader[Any]:
    """A loader that takes the data set's batches as they are."""
    return DataLoader(dataset, batch_size=None, num_workers=0)


class RolloutData(L.LightningDataModule):
    """Windows of rollout stores for :class:`train.modules.GeneratorModule`.

    Args:
        data: rollout stores.
        history, state_dims, state_lags, vla_output: see :func:`feature_config`.
        vla_confidence, vla_features, vla_plan: use them as inputs; the stores must have them.
        horizon: teacher actions ahead (H).
        batch_size: windows per step.
        hide: fraction of training windows with their last actions marked as the generator's.
        calibration_fraction: share of episodes for validation where the data has no official initial states.
        seed: of split and order.
        weights: share of each store of ``data`` in the training batches; by their numbers of frames if None.
        calibration_data: more rollout stores, of scenes that ``data`` does not train on: all their episodes calibrate.
        space: its scale normalises every action, as fields of :class:`spvla.actions.ActionSpace`; the first store's if None.
        eyes: what a gate sees of the recorded images, true or fields of :class:`spvla.gates.eyes.EyesConfig`; nothing if None.
        last_disagreement: gates read the generator's error at the VLA's last call, see :meth:`judged`.

    Attributes:
        windows: for generators.
        seen: the same for gates, with what their eyes see; whose generator errs is not yet known.
    """

    def __init__(
        self,
        data: list[Path],
        history: int = 12,
        state_dims: list[int] | None = None,
        state_lags: list[int] = [1, 3, 6],  # noqa: B006  (the command line shows it)
        vla_output: bool = True,
        vla_confidence: bool = False,
        vla_features: bool = False,
        vla_plan: bool = False,
        horizon: int = 4,
        batch_size: int = 1024,
        hide: float = 0.5,
        calibration_fraction: float = 0.2,
        seed: int = 0,
        weights: list[float] | None = None,
        calibration_data: list[Path] = [],  # noqa: B006
        space: dict[str, Any] | None = None,
        eyes: bool | dict[str, Any] | EyesConfig | None = None,
        last_disagreement: bool = False,
    ) -> None:
        super().__init__()
        stores = [RolloutStore(path) for path in [*data, *calibration_data]]
        scale = None if space is None else ActionSpace.from_dict(space)
        self.windows = Windows(stores, history, horizon, vla_confidence, vla_features, scale, vla_plan)
        self.eyes = eyes_config(eyes)
        self.seen = self.windows.seen(self.eyes)
        self.last_disagreement = last_disagreement
        self.split = split_episodes(self.windows, calibration_fraction, seed, len(calibration_data))
        self.features = feature_config(self.windows, self.split, history, state_dims, state_lags, vla_output)
        self.residual = residual_spread(self.windows, self.split)
        self.space = self.windows.space
        self.batch_size, self.hide, self.seed = batch_size, hide, seed
        self.weights = None if weights is None else [*mixture(len(data), weights), *[0.0] * len(calibration_data)]

    def judged(
        self,
        judges: Sequence[ActionGenerator],
        spans: Sequence[tuple[int, int]],
        fold: NDArray[np.uint8] | None = None,
    ) -> Windows:
        """What a gate sees in ``spans``, with the errors of ``judges`` if it reads them; arguments as for
        :func:`data.disagreement.frame_errors`."""
        return self.seen.knowing(frame_errors(self.windows, judges, spans, fold)) if self.last_disagreement else self.seen

    def stream(
        self,
        spans: Sequence[tuple[int, int]],
        batch_size: int | None = None,
        batches: int | None = None,
        windows: Windows | None = None,
    ) -> BatchStream:
        """Shuffled batches of the windows in ``spans``; a gate has ``windows`` of its own (:meth:`judged`)."""
        size = batch_size or self.batch_size
        passes, rank = (0, 0) if self.trainer is None else (self.trainer.current_epoch, self.trainer.global_rank)
        return BatchStream(windows or self.windows, spans, size, self.seed, self.hide, batches, self.weights, passes, rank)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.stream(self.split.train, windows=self.seen))

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(EpisodeBatches(self.seen, self.split.calibration))


def fold_of_frames(split: Split, folds: int, total: int, seed: int = 0) -> NDArray[np.uint8]:
    """Fold of every global frame, (total,): training episodes are dealt out at random into 0 .. folds - 1; all other
    frames are in fold ``folds``, which the generator trained on every training episode judges."""
    fold = np.full(total, folds, np.uint8)
    deal = np.random.default_rng(seed).permutation(len(split.train)) % folds
    for k, (first, length) in zip(deal, split.train, strict=True):
        fold[first : first + length] = k
    return fold


def fit_generator(
    data: RolloutData,
    spans: Sequence[tuple[int, int]],
    options: Mapping[str, Any],
    steps: int,
    description: str,
    batch_size: int | None = None,
    position: int = 0,
) -> LearnedGenerator:
    """Distil a generator from the windows in ``spans``.

    Args:
        data: the windows, their features and action space.
        spans: episodes to train on, (first, length) each.
        options: arguments of :class:`train.modules.GeneratorModule` beside features and space.
        steps: optimiser steps.
        description: what the progress bar says.
        batch_size: windows per step; the data's if None.
        position: line of the progress bar.
    """
    module = GeneratorModule(data.features, data.space, residual=data.residual, **options)
    quick_fit(module, data.stream(spans, batch_size, steps), description, position)
    return module.network.eval()


def quick_fit(module: L.LightningModule, stream: BatchStream, description: str, position: int = 0) -> None:
    """One pass of ``stream`` with a progress bar and nothing written to disk."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no device and tip lines before every bar
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        callbacks=[_Progress(description, len(stream), position)],
    )
    trainer.fit(module, loader(stream))


class _Progress(L.Callback):
    """One tqdm line per training."""

    def __init__(self, description: str, steps: int, position: int) -> None:
        self.description, self.steps, self.position = description, steps, position

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar = tqdm(total=self.steps, desc=self.description, unit="step", mininterval=1.0, position=self.position)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.bar.update()
        if trainer.global_step % 100 == 0:
            self.bar.set_postfix(loss=f"{float(trainer.callback_metrics['train/loss']):.4f}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.close()


def cross_fit(
    data: RolloutData, options: Mapping[str, Any], steps: int, folds: int, name: str
) -> tuple[list[LearnedGenerator], NDArray[np.uint8]]:
    """For each fold, a generator trained on the other folds' episodes; and every frame's fold."""
    fold = fold_of_frames(data.split, folds, len(data.windows), data.seed)

    def fit(k: int) -> LearnedGenerator:
        others = [span for span in data.split.train if fold[span[0]] != k]
        return fit_generator(data, others, options, steps, f"{name} without fold {k + 1}")

    return [fit(k) for k in range(folds)], fold


class GateData(RolloutData):
    """Windows for :class:`train.modules.ClassifierModule`, with the generators that judge them.

    Args:
        generator: to make the gate for: ``ridge``, ``ridge_paper``, ``last``, or a checkpoint of ``python -m train fit``. Of a
            checkpoint the architecture is trained anew without each fold, so that the gate learns on residuals of
            generators that have not seen the episode.
        folds: number of folds.
        steps: optimiser steps of each of those trainings.
        options: see :class:`RolloutData`.
    """

    def __init__(
        self,
        data: list[Path],
        generator: str,
        folds: int = 2,
        steps: int = 3000,
        **options: Any,
    ) -> None:
        module = None
        if generator not in GENERATORS or is_learned(generator):
            module = load_generator_module(generator)
            options = {"space": module.space.to_dict(), **options}
        super().__init__(data, horizon=module.network.config.horizon if module else 1, **options)
        self.judges: list[ActionGenerator]
        if module is None:
            self.judges = [make_baseline(generator, self.space)]
            self.fold = np.zeros(len(self.windows), np.uint8)
        else:
            if module.network.config.features != self.features:
                raise InputError(f"{generator}: was trained with features that differ from this gate's data")
            fitted, self.fold = cross_fit(self, module.options(), steps, folds, Path(generator).stem)
            self.judges = [g.bind(self.space) for g in [*fitted, module.network]]
        self.seen = self.judged(self.judges, [*self.split.train, *self.split.calibration], self.fold)


def load_generator_module(checkpoint: str) -> GeneratorModule:
    """A :class:`GeneratorModule` from its checkpoint; an :class:`InputError` names a missing or damaged file."""
    path = Path(checkpoint)
    if not path.is_file():
        raise InputError(f"{checkpoint}: neither a checkpoint nor a generator that needs no training")
    return GeneratorModule.from_checkpoint(path)
