"""Which visual tokens reach the language model (SP-VLA, arXiv 2506.12723): attended ones and contours, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isqrt
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.pruning.contours import contour_patches
from spvla.registry import Registry


class Scorer(Protocol):
    """Says how much each visual token matters. Add one as a function in a file of its own, named in :data:`SCORERS`,
    by an entry point of the group ``spvla.scores``, or as ``package.module:function``."""

    def __call__(self, queries: Tensor, keys: Tensor, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Scores, float32 (B, N), non-negative; each row sums to 1.

        Args:
            queries, keys: of the encoder's scoring block, (B, nh, N, hs), any float type.
            images: what the encoder sees, B x uint8 (S, S, 3) RGB.
        """


SCORERS = Registry("pruning score", "spvla.scores", {"attention": "spvla.pruning.attention:attention"})


def select(
    scores: ArrayLike,
    contours: NDArray[np.bool_] | None,
    keep: float,
    budget: int | None = None,
    measure: str = "mass",
    contour_fraction: float | None = None,
) -> NDArray[np.int64]:
    """Indices of the tokens to keep: the best by score, and the contours.

    Args:
        scores: such as attention received per token, (N,), non-negative, summing to 1.
        contours: patches on contours, bool (N,), or None. They come on top of the best by score.
        keep: with ``measure`` ``mass``, the k = #(cumulative score < keep) + 1 best tokens stay; with ``ratio``, the
            ceil(keep N) best. At 1 or more everything stays, whatever the budget.
        budget: at most this many tokens: the best by score of the union, so that clutter cannot switch pruning off.
        contour_fraction: of ``budget`` places (of k without one), ceil(contour_fraction places) go to the best contours that
            the score alone would have left out, as far as there are such, and never the last place; the others to the best by
            score.

    Returns:
        int64 (K,), strictly ascending: order is never changed.

    Raises:
        InputError: ``scores`` are no distribution, ``keep`` or ``budget`` is not positive, sizes differ.
    """
    scores = np.asarray(scores, np.float64)
    n = scores.size
    if scores.ndim != 1 or n == 0:
        raise InputError(f"pruning: scores must have shape (N,), got {scores.shape}")
    if contours is not None and contours.shape != (n,):
        raise InputError(f"pruning: contours have shape {contours.shape} for {n} tokens")
    if not keep > 0 or (budget is not None and budget < 1):
        raise InputError(f"pruning: keep and budget must be positive, got {keep} and {budget}")
    if keep >= 1:
        return np.arange(n)
    if not (scores >= 0).all() or abs(scores.sum() - 1) > 1e-3:
        raise InputError("pruning: scores must be finite, non-negative and sum to 1")
    order = np.argsort(-scores, kind="stable")  # best first; the earlier token wins a tie
    if measure == "ratio":
        k = ceil(keep * n)
    else:
        k = min(int(np.count_nonzero(np.cumsum(scores[order]) < keep)) + 1, n)
    kept = np.zeros(n, bool)
    kept[order[:k]] = True
    if contours is not None:
        kept |= contours
    places = budget or (n if contour_fraction is None else k)
    if np.count_nonzero(kept) > places:
        best = order[kept[order]]  # the union, best first
        if contours is not None and contour_fraction is not None:
            reserved = min(ceil(contour_fraction * places), places - 1)
            first, rest = best[: places - reserved], best[places - reserved :]
            best = np.concatenate([first, rest[contours[rest]], rest[~contours[rest]]])
        kept[:] = False
        kept[best[:places]] = True
    elif measure == "mass":
        assert scores[kept].sum() >= min(keep, scores.sum()) - 1e-9, "kept score below the asked mass"
    indices = np.flatnonzero(kept)
    assert (np.diff(indices) > 0).all(), "token order changed"
    return indices


