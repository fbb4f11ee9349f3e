"""The unit of actions: a data set's statistics (q01, q99), by which a checkpoint's actions are normalised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.vlas.checkpoint import some
from spvla.vlas.conventions import Conventions

NO_NOOPS = "_no_noops"  # OpenVLA's LIBERO data without its no-op steps; published statistics carry it in their names


@dataclass(frozen=True)
class ActionStatistics:
    """One data set's action scale: ``q01``, ``q99`` float64 (D,) and ``mask`` bool (D,), False: not normalised."""

    key: str
    q01: NDArray[np.float64]
    q99: NDArray[np.float64]
    mask: NDArray[np.bool_]

    @classmethod
    def find(cls, norm_stats: Mapping[str, Any], key: str | None) -> ActionStatistics:
        """The statistics called ``key`` or ``key + "_no_noops"``; for None the only ones there are.

        Raises:
            InputError: none of that name, or several and none asked for (the message lists them); bad shapes.
        """
        available = ", ".join(norm_stats) or "none"
        if key is None:
            if len(norm_stats) != 1:
                raise InputError(f"unnorm_key: choose the data set that gives the action statistics; available: {available}")
            key = next(iter(norm_stats))
        elif key not in norm_stats and f"{key}{NO_NOOPS}" in norm_stats:
            key = f"{key}{NO_NOOPS}"
        if key not in norm_stats:
            raise InputError(f"unnorm_key: no statistics for {key!r}; available: {available}")
        try:
            stats = norm_stats[key]["action"]
            q01, q99 = np.array(stats["q01"], np.float64), np.array(stats["q99"], np.float64)
            mask = np.array(stats.get("mask", np.ones(len(q01), bool)), bool)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"norm_stats[{key!r}]: no usable action q01, q99 and mask ({error!r})") from None
        if not (np.isfinite(q01).all() and np.isfinite(q99).all()):
            bad = [d for d in range(q01.size) if not np.isfinite([q01.flat[d], q99.flat[d]]).all()]
            raise InputError(
                f"norm_stats[{key!r}]: q01 or q99 is NaN or infinite in dimension {some(list(map(str, bad)))}; was a column of "
                "the training data empty?",
                code="statistics",
                field=f"norm_stats.{key}",
            )
        if q01.ndim != 1 or not q01.size or q01.shape != q99.shape or q01.shape != mask.shape:
            raise InputError(f"norm_stats[{key!r}]: q01, q99, mask differ in shape: {q01.shape}, {q99.shape}, {mask.shape}")
        return cls(key, q01, q99, mask)

    def denormalize(self, normalized: NDArray[np.floating]) -> NDArray[np.float32]:
        """Normalised actions (..., D) to the data's units."""
        x = np.asarray(normalized, np.float64)
        scaled = 0.5 * (x + 1) * (self.q99 - self.q01) + self.q01
        return np.where(self.mask, scaled, x).astype(np.float32)

    def normalize(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        """Actions (..., D) in the data's units to normalised ones, not clipped."""
        x = np.asarray(actions, np.float64)
        width = np.where(self.q99 > self.q01, self.q99 - self.q01, 1.0)
        return np.where(self.mask, 2 * (x - self.q01) / width - 1, x)

    def action_space(self, conventions: Conventions, control_rate: float) -> ActionSpace:
        """The environment's action space. 7 dimensions: OpenVLA's layout; else unmasked ones are plain continuous."""
        d = self.q01.size
        standard = d == 7
        gripper = (6,) if standard else tuple(np.flatnonzero(~self.mask).tolist())
        q01, q99 = self.q01.copy(), self.q99.copy()
        unscaled = list(np.flatnonzero(~self.mask))
        q01[unscaled], q99[unscaled] = 0.0, 1.0
        if conventions.signed_gripper:
            q01[list(gripper)], q99[list(gripper)] = -1.0, 1.0
        bound = conventions.bound
        low, high = (q01, q99) if bound is None else (np.full(d, -bound), np.full(d, bound))
        return ActionSpace(
            name=self.key,
            kind="eef_delta" if standard else "joint_position",
            control_rate=control_rate,
            q01=tuple(q01.tolist()),
            q99=tuple(q99.tolist()),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            translation=(0, 1, 2) if standard else (),
            rotation=(3, 4, 5) if standard else (),
            gripper=gripper,
        )


def statistics_of_suite(norm_stats: Mapping[str, Any], suite: str) -> str | None:
    """The statistics' key that belongs to a suite, or to the one it varies (``libero_object_swap``); None: none does."""
    keys = {key: key.removesuffix(NO_NOOPS) for key in norm_stats}
    return max((k for k, base in keys.items() if f"{suite}_".startswith(f"{base}_")), key=lambda k: len(keys[k]), default=None)
