"""How far off a generator is at every frame of a store: what a gate may know of the VLA's last call.

Online it is the generator's proposal less the VLA's answer at that call (:class:`spvla.history.ActionHistory`). Here it is
computed once for whole episodes, so that a batch only looks it up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.windows import Windows, blocks_of
from spvla.actions import FloatArray
from spvla.generators.base import ActionGenerator
from spvla.history import Window

ROWS = 65536  # windows at a time


def select(window: Window, rows: NDArray[np.bool_]) -> Window:
    """The windows of a batch at ``rows`` (B,)."""
    return Window(**{k: None if v is None else v[rows] for k, v in vars(window).items()})  # type: ignore[arg-type]


def propose(judges: Sequence[ActionGenerator], fold: NDArray[np.uint8], window: Window) -> FloatArray:
    """What the generator of each window's ``fold`` (B,) would do next, normalised (B, D); arrays."""
    proposals = np.zeros_like(window.vla_action)
    for k, judge in enumerate(judges):
        rows = fold == k
        if rows.any():
            proposals[rows] = judge.propose(select(window, rows))[:, 0]
    return proposals


def frame_errors(
    windows: Windows,
    judges: Sequence[ActionGenerator],
    spans: Sequence[tuple[int, int]],
    fold: NDArray[np.uint8] | None = None,
) -> FloatArray:
    """The error at each global frame, normalised (N, D), for :meth:`data.windows.Windows.knowing`; zeros where there is none.

    Args:
        windows: the data, without what a gate's eyes see.
        judges: per fold, the generator whose errors count there: for episodes of its training one that has not seen them, since
            it errs more than one that has.
        spans: the episodes that are read, (first, length) each.
        fold: of every global frame, (N,); None: there is one judge.
    """
    errors = np.zeros((len(windows), windows.space.dim), np.float32)
    for frames in blocks_of(spans, ROWS) if len(spans) else ():
        batch = windows.batch(frames)
        folds = np.zeros(len(frames), np.uint8) if fold is None else fold[frames]
        off = propose(judges, folds, batch.window) - batch.targets[:, 0]
        # Before its first call a generator knows nothing, and what the VLA said must be known.
        there = (batch.window.vla_age > 0) & (batch.valid[:, 0] > 0) & np.isfinite(off).all(1)
        errors[frames[there]] = off[there]
    return errors
