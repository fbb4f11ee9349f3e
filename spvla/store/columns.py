"""Columns of a store's Parquet files as arrays, with errors that name file and column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spvla.errors import InputError
from spvla.store.episode import require_ages, require_propensities, require_sources


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or those of ``columns`` that it has; check sums are verified.

    Raises:
        InputError: it is damaged or not there.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(columns)
        table.validate(full=True)  # text that is none
        _ = table.column_names  # likewise
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged Parquet file ({one_line(error)})") from None


def vectors(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A fixed-size-list column as float32 (T, D)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    width = array.type.list_size
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)


def is_vectors(column: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(column) and pa.types.is_floating(column.value_type))


def read_column(table: pa.Table, name: str, what: str, fits: Callable[[pa.DataType], bool], expected: str) -> pa.ChunkedArray:
    """A column without empty entries whose type ``fits``; an :class:`InputError` names ``what`` and the column if not."""
    if name not in table.column_names:
        raise InputError(f"{what}: no column {name}; available: {', '.join(table.column_names)}")
    column = table[name]
    if not fits(column.type):
        raise InputError(f"{what}: {name} is {column.type}, expected {expected}")
    if column.null_count:
        raise InputError(f"{what}: {name} has {column.null_count} empty entries")
    return column


def read_vectors(table: pa.Table, name: str, what: str) -> NDArray[np.float32]:
    """The column ``name`` as float32 (T, D).

    Raises:
        InputError: naming ``what`` and the column: not there, empty entries, not vectors of one size.
    """
    return vectors(read_column(table, name, what, is_vectors, "vectors of one size"))


def read_sources(table: pa.Table, what: str) -> NDArray[np.uint8]:
    """The column ``action.source`` as uint8 (T,).

    Raises:
        InputError: naming ``what``: not there, empty entries, another value than a :class:`~spvla.history.Source`.
    """
    column = read_column(table, "action.source", what, pa.types.is_integer, "integers").to_numpy()
    require_sources(column, f"{what}: action.source")
    return np.asarray(column, np.uint8)


def read_ages(table: pa.Table, steps: NDArray[np.int64], what: str) -> NDArray[np.int64] | None:
    """The column ``vla_age`` as int64 (T,), None where there is none; ``steps`` are those of :func:`read_steps`. Errors as for
    :func:`read_sources`."""
    if "vla_age" not in table.column_names:
        return None
    ages = np.asarray(read_column(table, "vla_age", what, pa.types.is_integer, "integers").to_numpy(), np.int64)
    require_ages(ages, steps, f"{what}: vla_age")
    return ages


def read_propensities(table: pa.Table, what: str) -> NDArray[np.float32] | None:
    """The column ``vla_propensity`` as float32 (T,), None where there is none. Errors as for :func:`read_sources`."""
    if "vla_propensity" not in table.column_names:
        return None
    column = read_column(table, "vla_propensity", what, pa.types.is_floating, "numbers").to_numpy()
    require_propensities(column, f"{what}: vla_propensity")
    return np.asarray(column, np.float32)


def read_steps(table: pa.Table, what: str) -> NDArray[np.int64]:
    """The column ``frame_index``, each frame's step in its episode, as int64 (T,). Errors as for :func:`read_sources`."""
    return np.asarray(read_column(table, "frame_index", what, pa.types.is_integer, "integers").to_numpy(), np.int64)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())
