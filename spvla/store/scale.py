"""The scale and bounds that recorded actions give their action space, and what their grippers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.gripper import GripperValues, judge_grippers
from spvla.statistics import Statistics
from spvla.store.columns import read_parquet, read_vectors

SMALLEST_SCALE = 0.05  # of the widest dimension of the same role


def measured_space(space: ActionSpace, actions: Statistics, ends: Sequence[tuple[float, float]] = ()) -> ActionSpace:
    """``space`` with the scale (see :func:`with_scale`) and bounds of actions that were seen. The q01 and q99 of binary
    grippers are their ``ends``."""
    q01, q99 = actions.quantile(0.01), actions.quantile(0.99)
    for d, pair in zip(space.gripper, ends, strict=False):
        q01[d], q99[d] = pair
    return with_scale(space, q01, q99, actions.min, actions.max, fixed=space.gripper if ends else ())


def with_scale(
    space: ActionSpace, q01: ArrayLike, q99: ArrayLike, low: ArrayLike, high: ArrayLike, fixed: Sequence[int] = ()
) -> ActionSpace:
    """``space`` with a measured scale and bounds, (D,) each, wherever they were measured.

    A dimension that barely moves has no scale of its own: it gets at least :data:`SMALLEST_SCALE` of the widest one of its
    role, so that sensor noise on a joint at rest is not full motion. The dimensions ``fixed`` keep what they have.
    """
    q01, q99 = (np.array(q, np.float64) for q in (q01, q99))
    roles = [(space.role(d), d in space.moving) for d in range(space.dim)]
    for role in set(roles):
        alike = [d for d in range(space.dim) if roles[d] == role and d not in fixed]
        if not alike:
            continue
        least = SMALLEST_SCALE * (q99 - q01)[alike].max()
        lacking = np.maximum(least - (q99 - q01)[alike], 0) / 2
        q01[alike], q99[alike] = q01[alike] - lacking, q99[alike] + lacking
    first, last, least, most = (tuple(np.asarray(v, np.float64).tolist()) for v in (q01, q99, low, high))
    return replace(space, q01=first, q99=last, low=least, high=most)


def judge_shards(shards: Mapping[Path, Mapping[str, Any]], space: ActionSpace) -> list[GripperValues]:
    """Judge the grippers of all episodes; an :class:`InputError` if one is not binary although ``space`` says so."""

    def values() -> Iterator[NDArray[np.float32]]:
        for path, info in shards.items():
            actions = read_vectors(read_parquet(path, ["action"]), "action", str(path))[:, list(space.gripper)]
            yield from np.split(actions, np.cumsum([e["length"] for e in info["episodes"]])[:-1])

    found = judge_grippers(values)
    store = next(iter(shards)).parents[1]
    for dimension, gripper in zip(space.gripper, found, strict=True):
        if not gripper.binary:
            raise InputError(
                f"{store}: the action space says that gripper entry {dimension} is binary, but its values are "
                f"{gripper}; write binary_gripper: false in its conventions",
                code="gripper-not-binary",
                field="binary_gripper",
            )
    return found


def wrong_grippers(space: ActionSpace, grippers: Sequence[GripperValues]) -> dict[int, str]:
    """The episodes in which a binary gripper is at neither end, with the reason to report for each."""
    out = {}
    for dimension, gripper in zip(space.gripper, grippers, strict=False):
        for number, (value, steps) in ({} if gripper.passing else gripper.strays).items():
            out[number] = (
                f"the gripper is at neither of its ends (action entry {dimension}: {gripper.low:g} and {gripper.high:g}) for "
                f"{steps} steps, mostly at {value:g}"
            )
    return out
