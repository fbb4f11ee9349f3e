"""Arrays in messages: every client's dialect reads as the same numbers, and nothing but numbers is read."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

pytest.importorskip("msgpack")
import msgpack

from spvla import InputError
from spvla.wire import bounds, decode_array, encode_array


def ours(a: np.ndarray) -> dict[Any, Any]:
    return {"__ndarray__": True, "data": a.tobytes(), "dtype": a.dtype.str, "shape": list(a.shape)}


def msgpack_numpy(a: np.ndarray) -> dict[Any, Any]:
    return {"nd": True, "type": a.dtype.str, "kind": "", "shape": a.shape, "data": a.tobytes()}


def with_bytes_keys(fields: dict[Any, Any]) -> dict[Any, Any]:
    return {k.encode(): v.encode() if isinstance(v, str) else v for k, v in fields.items()}


def sent(content: Any) -> Any:
    """What arrives of ``content``."""
    return msgpack.unpackb(msgpack.packb(content), object_hook=decode_array, strict_map_key=False)


numbers = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?"),
)


@given(arrays.arrays(numbers, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)), st.booleans())
def test_every_dialect_reads_as_the_same_array(array: np.ndarray, as_bytes: bool) -> None:
    for dialect in (ours, msgpack_numpy):
        fields = dialect(array)
        read = np.asarray(sent({"state": with_bytes_keys(fields) if as_bytes else fields})["state"])
        assert read.shape == array.shape
        assert read.dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(read, array, equal_nan=array.dtype.kind == "f")


@given(arrays.arrays(numbers, arrays.array_shapes(max_dims=3)), st.booleans())
def test_what_is_encoded_is_decoded(array: np.ndarray, as_bytes: bool) -> None:
    packed = msgpack.packb(array, default=lambda value: encode_array(value, as_bytes))
    assert np.array_equal(msgpack.unpackb(packed, object_hook=decode_array), array, equal_nan=array.dtype.kind == "f")


@pytest.mark.parametrize("scalar", [np.float32(0.25), np.int8(-3), np.uint16(9), np.bool_(True), np.float64(-1e300)])
def test_scalars_of_both_packages_are_numbers(scalar: np.generic) -> None:
    package = {b"nd": False, b"type": scalar.dtype.str, b"data": scalar.tobytes()}
    client = {b"__npgeneric__": True, b"data": scalar.item(), b"dtype": scalar.dtype.str}
    for fields in (package, client):
        read = sent(fields)
        assert read == scalar and read.dtype == scalar.dtype


def test_a_read_array_can_be_written_to() -> None:
    read = sent(ours(np.zeros(3)))
    read[0] = 1.0
    assert read.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["|O", "O", "<M8[s]", "|V8", "<c8", "|S4", "<U2", "f4,i4", "(2,)f4", "no_such", ""])
@pytest.mark.parametrize("dialect", [ours, msgpack_numpy])
def test_other_dtypes_are_refused_by_name(name: str, dialect: Any) -> None:
    fields = dialect(np.zeros(2))
    fields["dtype" if "dtype" in fields else "type"] = name
    with pytest.raises(InputError, match=re.escape(repr(name))) as error:
        decode_array(fields)
    assert error.value.code == "array-dtype"


class Harmful:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize("kind", [b"O", b"V", "O"])
@pytest.mark.parametrize("dtype", ["|O", "<f8", [["a", "<f4"]]])
def test_pickled_and_structured_arrays_are_never_read(kind: Any, dtype: Any) -> None:
    with pytest.raises(InputError) as error:
        decode_array({b"nd": True, b"type": dtype, b"kind": kind, b"shape": [1], b"data": pickle.dumps(Harmful())})
    assert error.value.code == "array-dtype"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"data": bytes(23)}, "array-data"),
        ({"data": bytes(25)}, "array-data"),
        ({"data": "text"}, "array-data"),
        ({"shape": [-1]}, "array-shape"),
        ({"shape": 3}, "array-shape"),
        ({"shape": [2**40, 2**40]}, "array-data"),
        ({"shape": [0, 2**70], "data": b""}, "array-shape"),
        ({"shape": [1] * 100, "data": bytes(8)}, "array-shape"),
        ({"dtype": None}, "array-dtype"),
    ],
)
def test_sizes_are_compared_with_the_data(change: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as error:
        decode_array({**ours(np.zeros(3)), **change})
    assert error.value.code == code


@pytest.mark.parametrize("field", ["data", "dtype", "shape"])
def test_an_incomplete_array_is_refused(field: str) -> None:
    fields = ours(np.zeros(3))
    del fields[field]
    with pytest.raises(InputError) as error:
        decode_array(fields)
    assert error.value.code == "array-incomplete"


@pytest.mark.parametrize("content", [{}, {"nd": 3}, {"nd": True}, {"data": b"x", "shape": [1]}, {1: 2}])
def test_other_maps_stay_as_they_are(content: dict[Any, Any]) -> None:
    assert decode_array(content) == content


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"\xdd\x00\x00\x00\xc8" + (b"\xdc\x27\x10" + b"\x90" * 10_000) * 200, InputError),  # 200 lists of 10,000 empty ones
        (b"\xdc\x27\x10" * 25 + b"\x81\xa1a\x01" * 250_000, InputError),  # 250,000 maps, in lists in lists
        (b"\xdc\x27\x11" + b"\x90" * 10_001, ValueError),
        (b"\xdb\x00\x01\x00\x01" + b"a" * (2**16 + 1), ValueError),
        (b"\xdd\xff\xff\xff\xff", ValueError),
    ],
    ids=["lists", "maps", "one list", "text", "a claim"],
)
def test_entries_are_counted_over_the_whole_message(content: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        msgpack.unpackb(content, **bounds(decode_array))
    if isinstance(raised.value, InputError):
        assert raised.value.code == "too-many-entries"


def test_claims_within_claims_take_little_memory() -> None:
    """A thousand lists, each the first entry of the one before, each said to have as many entries as the message has bytes."""
    claims = b"\xdd\x00\x3f\xff\xff" * 1000 + bytes(2**22)
    with pytest.raises(ValueError, match="exceeds max_array_len"):
        msgpack.unpackb(claims, **bounds(decode_array))


def test_a_message_as_large_as_robots_send_is_read() -> None:
    content = {
        "kept_tokens": list(range(5000)),
        "actions": [[0.5] * 7 for _ in range(1000)],
        "names": {f"{k}": k for k in range(900)},
    }
    assert msgpack.unpackb(msgpack.packb(content), **bounds(decode_array)) == content
