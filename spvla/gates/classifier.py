"""The learned action-type classifier (the gate): how likely is the generator's proposal to deviate from the VLA?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.gates.base import Decisions
from spvla.generators.features import FeatureConfig, HistoryFeatures
from spvla.generators.learned import LARGEST, MLP
from spvla.history import Window

if TYPE_CHECKING:
    from spvla.export import Export


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of an action-type classifier: an MLP over the history's features and the proposal.

    Args:
        features: its view of the history.
        width, depth: hidden width and number of hidden layers.
        dropout: in training only.
    """

    features: FeatureConfig
    width: int = 128
    depth: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.features, dict):
            object.__setattr__(self, "features", FeatureConfig(**self.features))
        with naming("gate"):
            check_fields(self, at_least={"width": 1, "depth": 0, "dropout": 0}, at_most=LARGEST)
        if self.dropout >= 1:
            raise InputError(f"gate: dropout must lie below 1, got {self.dropout}")


class ActionTypeClassifier(nn.Module):
    """Probability that a proposed action deviates from the VLA's. It sees the proposal itself, its change against the
    last executed action and against the VLA's own last action, beside the history's features."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.features = HistoryFeatures(config.features)
        size = self.features.size + 3 * config.features.action_dim
        self.net = MLP([size, *[config.width] * config.depth, 1], config.dropout)

    def forward(self, window: Window, proposal: Tensor) -> Tensor:
        """A window of tensors and normalised proposals (B, D) to logits (B,): positive means deliberative."""
        last, vla = torch.as_tensor(window.actions[:, -1]), torch.as_tensor(window.vla_action)
        x = torch.cat([self.features(window), proposal, proposal - last, proposal - vla], dim=1)
        return self.net(x)[:, 0]

    def probability(self, window: Window, proposal: Tensor) -> Tensor:
        """Estimated probability that each proposal deviates, (B,); arguments as for :meth:`forward`."""
        return torch.sigmoid(self(window, proposal))


@dataclass(frozen=True)
class Verdicts:
    """All that decides whether the generator acts in B steps, but for the threshold.

    Args:
        probability: the classifier's probability that the proposal deviates, (B,).
        familiar: the state lies within reach of what training saw, (B,).
        admissible: the proposal is finite, in bounds and no larger jump than the limits allow, (B,).
        started: the VLA has acted in this episode, (B,).
    """

    probability: NDArray[np.float64]
    familiar: NDArray[np.bool_]
    admissible: NDArray[np.bool_]
    started: NDArray[np.bool_]

    def intuitive(self, threshold: float) -> NDArray[np.bool_]:
        """Steps that are labelled intuitive, (B,). NaN is no probability that a threshold allows."""
        return self.started & self.familiar & (self.probability <= threshold)

    def refused(self, threshold: float) -> NDArray[np.bool_]:
        """Intuitive steps whose proposal is not admissible, so that the VLA acts, (B,)."""
        return self.intuitive(threshold) & ~self.admissible

    def generated(self, threshold: float) -> NDArray[np.bool_]:
        """Steps in which the generator acts, (B,)."""
        return self.intuitive(threshold) & self.admissible

    @classmethod
    def join(cls, parts: Sequence[Verdicts]) -> Verdicts:
        """The verdicts of several batches as those of one."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    @property
    def lowest_threshold(self) -> NDArray[np.float64]:
        """The lowest threshold at which the generator acts, (B,): infinite where the VLA acts at any."""
        return np.where(self.started & self.familiar & self.admissible, self.probability, np.inf)


@torch.inference_mode()
def judge(classifier: ActionTypeClassifier, limits: ActionSpace, window: Window, proposals: FloatArray) -> Verdicts:
    """The one decision about proposals: on a robot (B = 1), in evaluation without a simulator and in calibration.

    Args:
        classifier: the gate.
        limits: the action space with the bounds and jumps that the generator's proposals are held to.
        window: B histories, arrays.
        proposals: the actions proposed after them, normalised (B, D).
    """
    probability = classifier.probability(window, torch.from_numpy(proposals)).numpy().astype(np.float64)
    previous = limits.denormalize(window.actions[:, -1])
    return Verdicts(
        probability,
        familiar=classifier.features.familiar(window.states[:, -1]),
        admissible=limits.all_admissible(limits.denormalize(proposals), previous),
        started=window.vla_age > 0,
    )


@dataclass(frozen=True)
class LearnedGate:
    """Intuitive iff the state is familiar and the probability of deviating at most a calibrated threshold.

    Args:
        classifier: the gate.
        threshold: the largest probability of an intuitive step.
        space: the action space with the limits of the generator's proposals.
    """

    classifier: ActionTypeClassifier
    threshold: float
    space: ActionSpace

    def __post_init__(self) -> None:
        if self.classifier.config.features.action_dim != self.space.dim:
            raise InputError(
                f"classifier: trained for {self.classifier.config.features.action_dim} action dimensions, "
                f"action space {self.space.name!r} has {self.space.dim}"
            )
        self.classifier.eval()

    @property
    def history_length(self) -> int:
        """Steps of history the classifier reads."""
        return self.classifier.config.features.history

    @classmethod
    def from_export(cls, export: Export, generator: str, risk: float, space: ActionSpace) -> LearnedGate:
        """The gate of ``generator`` at an allowed ``risk``. A generator without a gate is refused."""
        if generator not in export.gates:
            raise InputError(f"export: generator {generator!r} has no gate; gates exist for: {', '.join(sorted(export.gates))}")
        threshold = export.calibration[generator].threshold(risk)
        return cls(export.gates[generator], threshold, export.limits(generator, space))

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Label the steps that follow B windows by :func:`judge` and the threshold."""
        verdicts = judge(self.classifier, self.space, window, proposals)
        reason = np.where(verdicts.started, np.where(verdicts.familiar, "classifier", "unfamiliar state"), "first step")
        return Decisions(
            verdicts.intuitive(self.threshold),
            reason,
            verdicts.probability,
            refused=verdicts.refused(self.threshold),
            threshold=self.threshold,
        )
