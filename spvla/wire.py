"""Arrays in msgpack messages, in the dialects that robots' clients and servers speak.

    vla-eval, spvla      {"__ndarray__": True, "data": bytes, "dtype": "<f4", "shape": [8]}
    openpi-client        the same with bytes as keys; {b"__npgeneric__": True, "data": 1.5, "dtype": "<f8"} for a scalar
    msgpack-numpy        {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [8], b"data": bytes}; a scalar has nd: False

Only booleans, integers and floats are read: nothing here can make an object, so that a message cannot run code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError

KINDS = "biuf"  # numpy's letters for booleans, integers and floats
MAX_DIMENSIONS = 8
LONGEST = {"max_array_len": 10_000, "max_map_len": 1000, "max_str_len": 2**16, "max_ext_len": 0}  # of one entry of a message
MAX_ENTRIES = 2**15  # of a message's lists and maps together
MARKS = ("__ndarray__", "__npgeneric__", "nd")  # a map with one of these is an array or a scalar


def shorten(text: str, length: int = 200) -> str:
    """A text that came over the wire, as much of it as an error or a log should repeat, on one line and printable."""
    cut = text if len(text) <= length else text[: length - 3] + "..."
    return "".join(c if c.isprintable() else " " for c in cut)


def read_token(path: str | Path) -> str:
    """The token in a file. Raises :class:`InputError` for one that cannot be read, or is too short to be a secret."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token_file: {path}: cannot be read ({error})", field="token_file") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"token_file: {path}: expected at least 16 printable ASCII characters without spaces", field="token_file"
        )
    return token


def encode_array(value: Any, bytes_keys: bool = False) -> Any:
    """msgpack's ``default``: a numpy array or scalar as a map, with bytes as keys where openpi reads it."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        return value
    fields = {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    return {k.encode(): v for k, v in fields.items()} if bytes_keys else fields


def decode_array(content: Mapping[Any, Any]) -> Any:
    """msgpack's ``object_hook``: the array or scalar that a map describes in any of the dialects, else the map itself.

    Raises:
        InputError: an array with another dtype than booleans, integers and floats, or data that do not fit its shape.
    """
    if not any(mark in content or mark.encode() in content for mark in MARKS):
        return content
    fields = {k.decode("ascii", "replace") if isinstance(k, bytes) else k: v for k, v in content.items()}
    if "__ndarray__" in fields:
        return _array(fields, "dtype")
    if "__npgeneric__" in fields:
        return _scalar(fields, "dtype")
    if not isinstance(fields["nd"], bool) or not {"type", "data"} <= fields.keys():
        return content  # somebody's own field that happens to be called nd
    if fields.get("kind") not in (None, "", b""):
        raise InputError("array: objects and structured arrays are not supported; send arrays of numbers", code="array-dtype")
    return _array(fields, "type") if fields["nd"] else _scalar(fields, "type")


def bounds(of_map: Callable[[dict[Any, Any]], Any]) -> dict[str, Any]:
    """Options with which msgpack reads one message: bounds on each list, map and text, ``of_map`` as its ``object_hook``, and
    an end where there are too many entries in all. Bounds on each list do not bound lists of lists, and other threads stand
    still while msgpack reads.

    Raises:
        InputError: more than :data:`MAX_ENTRIES` lists, maps and entries of these (code ``too-many-entries``).
    """
    left = MAX_ENTRIES

    def count(content: Any) -> None:
        nonlocal left
        left -= 1 + len(content)
        if left < 0:
            raise InputError(f"message: more than {MAX_ENTRIES} entries in lists and maps", code="too-many-entries")

    def list_hook(content: list[Any]) -> list[Any]:
        count(content)
        return content

    def object_hook(content: dict[Any, Any]) -> Any:
        count(content)
        return of_map(content)

    return {"object_hook": object_hook, "list_hook": list_hook, "strict_map_key": False, **LONGEST}


def _dtype(name: Any) -> np.dtype[Any]:
    if isinstance(name, bytes):
        name = name.decode("ascii", "replace")
    if not isinstance(name, str):
        raise InputError(f"array: dtype must be a name such as '<f4', got {shorten(repr(name))}", code="array-dtype")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError):
        raise InputError(f"array: dtype {shorten(repr(name))} is unknown to numpy", code="array-dtype") from None
    if dtype.kind not in KINDS or dtype.hasobject or dtype.subdtype is not None:
        raise InputError(
            f"array: dtype {shorten(repr(name))} is not read; send booleans, integers or floats, such as '<f4' or '|u1'",
            code="array-dtype",
        )
    return dtype


def _array(fields: Mapping[str, Any], dtype_key: str) -> NDArray[Any]:
    if missing := [key for key in (dtype_key, "shape", "data") if key not in fields]:
        raise InputError(f"array: {missing[0]} is missing", code="array-incomplete")
    dtype, shape, data = _dtype(fields[dtype_key]), fields["shape"], fields["data"]
    sizes = isinstance(shape, list | tuple) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not all(isinstance(n, int) and 0 <= n < 2**63 for n in shape):
        raise InputError(
            f"array: shape must be a list of at most {MAX_DIMENSIONS} sizes, got {shorten(repr(shape))}", code="array-shape"
        )
    if not isinstance(data, bytes):
        raise InputError(f"array: data must be bytes, got {type(data).__name__}", code="array-data")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InputError(
            f"array: {list(shape)} of {dtype} needs {expected} bytes, but data has {len(data)}", code="array-data", field="data"
        )
    try:
        array = np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # more dimensions than numpy has, or sizes beyond its integers around a zero
        raise InputError(f"array: shape {list(shape)}: {error}", code="array-shape") from None
    return array.astype(dtype.newbyteorder("="))  # a copy that can be written to, in this machine's byte order


def _scalar(fields: Mapping[str, Any], dtype_key: str) -> Any:
    """A numpy scalar: its bytes in msgpack-numpy, its value in openpi-client."""
    if missing := [key for key in (dtype_key, "data") if key not in fields]:
        raise InputError(f"scalar: {missing[0]} is missing", code="array-incomplete")
    data = fields["data"]
    if isinstance(data, bytes):
        return _array({dtype_key: fields[dtype_key], "shape": [], "data": data}, dtype_key)[()]
    dtype = _dtype(fields[dtype_key])
    if not isinstance(data, bool | int | float):
        raise InputError(f"scalar: data must be a number, got {type(data).__name__}", code="array-data")
    try:
        return dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise InputError(f"scalar: {shorten(repr(data))} is no {dtype} ({shorten(str(error))})", code="array-data") from None
