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
from spvla.gates.eyes import OUTPUTS, Eyes, EyesConfig, eyes_config
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
        eyes: what it sees of the scene, beside the history; None: nothing.
    """

    features: FeatureConfig
    width: int = 128
    depth: int = 3
    dropout: float = 0.1
    eyes: EyesConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.features, dict):
            object.__setattr__(self, "features", FeatureConfig(**self.features))
        with naming("gate"):
            object.__setattr__(self, "eyes", eyes_config(self.eyes))
            check_fields(self, at_least={"width": 1, "depth": 0, "dropout": 0}, at_most=LARGEST)
        if self.dropout >= 1:
            raise InputError(f"gate: dropout must lie below 1, got {self.dropout}")


class ActionTypeClassifier(nn.Module):
    """Probability that a proposed action deviates from the VLA's. It sees the proposal itself, its change against the
    last executed action and against the VLA's own last action, beside the history's features.

    Where plans are among the features it has two *arms*, the generator's proposal and the next action of the VLA's plan. It is
    told which one it judges, and how far that is from the other.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.features = HistoryFeatures(config.features)
        self.arms = config.features.vla_plan > 0
        self.eyes = None if config.eyes is None else Eyes(config.eyes)
        dim, seen = config.features.action_dim, 0 if self.eyes is None else OUTPUTS
        size = self.features.size + seen + 3 * dim + (dim + 1 if self.arms else 0)
        self.net = MLP([size, *[config.width] * config.depth, 1], config.dropout)

    def forward(self, window: Window, proposal: Tensor) -> Tensor:
        """A window of tensors and the generator's normalised proposals (B, D) to logits (B,): positive means deliberative. With
        arms (2, B): of the proposals, and of what the plans have next."""
        last, vla = torch.as_tensor(window.actions[:, -1]), torch.as_tensor(window.vla_action)
        x = self.features(window)
        if self.eyes is not None:
            x = torch.cat([x, self.eyes(window)], dim=1)
        if not self.arms:
            return self.net(torch.cat([x, proposal, proposal - last, proposal - vla], dim=1))[:, 0]
        planned = next_planned(window, proposal)
        rows = []
        for arm, (action, other) in enumerate(((proposal, planned), (planned, proposal))):
            told = torch.full_like(action[:, :1], float(arm))
            rows.append(torch.cat([x, action, action - last, action - vla, action - other, told], dim=1))
        return self.net(torch.cat(rows))[:, 0].view(2, -1)

    def probability(self, window: Window, proposal: Tensor) -> Tensor:
        """Estimated probability that each proposal deviates; arguments and shape as for :meth:`forward`."""
        return torch.sigmoid(self(window, proposal))


def next_planned(window: Window, otherwise: Tensor) -> Tensor:
    """What the VLA's plans have next, normalised (B, D); ``otherwise`` (B, D) where a plan is used up."""
    plan, left = torch.as_tensor(window.plan), torch.as_tensor(window.plan_left)
    return torch.where(left[:, None] > 0, plan[:, 0], otherwise)


@dataclass(frozen=True)
class Verdicts:
    """All that decides who acts in B steps, but for the threshold. Of two arms it is about the one that is less likely to
    deviate: the gate's *candidate*, else the generator's proposal.

    Args:
        probability: the classifier's probability that the candidate deviates, (B,).
        familiar: the state lies within reach of what training saw, (B,).
        admissible: the proposal is finite, in bounds and no larger jump than the limits allow, (B,); a plan's action is the
            VLA's own.
        started: the VLA has acted in this episode, (B,).
        kept: the candidate is the plan's next action, (B,).
        actions: the candidates, normalised (B, D).
    """

    probability: NDArray[np.float64]
    familiar: NDArray[np.bool_]
    admissible: NDArray[np.bool_]
    started: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    actions: FloatArray

    def intuitive(self, threshold: float) -> NDArray[np.bool_]:
        """Steps that are labelled intuitive, (B,). NaN is no probability that a threshold allows."""
        return self.started & self.familiar & (self.probability <= threshold)

    def refused(self, threshold: float) -> NDArray[np.bool_]:
        """Intuitive steps whose candidate is not admissible, so that the VLA acts, (B,)."""
        return self.intuitive(threshold) & ~self.admissible

    def generated(self, threshold: float) -> NDArray[np.bool_]:
        """Steps in which the candidate is executed, (B,)."""
        return self.intuitive(threshold) & self.admissible

    @classmethod
    def join(cls, parts: Sequence[Verdicts]) -> Verdicts:
        """The verdicts of several batches as those of one."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    @property
    def lowest_threshold(self) -> NDArray[np.float64]:
        """The lowest threshold at which the candidate is executed, (B,): infinite where the VLA acts at any."""
        return np.where(self.started & self.familiar & self.admissible, self.probability, np.inf)


@torch.inference_mode()
def judge(classifier: ActionTypeClassifier, limits: ActionSpace, window: Window, proposals: FloatArray) -> Verdicts:
    """The one decision about proposals: on a robot (B = 1), in evaluation without a simulator and in calibration.

    Args:
        classifier: the gate.
        limits: the action space with the bounds and jumps that the generator's proposals are held to.
        window: B histories, arrays.
        proposals: the generator's actions after them, normalised (B, D).
    """
    probability = classifier.probability(window, torch.from_numpy(proposals)).numpy().astype(np.float64)
    previous = limits.denormalize(window.actions[:, -1])
    admissible = limits.all_admissible(limits.denormalize(proposals), previous)
    kept, actions = np.zeros(len(proposals), bool), proposals
    if classifier.arms:
        assert window.plan is not None and window.plan_left is not None, "the classifier has read them"
        generated, planned = probability
        kept = (window.plan_left > 0) & (planned <= np.where(admissible, generated, np.inf))
        actions = np.where(kept[:, None], window.plan[:, 0], proposals)
        probability = np.where(kept, planned, generated)
    return Verdicts(
        probability,
        familiar=classifier.features.familiar(window.states[:, -1]),
        admissible=admissible | kept,
        started=window.vla_age > 0,
        kept=kept,
        actions=actions,
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

    @property
    def reads_plan(self) -> bool:
        """Whether it decides between the plan's next action and the generator's, too."""
        return self.classifier.arms

    @property
    def eyes(self) -> EyesConfig | None:
        """What it sees of the scene at every step; None: nothing."""
        return self.classifier.config.eyes

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
            kept=verdicts.kept,
        )
