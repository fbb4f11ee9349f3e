"""Windows over rollout stores, indexed a whole batch at a time.

A batch is gathered by numpy fancy indexing from the memory-mapped arrays: no Python per window, no copy of the store.
What a window holds is exactly what :class:`spvla.history.ActionHistory` would hold online; a test replays one against
the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from data.store import EpisodeInfo, RolloutStore
from data.views import Scenes
from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.gates.eyes import EyesConfig
from spvla.history import Source, Window

BLOCK = 4_000_000  # frames that are shuffled together
SWAPPED = 0.15  # share of training windows whose frame at the VLA's last call is that of another episode


@dataclass(frozen=True)
class Batch:
    """Windows and what the teacher did next.

    Args:
        window: B histories.
        targets: the teacher's actions at the visited states t .. t + H - 1, normalised, (B, H, D); zeros where unknown.
        valid: 1 where a target exists, (B, H): within the episode, and the teacher was asked.
        changed: where the scene is another one than when the VLA was last asked, (B,); None where there are no frames.
    """

    window: Window
    targets: FloatArray
    valid: FloatArray
    changed: NDArray[np.bool_] | None = None


class Windows:
    """All windows of one or more stores.

    Args:
        stores: stores of compatible action spaces and equal state sizes. Each has a scale of its own; every window is in one.
        history: steps to look back (n).
        horizon: teacher actions ahead (H).
        confidence, features, plans: gather the VLA's confidence, its pooled features and the rest of its plan too; every store
            must have them.
        space: its scale normalises every action, for example an export's; None: the first store's scale.

    Attributes:
        space: the action space with that scale. Without ``space`` its bounds admit whatever one of the stores' bounds admit.

    Raises:
        InputError: spaces that differ in more than scale and bounds, other state sizes, a feature that is missing.
    """

    def __init__(
        self,
        stores: Sequence[RolloutStore],
        history: int,
        horizon: int = 1,
        confidence: bool = False,
        features: bool = False,
        space: ActionSpace | None = None,
        plans: bool = False,
    ) -> None:
        if not stores:
            raise InputError("windows: no stores given")
        first = stores[0]
        reference = first.space if space is None else space
        for store in stores:
            reference.require_compatible(store.space, str(store.folder))
            if store.arrays["states"].shape[1] != first.arrays["states"].shape[1]:
                raise InputError(
                    f"{store.folder}: observation.state has {store.arrays['states'].shape[1]} values, "
                    f"{first.folder} has {first.arrays['states'].shape[1]}",
                    code="state-mismatch",
                    field="observation.state",
                )
        for flag, name in ((confidence, "vla_confidence"), (features, "vla_features"), (plans, "vla_plans")):
            for store in stores:
                if flag and name not in store.arrays:
                    raise InputError(
                        f"{store.folder}: the model needs {name}, which this store lacks", code="missing-feature", field=name
                    )
        if plans and len(lengths := {store.arrays["vla_plans"].shape[1] for store in stores}) > 1:
            told = ", ".join(map(str, sorted(lengths)))
            raise InputError(f"windows: plans of several lengths: {told} actions", code="plan-mismatch", field="vla_plans")
        if space is None:
            low, high = (np.array([getattr(s.space, name) for s in stores]) for name in ("low", "high"))
            reference = replace(reference, low=tuple(low.min(0).tolist()), high=tuple(high.max(0).tolist()))
        self.space = reference.scaled_like(reference)
        self.stores = list(stores)
        self._rescaling = [store.space.rescaling(self.space) for store in stores]
        self.history, self.horizon = history, horizon
        self.confidence, self.features = confidence, features
        self.plan = stores[0].arrays["vla_plans"].shape[1] if plans else 0  # actions of a plan (P)
        self.offsets = np.cumsum([0] + [s.frames for s in stores])
        self.scenes: list[Scenes] | None = None  # what eyes see of each store
        self.errors: FloatArray | None = None  # of a generator at each frame

    def seen(self, eyes: EyesConfig | None) -> Self:
        """The same windows with what ``eyes`` see now and saw when the VLA was last asked: for gates alone, since frames are
        large. Raises :class:`InputError` that names a store without images."""
        if eyes is None:
            return self
        out = copy.copy(self)
        out.scenes = [Scenes.of(store, eyes) for store in self.stores]
        return out

    def knowing(self, errors: FloatArray) -> Self:
        """The same windows with a generator's error at the VLA's last call: its proposal less the VLA's action at each global
        frame, normalised (N, D), zeros where there is none; see :func:`data.disagreement.frame_errors`."""
        out = copy.copy(self)
        out.errors = errors
        return out

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def episodes(self) -> list[tuple[int, int, EpisodeInfo]]:
        """(store index, first global frame, info) of every episode."""
        return [(i, int(self.offsets[i]) + e.start, e) for i, s in enumerate(self.stores) for e in s.episodes]

    def batch(
        self,
        frames: NDArray[np.int64],
        hidden: NDArray[np.int64] | None = None,
        ages: NDArray[np.int64] | None = None,
        swaps: NDArray[np.int64] | None = None,
    ) -> Batch:
        """The windows before global ``frames`` (B,), in that order.

        Args:
            frames: global frame indices (over all stores).
            hidden: per window, pretend that the generator made the last this many actions, (B,): the VLA's last output
                then lies further back. The first step of an episode is always the VLA's.
            ages: per window, pretend that the VLA last planned so many steps ago, (B,), at most at the episode's start; 0: when
                it did. What it planned there must be known; otherwise it is as recorded.
            swaps: per window, a number that chooses another episode, whose frame is passed off as that of the VLA's last call,
                (B,); 0: its own. For windows that are seen.
        """
        if len(self.stores) == 1:
            return self._gather(0, frames, hidden, ages, swaps)
        which = np.searchsorted(self.offsets, frames, side="right") - 1
        order = np.argsort(which, kind="stable")
        parts = [
            self._gather(
                int(i),
                frames[chosen] - self.offsets[i],
                None if hidden is None else hidden[chosen],
                None if ages is None else ages[chosen],
                None if swaps is None else swaps[chosen],
            )
            for i in np.unique(which)
            for chosen in (order[which[order] == i],)
        ]
        back = np.argsort(order, kind="stable")

        def join(values: list[Any]) -> Any:
            return None if values[0] is None else np.concatenate([v for v in values if v is not None])[back]

        window = {name: join([getattr(p.window, name) for p in parts]) for name in vars(parts[0].window)}
        return Batch(Window(**window), *(join([getattr(p, name) for p in parts]) for name in ("targets", "valid", "changed")))

    def _gather(
        self,
        i: int,
        frames: NDArray[np.int64],
        hidden: NDArray[np.int64] | None,
        ages: NDArray[np.int64] | None,
        swaps: NDArray[np.int64] | None,
    ) -> Batch:
        a, rescaling = self.stores[i].arrays, self._rescaling[i]

        def in_scale(actions: FloatArray) -> FloatArray:
            return actions if rescaling is None else actions * rescaling[0] + rescaling[1]

        start = a["start"][frames]
        past = frames[:, None] + np.arange(-self.history, 0)  # (B, n)
        mask = (past >= start[:, None]).astype(np.float32)
        past = np.maximum(past, start[:, None])
        sources = (a["sources"][past] == Source.GENERATOR) * mask
        if hidden is None:
            last = a["last_vla"][frames]
        else:
            hidden = np.clip(hidden, 0, np.maximum(frames - start - 1, 0))
            pretend = np.arange(self.history, 0, -1)[None] <= hidden[:, None]
            sources = np.where(pretend, float(Source.GENERATOR), sources).astype(np.float32)
            last = a["last_vla"][frames - hidden]
        if ages is not None:
            earlier = np.maximum(frames - ages, start)
            pretend = (ages > 0) & (frames > start) & ~np.isnan(a["targets"][earlier]).any(1)
            last = np.where(pretend, earlier, last)
            sources = np.where(past == last[:, None], 0, sources)
        known = last >= 0
        last = np.where(known, last, start)
        context = np.concatenate([past, frames[:, None]], axis=1)  # (B, n + 1)
        ahead = frames[:, None] + np.arange(self.horizon)  # (B, H)
        inside = ahead < a["end"][frames][:, None]
        targets = in_scale(a["targets"][np.where(inside, ahead, frames[:, None])])
        valid = inside & ~np.isnan(targets).any(-1)

        def last_output(values: FloatArray) -> FloatArray:
            return np.nan_to_num(values) * known[:, None].astype(np.float32)

        plan, left = self._rest_of_plan(i, frames, last, known) if self.plan else (None, None)
        window = Window(
            actions=in_scale(a["actions"][past]) * mask[..., None],
            sources=sources.astype(np.float32),
            mask=mask,
            states=a["states"][context],
            vla_action=last_output(in_scale(a["targets"][last])),
            vla_state=a["states"][last],
            vla_age=np.where(known, frames - last, 0).astype(np.float32),
            vla_confidence=last_output(a["vla_confidence"][last]) if self.confidence else None,
            vla_features=last_output(a["vla_features"][last]) if self.features else None,
            plan=None if plan is None else in_scale(plan) * (np.arange(self.plan) < left[:, None])[..., None],  # type: ignore[index]
            plan_left=left,
            vla_error=None if self.errors is None else last_output(self.errors[self.offsets[i] + last]),
        )
        changed = None
        if self.scenes is not None:
            scenes = self.scenes[i]
            seen = last if swaps is None else scenes.elsewhere(last, swaps)
            window = replace(window, frame=scenes.views[frames], vla_frame=scenes.views[seen])
            changed = scenes.changed(last, frames) | (seen != last)
        return Batch(window, np.where(valid[..., None], targets, 0.0).astype(np.float32), valid.astype(np.float32), changed)

    def _rest_of_plan(
        self, i: int, frames: NDArray[np.int64], last: NDArray[np.int64], known: NDArray[np.bool_]
    ) -> tuple[FloatArray, FloatArray]:
        """What the plans made at frames ``last`` (B,) of a store hold for ``frames`` (B,) and later, (B, P, D), in the store's
        scale, followed by anything; and how many actions that are, (B,), none where there is no plan."""
        plans = self.stores[i].arrays["vla_plans"]
        ahead = (frames - last)[:, None] + np.arange(self.plan)  # (B, P)
        plan = plans[last[:, None], np.minimum(ahead, self.plan - 1)]
        whole = known & ~np.isnan(plan).any((1, 2))
        left = np.where(whole, np.maximum(self.plan - (frames - last), 0), 0)
        return np.nan_to_num(plan), left.astype(np.float32)


def frames_of(spans: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Global frames of (first, length) spans, (sum of lengths,)."""
    if not len(spans):
        return np.zeros(0, np.int64)
    first, length = np.asarray(spans, np.int64).T
    before = np.cumsum(length) - length
    return np.repeat(first - before, length) + np.arange(length.sum())


