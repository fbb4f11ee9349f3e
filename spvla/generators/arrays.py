"""Networks without torch, as a robot runs them: a few rows at every step, where torch's own overhead is most of the time.

The torch modules are the reference, and their parameters are the weights: the arrays here are views of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scipy.special import ndtr
from torch import nn

from spvla.actions import FloatArray
from spvla.history import Window

FEW_ROWS = 4  # beyond, torch is faster
ArrayForm = Callable[[Window, FloatArray | None], FloatArray]
"""A network's outputs (B, H D), from a window of arrays and the executed actions as changes, (B, n, D), or None."""


def views(layer: nn.Linear) -> tuple[FloatArray, FloatArray]:
    """A layer's weights (inputs, outputs) and bias (1, outputs): numpy adds arrays of one shape in less than half the time."""
    return layer.weight.detach().numpy().T, layer.bias.detach().numpy()[None]


def gelu(x: FloatArray) -> FloatArray:
    """In place: x times the normal distribution's function of x."""
    x *= ndtr(x)
    return x


class ArrayMLP:
    """Linear layers with GELU between them, as :class:`~spvla.generators.learned.MLP`."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = [views(layer) for layer in layers]

    def __call__(self, x: FloatArray) -> FloatArray:
        """(..., inputs) to (..., outputs)."""
        *hidden, (weight, bias) = self.layers
        for w, b in hidden:
            x = x.dot(w)
            x += b
            gelu(x)
        x = x.dot(weight)
        x += bias
        return x
