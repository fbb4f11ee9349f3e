"""Messages from clients, which nobody vouches for: read within bounds, or refused with a reason that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from vla_eval.protocol.image_codec import is_encoded_image
from vla_eval.protocol.messages import MessageType

from spvla.errors import InputError
from spvla.fields import naming
from spvla.images import open_image
from spvla.wire import bounds, decode_array, shorten

MAX_FRAME = 16 * 2**20  # bytes; two uncompressed 1080p images
MAX_PIXELS = 2**23  # of a message's compressed images together, decoded


def decode(frame: bytes | str) -> dict[str, Any]:
    """A frame's content, images as arrays. Raises :class:`InputError` for anything but a msgpack map, or what is too large."""
    if isinstance(frame, str):
        raise InputError("message: expected a binary frame (msgpack), got text")
    pixels = 0

    def array(content: Any) -> Any:
        nonlocal pixels
        if not is_encoded_image(content):
            return decode_array(content)
        if content["format"] == "raw":
            return decode_array({"__ndarray__": True, **content})
        with naming("image"), open_image(content["data"], MAX_PIXELS) as image:
            pixels += image.width * image.height
            if pixels > MAX_PIXELS:  # known before anything is decompressed
                raise InputError(f"{image.height} x {image.width} pixels are more than {MAX_PIXELS} in one message")
            return np.array(image)

    try:
        content = msgpack.unpackb(frame, **bounds(array))
    except InputError:
        raise
    except Exception as error:  # msgpack, numpy and Pillow raise many types for damaged content
        why = shorten(f"{type(error).__name__}: {error}")
        raise InputError(f"message: not readable as msgpack with arrays ({why})") from None
    if not isinstance(content, dict):
        raise InputError(f"message: expected a map, got {type(content).__name__}")
    return content


def parse(content: Mapping[str, Any]) -> tuple[MessageType, dict[str, Any]]:
    """A message's type and payload. Raises :class:`InputError` that names the field."""
    try:
        kind = MessageType(content.get("type"))
    except ValueError:
        known = ", ".join(t.value for t in MessageType)
        raise InputError(f"message: type {shorten(repr(content.get('type')))} is not one of {known}") from None
    payload = content.get("payload")
    if not isinstance(payload, dict):
        raise InputError(f"message: payload must be a map, got {type(payload).__name__}")
    return kind, payload
