"""What a policy sees at one control step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError


@dataclass(frozen=True)
class Observation:
    """One control step's input.

    Args:
        image: main camera, uint8 (H, W, 3) RGB, or None where nothing was rendered.
        state: proprioception, float32 (S,), or None.
        wrist_image: second camera, uint8 (H, W, 3) RGB, or None.
    """

    image: NDArray[np.uint8] | None = None
    state: NDArray[np.float32] | None = None
    wrist_image: NDArray[np.uint8] | None = None

    def require_image(self) -> NDArray[np.uint8]:
        """The main camera's image, checked. Raises :class:`InputError` for a missing, grey, RGBA or float image."""
        return check_image(self.image, "observation.image")


def check_image(image: Any, what: str) -> NDArray[np.uint8]:
    """``image`` if it is uint8 (H, W, 3), else an :class:`InputError` that names ``what`` and the mismatch."""
    if image is None:
        raise InputError(f"{what}: the policy needs an image, got None")
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        shape = getattr(image, "shape", type(image).__name__)
        raise InputError(f"{what}: expected an RGB image (H, W, 3), got {shape}")
    if image.dtype != np.uint8:
        raise InputError(f"{what}: expected uint8 in 0..255, got {image.dtype}")
    return image