@dataclass(frozen=True)
class TokenSelector:
    """Chooses a VLA's visual tokens. Belongs to the VLA; how much to keep comes with each call, from the policy.

    Args:
        score: the :class:`Scorer` that says how much a token matters: a name in
            :data:`SCORERS` or ``package.module:function``.
        measure: what is kept: ``mass``, this much of the score, or ``ratio``, this many of the tokens.
        contours: also keep patches with Canny edges.
        contour_fraction: in (0, 1): contours take this fraction of the places instead of coming on top, see :func:`select`.
            Needed with contours and a budget: the budget's places would otherwise all go to the best by score.
        budget: at most this many tokens, or None.
        positions: position ids of the kept tokens in the language model: ``packed`` (consecutive) or ``original``.

    Raises:
        InputError: a value out of range; a setting in which a part cannot matter (code ``cannot-matter``).
    """

    score: str = "attention"
    measure: Literal["mass", "ratio"] = "mass"
    contours: bool = True
    contour_fraction: float | None = None
    budget: int | None = None
    positions: Literal["packed", "original"] = "packed"

    def __post_init__(self) -> None:
        with naming("pruning"):
            check_fields(self, at_least={"budget": 1})
        _ = self._scorer  # an unknown name is refused at once
        fraction, budget = self.contour_fraction, self.budget
        if fraction is not None and not 0 < fraction < 1:
            raise InputError(f"pruning: contour_fraction must lie between 0 and 1, got {fraction}", field="contour_fraction")
        if fraction is not None and not self.contours:
            raise _cannot_matter("contour_fraction", f"{fraction} of no contours (contours is false); leave it out")
        if self.contours and budget is not None and fraction is None:
            raise _cannot_matter(
                "contours", f"the {budget} places of the budget all go by score; give a contour_fraction, or contours: false"
            )
        if self.contours and budget is not None and fraction is not None and ceil(fraction * budget) >= budget:
            raise _cannot_matter(
                "score", f"contours take all {budget} places; give a larger budget or a smaller contour_fraction"
            )

    def require(self, tokens: int) -> None:
        """Raise :class:`InputError` if this cannot choose among ``tokens``: no square grid, or a budget that spares none."""
        if isqrt(tokens) ** 2 != tokens:
            raise InputError(f"pruning: {tokens} tokens do not form a square grid", code="no-grid")
        if self.budget is not None and self.budget >= tokens:
            raise _cannot_matter("budget", f"there are only {tokens} tokens, got {self.budget}")

    def scores(self, queries: Tensor, keys: Tensor, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """What the :class:`Scorer` says: (B, N)."""
        return self._scorer(queries, keys, images)

    @cached_property
    def _scorer(self) -> Scorer:
        scorer: Scorer = SCORERS.get(self.score)
        return scorer

    def contour_mask(self, image: NDArray[np.uint8], tokens: int) -> NDArray[np.bool_] | None:
        """Patches on contours, bool (N,), or None if contours do not count.

        Args:
            image: what the encoder sees, uint8 (S, S, 3) RGB.
            tokens: N = grid x grid.
        """
        self.require(tokens)
        return contour_patches(image, isqrt(tokens)) if self.contours else None

    def choose(self, scores: ArrayLike, contours: NDArray[np.bool_] | None, keep: float) -> NDArray[np.int64]:
        """Indices (K,) ascending of the tokens to keep, given :meth:`contour_mask`'s answer."""
        return select(scores, contours, keep, self.budget, self.measure, self.contour_fraction)

    def select(self, scores: ArrayLike, image: NDArray[np.uint8], keep: float) -> NDArray[np.int64]:
        """Indices (K,) ascending of the tokens to keep.

        Args:
            scores: (N,), N = grid x grid.
            image: what the encoder sees, uint8 (S, S, 3) RGB.
            keep: in (0, 1]; at 1 everything is kept at once.
        """
        scores = np.asarray(scores)
        return np.arange(scores.size) if keep >= 1 else self.choose(scores, self.contour_mask(image, scores.size), keep)


def _cannot_matter(field: str, why: str) -> InputError:
    return InputError(f"pruning: {field} cannot matter here: {why}", code="cannot-matter", field=field)
