"""The learned action-type classifier (the gate): how likely is the generator's proposal to deviate from the VLA?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.gates.base import Decisions
from spvla.gates.eyes import OUTPUTS, Eyes, EyesConfig, eyes_config
from spvla.generators.arrays import FEW_ROWS
from spvla.generators.features import FeatureConfig, HistoryFeatures, cat, feature_names
from spvla.generators.learned import LARGEST, MLP
from spvla.history import Window

if TYPE_CHECKING:
    from spvla.export import Export

REASONS = np.array(["first step", "unfamiliar state", "classifier"])  # how many conditions hold: the VLA has acted; familiar
ERROR_GAIN = 5.0  # an error at the usual tolerance of 0.2 is one


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of an action-type classifier: an MLP over the history's features and the proposal.

    Args:
        features: its view of the history.
        width, depth: hidden width and number of hidden layers.
        dropout: in training only.
        eyes: what it sees of the scene, beside the history; None: nothing.
        last_disagreement: the generator's error at the VLA's last call is an input.
    """

    features: FeatureConfig
    width: int = 128
    depth: int = 3
    dropout: float = 0.1
    eyes: EyesConfig | None = None
    last_disagreement: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.features, dict):
            object.__setattr__(self, "features", FeatureConfig(**self.features))
        with naming("gate"):
            object.__setattr__(self, "eyes", eyes_config(self.eyes))
            check_fields(self, at_least={"width": 1, "depth": 0, "dropout": 0}, at_most=LARGEST)
        if self.dropout >= 1:
            raise InputError(f"gate: dropout must lie below 1, got {self.dropout}")


def input_names(config: ClassifierConfig) -> list[str]:
    """The name of every input of a classifier's network, in order."""
    dim = config.features.action_dim
    names = feature_names(config.features)
    names += [f"eyes[{i}]" for i in range(OUTPUTS if config.eyes is not None else 0)]
    names += [f"last_disagreement[{d}]" for d in range(dim if config.last_disagreement else 0)]
    compared = ["proposal", "proposal-action[t-1]", "proposal-vla_action"]
    if config.features.vla_plan:
        compared += ["proposal-other arm"]
    names += [f"{name}[{d}]" for name in compared for d in range(dim)]
    return names + (["arm"] if config.features.vla_plan else [])


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
        self.net = MLP([len(input_names(config)), *[config.width] * config.depth, 1], config.dropout)

    def forward(self, window: Window, proposal: Tensor) -> Tensor:
        """A window of tensors and the generator's normalised proposals (B, D) to logits (B,): positive means deliberative. With
        arms (2, B): of the proposals, and of what the plans have next."""
        told = [torch.as_tensor(x) for x in self._told(window)]
        features = self.features(window)
        if self.eyes is not None:
            features = torch.cat([features, self.eyes(window)], 1)
        if self.config.last_disagreement:
            features = torch.cat([features, torch.as_tensor(self._error(window))], 1)
        return self._of_arms(self.net(self._inputs(features, proposal, *told)))

    def probability(self, window: Window, proposal: Tensor) -> Tensor:
        """Estimated probability that each proposal deviates; arguments and shape as for :meth:`forward`."""
        return torch.sigmoid(self(window, proposal))

    def estimate(self, window: Window, proposals: FloatArray, without_torch: bool = True) -> NDArray[np.float64]:
        """:meth:`probability` of arrays. That of few rows, as on a robot, is computed with arrays alone, unless torch is to be
        the reference."""
        if len(proposals) > FEW_ROWS or not without_torch:
            with torch.inference_mode():
                return self.probability(window, torch.from_numpy(proposals)).numpy().astype(np.float64)
        with np.errstate(all="ignore"):  # what is not finite stays so, and is refused
            rows = self.features.rows(window)
            if self.eyes is not None:
                rows = np.concatenate([rows, self.eyes.rows(window)], 1)
            if self.config.last_disagreement:
                rows = np.concatenate([rows, self._error(window)], 1)
            inputs = self._inputs(rows, proposals, *self._told(window))
            return self._of_arms(expit(self.net.arrays(inputs))).astype(np.float64)

    def _error(self, window: Window) -> Any:
        """How far off the generator was at the VLA's last call, (B, D), of order one."""
        if window.vla_error is None:
            told = "gate: reads the generator's error at the VLA's last call, which this window does not have"
            raise InputError(told, code="no-disagreement", field="vla_error")
        return window.vla_error * ERROR_GAIN

    def _told(self, window: Window) -> list[Any]:
        """What a proposal is compared with: the last action and the VLA's own last, (B, D); with arms also the rest of its
        plan, (B, P, D), and how much that is, (B,)."""
        return [window.actions[:, -1], window.vla_action, *((window.plan, window.plan_left) if self.arms else ())]

    def _inputs(self, features: Any, proposal: Any, last: Any, vla: Any, plan: Any = None, left: Any = None) -> Any:
        """The network's rows, (B, inputs) or (2 B, inputs), of tensors or of arrays."""
        if not self.arms:
            return cat([features, proposal, proposal - last, proposal - vla], 1)
        planned = (torch if isinstance(plan, Tensor) else np).where(left[:, None] > 0, plan[:, 0], proposal)
        rows = []
        for arm, (action, other) in enumerate(((proposal, planned), (planned, proposal))):
            which = action[:, :1] * 0 + arm
            rows.append(cat([features, action, action - last, action - vla, action - other, which], 1))
        return cat(rows, 0)

    def _of_arms(self, out: Any) -> Any:
        """The network's outputs, (B, 1) or (2 B, 1), as (B,) or (2, B)."""
        return out.reshape(2, -1) if self.arms else out[:, 0]


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


