"""Open-X data sets in RLDS form (TFDS folders of TFRecord shards), read without TensorFlow.

``tensorflow_datasets`` says which features there are and parses each record; the framing of TFRecord files, with its
check sums, is read here:

    uint64 length, uint32 masked CRC32C of the length, the record, uint32 masked CRC32C of the record (little endian)

(https://www.tensorflow.org/tutorials/load_data/tfrecord). Only the features asked for are parsed, and images stay
encoded: that is what makes it fast. Episodes are streamed; no more than one record is in memory.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.openx import Conventions, Raw, find_conventions, standardize
from data.sources import Part, Problem
from spvla.episodes import Episode
from spvla.errors import InputError

EPISODES_PER_PART = 16
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
        sums: the records' check sums as the file states them, (N,): with the lengths, they tell equal records.
        problem: what ended the scan before the file's end, or None.
    """

    path: Path
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sums: NDArray[np.int64]
    problem: Problem | None

    def __len__(self) -> int:
        return len(self.offsets)


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


def read_records(index: Index, first: int = 0, count: int | None = None) -> Iterator[tuple[int, bytes | Problem]]:
    """Records ``first`` to ``first + count`` of a shard with their numbers, or what is wrong with one."""
    with index.path.open("rb") as stream:
        for i in range(first, len(index) if count is None else min(first + count, len(index))):
            stream.seek(index.offsets[i])
            record = stream.read(index.lengths[i])
            if masked_crc(record) != index.sums[i]:
                yield i, Problem(str(index.path), "the check sum is wrong: the record is damaged", i)
            else:
                yield i, record


class RldsFolder:
    """A TFDS folder of one version: which splits, shards and features it has.

    Args:
        path: the folder with ``dataset_info.json``, or the one above it with one folder per version (the newest is taken).

    Raises:
        InputError: no such folder, or one whose metadata cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = _version_folder(Path(path))
        import tensorflow_datasets as tfds

        try:
            self.builder = tfds.builder_from_directory(self.path)
            self.features = self.builder.info.features
            self.steps = self.features["steps"].feature
        except Exception as error:  # tfds raises what its parsers raise: JSON, protobuf, key and value errors
            raise InputError(f"{self.path}: not a readable TFDS data set of episodes ({error!r})") from None
        self.name: str = self.builder.info.name

    @cached_property
    def splits(self) -> dict[str, list[tuple[Path, int]]]:
        """Per split, its shards: file and number of episodes as the metadata claims it."""
        return {
            name: list(zip((Path(f) for f in split.filepaths), split.shard_lengths, strict=True))
            for name, split in self.builder.info.splits.items()
        }

    def leaf(self, key: str) -> Any:
        """The feature called ``key`` (path with slashes inside a step). Raises :class:`InputError` if there is none."""
        flat = _leaves(self.steps)
        if key not in flat:
            raise InputError(f"{self.path}: no feature {key!r} in a step; there are: {', '.join(sorted(flat))}")
        return flat[key]

    def image_shape(self, key: str) -> tuple[int, ...] | None:
        """(H, W, 3) of an image feature as the metadata says, or None where it leaves that open."""
        shape = tuple(self.leaf(key).shape)
        return None if any(n is None for n in shape) else shape

    def reader(self, keys: Sequence[str]) -> RldsReader:
        """A parser for the features ``keys`` of a step and for the episode's metadata."""
        return RldsReader(self, tuple(dict.fromkeys(keys)))


class RldsReader:
    """Parses records into whole-episode arrays: one array (T, ...) per feature, images and text left as bytes."""

    def __init__(self, folder: RldsFolder, keys: tuple[str, ...]) -> None:
        import tensorflow_datasets as tfds

        self.keys = keys
        self.leaves = {key: folder.leaf(key) for key in keys}
        self.encoded = {key for key, feature in self.leaves.items() if isinstance(feature, tfds.features.Image)}
        nested: dict[str, Any] = {}
        for key, feature in self.leaves.items():
            node = nested
            *parents, last = _split(key, folder.steps)
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = feature
        self.paths = {key: _split(key, folder.steps) for key in keys}
        wanted = {"steps": tfds.features.Dataset(nested)}
        if "episode_metadata" in folder.features:
            wanted["episode_metadata"] = folder.features["episode_metadata"]
        self.features = tfds.features.FeaturesDict(wanted)
        self.decoders = {"steps": tfds.decode.SkipDecoding()}

    def parse(self, record: bytes, file: str, number: int) -> Raw | Problem:
        """A record as arrays, or what is wrong with it.

        Args:
            record: the record's bytes.
            file, number: where it came from, for messages.
        """
        try:
            example = self.features.deserialize_example_np(record, decoders=self.decoders)
        except Exception as error:  # protobuf and tfds raise what they like for damaged records
            missing = self._missing(record)
            reason = "the record lacks this feature" if missing else f"not a readable example ({error!r:.200})"
            return Problem(file, reason, number, missing)
        steps: dict[str, NDArray[Any]] = {}
        for key, path in self.paths.items():
            value: Any = example["steps"]
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if value is None:
                return Problem(file, "the record lacks this feature", number, key)
            feature = self.leaves[key]
            if key not in self.encoded and value.dtype == object and np.dtype(feature.np_dtype) != object:
                value = np.stack([feature.decode_example_np(v) for v in value])  # a tensor that was stored compressed
            steps[key] = value
        lengths = {key: len(value) for key, value in steps.items()}
        usual = Counter(lengths.values()).most_common(1)[0][0]
        for key, length in lengths.items():
            if length != usual:
                return Problem(file, f"has {length} steps where others have {usual}", number, key)
        return Raw(steps, example.get("episode_metadata", {}))

    def _missing(self, record: bytes) -> str | None:
        """The first wanted feature that the record does not name, if that is what is wrong with it."""
        return next((key for key in self.keys if f"steps/{key}".encode() not in record), None)


