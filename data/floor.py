"""The noise floor of a VLA that plans in chunks, from stores with its whole plans (:mod:`spvla.gates.floor`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.store import RolloutStore
from data.windows import Windows, frames_of
from spvla.gates.floor import NoiseFloor

SAME = 1e-3  # normalised units: a recorded action that is a plan's, after both were stored as float32


def noise_floor(windows: Windows, spans: Sequence[tuple[int, int]], tolerance: float) -> NoiseFloor | None:
    """The floor over the episodes in ``spans``, (first, length) each, as global frames.

    Args:
        windows: the data; every store with plans counts.
        spans: the episodes.
        tolerance: largest error of an action that does not deviate, in the windows' scale.

    Returns:
        None where no store has plans, or they are of several lengths.
    """
    frames = frames_of(spans)
    found: list[NDArray[np.int64]] = []  # per store, see _count
    for i, store in enumerate(windows.stores):
        mine = frames[(frames >= windows.offsets[i]) & (frames < windows.offsets[i + 1])] - windows.offsets[i]
        if "vla_plans" in store.arrays and len(mine):
            found.append(_count(windows, i, store, mine, tolerance))
    if not found or len({counts.shape for counts in found}) > 1:
        return None
    deviating, known = np.sum(found, axis=0)
    share = deviating / np.maximum(known, 1)
    length = len(share) // 2
    stale, kept = (tuple(part.tolist()) for part in (share[:length], share[length:-1]))
    return NoiseFloor(stale, float(share[-1]) if known[-1] else None, kept if known[length:-1].all() else None)


def _count(windows: Windows, i: int, store: RolloutStore, frames: NDArray[np.int64], tolerance: float) -> NDArray[np.int64]:
    """In how many of a store's ``frames`` a plan deviates and in how many that is known, (2, 2 P + 1): plans of each age, those
    of each age that were executed until then, and last second plans."""
    a, rescaling = store.arrays, store.space.rescaling(windows.space)
    length = a["vla_plans"].shape[1]
    counts = np.zeros((2, 2 * length + 1), np.int64)
    fresh = a["targets"][frames]

    def judge(column: int, actions: NDArray[np.float32], there: NDArray[np.bool_]) -> None:
        there = there & ~np.isnan(actions).any(1) & ~np.isnan(fresh).any(1)
        mine, theirs = actions[there], fresh[there]
        if rescaling is not None:
            mine, theirs = (x * rescaling[0] + rescaling[1] for x in (mine, theirs))
        counts[:, column] = windows.space.deviation(mine, theirs, tolerance).sum(), there.sum()

    for age in range(length):
        there = frames - age >= a["start"][frames]
        made = np.where(there, frames - age, frames)
        plans = a["vla_plans"][made]
        judge(age, plans[:, age], there)
        executed = a["actions"][made[:, None] + np.arange(age)]  # (F, age, D)
        judge(length + age, plans[:, age], there & (np.abs(executed - plans[:, :age]) <= SAME).all((1, 2)))
    if "vla_again" in a:
        judge(2 * length, a["vla_again"][frames], np.ones(len(frames), bool))
    return counts
