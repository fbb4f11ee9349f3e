"""What lies between an environment and the data a VLA was trained on: image steps and gripper sign, as data.

The LIBERO steps are those of OpenVLA's published evaluation. They were written for TensorFlow; here Pillow and numpy do
them. Measured against TensorFlow's arrays: lanczos3 within 0.14 grey levels on average, centre crop within 1e-4, JPEG
within 1.1 (same quality and chroma sampling, another integer DCT).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spvla.actions import FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.images import open_image

UInt8Array = NDArray[np.uint8]

JPEG_QUALITY = 95  # tf.image.encode_jpeg's default, with 4:2:0 chroma


@dataclass(frozen=True)
class Conventions:
    """How an environment's images and actions differ from the training data's.

    Args:
        rotate_180: turn the image upside down, for cameras that are mounted so.
        jpeg: JPEG round trip, as the training images went through.
        lanczos: resize to the encoder's size with lanczos3 before anything else does.
        center_crop: share of the image's area to keep, resized back; for checkpoints trained with random crops. 1: off.
        signed_gripper: the data's gripper (0 close, 1 open) becomes the environment's (+1 close, -1 open).
        control_rate: control steps per second of the environment, or None where unknown.
        bound: all actions lie within +-bound in environment units, or None: the data's own range bounds them.
    """

    rotate_180: bool = False
    jpeg: bool = False
    lanczos: bool = False
    center_crop: float = 1.0
    signed_gripper: bool = False
    control_rate: float | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        with naming("conventions"):
            check_fields(self)
        if not 0 < self.center_crop <= 1:
            raise InputError(f"conventions: center_crop must lie in (0, 1], got {self.center_crop}")
        for name in ("control_rate", "bound"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InputError(f"conventions: {name} must be positive, got {value}")

    def apply_image(self, image: UInt8Array, size: int) -> UInt8Array:
        """An environment's image, uint8 (H, W, 3), as the training data would show it; (size, size, 3) if resized."""
        if self.rotate_180:
            image = np.ascontiguousarray(image[::-1, ::-1])
        if self.jpeg:
            image = jpeg_round_trip(image)
        if self.lanczos:
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
        return center_crop(image, self.center_crop) if self.center_crop < 1 else image

    def to_environment(self, actions: FloatArray, gripper: tuple[int, ...]) -> FloatArray:
        """Actions (..., D) in the data's units to environment units."""
        if not self.signed_gripper:
            return actions
        out = actions.copy()
        out[..., list(gripper)] = -np.sign(2 * out[..., list(gripper)] - 1)
        return out

    def from_environment(self, actions: FloatArray, gripper: tuple[int, ...]) -> FloatArray:
        """Actions (..., D) in environment units to the data's units: what :meth:`to_environment` takes, but for the sign."""
        if not self.signed_gripper:
            return actions
        out = actions.copy()
        out[..., list(gripper)] = (1 - out[..., list(gripper)]) / 2
        return out


IDENTITY = Conventions()
CONVENTIONS = {
    "libero": Conventions(
        jpeg=True,
        lanczos=True,
        center_crop=0.9,
        signed_gripper=True,
        control_rate=20.0,
        bound=1.0,
    )
}
"""Conventions by name. ``libero``: the published, fine-tuned checkpoints in LIBERO."""


def conventions_by_name(conventions: Conventions | Mapping[str, Any] | str | None, base: Conventions = IDENTITY) -> Conventions:
    """``conventions`` itself, the ones of that name, or ``base``: as it is for None, with the changes a mapping names.

    Raises:
        InputError: an unknown name or field; the message lists the known ones.
    """
    if conventions is None:
        return base
    if isinstance(conventions, str):
        if conventions not in CONVENTIONS:
            raise InputError(f"conventions {conventions!r} are unknown; available: {', '.join(CONVENTIONS)}")
        return CONVENTIONS[conventions]
    if isinstance(conventions, Mapping):
        known = [f.name for f in fields(Conventions)]
        for name in conventions:
            if name not in known:
                raise InputError(f"conventions: {name!r} is unknown; available: {', '.join(known)}")
        return replace(base, **conventions)
    if not isinstance(conventions, Conventions):
        raise InputError(f"conventions must be a name or a map of changes, got {conventions!r}")
    return conventions


def encode_jpeg(image: UInt8Array) -> bytes:
    """``image`` (H, W, 3) as JPEG, with the training images' quality and chroma sampling."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def decode_image(encoded: bytes) -> UInt8Array:
    """An encoded image as uint8 (H, W, 3) RGB. Errors as for :func:`~spvla.images.open_image`."""
    with open_image(encoded) as image:
        return np.asarray(image.convert("RGB"))


def jpeg_round_trip(image: UInt8Array) -> UInt8Array:
    """``image`` (H, W, 3) encoded as JPEG and decoded again."""
    return decode_image(encode_jpeg(image))


def center_crop(image: UInt8Array, area: float) -> UInt8Array:
    """The central ``area`` (0..1) of ``image`` (H, W, 3), resized back bilinearly, corner pixels aligned.

    In float32 and on pixels in 0..1, as TensorFlow does it: where a value lies at the edge of two grey levels, that decides.
    """
    x = image.astype(np.float32) / np.float32(255)
    for axis in (0, 1):
        low, high, w = _samples(image.shape[axis], area)
        x, beyond = np.take(x, low, axis), np.take(x, high, axis)
        beyond -= x
        beyond *= w.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        x += beyond
    return (x * np.float32(255.5)).astype(np.uint8)  # TensorFlow's float-to-uint8 conversion truncates so


@lru_cache
def _samples(size: int, area: float) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Where each of ``size`` pixels along an axis samples: the pixel before it, the one after, and how far behind the first."""
    side = np.sqrt(np.float32(area))
    first = (1 - side) / 2 * np.float32(size - 1)
    at = (first + np.arange(size, dtype=np.float32) * side).astype(np.float32)
    low = np.floor(at).astype(np.intp)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)