def blocks_of(spans: Sequence[tuple[int, int]], most: int = BLOCK) -> Iterator[NDArray[np.int64]]:
    """The frames of (first, length) spans in their order, at most about ``most`` at a time, whole spans each."""
    ends = np.cumsum(np.asarray(spans, np.int64)[:, 1])
    for group in np.split(np.arange(len(spans)), np.flatnonzero(np.diff(ends // most)) + 1):
        yield frames_of(spans[group[0] : group[-1] + 1])


def shuffled(spans: Sequence[tuple[int, int]], rng: np.random.Generator, most: int = BLOCK) -> Iterator[NDArray[np.int64]]:
    """The frames of ``spans`` in random order, pass after pass without end, in constant memory: more than ``most`` frames
    come in blocks of so many, each of other episodes in every pass."""
    while True:
        order = spans
        if sum(length for _, length in spans) > most:
            order = [spans[i] for i in rng.permutation(len(spans))]
        for block in blocks_of(order, most):
            yield rng.permutation(block)


class BatchStream(torch.utils.data.IterableDataset[Batch]):
    """Endless shuffled batches of tensors, whole batches at a time (use ``DataLoader(batch_size=None)``).

    Args:
        windows: where from.
        spans: the episodes to draw from, (first, length) each; every frame once per pass.
        batch_size: B.
        seed: of the order and of the hiding.
        hide: share of windows in which the last 1 .. n actions are passed off as the generator's (see
            :meth:`Windows.batch`), so that a model trained on a teacher's rollouts knows what an old VLA output looks like. Of
            windows with plans the last look is passed off as 1 .. max(n, P) steps old, and some of the steps since then, the
            last ones, as the generator's.
        batches: batches per pass; by default as many as the frames fill.
        weights: share of each store in every batch, on average; None: as many as it has frames.
        passes: how many an earlier run has made.
        rank: which of several training processes this is; each draws frames of its own.

    Raises:
        InputError: no frames, or weights that do not fit the stores.
    """

    def __init__(
        self,
        windows: Windows,
        spans: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int = 0,
        hide: float = 0.0,
        batches: int | None = None,
        weights: Sequence[float] | None = None,
        passes: int = 0,
        rank: int = 0,
    ) -> None:
        total = sum(length for _, length in spans)
        if not total:
            raise InputError("batches: no frames to draw from")
        self.windows, self.batch_size = windows, batch_size
        self.seed, self.hide = seed, hide
        self.batches = batches or max(1, total // batch_size)
        self.passes, self.rank = passes, rank
        self.groups, self.shares = [list(spans)], np.ones(1)
        if weights is not None:
            self.shares = mixture(len(windows.stores), weights)
            which = np.searchsorted(windows.offsets, [first for first, _ in spans], side="right") - 1
            self.groups = [[s for s, store in zip(spans, which, strict=True) if store == i] for i in range(len(windows.stores))]
            for store, group, share in zip(windows.stores, self.groups, self.shares, strict=True):
                if share > 0 and not group:
                    raise InputError(f"{store.folder}: has weight {share:g} but no training episodes")

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        rng = np.random.default_rng([self.seed, self.passes, self.rank])
        self.passes += 1
        drawn = [_Drawing(shuffled(group, rng)) if group else None for group in self.groups]
        for _ in range(self.batches):
            counts = [self.batch_size] if len(drawn) == 1 else rng.multinomial(self.batch_size, self.shares)
            parts = [d.take(n) for d, n in zip(drawn, counts, strict=True) if d is not None and n]
            frames = parts[0] if len(parts) == 1 else np.concatenate(parts)
            hidden = ages = None
            if self.hide and self.windows.plan:
                age = rng.integers(1, max(self.windows.history, self.windows.plan) + 1, len(frames))
                ages = np.where(rng.random(len(frames)) < self.hide, age, 0)
                hidden = rng.integers(0, np.maximum(ages, 1))
            elif self.hide:
                run = rng.integers(1, self.windows.history + 1, len(frames))
                hidden = np.where(rng.random(len(frames)) < self.hide, run, 0)
            swaps = None
            if self.windows.scenes is not None:
                swaps = np.where(rng.random(len(frames)) < SWAPPED, rng.integers(1, 2**31, len(frames)), 0)
            yield frames, self.windows.batch(frames, hidden, ages, swaps)


class _Drawing:
    """Takes so many frames at a time off blocks."""

    def __init__(self, blocks: Iterator[NDArray[np.int64]]) -> None:
        self.blocks, self.block = blocks, next(blocks)

    def take(self, count: int) -> NDArray[np.int64]:
        parts = []
        while count > len(self.block):
            parts.append(self.block)
            count -= len(self.block)
            self.block = next(self.blocks)
        parts.append(self.block[:count])
        self.block = self.block[count:]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def mixture(stores: int, weights: Sequence[float]) -> NDArray[np.float64]:
    """Shares (stores,) that sum to one, from one weight per store. Raises :class:`InputError` for others."""
    shares = np.asarray(weights, np.float64)
    if len(shares) != stores:
        raise InputError(f"weights: {len(shares)} for {stores} stores; give one for each of --data, in order")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise InputError(f"weights: must not be negative, nor all zero, got {list(weights)}")
    return shares / shares.sum()
