"""The learned action-type classifier (the gate): how likely is the generator's proposal to deviate from the VLA?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.generators.base import Proposal
from spvla.generators.features import FeatureConfig, HistoryFeatures
from spvla.generators.learned import MLP
from spvla.history import ActionHistory, Window
from spvla.scheduling.base import Decision


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
            check_fields(self, at_least={"width": 1, "depth": 0, "dropout": 0})
        if self.dropout >= 1:
            raise InputError(f"gate: dropout must lie below 1, got {self.dropout}")


class ActionTypeClassifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="spvla",
    tags=["robotics", "action-type-classifier"],
):
    """Probability that a proposed action deviates from the VLA's. It sees the proposal itself, its change against the
    last executed action and against the VLA's own last action, beside the history's features."""

    def __init__(self, config: ClassifierConfig | dict[str, Any]) -> None:
        super().__init__()
        self.config = config = ClassifierConfig(**config) if isinstance(config, dict) else config  # config.json holds a dict
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
class LearnedScheduler:
    """Intuitive iff the classifier's probability of deviating is at most a calibrated threshold."""

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

    @torch.inference_mode()
    def decide(self, history: ActionHistory, proposal: Proposal) -> Decision:
        """Label the coming step. A NaN probability is deliberative, and so is a state far from all that training saw."""
        normalized = torch.from_numpy(self.space.normalize(proposal.actions[:1]))
        p = float(self.classifier.probability(history.window(), normalized))
        if history.states is not None and self.classifier.features.unfamiliar(history.states[-1]):
            return Decision(False, "unfamiliar state", p)
        return Decision(p <= self.threshold, "classifier", p)
