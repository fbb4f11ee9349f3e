"""What learned generators and gates see: windows of executed actions, proprioception and the VLA's last output.

Never object poses, the task, the initial state or the step number: :func:`feature_names` lists every input, and a test
holds it to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spvla.actions import FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.history import Window

LARGEST = {"action_dim": 1000, "history": 1000, "vla_features": 2**16, "vla_plan": 1000}


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
        vla_plan: actions of a VLA's plan, whose rest is an input; 0: it is none, or the VLA does not plan ahead.
        state_size: how many values the whole state had in training; None in exports of earlier versions, which did not keep it.
        state_names: what they were called, where that is known.
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
    vla_plan: int = 0
    state_size: int | None = None
    state_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with naming("features"):
            check_fields(
                self,
                at_least={"action_dim": 1, "history": 1, "state_dims": 0, "vla_features": 0, "vla_plan": 0},
                at_most=LARGEST,
            )
        if not len(self.state_dims) == len(self.state_q01) == len(self.state_q99):
            raise InputError("features: state_dims, state_q01 and state_q99 differ in length")
        if self.state_size is not None and max(self.state_dims, default=-1) >= self.state_size:
            raise InputError(f"features: state_dims {self.state_dims} must lie below state_size = {self.state_size}")
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
    if config.vla_plan:
        names += [f"plan[t+{i}][{d}]" for i in PLAN_AHEAD for d in range(config.action_dim)] + ["plan_left"]
    return names


PLAN_AHEAD = (0, 1, 3)  # steps from now whose planned actions are inputs: speed, and gripper events ahead
MOTION_GAIN = 5.0  # state differences over a few steps span a fraction of the range: bring them to order one
AGE_SCALE = 10.0  # steps
MAX_AGE = 50.0  # steps
FAMILIAR = 10.0  # half ranges (q01 to q99) from the middle: beyond, a sensor failed or it is another robot


def to_device(window: Window, device: torch.device | str) -> Window:
    """The same window with torch tensors on ``device`` in place of arrays."""

    def convert(x: np.ndarray | None) -> Tensor | None:
        return None if x is None else torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    return Window(**{k: convert(v) for k, v in vars(window).items()})  # type: ignore[arg-type]


def cat(parts: Sequence[Any], axis: int) -> Any:
    """Tensors or arrays, concatenated."""
    return torch.cat(list(parts), axis) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis)


def _take(x: Any, columns: NDArray[np.int64]) -> Any:
    return x[:, columns.tolist()] if isinstance(x, Tensor) else x.take(columns, 1)


class HistoryFeatures(nn.Module):
    """A window to one row of features (B, len(feature_names(config))), all of order one.

    Works on windows of tensors (training, ONNX) and of arrays. On a robot there is no torch: :meth:`rows` computes with arrays
    alone and keeps the result until another window comes, so that generator and gate share it. :meth:`tokens` gives the same
    content as a sequence, for models that read it step by step.
    """

    state_offset: Tensor
    state_scale: Tensor

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        q01, q99 = np.asarray(config.state_q01, np.float32), np.asarray(config.state_q99, np.float32)
        self.offset = (q01 + q99) / 2
        self.scale = np.where(q99 - q01 > 2e-6, (q99 - q01) / 2, np.float32(1))
        self.state_dims = list(config.state_dims)
        self.least_state = max(self.state_dims, default=-1) + 1  # values of the state that are needed
        self.size = len(feature_names(config))
        executed = config.history * (config.action_dim + 2)  # actions, sources and masks
        self.now = slice(executed, executed + len(self.state_dims))  # columns of the state now
        pasts = len(config.state_lags) + config.vla_output  # earlier states that the one now is compared with
        self._again = np.tile(np.arange(len(self.state_dims)), pasts)
        self._offsets, self._scales = np.tile(self.offset, (1, 1 + pasts)), np.tile(self.scale, (1, 1 + pasts))
        self.register_buffer("state_offset", torch.from_numpy(self._offsets), persistent=False)
        self.register_buffer("state_scale", torch.from_numpy(self._scales), persistent=False)
        reported = {"vla_confidence": config.vla_confidence * config.action_dim, "vla_features": config.vla_features}
        self._reported = [(name, size) for name, size in reported.items() if size]  # what the VLA has to say of itself
        self._places: dict[int, NDArray[np.int64]] = {}  # by the size of a state
        self._latest: tuple[Window, FloatArray] | None = None
        self.token_size = config.action_dim + 2 + len(self.state_dims)  # action, source, exists, state
        self.global_size = (config.action_dim + 1 + len(self.state_dims)) if config.vla_output else 0
        self.global_size += (config.action_dim if config.vla_confidence else 0) + config.vla_features
        self.global_size += len(PLAN_AHEAD) * config.action_dim + 1 if config.vla_plan else 0

    def _require_state(self, size: int) -> None:
        """Refuse a state of ``size`` values if it is not the one that the model was trained with."""
        trained = self.config.state_size
        if self.least_state and (size < self.least_state or trained not in (None, size)):
            names = f" ({', '.join(self.config.state_names)})" if self.config.state_names else ""
            wanted = (
                f"the one with index {self.least_state - 1} is needed" if trained is None else f"it had {trained} in training"
            )
            raise InputError(
                f"observation.state: has {size} values, {wanted}{names}; a state in another layout would be misread",
                code="state-mismatch",
                field="observation.state",
            )

    def _states(self, states: Any) -> Any:
        """The entries that are read of states (..., S), in units of their range."""
        self._require_state(states.shape[-1])
        offset, scale = self._ranges(isinstance(states, Tensor))
        return (states[..., self.state_dims] - offset[0, : len(self.state_dims)]) / scale[0, : len(self.state_dims)]

    def _ranges(self, tensors: bool) -> tuple[Any, Any]:
        """Middle and half width of the entries, as many times as :meth:`_moves` reads them, (1, (1 + pasts) entries)."""
        return (self.state_offset, self.state_scale) if tensors else (self._offsets, self._scales)

    def _moves(self, w: Window) -> tuple[Any, Any]:
        """The state now, (B, entries), and how far it is from those at the lags and from the one that the VLA saw last,
        (B, pasts entries). All in one go: on a robot the number of operations counts, not their size."""
        n, (rows, _, size) = self.config.history, w.states.shape
        if (places := self._places.get(size)) is None:
            self._require_state(size)
            steps = [n, *(n - lag for lag in self.config.state_lags), *([n + 1] if self.config.vla_output else [])]
            places = self._places[size] = np.array([size * t + d for t in steps for d in self.state_dims], np.int64)
        states = self._crop(w.states, n + 1).reshape(rows, -1)
        states = cat([states, w.vla_state], 1) if self.config.vla_output else states
        offset, scale = self._ranges(isinstance(states, Tensor))
        read = (_take(states, places) - offset) / scale
        now = read[:, : len(self.state_dims)]
        return now, (_take(read, self._again) - read[:, len(self.state_dims) :]) * MOTION_GAIN

    def familiar(self, states: FloatArray) -> NDArray[np.bool_]:
        """Whether every entry of ``states`` (..., S) that is read here lies within :data:`FAMILIAR`: bool (...)."""
        return np.asarray((np.abs(self._states(states)) <= FAMILIAR).all(-1))

    def familiar_now(self, w: Window) -> NDArray[np.bool_]:
        """Whether B windows of arrays end in a state that is :meth:`familiar`, (B,)."""
        return np.logical_and.reduce(np.abs(self.rows(w)[:, self.now]) <= FAMILIAR, 1)

    def _crop(self, x: Any, keep: int) -> Any:
        if x.shape[1] < keep:
            raise InputError(f"features: window holds {x.shape[1]} steps, but the model needs {keep}")
        return x if x.shape[1] == keep else x[:, x.shape[1] - keep :]

    def _last_vla(self, w: Window, moved: Any) -> list[Any]:
        """What the VLA has said last, given how far the state has ``moved`` since, (B, entries)."""
        parts: list[Any] = []
        if self.config.vla_output:
            age = w.vla_age[:, None]
            capped = age.clip(0.0, MAX_AGE) if isinstance(age, Tensor) else np.minimum(age, MAX_AGE)
            parts += [w.vla_action, capped / AGE_SCALE, moved]
        for name, size in self._reported:
            value = getattr(w, name)
            if value is None and not (w.vla_age == 0).all():
                raise InputError(f"features: the model needs {name}, which this VLA or data set does not provide")
            if value is not None and value.shape[1] != size:
                raise InputError(
                    f"features: the model needs {name} of {size} values, this VLA or data set has {value.shape[1]}"
                )
            parts.append(cat([w.vla_age[:, None] * 0] * size, 1) if value is None else value)  # none before the first call
        return parts + (self._plan(w) if self.config.vla_plan else [])

    def _plan(self, w: Window) -> list[Any]:
        """What is planned for now and soon, zeros beyond the plan's end, and how much of it is left, as a fraction."""
        if w.plan is None or w.plan_left is None:
            raise InputError("features: the model reads plans, which this window does not have", code="no-plan")
        ahead = [w.plan[:, i] if i < w.plan.shape[1] else w.vla_action * 0 for i in PLAN_AHEAD]
        return [*ahead, w.plan_left[:, None] / self.config.vla_plan]

    def _parts(self, w: Window) -> list[Any]:
        """The features of a window of tensors or of arrays, in pieces (B, size)."""
        n, rows = self.config.history, w.states.shape[0]  # not len(): a traced size stays free
        parts = [self._crop(w.actions, n).reshape(rows, -1), self._crop(w.sources, n), self._crop(w.mask, n)]
        now, moves = self._moves(w)
        lags = len(self.config.state_lags) * len(self.state_dims)
        return [*parts, now, moves[:, :lags], *self._last_vla(w, moves[:, lags:])]

    def rows(self, w: Window) -> FloatArray:
        """The features of a window of arrays, not to be written to; computed once for a window that is asked for again."""
        latest = self._latest  # read once: sessions in other threads share this module
        if latest is not None and latest[0] is w:
            return latest[1]
        features: FloatArray = np.concatenate(self._parts(w), 1)
        self._latest = (w, features)
        return features

    def forward(self, w: Window) -> Tensor:
        return torch.cat(self._parts(w), 1) if isinstance(w.states, Tensor) else torch.from_numpy(self.rows(w))

    def tokens(self, w: Window) -> tuple[Tensor, Tensor]:
        """The window as n + 1 tokens (B, n + 1, token_size) and the global features (B, G) of the VLA's last output.

        Token i holds what was executed at step i and the state it was executed in, as motion relative to now; the last
        token is now: its action is still open (zeros) and its state is absolute.
        """
        tokens, rest = self.token_rows(w)
        return (tokens, rest) if isinstance(tokens, Tensor) else (torch.from_numpy(tokens), torch.from_numpy(rest))

    def token_rows(self, w: Window) -> tuple[Any, Any]:
        """:meth:`tokens` as arrays, of a window of arrays."""
        n = self.config.history
        states = self._states(self._crop(w.states, n + 1))
        now = states[:, -1]
        motion = (states[:, :-1] - now[:, None]) * MOTION_GAIN
        flags = [self._crop(x, n)[..., None] for x in (w.sources, w.mask)]
        steps = cat([self._crop(w.actions, n), *flags, motion], 2)  # (B, n, token_size)
        last = cat([steps[:, 0, : self.token_size - len(self.state_dims)] * 0, now], 1)
        moved = (now - self._states(w.vla_state)) * MOTION_GAIN if self.config.vla_output else None
        return cat([steps, last[:, None]], 1), cat([now[:, :0], *self._last_vla(w, moved)], 1)