class RldsSource:
    """An RLDS data set as :class:`~data.sources.Source`.

    Args:
        path: see :class:`RldsFolder`.
        conventions: name or file; by the data set's name if None.
        split: which split, or ``all``.
        camera: image feature to read in place of the conventions' one.

    Records that repeat an earlier one byte for byte (a validation split that repeats the training split) are left out.

    Raises:
        InputError: an unknown split or camera; a shard that is not there; conventions that name features which are not.
    """

    def __init__(self, path: Path, conventions: str | Path | None, split: str, camera: str | None) -> None:
        self.folder = RldsFolder(path)
        self.name = self.folder.name
        self.conventions: Conventions = find_conventions(conventions, self.name)
        self.space = self.conventions.space(self.name)
        self.camera = camera or self.conventions.camera
        if camera is not None:
            self.folder.leaf(camera)
        splits = self.folder.splits
        if split != "all" and split not in splits:
            raise InputError(f"{self.folder.path}: no split {split!r}; there are: {', '.join(splits)}, or all")
        chosen = list(splits) if split == "all" else [split]
        self.notes: list[str] = []
        self.parts: list[Part] = []
        self.indexes: dict[str, Index] = {}
        self.repeats: dict[str, set[int]] = {}
        seen: dict[tuple[int, int], str] = {}
        start = 0
        for name in chosen:
            repeated: Counter[str] = Counter()
            for number, (file, claimed) in enumerate(splits[name]):
                if not file.is_file():
                    raise InputError(
                        f"{file}: the shard is not there, though {self.folder.path / 'dataset_info.json'} names it"
                    )
                index = scan(file)
                self.indexes[str(file)] = index
                if len(index) != claimed and index.problem is None:
                    self.notes.append(f"{file}: holds {len(index)} records, dataset_info.json claims {claimed}")
                repeats = self.repeats.setdefault(str(file), set())
                for i, key in enumerate(zip(index.lengths.tolist(), index.sums.tolist(), strict=True)):
                    if key in seen:
                        repeats.add(i)
                        repeated[seen[key]] += 1
                    else:
                        seen[key] = name
                records = len(index) + (index.problem is not None)
                for first in range(0, records, EPISODES_PER_PART):
                    part = f"{self.name}-{name}-{number:05d}-{first:06d}"
                    count = min(EPISODES_PER_PART, records - first)
                    self.parts.append(Part(part, str(file), first, count, start + first))
                start += records
            for other, count in repeated.items():
                self.notes.append(f"{self.folder.path}: {count} records of split {name} repeat records of {other}; left out")
        self.split = split
        self.reader = self.folder.reader(self.conventions.keys)
        self.image_shape = None if self.camera is None else self.folder.image_shape(self.camera)
        self._with_images: RldsReader | None = None

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """See :class:`~data.sources.Source`. Images are encoded, as the shard holds them."""
        reader = self.reader
        if images:
            if self.camera is None:
                raise InputError(f"{self.folder.path}: its conventions name no camera; name one with --camera")
            self._with_images = self._with_images or self.folder.reader([*self.conventions.keys, self.camera])
            reader = self._with_images
        index, repeats = self.indexes[part.file], self.repeats[part.file]
        for i, record in read_records(index, part.first, part.count):
            if i in repeats:
                continue
            raw = record if isinstance(record, Problem) else reader.parse(record, part.file, i)
            if isinstance(raw, Problem):
                yield raw
            else:
                facts = {"dataset": self.name, "file": Path(part.file).name, "record": i, "number": part.start + i - part.first}
                cameras = {self.camera.rpartition("/")[2]: self.camera} if images and self.camera else {}
                yield standardize(raw, self.conventions, part.file, i, facts, cameras)
        if index.problem is not None and part.first <= len(index) < part.first + part.count:
            yield index.problem


def _version_folder(path: Path) -> Path:
    if (path / "dataset_info.json").is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    versions = [p.parent for p in path.glob("*/dataset_info.json")]
    if not versions:
        raise InputError(f"{path}: not an RLDS data set: no dataset_info.json there or one folder below")
    return max(versions, key=lambda p: [int(n) if n.isdecimal() else -1 for n in p.name.split(".")])


def _leaves(features: Any, prefix: str = "") -> dict[str, Any]:
    """Feature by path with slashes."""
    out: dict[str, Any] = {}
    for name, feature in features.items():
        if hasattr(feature, "items"):
            out |= _leaves(feature, f"{prefix}{name}/")
        else:
            out[f"{prefix}{name}"] = feature
    return out


def _split(key: str, features: Any) -> list[str]:
    """A feature's path as the list of names that lead to it; names may contain slashes themselves."""
    for name, feature in features.items():
        if name == key:
            return [name]
        if key.startswith(f"{name}/") and hasattr(feature, "items"):
            return [name, *_split(key[len(name) + 1 :], feature)]
    raise KeyError(key)
