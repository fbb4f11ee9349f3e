"""Learned action generators: an MLP and a causal transformer over the history, distilled from a VLA's rollouts.

Both map a :class:`~spvla.history.Window` to the teacher's next H actions in normalised units. Continuous dimensions are
regressed, binary grippers are logits. They are small (tens of thousands to a few hundred thousand parameters), since
their cost is paid at every control step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from numpy.typing import NDArray
from torch import Tensor, nn

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.generators.base import Proposal
from spvla.generators.features import FeatureConfig, HistoryFeatures
from spvla.history import ActionHistory, Window


@dataclass(frozen=True)
class GeneratorConfig:
    """Architecture of a learned generator.

    Args:
        kind: ``"mlp"`` or ``"transformer"``.
        features: its inputs.
        gripper: indices of binary gripper dimensions (predicted as logits); continuous grippers are not listed.
        horizon: actions predicted (H). Only the first is executed; the others sharpen the features and show in reports.
        width, depth: hidden width and number of hidden layers or blocks.
        heads: attention heads (transformer).
        dropout: in training only.
        residual: per dimension, the spread of the teacher's change against the last executed action (normalised units): the
            network predicts that change in units of its spread, so that an output of zero repeats the last action, and sees
            earlier actions as changes too. Zero where it predicts the action itself; empty: everywhere.
    """

    kind: Literal["mlp", "transformer"]
    features: FeatureConfig
    gripper: tuple[int, ...] = ()
    horizon: int = 4
    width: int = 256
    depth: int = 3
    heads: int = 4
    dropout: float = 0.0
    residual: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.features, dict):
            object.__setattr__(self, "features", FeatureConfig(**self.features))
        least = {"gripper": 0, "horizon": 1, "width": 1, "depth": 0, "heads": 1, "dropout": 0, "residual": 0}
        with naming("generator"):
            check_fields(self, at_least=least)
        if self.residual and len(self.residual) != self.features.action_dim:
            raise InputError(
                f"generator: residual has {len(self.residual)} entries, there are {self.features.action_dim} action dimensions",
                code="wrong-length",
                field="generator.residual",
            )
        if any(self.residual[g : g + 1] > (0,) for g in self.gripper):
            raise InputError(
                "generator: residual must be zero at binary grippers, which are predicted as logits",
                code="residual-gripper",
                field="generator.residual",
            )
        if max(self.gripper, default=0) >= self.features.action_dim:
            raise InputError(f"generator: gripper {self.gripper} lies outside 0..{self.features.action_dim - 1}")
        if self.kind == "transformer" and self.width % self.heads:
            raise InputError(f"generator: width {self.width} is no multiple of heads {self.heads}")
        if self.dropout >= 1:
            raise InputError(f"generator: dropout must lie below 1, got {self.dropout}")


class MLP(nn.Sequential):
    """Linear layers with GELU between them; ``sizes`` lists input, hidden and output widths.

    In evaluation the layers are applied without the module machinery, which at a batch of one costs as much as they do.
    """

    def __init__(self, sizes: list[int], dropout: float = 0.0) -> None:
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers.append(nn.Linear(a, b))
            if i < len(sizes) - 2:
                layers.append(nn.GELU())
                if dropout:
                    layers.append(nn.Dropout(dropout))
        super().__init__(*layers)
        self.linear = tuple(layer for layer in layers if isinstance(layer, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        *hidden, last = self.linear
        for layer in hidden:
            x = F.gelu(F.linear(x, layer.weight, layer.bias))
        return F.linear(x, last.weight, last.bias)


class CausalBlock(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = MLP([width, 4 * width, width], dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, nh, n, hs)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(b, n, w))
        return x + self.mlp(self.norm2(x))


class LearnedGenerator(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="spvla",
    tags=["robotics", "action-generator"],
):
    """A small network that continues the motion. ``forward`` is the network, :meth:`propose` the generator."""

    residual: Tensor
    scale: Tensor

    def __init__(self, config: GeneratorConfig | dict[str, Any]) -> None:
        super().__init__()
        self.config = config = GeneratorConfig(**config) if isinstance(config, dict) else config  # config.json holds a dict
        self.features = HistoryFeatures(config.features)
        self.out = config.horizon * config.features.action_dim
        scale = torch.tensor(config.residual or [0.0] * config.features.action_dim)
        self.register_buffer("residual", (scale > 0).float(), persistent=False)  # 1 where a change is predicted, (D,)
        self.register_buffer("scale", torch.where(scale > 0, scale, 1.0), persistent=False)  # of an output, (D,)
        w, changes = config.width, config.features.action_dim if config.residual else 0
        if config.kind == "mlp":
            self.net = MLP(
                [self.features.size + config.features.history * changes, *[w] * config.depth, self.out], config.dropout
            )
        else:
            self.embed = nn.Linear(self.features.token_size + changes, w)
            self.embed_now = nn.Linear(self.features.token_size + self.features.global_size, w)
            self.position = nn.Parameter(torch.randn(config.features.history + 1, w) * 0.02)
            self.blocks = nn.ModuleList(CausalBlock(w, config.heads, config.dropout) for _ in range(config.depth))
            self.norm = nn.LayerNorm(w)
            self.head = nn.Linear(w, self.out)
        if config.residual:
            self.repeat_last_action()

    def repeat_last_action(self) -> None:
        """Zero the last layer: every dimension that is predicted as a change then repeats the last action."""
        last = self.net.linear[-1] if self.config.kind == "mlp" else self.head
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @property
    def history_length(self) -> int:
        """Steps of history this generator reads."""
        return self.config.features.history

    def forward(self, window: Window) -> Tensor:
        """A window of tensors to (B, H, D): normalised actions, logits at binary grippers (positive: +1)."""
        last = torch.as_tensor(window.actions)[:, -1:] if self.config.residual else None  # (B, 1, D)
        if self.config.kind == "mlp":
            x = self.features(window)
            if last is not None:
                x = torch.cat([x, self._changes(window, last).flatten(1)], dim=1)
            out = self.net(x)
        else:
            tokens, rest = self.features.tokens(window)  # (B, n + 1, token), (B, G)
            now, steps = self.embed_now(torch.cat([tokens[:, -1], rest], dim=1)), tokens[:, :-1]
            if last is not None:
                steps = torch.cat([steps, self._changes(window, last)], dim=2)
            x = torch.cat([self.embed(steps), now[:, None]], dim=1) + self.position  # (B, n + 1, W)
            for block in self.blocks:
                x = block(x)
            out = self.head(self.norm(x[:, -1]))
        out = out.view(-1, self.config.horizon, self.config.features.action_dim)  # (B, H, D)
        return out if last is None else last * self.residual + out * self.scale

    def _changes(self, window: Window, last: Tensor) -> Tensor:
        """The n executed actions as changes against the ``last``, (B, n, D): linear up to their spread, logarithmic beyond."""
        n = self.config.features.history
        mask = torch.as_tensor(window.mask)[:, -n:, None]
        return torch.asinh((torch.as_tensor(window.actions)[:, -n:] - last) / self.scale * self.residual * mask)

    def actions(self, window: Window) -> Tensor:
        """:meth:`forward` with binary grippers decided: normalised actions (B, H, D)."""
        out = self(window)
        if self.config.gripper:
            g = list(self.config.gripper)
            out[..., g] = torch.where(out[..., g] >= 0, 1.0, -1.0)
        return out

    def bind(self, space: ActionSpace) -> BoundGenerator:
        """This network as an :class:`~spvla.generators.base.ActionGenerator` of one robot."""
        if space.dim != self.config.features.action_dim:
            raise InputError(
                f"generator: trained for {self.config.features.action_dim} action dimensions, "
                f"action space {space.name!r} has {space.dim}"
            )
        return BoundGenerator(self.eval(), space)


@dataclass(frozen=True)
class BoundGenerator:
    """A learned generator with the action space it acts in."""

    network: LearnedGenerator
    space: ActionSpace
    low: FloatArray = field(init=False, repr=False, compare=False)  # the bounds, normalised
    high: FloatArray = field(init=False, repr=False, compare=False)
    gripper: NDArray[np.bool_] = field(init=False, repr=False, compare=False)  # which dimensions are logits, (D,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", self.space.normalize(self.space.low))
        object.__setattr__(self, "high", self.space.normalize(self.space.high))
        object.__setattr__(self, "gripper", np.isin(np.arange(self.space.dim), self.network.config.gripper))

    @property
    def history_length(self) -> int:
        """Steps of history this generator reads."""
        return self.network.history_length

    def propose(self, history: ActionHistory) -> Proposal:
        """The network's H actions; one with NaN stays as it is, for the policy to refuse."""
        return Proposal(self.space.denormalize(self.propose_windows(history.window())[0]))

    @torch.inference_mode()
    def propose_windows(self, window: Window) -> FloatArray:
        """The network's H actions after B windows, within the space's bounds: normalised (B, H, D)."""
        out: FloatArray = self.network(window).numpy()
        np.copysign(np.float32(1), out, where=self.gripper, out=out)
        return np.minimum(np.maximum(out, self.low), self.high)  # as np.clip, at a third of its cost
