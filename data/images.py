"""Images of data sets: which of them are colours, and whether an episode's are readable, of one shape and of several colours.

Colour and 8-bit grey are read, with a palette or an alpha channel too if every pixel is opaque. Everything else is refused:
the colour of a transparent pixel depends on its background, 16-bit grey is a depth map or a camera of unknown range.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spvla.errors import InputError
from spvla.images import open_image
from spvla.store import Episode
from spvla.vlas.conventions import encode_jpeg

UPRIGHT = "upright"  # what a recorded episode's metadata say of its images
COLOURS = ("RGB", "RGBA", "L", "LA", "P", "PA")  # Pillow's modes that are read
SMALL = 32  # pixels: images need not be decoded in more detail than this to be checked


def is_upside_down(metadata: Mapping[str, Any]) -> bool:
    """Whether an episode with this metadata was recorded in LIBERO before environments gave upright images."""
    return str(metadata.get("suite", "")).startswith("libero") and metadata.get("images") != UPRIGHT


def read_rgb(encoded: bytes) -> NDArray[np.uint8]:
    """An encoded image as uint8 (H, W, 3).

    Raises:
        InputError: it is damaged, or its pixels are not plain colours; the message completes "the image of step 3 ...".
    """
    return np.asarray(_open_rgb(encoded)[0])


def as_rgb_file(encoded: bytes) -> bytes:
    """The same image as an RGB file: as it is, or as PNG. Errors as for :func:`read_rgb`."""
    with open_image(encoded) as opened:
        if opened.mode == "RGB":
            return encoded
    out = io.BytesIO()
    Image.fromarray(read_rgb(encoded)).save(out, "PNG")
    return out.getvalue()


def _open_rgb(
    encoded: object, small: bool = False, shape: tuple[int, ...] | None = None
) -> tuple[Image.Image | None, tuple[int, int, int]]:
    """An encoded image as RGB, and its shape (H, W, 3); of a JPEG a ``small`` version, if that is enough. None if its header
    has another shape than ``shape``: nothing is decoded then."""
    with open_image(encoded) as opened:
        picture: Image.Image = opened
        found = (opened.height, opened.width, 3)
        if shape is not None and found != shape:
            return None, found
        if small:
            opened.draft(opened.mode, (SMALL, SMALL))
        opened.load()
        if opened.mode not in COLOURS:
            told = f"is of the kind {opened.mode}; 8-bit kinds are read: {', '.join(COLOURS)}"
            raise InputError(told, code="image-kind")
        if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
            picture = opened.convert("RGBA")
            if picture.getchannel("A").getextrema() != (255, 255):
                told = "has transparent pixels, whose colour depends on a background"
                raise InputError(f"{told} that the data set does not name", code="image-kind")
        return picture.convert("RGB"), found


class ImageCheck:
    """Takes an episode's images one after the other.

    Args:
        shape: (H, W, channels) that the metadata states, or None: all like the first one. Channels do not count: what has
            an alpha channel or is grey is read as RGB.

    Attributes:
        coloured: whether any image so far had more than one colour.
    """

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        self.shape, self.stated = None if shape is None else (*shape[:2], 3), shape is not None
        self.steps, self.coloured = 0, False

    def add(self, image: NDArray[np.uint8] | bytes | None) -> str | None:
        """What is wrong with the next image, uint8 (H, W, 3) or encoded, or None. Of a JPEG a small version is decoded,
        which meets all its bytes."""
        t, self.steps = self.steps, self.steps + 1
        if image is None:
            return f"there is no image of step {t}"
        if isinstance(image, np.ndarray):
            size: tuple[int, ...] = image.shape
            self.coloured = self.coloured or int(image.max()) != int(image.min())
        else:
            try:
                picture, size = _open_rgb(image, small=True, shape=self.shape)
            except InputError as error:
                return f"the image of step {t} {error}"
            ends: Any = () if picture is None else picture.getextrema()
            self.coloured = self.coloured or any(low != high for low, high in ends)
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
    """Check an episode's images and encode those that are not yet, in place; what is wrong with them, or None. Encoded ones
    stay byte for byte if they are RGB, others become RGB as PNG.

    Args:
        episode: with images uint8 (H, W, 3) or encoded, by camera.
        shape: (H, W, channels) that the metadata states, or None.
    """
    for camera, frames in episode.images.items():
        check = ImageCheck(shape)
        encoded: list[bytes] = []
        try:
            for frame in frames:
                if (reason := check.add(frame)) is not None:
                    return reason
                encoded.append(as_rgb_file(frame) if isinstance(frame, bytes) else encode_jpeg(frame))
        except InputError as error:  # a video that cannot be read, or ends early
            return str(error)
        if (reason := check.end()) is not None:
            return reason
        episode.images[camera] = encoded
    return None