def judge(
    classifier: ActionTypeClassifier,
    limits: ActionSpace,
    window: Window,
    proposals: FloatArray,
    without_torch: bool = True,
) -> Verdicts:
    """The one decision about proposals: on a robot (B = 1), in evaluation without a simulator and in calibration.

    Args:
        classifier: the gate.
        limits: the action space with the bounds and jumps that the generator's proposals are held to.
        window: B histories, arrays.
        proposals: the generator's actions after them, normalised (B, D).
        without_torch: see :meth:`ActionTypeClassifier.estimate`.
    """
    probability = classifier.estimate(window, proposals, without_torch)
    admissible = _admissible(limits, proposals, window.actions[:, -1])
    kept, actions = np.zeros(len(proposals), bool), proposals
    if classifier.arms:
        assert window.plan is not None and window.plan_left is not None, "the classifier has read them"
        generated, planned = probability
        kept = (window.plan_left > 0) & (planned <= np.where(admissible, generated, np.inf))
        actions = np.where(kept[:, None], window.plan[:, 0], proposals)
        probability = np.where(kept, planned, generated)
    return Verdicts(
        probability,
        familiar=classifier.features.familiar_now(window),
        admissible=admissible | kept,
        started=window.vla_age > 0,
        kept=kept,
        actions=actions,
    )


def _admissible(limits: ActionSpace, proposals: FloatArray, last: FloatArray) -> NDArray[np.bool_]:
    """Whether proposals after the ``last`` actions, both normalised (B, D), are admissible, (B,)."""
    if len(proposals) == 1:  # on a robot: numpy is faster on one vector than on a batch of one
        return np.array([limits.admissible(limits.denormalize(proposals[0]), limits.denormalize(last[0]))])
    return limits.all_admissible(limits.denormalize(proposals), limits.denormalize(last))


@dataclass(frozen=True)
class LearnedGate:
    """Intuitive iff the state is familiar and the probability of deviating at most a calibrated threshold.

    Args:
        classifier: the gate.
        threshold: the largest probability of an intuitive step.
        space: the action space with the limits of the generator's proposals.
        without_torch: see :meth:`ActionTypeClassifier.estimate`.
    """

    classifier: ActionTypeClassifier
    threshold: float
    space: ActionSpace
    without_torch: bool = True

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
    def reads_error(self) -> bool:
        """Whether the generator's error at the VLA's last call is an input."""
        return self.classifier.config.last_disagreement

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
        verdicts = judge(self.classifier, self.space, window, proposals, self.without_torch)
        intuitive = verdicts.intuitive(self.threshold)
        return Decisions(
            intuitive,
            REASONS.take(np.add(verdicts.started, verdicts.started & verdicts.familiar, dtype=np.intp)),
            verdicts.probability,
            refused=intuitive & ~verdicts.admissible,
            threshold=self.threshold,
            kept=verdicts.kept,
        )
