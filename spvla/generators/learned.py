"""Learned action generators: small networks over the history, distilled from a VLA's rollouts.

They map a :class:`~spvla.history.Window` to the teacher's next H actions in normalised units. Continuous dimensions are
regressed, binary grippers are logits. They have tens of thousands to a few hundred thousand parameters, since
their cost is paid at every control step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.generators.arrays import FEW_ROWS, ArrayForm, ArrayMLP
from spvla.generators.features import FeatureConfig, HistoryFeatures
from spvla.history import Window

# Far beyond every sensible network: what a damaged or hostile file could ask for is refused before anything is built.
LARGEST = {"horizon": 1000, "width": 16384, "depth": 100, "heads": 1024}
ONE = np.float32(1)


@dataclass(frozen=True)
class GeneratorConfig:
    """Architecture of a learned generator.

    Args:
        kind: the network's name: ``"mlp"``, ``"transformer"``, or that of another package's (see :mod:`spvla.generators`).
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

    kind: str
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
            check_fields(self, at_least=least, at_most=LARGEST)
        if self.residual and len(self.residual) != self.features.action_dim:
            raise InputError(
                f"generator: residual has {len(self.residual)} entries for {self.features.action_dim} action dimensions",
                code="wrong-length",
                field="generator.residual",
            )
        if any(self.residual[g : g + 1] > (0,) for g in self.gripper):
            raise InputError(
                "generator: residual must be zero for binary grippers, which are predicted as logits",
                code="residual-gripper",
                field="generator.residual",
            )
        if max(self.gripper, default=0) >= self.features.action_dim:
            raise InputError(f"generator: gripper {self.gripper} lies outside 0..{self.features.action_dim - 1}")
        if self.dropout >= 1:
            raise InputError(f"generator: dropout must lie below 1, got {self.dropout}")


class MLP(nn.Sequential):
    """Linear layers with GELU between them; ``sizes`` lists input, hidden and output widths.

    In evaluation the layers are applied without the module machinery. In inference mode on a CPU a few rows, as on a robot, go
    through :attr:`arrays`: at that size torch's own overhead is more than the work.
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
        self._arrays: ArrayMLP | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._arrays = None  # the parameters may move
        return super()._apply(fn, recurse)

    @property
    def arrays(self) -> ArrayMLP:
        """The same network without torch, on the same weights."""
        if self._arrays is None:
            self._arrays = ArrayMLP(self.linear)
        return self._arrays

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        if torch.is_inference_mode_enabled() and len(x) <= FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.float32:
            with np.errstate(all="ignore"):  # what is not finite stays so, and is refused by who reads it
                return torch.from_numpy(self.arrays(x.numpy()))
        *hidden, last = self.linear
        for layer in hidden:
            x = F.gelu(F.linear(x, layer.weight, layer.bias))
        return F.linear(x, last.weight, last.bias)


class LearnedGenerator(nn.Module):
    """A small network that continues the motion; :meth:`bind` makes it a robot's generator.

    A kind of network is a subclass with :meth:`outputs`, which calls :meth:`start_from_last_action` with its last layer. A
    class that also defines :meth:`arrays` runs without torch on a robot; its subclasses do not, unless they define it too.
    """

    config_class: ClassVar[type[GeneratorConfig]] = GeneratorConfig
    residual: Tensor
    scale: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.features = HistoryFeatures(config.features)
        self.out = config.horizon * config.features.action_dim  # H D
        self.changes_size = config.features.action_dim if config.residual else 0  # D, or 0 where there are none
        scale = torch.tensor(config.residual or [0.0] * config.features.action_dim)
        self.register_buffer("residual", (scale > 0).float(), persistent=False)  # 1 where a change is predicted, (D,)
        self.register_buffer("scale", torch.where(scale > 0, scale, 1.0), persistent=False)  # of an output, (D,)

    def outputs(self, window: Window, changes: Tensor | None) -> Tensor:
        """The last layer's outputs, (B, H D), from a window and the executed actions as ``changes`` against the last one,
        (B, n, D), or None where no dimension is predicted as a change."""
        raise NotImplementedError

    def arrays(self) -> ArrayForm:
        """:meth:`outputs` of few rows with arrays alone, on the same weights, which stay where they are from now on."""
        raise NotImplementedError

    def start_from_last_action(self, last_layer: nn.Linear) -> None:
        """Zero the last layer where changes are predicted: an untrained network then repeats the last action."""
        if self.config.residual:
            nn.init.zeros_(last_layer.weight)
            nn.init.zeros_(last_layer.bias)

    @property
    def history_length(self) -> int:
        """Steps of history this generator reads."""
        return self.config.features.history

    def forward(self, window: Window) -> Tensor:
        """A window of tensors to (B, H, D): normalised actions, logits at binary grippers (positive: +1)."""
        last = torch.as_tensor(window.actions)[:, -1:] if self.config.residual else None  # (B, 1, D)
        out = self.outputs(window, None if last is None else self._changes(window, last))
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


class MLPGenerator(LearnedGenerator):
    """An MLP over all features at once."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        inputs = self.features.size + config.features.history * self.changes_size
        self.net = MLP([inputs, *[config.width] * config.depth, self.out], config.dropout)
        self.start_from_last_action(self.net.linear[-1])

    def outputs(self, window: Window, changes: Tensor | None) -> Tensor:
        x = self.features(window)
        return self.net(x if changes is None else torch.cat([x, changes.flatten(1)], dim=1))

    def arrays(self) -> ArrayForm:
        def outputs(window: Window, changes: FloatArray | None) -> FloatArray:
            x = self.features.rows(window)
            return self.net.arrays(x if changes is None else np.concatenate([x, changes.reshape(len(x), -1)], 1))

        return outputs


