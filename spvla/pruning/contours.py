"""The spatial score: which patches lie on object contours (Canny edges; SP-VLA, arXiv 2506.12723)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError
from spvla.observation import check_image

LOW, HIGH = 100, 200  # Canny's hysteresis thresholds, grey levels


def contour_patches(image: NDArray[np.uint8], grid: int) -> NDArray[np.bool_]:
    """Whether each patch holds any edge pixel.

    Args:
        image: what the encoder sees, uint8 (H, W, 3) RGB.
        grid: the encoder's patches along one side; the image is split evenly (14 x 14 px for 224 px and 16 patches).

    Returns:
        bool (grid * grid,), row by row.

    Raises:
        InputError: no uint8 RGB image, or fewer pixels than patches.
    """
    import cv2

    check_image(image, "contours: image")
    height, width = image.shape[:2]
    if min(height, width) < grid:
        raise InputError(f"contours: image of {height} x {width} px cannot be split into {grid} x {grid} patches")
    edges = cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), LOW, HIGH)  # (H, W), 0 or 255
    starts = np.arange(grid)
    rows = np.maximum.reduceat(np.asarray(edges), starts * height // grid, axis=0)  # (grid, W)
    patches = np.maximum.reduceat(rows, starts * width // grid, axis=1)  # (grid, grid)
    return np.asarray(patches > 0).reshape(-1)
