"""Whether the images of an episode are what they should be: readable, of one shape, and of more than one colour."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spvla.episodes import Episode
from spvla.errors import InputError
from spvla.vlas.conventions import encode_jpeg

UPRIGHT = "upright"  # what a recorded episode's metadata say of its images
SMALL = 32  # pixels: images need not be decoded in more detail than this to be checked


def is_upside_down(metadata: Mapping[str, Any]) -> bool:
    """Whether an episode with this metadata was recorded in LIBERO before environments gave upright images."""
    return str(metadata.get("suite", "")).startswith("libero") and metadata.get("images") != UPRIGHT


class ImageCheck:
    """Takes an episode's images one after the other.

    Args:
        shape: (H, W, 3) that the metadata states, or None: all like the first one.

    Attributes:
        coloured: whether any image so far had more than one colour.
    """

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        self.shape, self.stated = shape, shape is not None
        self.steps, self.coloured = 0, False

    def add(self, image: NDArray[np.uint8] | bytes | None) -> str | None:
        """What is wrong with the next image, uint8 (H, W, 3) or encoded, or None. Of a JPEG a small version is decoded,
        which meets all its bytes."""
        t, self.steps = self.steps, self.steps + 1
        if image is None:
            return f"there is no image of step {t}"
        if isinstance(image, bytes):
            try:
                with Image.open(io.BytesIO(image)) as opened:
                    size: tuple[int, ...] = (opened.height, opened.width, len(opened.getbands()))
                    opened.draft(opened.mode, (SMALL, SMALL))
                    opened.load()
                    spread: Any = opened.getextrema()
            except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for damaged files
                return f"the image of step {t} cannot be read ({error})"
            ends = spread if isinstance(spread[0], tuple) else (spread,)
            self.coloured = self.coloured or any(low != high for low, high in ends)
        else:
            size = image.shape
            self.coloured = self.coloured or int(image.max()) != int(image.min())
        if self.shape is None:
            self.shape = size
        elif size != self.shape:
            told = "the data set says" if self.stated else "the first one is"
            return f"the image of step {t} is {size}, {told} {self.shape}"
        return None

    def end(self) -> str | None:
        """What is wrong with the episode's images as a whole, or None."""
        return None if self.coloured else "every image has one colour only: the camera was not connected"


def encode_images(episode: Episode, shape: tuple[int, ...] | None) -> str | None:
    """Check an episode's images and encode those that are not yet, in place; what is wrong with them, or None.

    Args:
        episode: with images uint8 (H, W, 3) or encoded, by camera.
        shape: (H, W, 3) that the metadata states, or None.
    """
    for camera, frames in episode.images.items():
        check = ImageCheck(shape)
        encoded: list[bytes] = []
        try:
            for frame in frames:
                if (reason := check.add(frame)) is not None:
                    return reason
                encoded.append(frame if isinstance(frame, bytes) else encode_jpeg(frame))
        except InputError as error:  # a video that cannot be read, or ends early
            return str(error)
        if (reason := check.end()) is not None:
            return reason
        episode.images[camera] = encoded
    return None