@dataclass(frozen=True)
class BoundGenerator:
    """A learned generator with the action space it acts in.

    Args:
        network: which.
        space: the action space.
        without_torch: proposals after few windows are computed with arrays alone, where the network can; False: by torch, the
            reference.
    """

    network: LearnedGenerator
    space: ActionSpace
    without_torch: bool = True
    low: FloatArray = field(init=False, repr=False, compare=False)  # the bounds, normalised, (1, H, D)
    high: FloatArray = field(init=False, repr=False, compare=False)
    residual: FloatArray = field(init=False, repr=False, compare=False)  # as the network's, (1, H, D)
    scale: FloatArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        network, shape = self.network, (1, self.network.config.horizon, self.space.dim)
        arrays = {"low": self.space.normalize(self.space.low), "high": self.space.normalize(self.space.high)}
        arrays |= {"residual": network.residual.cpu().numpy(), "scale": network.scale.cpu().numpy()}
        for name, values in arrays.items():  # of full size: numpy is slower where shapes differ
            object.__setattr__(self, name, np.ascontiguousarray(np.broadcast_to(values, shape)))

    @property
    def history_length(self) -> int:
        """Steps of history this generator reads."""
        return self.network.history_length

    @property
    def reads_plan(self) -> bool:
        """Whether the rest of the VLA's plan is an input."""
        return self.network.config.features.vla_plan > 0

    @cached_property
    def _arrays(self) -> ArrayForm | None:
        """The network without torch; None where its class does not say how."""
        return self.network.arrays() if self.without_torch and "arrays" in vars(type(self.network)) else None

    def propose(self, window: Window) -> FloatArray:
        """The network's H actions after B windows, within the space's bounds: normalised (B, H, D). NaN stays NaN, for the
        policy to refuse."""
        few = len(window.actions) <= FEW_ROWS and self._arrays is not None
        out = self._by_arrays(window) if few else self._by_torch(window)
        for gripper in self.network.config.gripper:
            logits = out[..., gripper]
            np.copysign(ONE, logits, out=logits)
        return np.minimum(np.maximum(out, self.low), self.high)  # as np.clip, at a third of its cost

    @torch.inference_mode()
    def _by_torch(self, window: Window) -> FloatArray:
        out: FloatArray = self.network(window).numpy()
        return out

    def _by_arrays(self, window: Window) -> FloatArray:
        """:meth:`LearnedGenerator.forward`, step for step."""
        assert self._arrays is not None
        with np.errstate(all="ignore"):  # what is not finite stays so, and is refused by who reads it
            if not self.network.config.residual:
                return self._arrays(window, None).reshape(-1, *self.low.shape[1:])
            n = self.network.config.features.history
            last, residual, scale = window.actions[:, -1:], self.residual[:, :1], self.scale[:, :1]
            changes = np.arcsinh((window.actions[:, -n:] - last) / scale * residual * window.mask[:, -n:, None])
            out = self._arrays(window, changes).reshape(-1, *self.low.shape[1:])
            return last * self.residual + out * self.scale
