"""Mean, spread and quantiles of vectors in one pass and bounded memory.

Quantiles come from a histogram whose cells are the leading bits of a float32: 2048 cells for each power of two, so that a
quantile is off by at most 1/4096 of its size, however many vectors there were and in whatever order and parts they came.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DROPPED_BITS = 12


def _cells(x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Histogram cells of values; cells are ordered as the values are."""
    bits = (x + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: minus zero is zero
    return np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits) >> DROPPED_BITS


def _values(cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """The value in the middle of each cell; zero is in the middle of its own."""
    ordered = cells << DROPPED_BITS
    low = np.where(ordered < 0, -(ordered + 1), ordered)
    high = np.where(ordered < 0, low - (1 << DROPPED_BITS) + 1, low + (1 << DROPPED_BITS) - 1)
    magnitude = (low.astype(np.int32).view(np.float32).astype(np.float64) + high.astype(np.int32).view(np.float32)) / 2
    return np.where(ordered < 0, -magnitude, np.where(ordered == 0, 0.0, magnitude))


class Statistics:
    """Statistics of vectors (N, D) that come in parts; rows with NaN or infinity are left out.

    Args:
        quantiles: keep the histograms that quantiles come from; what they cost grows with D.

    Attributes:
        count: N.
        min, max, mean: (D,) each, once there is a vector.
        squares: sum of the squared distances from the mean, (D,).
    """

    min: NDArray[np.float32]
    max: NDArray[np.float32]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    def __init__(self, quantiles: bool = True) -> None:
        self.count = 0
        self.quantiles = quantiles
        self._histograms: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def add(self, x: NDArray[np.float32]) -> None:
        """Take in vectors (N, D)."""
        x = np.asarray(x, np.float32)
        x = x[np.isfinite(x).all(1)]
        if not len(x):
            return
        other = Statistics(self.quantiles)
        other.count = len(x)
        other.min, other.max = x.min(0), x.max(0)
        other.mean = x.mean(0, dtype=np.float64)
        other.squares = ((x - other.mean) ** 2).sum(0, dtype=np.float64)
        if self.quantiles:
            other._histograms = [np.unique(c, return_counts=True) for c in _cells(np.ascontiguousarray(x.T))]
        self.merge(other)

    def merge(self, other: Statistics) -> None:
        """Take in what ``other`` has seen."""
        if not other.count:
            return
        if not self.count:
            self.__dict__.update(other.__dict__)
            return
        total = self.count + other.count
        apart = other.mean - self.mean
        self.squares = self.squares + other.squares + apart**2 * (self.count * other.count / total)
        self.mean = self.mean + apart * (other.count / total)
        self.min, self.max = np.minimum(self.min, other.min), np.maximum(self.max, other.max)
        self.count = total
        for d, (cells, counts) in enumerate(other._histograms):
            mine, my_counts = self._histograms[d]
            joined, back = np.unique(np.concatenate([mine, cells]), return_inverse=True)
            weights = np.concatenate([my_counts, counts])
            self._histograms[d] = joined, np.bincount(back, weights).astype(np.int64)

    def quantile(self, q: float) -> NDArray[np.float64]:
        """The ``q`` quantile (0..1) per dimension, (D,), between order statistics as numpy does it."""
        out = []
        at = q * (self.count - 1)
        for d, (cells, counts) in enumerate(self._histograms):
            ends = np.cumsum(counts)
            pair = _values(cells[np.searchsorted(ends, [np.floor(at), np.ceil(at)], side="right")])
            out.append(np.clip(pair[0] + (pair[1] - pair[0]) * (at - np.floor(at)), self.min[d], self.max[d]))
        return np.array(out)

    def histogram(self, dimension: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The distinct values of a dimension, in order and to within 1/4096 of their size, and how often each came."""
        cells, counts = self._histograms[dimension]
        return _values(cells), counts

    def result(self) -> dict[str, list[float]]:
        """``min``, ``max``, ``mean``, ``std``, with quantiles ``q01`` and ``q99``, (D,), and ``count`` (1,), ready for JSON."""
        named = {"min": self.min, "max": self.max, "mean": self.mean, "std": np.sqrt(self.squares / self.count)}
        if self.quantiles:
            named |= {"q01": self.quantile(0.01), "q99": self.quantile(0.99)}
        return {k: np.asarray(v, np.float64).tolist() for k, v in named.items()} | {"count": [self.count]}
