"""TFRecord files: where their records are, and the records, with their check sums.

    uint64 length, uint32 masked CRC32C of the length, the record, uint32 masked CRC32C of the record (little endian)

(https://www.tensorflow.org/tutorials/load_data/tfrecord)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.parts import Problem

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")


def masked_crc(data: bytes) -> int:
    """The check sum TFRecord files carry: CRC32C, rotated by 15 bits, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@dataclass(frozen=True)
class Index:
    """Where the records of a shard are.

    Args:
        path: the shard.
        offsets, lengths: bytes, int64 (N,) each.
        sums: the records' check sums as the file states them, (N,).
        problem: what ended the scan before the file's end, or None.
    """

    path: Path
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sums: NDArray[np.int64]
    problem: Problem | None

    def __len__(self) -> int:
        return len(self.offsets)

    def identities(self) -> Iterator[tuple[int, int]]:
        """Length and check sum of each record: equal for equal records."""
        return zip(self.lengths.tolist(), self.sums.tolist(), strict=True)

    def contents(self) -> list[str]:
        """The same as text."""
        return [f"{length:x}-{check:08x}" for length, check in self.identities()]


def scan(path: Path) -> Index:
    """Find the records of a shard by their headers alone; what lies between is not read."""
    offsets: list[int] = []
    lengths: list[int] = []
    sums: list[int] = []
    problem = None
    size = path.stat().st_size
    with path.open("rb") as stream:
        position = 0
        while position < size:
            stream.seek(position)
            header = stream.read(HEADER.size)
            if len(header) < HEADER.size:
                problem = Problem(str(path), f"cut off inside a record's header ({size} bytes)", len(offsets))
                break
            length, check = HEADER.unpack(header)
            if masked_crc(header[:8]) != check:
                reason = "the check sum of the record's length is wrong; nothing after it can be read"
                problem = Problem(str(path), reason, len(offsets))
                break
            end = position + HEADER.size + length + FOOTER.size
            if end > size:
                problem = Problem(str(path), f"cut off: the record ends at byte {end}, the file at {size}", len(offsets))
                break
            stream.seek(end - FOOTER.size)
            sums.append(FOOTER.unpack(stream.read(FOOTER.size))[0])
            offsets.append(position + HEADER.size)
            lengths.append(length)
            position = end
    return Index(path, np.array(offsets, np.int64), np.array(lengths, np.int64), np.array(sums, np.int64), problem)


def missing(file: Path) -> Index:
    none = np.zeros(0, np.int64)
    return Index(file, none, none, none, Problem(str(file), "the shard is not there, though dataset_info.json names it"))


def read_records(index: Index, first: int = 0, count: int | None = None) -> Iterator[tuple[int, bytes | Problem]]:
    """Records ``first`` to ``first + count`` of a shard with their numbers, or what is wrong with one."""
    if not len(index):  # an empty shard, or one that is not there
        return
    with index.path.open("rb") as stream:
        for i in range(first, len(index) if count is None else min(first + count, len(index))):
            stream.seek(index.offsets[i])
            record = stream.read(index.lengths[i])
            if masked_crc(record) != index.sums[i]:
                yield i, Problem(str(index.path), "the check sum is wrong: the record is damaged", i)
            else:
                yield i, record
