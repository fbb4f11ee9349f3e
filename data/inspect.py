"""Look at a rollout store: ``python -m data inspect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from data.store import RolloutStore


def inspect(data: Path) -> None:
    """Print what a rollout store holds: episodes, lengths, success, who acted, labels, action quantiles.

    Args:
        data: the rollout store.
    """
    store = RolloutStore(data)
    a, space = store.arrays, store.space
    lengths = np.array([e.length for e in store.episodes])
    known = [e.success for e in store.episodes if e.success is not None]
    print(f"{data}: {len(lengths)} episodes, {store.frames} steps at {space.control_rate:g} Hz ({space.name}, {space.kind})")
    print(f"lengths   median {np.median(lengths):g}, {lengths.min()} to {lengths.max()}")
    print(f"success   {np.mean(known):.1%} of {len(known)}" if known else "success   unknown")
    labelled = ~np.isnan(a["targets"]).any(1)
    kind = "teacher's actions" if store.labelled_by_teacher else "recorded actions (demonstrations, no teacher)"
    print(f"labels    {kind}, {labelled.mean():.1%} of the steps")
    print(f"generated {a['sources'].mean():.1%} of the steps")
    groups = Counter((e.metadata.get("suite", "-"), e.metadata.get("task_name", e.instruction)) for e in store.episodes)
    for (suite, task), count in sorted(groups.items()):
        print(f"  {count:5d} episodes  {suite}  {task}")
    print("action    " + "  ".join(f"{name:>7}" for name in ("q01", "q25", "q50", "q75", "q99")) + "   (environment units)")
    for d, row in enumerate(np.quantile(space.denormalize(a["actions"]), [0.01, 0.25, 0.5, 0.75, 0.99], axis=0).T):
        role = next((r for r in ("translation", "rotation", "gripper") if d in getattr(space, r)), "joint")
        print(f"  {d:3d}     " + "  ".join(f"{v:7.3f}" for v in row) + f"   {role}")
