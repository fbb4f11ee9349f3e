"""The noise floor of a VLA that plans in chunks, from stores with its whole plans (:mod:`spvla.gates.floor`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.store import RolloutStore
from data.windows import Windows, frames_of
from spvla.gates.floor import NoiseFloor


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
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # per store, deviating and known states, (P + 1,) each
    for i, store in enumerate(windows.stores):
        mine = frames[(frames >= windows.offsets[i]) & (frames < windows.offsets[i + 1])] - windows.offsets[i]
        if "vla_plans" in store.arrays and len(mine):
            found.append(_count(windows, i, store, mine, tolerance))
    if not found or len({len(known) for _, known in found}) > 1:
        return None
    deviating, known = (np.sum(counts, axis=0) for counts in zip(*found, strict=True))
    share = deviating / np.maximum(known, 1)
    return NoiseFloor(tuple(share[:-1].tolist()), float(share[-1]) if known[-1] else None)


def _count(
    windows: Windows, i: int, store: RolloutStore, frames: NDArray[np.int64], tolerance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """In how many of a store's ``frames`` the plan of each age, and last a second plan, deviates; in how many that is known."""
    a, rescaling = store.arrays, store.space.rescaling(windows.space)
    length = a["vla_plans"].shape[1]
    deviating, known = np.zeros(length + 1, np.int64), np.zeros(length + 1, np.int64)
    fresh = a["targets"][frames]

    def judge(age: int, actions: NDArray[np.float32], there: NDArray[np.bool_]) -> None:
        there = there & ~np.isnan(actions).any(1) & ~np.isnan(fresh).any(1)
        mine, theirs = actions[there], fresh[there]
        if rescaling is not None:
            mine, theirs = (x * rescaling[0] + rescaling[1] for x in (mine, theirs))
        known[age] = int(there.sum())
        deviating[age] = int(windows.space.deviation(mine, theirs, tolerance).sum())

    for age in range(length):
        made = frames - age
        judge(age, a["vla_plans"][np.maximum(made, 0), age], made >= a["start"][frames])
    if "vla_again" in a:
        judge(length, a["vla_again"][frames], np.ones(len(frames), bool))
    return deviating, known
