"""Which visual tokens reach the language model (SP-VLA, arXiv 2506.12723): attended ones and contours, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, isqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.history import ActionHistory
from spvla.pruning.contours import contour_patches
from spvla.pruning.speed import check_thresholds, readme_keep_mass, release_keep_mass

SPEEDS = ("constant", "release", "readme")
MEASURES = ("mass", "ratio")
POSITIONS = ("packed", "original")
PRESETS = ("release", "readme")  # speed responses that need no further field


def select(
    attention: ArrayLike,
    contours: NDArray[np.bool_] | None,
    keep: float,
    budget: int | None = None,
    measure: str = "mass",
) -> NDArray[np.int64]:
    """Indices of the tokens to keep.

    Args:
        attention: attention received per token, (N,), non-negative, summing to 1.
        contours: patches to keep whatever their attention, bool (N,), or None.
        keep: with ``measure`` ``mass``, the k = #(cumulative attention < keep) + 1 most attended tokens stay; with
            ``ratio``, the ceil(keep N) most attended. At 1 or more everything stays, whatever the budget.
        budget: at most this many tokens: the most attended of the union, so that clutter cannot switch pruning off.

    Returns:
        int64 (K,), strictly ascending: order is never changed.

    Raises:
        InputError: ``attention`` is no distribution, ``keep`` or ``budget`` is not positive, sizes differ.
    """
    attention = np.asarray(attention, np.float64)
    n = attention.size
    if attention.ndim != 1 or n == 0:
        raise InputError(f"pruning: attention must have shape (N,), got {attention.shape}")
    if contours is not None and contours.shape != (n,):
        raise InputError(f"pruning: contours have shape {contours.shape}, attention has {n} tokens")
    if not keep > 0 or (budget is not None and budget < 1):
        raise InputError(f"pruning: keep and budget must be positive, got {keep} and {budget}")
    if keep >= 1:
        return np.arange(n)
    if not (attention >= 0).all() or abs(attention.sum() - 1) > 1e-3:
        raise InputError("pruning: attention must be finite, non-negative and sum to 1")
    order = np.argsort(-attention, kind="stable")  # most attended first; the earlier token wins a tie
    if measure == "ratio":
        k = ceil(keep * n)
    else:
        k = min(int(np.count_nonzero(np.cumsum(attention[order]) < keep)) + 1, n)
    kept = np.zeros(n, bool)
    kept[order[:k]] = True
    if contours is not None:
        kept |= contours
    if budget is not None and np.count_nonzero(kept) > budget:
        best = order[kept[order]][:budget]
        kept[:] = False
        kept[best] = True
    elif measure == "mass":
        assert attention[kept].sum() >= min(keep, attention.sum()) - 1e-9, "kept attention below the asked mass"
    indices = np.flatnonzero(kept)
    assert (np.diff(indices) > 0).all(), "token order changed"
    return indices


@dataclass(frozen=True)
class TokenPruner:
    """Chooses tokens for one model call, and the mass to keep at the current speed.

    Args:
        speed: ``release`` (fast motion keeps fewer), ``readme`` (slow motion keeps fewer) or ``constant``.
        keep: what ``constant`` keeps, in (0, 1].
        z_threshold, z_min: the speed response's constants, see :mod:`spvla.pruning.speed`; environment units.
        measure: what the kept number means: attention ``mass``, or a plain ``ratio`` of the tokens.
        contours: also keep patches with Canny edges.
        budget: at most this many tokens, or None.
        positions: position ids of the kept tokens in the language model: ``packed`` (consecutive) or ``original``.
    """

    speed: str = "release"
    keep: float = 1.0
    z_threshold: float = 0.5
    z_min: float = 0.9
    measure: str = "mass"
    contours: bool = True
    budget: int | None = None
    positions: str = "packed"

    def __post_init__(self) -> None:
        for name, known in (("speed", SPEEDS), ("measure", MEASURES), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"pruner: {name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not 0 < self.keep <= 1:
            raise InputError(f"pruner: keep must lie in (0, 1], got {self.keep}")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"pruner: budget must be at least 1, got {self.budget}")
        check_thresholds(self.z_threshold, self.z_min)

    def require(self, space: ActionSpace) -> None:
        """Raise :class:`InputError` if ``space`` lacks a dimension that the speed response reads."""
        needed = {"constant": 0, "readme": 1, "release": 3}[self.speed]
        if len(space.translation) < needed:
            what = "a vertical translation (translation[2])" if self.speed == "release" else "a translation"
            raise InputError(
                f"pruner: speed {self.speed!r} needs {what}, which action space {space.name!r} lacks; use speed 'constant'"
            )

    def keep_mass(self, history: ActionHistory) -> float:
        """What to keep in the next call, in (0, 1]; 1 prunes nothing, as before the first action of an episode.

        Raises:
            InputError: the action space lacks a dimension that the speed response reads.
        """
        self.require(history.space)
        if self.speed == "constant":
            return self.keep
        if history.last_action is None:
            return 1.0
        translation = history.last_action[list(history.space.translation)]
        if self.speed == "release":
            return release_keep_mass(translation[2], self.z_threshold, self.z_min)
        return readme_keep_mass(translation, self.z_threshold, self.z_min)

    def contour_mask(self, image: NDArray[np.uint8], tokens: int) -> NDArray[np.bool_] | None:
        """Patches to keep for their contours, bool (N,), or None if contours do not count.

        Args:
            image: what the encoder sees, uint8 (H, W, 3) RGB.
            tokens: N = grid x grid.
        """
        grid = isqrt(tokens)
        if grid * grid != tokens:
            raise InputError(f"pruner: {tokens} tokens form no square grid")
        return contour_patches(image, grid) if self.contours else None

    def choose(self, attention: ArrayLike, contours: NDArray[np.bool_] | None, keep_mass: float) -> NDArray[np.int64]:
        """Indices (K,) ascending of the tokens to keep, given :meth:`contour_mask`'s answer."""
        return select(attention, contours, keep_mass, self.budget, self.measure)

    def select(self, attention: ArrayLike, image: NDArray[np.uint8], keep_mass: float) -> NDArray[np.int64]:
        """Indices (K,) ascending of the tokens to keep.

        Args:
            attention: attention received per token, (N,), N = grid x grid.
            image: what the encoder sees, uint8 (H, W, 3) RGB.
            keep_mass: :meth:`keep_mass`'s answer; at 1 or more everything is kept at once.
        """
        attention = np.asarray(attention)
        if keep_mass >= 1:
            return np.arange(attention.size)
        return self.choose(attention, self.contour_mask(image, attention.size), keep_mass)


def make_pruner(pruning: TokenPruner | Mapping[str, Any] | str | None, name: str = "pruning") -> TokenPruner | None:
    """The pruner that a configuration means.

    Args:
        pruning: a pruner; fields of one; a speed response by its name (``release``, ``readme``), constants as published
            for LIBERO-Object; ``none`` or None for no pruning.
        name: what the error calls it.

    Raises:
        InputError: an unknown name, or a field that does not fit; the message lists the known ones.
    """
    if pruning is None or pruning == "none":
        return None
    if isinstance(pruning, TokenPruner):
        return pruning
    if isinstance(pruning, str):
        if pruning not in PRESETS:
            raise InputError(f"{name} {pruning!r} is unknown; there are: none, {', '.join(PRESETS)}")
        return TokenPruner(speed=pruning)
    known = [f.name for f in fields(TokenPruner)]
    for option in pruning:
        if option not in known:
            raise InputError(f"{name}: field {option!r} is unknown; there are: {', '.join(known)}")
    try:
        return TokenPruner(**pruning)
    except TypeError as error:  # a text where a number belongs
        raise InputError(f"{name}: {error}") from None
