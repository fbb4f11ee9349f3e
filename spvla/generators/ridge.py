"""The published linear generator: ridge regression of the action on the time index (SP-VLA, arXiv 2506.12723).

For X = [t, 1] with t = 0..n-1 the prediction at t = n is [n, 1] (X'X + lambda I)^-1 X' Y. The design matrix is fixed, so
each n gives one constant filter over the last n actions: a proposal costs one small matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.history import Window


@cache
def ridge_filter(n: int, horizon: int = 1, penalty: float = 1e-4) -> FloatArray:
    """Weights (horizon, n) that map the last n values, oldest first, to their ridge extrapolations at t = n, n + 1, ..."""
    t = np.arange(n, dtype=np.float64)
    x = np.stack([t, np.ones(n)], axis=1)  # (n, 2)
    future = np.stack([n + np.arange(horizon), np.ones(horizon)], axis=1)  # (horizon, 2)
    weights: FloatArray = (future @ np.linalg.solve(x.T @ x + penalty * np.eye(2), x.T)).astype(np.float32)
    return weights


def extrapolate(actions: FloatArray, horizon: int = 1, penalty: float = 1e-4) -> FloatArray:
    """Ridge extrapolation of ``actions`` (..., n, D), oldest first, to (..., horizon, D)."""
    return np.asarray(ridge_filter(actions.shape[-2], horizon, penalty) @ actions, np.float32)


def validity_clip(proposed: FloatArray, actions: FloatArray, limit: float = 0.9) -> FloatArray:
    """SP-VLA's clip: ``proposed`` (..., H, D) to +-``limit``, then its change against the last of ``actions``
    (..., n, D) to the largest change per dimension inside them."""
    proposed = np.minimum(np.maximum(proposed, -limit), limit)  # as np.clip, at a third of its cost
    last = actions[..., -1:, :]
    if actions.shape[-2] < 2:
        return proposed
    step = np.abs(actions[..., 1:, :] - actions[..., :-1, :]).max(-2, keepdims=True)
    return last + np.minimum(np.maximum(proposed - last, -step), step)


@dataclass(frozen=True)
class RidgeGenerator:
    """SP-VLA's linear generator in its two published forms.

    Args:
        space: the action space.
        form: ``"release"`` extrapolates and clips the translation and copies everything else from the last action;
            ``"paper"`` extrapolates every dimension but the gripper's, which is copied. Published for translations in
            [-1, 1] a step; ``limit`` is in environment units.
        buffer: number of past actions the line is fitted to (n).
        penalty: lambda; it penalises the intercept too, as published.
        horizon: steps to extrapolate (H).
    """

    space: ActionSpace
    form: Literal["release", "paper"] = "release"
    buffer: int = 6
    penalty: float = 1e-4
    limit: float = 0.9
    horizon: int = 1
    fitted: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.form not in ("release", "paper"):
            raise InputError(f"ridge form {self.form!r} is neither 'release' nor 'paper'")
        if self.form == "release" and not self.space.translation:
            raise InputError(
                f"ridge form 'release' extrapolates translation, which action space {self.space.name!r} lacks: use 'paper'"
            )
        fitted = self.space.translation if self.form == "release" else self.space.continuous
        object.__setattr__(self, "fitted", list(fitted))

    @property
    def history_length(self) -> int:
        """Steps of history this generator reads."""
        return self.buffer

    def continue_actions(self, actions: FloatArray) -> FloatArray:
        """Continue ``actions`` (..., n, D), environment units, oldest first, to (..., H, D)."""
        last = actions[..., -1:, :]
        out = np.repeat(last, self.horizon, axis=-2)
        if actions.shape[-2] >= 2:
            fitted = actions[..., self.fitted]
            line = extrapolate(fitted, self.horizon, self.penalty)
            if self.form == "release":
                line = validity_clip(line, fitted, self.limit)
            out[..., self.fitted] = line
        return out

    def propose(self, window: Window) -> FloatArray:
        """Continue the last ``buffer`` executed actions of B windows, whoever made them: normalised (B, H, D). A shorter
        history uses the filter of its own length."""
        out = np.zeros((len(window.actions), self.horizon, self.space.dim), np.float32)
        counts = np.minimum(window.mask.sum(1).astype(int), self.buffer)
        for k in {*counts.tolist()} - {0}:
            rows = slice(None) if len(counts) == 1 else counts == k
            actions = self.space.denormalize(window.actions[rows, window.actions.shape[1] - k :])
            out[rows] = self.space.normalize(self.continue_actions(actions))
        return out


@dataclass(frozen=True)
class LastActionGenerator:
    """Repeats the last executed action: the floor that every other generator has to beat."""

    space: ActionSpace
    horizon: int = 1
    history_length: int = 1

    def propose(self, window: Window) -> FloatArray:
        """The last action of B windows, ``horizon`` times: normalised (B, H, D)."""
        return np.repeat(window.actions[:, -1:], self.horizon, axis=1)


def ridge(space: ActionSpace) -> RidgeGenerator:
    """The form of the published code, or where a space has no translation that of the paper."""
    return RidgeGenerator(space, form="release" if space.translation else "paper")


def ridge_paper(space: ActionSpace) -> RidgeGenerator:
    """The form of the paper: every dimension but the gripper's is extrapolated."""
    return RidgeGenerator(space, form="paper")
