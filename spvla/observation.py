"""What a policy sees at one control step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError

MAIN, WRIST = "image", "wrist_image"  # what the main camera and the one in the hand are called; others have names of their own


@dataclass(frozen=True, init=False)
class Observation:
    """One control step's input.

    Args:
        images: what each camera sees, uint8 (H, W, 3) RGB, by its name: :data:`MAIN`, :data:`WRIST`, any others; empty where
            nothing was rendered. An array alone is the main camera's.
        state: proprioception, float32 (S,), or None.
    """

    images: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    state: NDArray[np.float32] | None = None

    def __init__(
        self,
        images: Mapping[str, NDArray[np.uint8]] | NDArray[np.uint8] | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> None:
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "state", state)
        self.__post_init__()

    def __post_init__(self) -> None:
        if not isinstance(self.images, Mapping):
            object.__setattr__(self, "images", {} if self.images is None else {MAIN: self.images})

    @property
    def image(self) -> NDArray[np.uint8] | None:
        """The main camera's image, or None where there is none."""
        return self.images.get(MAIN)

    def require_image(self, camera: str = MAIN) -> NDArray[np.uint8]:
        """A camera's image, checked. Raises :class:`InputError` for a missing, grey, RGBA or float image."""
        if self.images and camera not in self.images:
            seen = ", ".join(self.images)
            raise InputError(
                f"observation.images: the policy needs camera {camera!r}; available: {seen}",
                code="missing-camera",
                field=f"observation.images.{camera}",
            )
        return check_image(self.images.get(camera), "observation.image" if camera == MAIN else f"observation.images.{camera}")


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
