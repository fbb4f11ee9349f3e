"""What learned generators and gates see: windows of executed actions, proprioception and the VLA's last output.

Never object poses, the task, the initial state or the step number: :func:`feature_names` lists every input, and a test
holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spvla.errors import InputError
from spvla.history import Window


@dataclass(frozen=True)
class FeatureConfig:
    """Which parts of a window are inputs, and their scales.

    Args:
        action_dim: D.
        history: executed actions to look back on (n).
        state_dims: the entries of proprioception to use; empty: none.
        state_q01, state_q99: quantiles of those entries in the training data, mapped to [-1, 1].
        state_lags: differences of the state over these many steps are inputs (motion, in units of the state's range).
        vla_output: use the VLA's last action, its age and how far the state has moved since.
        vla_confidence: use the VLA's confidence in it, too (the VLA must report one).
        vla_features: size of the VLA's pooled features to use (0: none).
    """

    action_dim: int
    history: int = 12
    state_dims: tuple[int, ...] = ()
    state_q01: tuple[float, ...] = ()
    state_q99: tuple[float, ...] = ()
    state_lags: tuple[int, ...] = (1, 3, 6)
    vla_output: bool = True
    vla_confidence: bool = False
    vla_features: int = 0

    def __post_init__(self) -> None:
        for name in ("state_dims", "state_q01", "state_q99", "state_lags"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.state_dims) == len(self.state_q01) == len(self.state_q99):
            raise InputError("features: state_dims, state_q01 and state_q99 differ in length")
        if any(not 1 <= lag <= self.history for lag in self.state_lags):
            raise InputError(f"features: state_lags {self.state_lags} must lie in 1..history = {self.history}")


def feature_names(config: FeatureConfig) -> list[str]:
    """The name of every column of :meth:`HistoryFeatures.forward`, in order."""
    names = [f"action[t-{config.history - i}][{d}]" for i in range(config.history) for d in range(config.action_dim)]
    names += [f"source[t-{config.history - i}]" for i in range(config.history)]
    names += [f"exists[t-{config.history - i}]" for i in range(config.history)]
    names += [f"state[t][{s}]" for s in config.state_dims]
    names += [f"state[t]-state[t-{lag}][{s}]" for lag in config.state_lags for s in config.state_dims]
    if config.vla_output:
        names += [f"vla_action[{d}]" for d in range(config.action_dim)] + ["vla_age"]
        names += [f"state[t]-state[vla][{s}]" for s in config.state_dims]
    if config.vla_confidence:
        names += [f"vla_confidence[{d}]" for d in range(config.action_dim)]
    names += [f"vla_features[{f}]" for f in range(config.vla_features)]
    return names


MOTION_GAIN = 5.0  # state differences over a few steps span a fraction of the range: bring them to order one
AGE_SCALE = 10.0  # steps


def to_device(window: Window, device: torch.device | str) -> Window:
    """The same window with torch tensors on ``device`` in place of arrays."""

    def convert(x: np.ndarray | None) -> Tensor | None:
        return None if x is None else torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    return Window(**{k: convert(v) for k, v in vars(window).items()})  # type: ignore[arg-type]


class HistoryFeatures(nn.Module):
    """A window, of arrays or tensors, to one row of features (B, len(feature_names(config))), all of order one.

    Also gives the same content as a sequence, for models that read it step by step: :meth:`tokens`.
    """

    state_offset: Tensor
    state_scale: Tensor

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        q01, q99 = torch.tensor(config.state_q01), torch.tensor(config.state_q99)
        self.state_dims = list(config.state_dims)
        self.lag_steps = [config.history - lag for lag in config.state_lags]
        self.register_buffer("state_offset", (q01 + q99) / 2, persistent=False)
        half = (q99 - q01) / 2
        self.register_buffer("state_scale", torch.where(half > 1e-6, half, torch.ones_like(half)), persistent=False)

    @property
    def size(self) -> int:
        """Number of features."""
        return len(feature_names(self.config))

    @property
    def token_size(self) -> int:
        """Entries of one step's token: action, source, exists, state."""
        return self.config.action_dim + 2 + len(self.state_dims)

    def _states(self, states: Tensor) -> Tensor:
        return (states[..., self.state_dims] - self.state_offset) / self.state_scale

    def _crop(self, x: Tensor, keep: int) -> Tensor:
        if x.shape[1] < keep:
            raise InputError(f"features: window holds {x.shape[1]} steps, the model looks back {keep}")
        return x[:, x.shape[1] - keep :]

    def _last_vla(self, w: Window, now: Tensor) -> list[Tensor]:
        parts: list[Tensor] = []
        if self.config.vla_output:
            age = torch.as_tensor(w.vla_age)[:, None]
            parts += [torch.as_tensor(w.vla_action), age.clamp(max=50.0) / AGE_SCALE]
            parts += [(now - self._states(torch.as_tensor(w.vla_state))) * MOTION_GAIN]
        if self.config.vla_confidence:
            if w.vla_confidence is None:
                raise InputError("features: the model needs vla_confidence, which this VLA or data set does not report")
            parts.append(torch.as_tensor(w.vla_confidence))
        if self.config.vla_features:
            if w.vla_features is None:
                raise InputError("features: the model needs vla_features, which this VLA or data set does not report")
            parts.append(torch.as_tensor(w.vla_features))
        return parts

    def forward(self, w: Window) -> Tensor:
        n = self.config.history
        actions = self._crop(torch.as_tensor(w.actions), n)  # (B, n, D)
        sources, mask = self._crop(torch.as_tensor(w.sources), n), self._crop(torch.as_tensor(w.mask), n)
        parts = [actions.flatten(1), sources, mask]
        states = self._states(self._crop(torch.as_tensor(w.states), n + 1))  # (B, n + 1, S)
        now = states[:, -1]
        parts += [now, ((now[:, None] - states[:, self.lag_steps]) * MOTION_GAIN).flatten(1)]
        return torch.cat(parts + self._last_vla(w, now), dim=1)

    def tokens(self, w: Window) -> tuple[Tensor, Tensor]:
        """The window as n + 1 tokens (B, n + 1, token_size) and the global features (B, G) of the VLA's last output.

        Token i holds what was executed at step i and the state it was executed in, as motion relative to now; the last
        token is now: its action is still open (zeros) and its state is absolute.
        """
        n = self.config.history
        actions = self._crop(torch.as_tensor(w.actions), n)
        sources, mask = self._crop(torch.as_tensor(w.sources), n), self._crop(torch.as_tensor(w.mask), n)
        states = self._states(self._crop(torch.as_tensor(w.states), n + 1))
        now = states[:, -1]
        motion = (states[:, :-1] - now[:, None]) * MOTION_GAIN
        steps = torch.cat([actions, sources[..., None], mask[..., None], motion], dim=-1)  # (B, n, token)
        last = torch.zeros_like(steps[:, :1])
        last[:, 0, steps.shape[-1] - now.shape[-1] :] = now
        rest = self._last_vla(w, now)
        return torch.cat([steps, last], dim=1), torch.cat(rest, dim=1) if rest else now[:, :0]

    @property
    def global_size(self) -> int:
        """Entries of the global features that :meth:`tokens` returns."""
        c = self.config
        out = (c.action_dim + 1 + len(c.state_dims)) if c.vla_output else 0
        return out + (c.action_dim if c.vla_confidence else 0) + c.vla_features
