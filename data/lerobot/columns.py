"""The columns of a LeRobot data file in one form, however a converter stored them.

An index column is one number a row, a vector is a list of one size a row. Converters also write index columns as lists of one
entry or as decimals, times as dates or durations, and an action of 7 entries as a 1 x 7 matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from spvla.store.columns import vectors

INDEX = ("timestamp", "frame_index", "episode_index", "task_index")
PER_SECOND = {"s": 1e0, "ms": 1e3, "us": 1e6, "ns": 1e9}
DATE = 1e8  # seconds: times from here on are dates since 1970; an episode's own times begin near 0


def in_one_form(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """A column as its readers expect it, or None for an index column that says nothing.

    Of the index columns, ``timestamp`` becomes float64 (a date or duration: in seconds), the others int64. Lists of numbers,
    nested or not, become lists of one size. Everything else stays as it is.

    Raises:
        ValueError: rows of different lengths, or an index column that is not one whole number a row; the message completes
            a sentence that begins with the column's name.
    """
    column = _plain(column)
    if name in INDEX:
        return _index(name, column)
    if not is_vector(column.type) or is_regular(column.type):
        return column
    array = _combined(column)
    values, valid = _matrix(array), np.asarray(array.is_valid())
    if not values.shape[1]:
        return column
    mask = None if valid.all() else pa.array(~valid)
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1], mask=mask)])


def is_vector(column: pa.DataType) -> bool:
    """Whether the entries of a column are lists of numbers, nested or not."""
    return _is_list(column) and _is_number(innermost(column))


def is_regular(column: pa.DataType) -> bool:
    """Whether the entries of a column are lists of numbers of one size."""
    whole = pa.types.is_fixed_size_list(column)
    return bool(whole and (pa.types.is_integer(column.value_type) or pa.types.is_floating(column.value_type)))


def innermost(column: pa.DataType) -> pa.DataType:
    """The type of what the lists of a column hold, however deep."""
    column = column.storage_type if isinstance(column, pa.BaseExtensionType) else column
    return innermost(column.value_type) if _is_list(column) else column


def to_array(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column, in one form, as (T, D) or (T,); missing numbers are NaN.

    Raises:
        TypeError: its lists hold something else than numbers.
    """
    if is_regular(column.type):
        if column.null_count:
            rows = [[np.nan] * column.type.list_size if v is None else v for v in column.to_pylist()]
            return np.array(rows, np.float32).reshape(len(rows), column.type.list_size)
        return vectors(column)
    if (kind := innermost(column.type)) != column.type:
        if not pa.types.is_string(kind) or pc.unique(pc.list_value_length(column)).to_pylist() != [1]:
            raise TypeError(f"its values are {kind}, not numbers")
        column = pc.list_flatten(column)  # one text a row
    return np.asarray(column.to_numpy())


def recorded_times(table: pa.Table, unit: float = 1.0) -> NDArray[np.float64] | None:
    """Recorded times of an episode, seconds (T,), or None where there are none that are finite and only ever grow.

    Dates are counted from the episode's first row.

    Args:
        table: its rows, in one form.
        unit: seconds per unit of its numbers.
    """
    if "timestamp" not in table.column_names:
        return None
    times = np.asarray(table["timestamp"].to_numpy(), np.float64)
    if not np.isfinite(times).all() or not (np.diff(times) > 0).all():
        return None
    if len(times) and times[0] * unit > DATE:
        times = times - times[0]
    return times if unit == 1 else times * unit


def _index(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    while _is_list(column.type):
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if lengths not in ([], [1]):
            raise ValueError("has rows that are not one number")
        column = pc.list_flatten(column)
    if len(column) and column.null_count == len(column):
        return None
    if name == "timestamp":
        return _seconds(column)
    if column.null_count and name != "task_index":
        raise ValueError(f"has {column.null_count} empty entries")
    try:
        return column.cast(pa.int64())
    except pa.ArrowException:
        raise ValueError(f"has entries that are no whole numbers (they are {column.type})") from None


def _seconds(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Times as float64: dates and durations in seconds, numbers as they are; None for anything else."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind) or pa.types.is_time(kind):
        ticks = column.cast(pa.int32()) if pa.types.is_time32(kind) else column
        return pc.divide(ticks.cast(pa.int64()).cast(pa.float64(), safe=False), PER_SECOND[kind.unit])
    return column.cast(pa.float64(), safe=False) if _is_number(kind) else None


def _matrix(array: pa.Array) -> NDArray[np.number]:
    """Lists of numbers, however deep, as (rows, numbers per row); what is empty is NaN."""
    if not _is_list(array.type):
        kind = array.type
        array = array.cast(pa.float64()) if pa.types.is_decimal(kind) else array
        array = array.cast(pa.uint8()) if pa.types.is_boolean(kind) else array
        values: NDArray[np.number] = array.to_numpy(zero_copy_only=False)[:, None]
        return values
    lengths = pc.unique(pc.list_value_length(array).drop_null()).to_pylist()
    if len(lengths) > 1:
        raise ValueError(f"has rows of different lengths ({min(lengths)} to {max(lengths)} entries)")
    inner = _matrix(array.flatten())  # of the rows that are not empty
    width = lengths[0] * inner.shape[1] if lengths else 0
    inner = inner.reshape(len(array) - array.null_count, width)
    if not array.null_count:
        return inner
    out = np.full((len(array), width), np.nan)
    out[np.asarray(array.is_valid())] = inner
    return out


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without extension types and dictionaries around its values."""
    if isinstance(column.type, pa.BaseExtensionType):
        return _plain(pa.chunked_array([c.storage for c in column.chunks], column.type.storage_type))
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _combined(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        return array.chunk(0) if array.num_chunks else pa.array([], column.type)
    return array


def _is_list(column: pa.DataType) -> bool:
    return bool(pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column))


def _is_number(column: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(fits(column) for fits in kinds)
