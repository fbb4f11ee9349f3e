"""Open-X data sets in RLDS form (TFDS folders of TFRecord shards), read without TensorFlow.

``tensorflow_datasets`` says which features there are and brings the record's message type (``tf.train.Example``) and the
decoders of unusual features; the framing of TFRecord files, with its check sums, is read here:

    uint64 length, uint32 masked CRC32C of the length, the record, uint32 masked CRC32C of the record (little endian)

(https://www.tensorflow.org/tutorials/load_data/tfrecord). Only the features asked for are taken out of a record, each as
one array, and images stay encoded: that is what makes it fast. Episodes are streamed; no more than one record is in memory.
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

from data.cameras import Cameras
from data.identity import digest
from data.images import ImageCheck
from data.openx import Conventions, Steps, as_text, find_conventions, first_action_note, standardize
from data.parts import Part, Problem
from data.words import Words, several_words_note, split_at_words
from spvla.errors import InputError
from spvla.store import Episode

EPISODES_PER_PART = 16
FLAGS = ("is_last", "is_terminal")
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
        form = self.builder.info.file_format
        if form is not None and form.value != "tfrecord":
            raise InputError(f"{self.path}: is stored as {form.value}; only tfrecord is read")

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

    def find_cameras(self, named: str | None) -> Cameras:
        """The image features of a step by kind, and which of them is ``named``. Raises :class:`InputError`: see
        :class:`~data.cameras.Cameras`."""
        import tensorflow_datasets as tfds

        images = {key: f for key, f in _leaves(self.steps).items() if isinstance(f, tfds.features.Image)}
        depth = [key for key, f in images.items() if np.dtype(f.np_dtype) != np.uint8]  # 16 bits, or metres
        colour = [key for key, f in images.items() if key not in depth and f.shape[-1] == 3]
        others = [key for key in images if key not in depth and key not in colour]
        if named is not None and named not in images:
            others.append(named)  # a feature in a form of its own, which is told when it cannot be read
        return Cameras(str(self.path), colour, depth, others, named)

    def reader(self, keys: Sequence[str]) -> RldsReader:
        """A parser for the features ``keys`` of a step and for the episode's metadata."""
        return RldsReader(self, tuple(dict.fromkeys(keys)))


class RldsReader:
    """Parses records into whole-episode arrays: one array (T, ...) per feature, images and text left as bytes.

    Features of one fixed shape are taken straight from the record; all others (ragged, nested, packed) go through tfds.
    """

    def __init__(self, folder: RldsFolder, keys: tuple[str, ...]) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        self.folder, self.keys = folder, keys
        self.message = tf_example_pb2.Example
        self.plain: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self.others: dict[str, Any] = {}
        for key in keys:
            feature = folder.leaf(key)
            info = feature.get_serialized_info()
            simple = isinstance(feature, tfds.features.Tensor | tfds.features.Image) and isinstance(info.shape, tuple)
            packed = getattr(feature, "_encoding", None) not in (None, tfds.features.Encoding.NONE)
            if simple and not packed and None not in info.shape:
                self.plain[key] = np.dtype(info.np_dtype), info.shape
            else:
                self.others[key] = _step_feature(folder.steps, key, feature)

    def parse(self, record: bytes, file: str, number: int) -> Steps | Problem:
        """A record as arrays, or what is wrong with it.

        Args:
            record: the record's bytes.
            file, number: where it came from, for messages.
        """
        try:
            features = self.message.FromString(record).features.feature
        except Exception as error:  # protobuf's own error class differs from version to version
            return Problem(file, f"not a readable example ({error})", number)
        steps: dict[str, NDArray[Any]] = {}
        for key in self.keys:
            try:
                if key in self.plain:
                    value = self._plain(features, key)
                elif any(name.startswith(f"steps/{key}") for name in features):
                    value = self._other(record, key)
                else:
                    value = None
            except Exception as error:  # numpy and tfds raise what they like for values that do not fit
                return Problem(file, f"not readable as the data set describes it ({error})", number, key)
            if value is None:
                return Problem(file, "the record lacks this feature", number, key)
            steps[key] = value
        lengths = {key: len(value) for key, value in steps.items()}
        usual = Counter(lengths.values()).most_common(1)[0][0] if lengths else 0
        for key, length in lengths.items():
            if length != usual:
                return Problem(file, f"has {length} steps where others have {usual}", number, key)
        return steps

    def _plain(self, features: Any, key: str) -> NDArray[Any] | None:
        name = f"steps/{key}"
        kind = features[name].WhichOneof("kind") if name in features else None
        if kind is None:
            return None
        dtype, shape = self.plain[key]
        return np.array(getattr(features[name], kind).value, dtype).reshape(-1, *shape)

    def _other(self, record: bytes, key: str) -> NDArray[Any] | None:
        import tensorflow_datasets as tfds

        value = self.others[key].deserialize_example_np(record, decoders={"steps": tfds.decode.SkipDecoding()})["steps"]
        for name in _split(key, self.folder.steps):
            value = value.get(name) if isinstance(value, dict) else None
        feature = self.folder.leaf(key)
        if value is not None and value.dtype == object and np.dtype(feature.np_dtype) != object:
            value = np.stack([feature.decode_example_np(v) for v in value])  # a tensor that was stored compressed
        return value


class RldsSource:
    """An RLDS data set as :class:`~data.sources.Source`.

    Args:
        path: see :class:`RldsFolder`.
        conventions: name or file; by the data set's name if None.
        split: which split, or ``all``.
        camera: image feature to read in place of the conventions' one.

    Records that repeat an earlier one byte for byte (a validation split that repeats the training split) are left out.

    Raises:
        InputError: an unknown split or camera; none of the shards is there; conventions that name features which are not.
    """

    def __init__(self, path: Path, conventions: str | Path | None, split: str, camera: str | None) -> None:
        self.folder = RldsFolder(path)
        self.name, self.named = self.folder.name, True
        self.conventions: Conventions = find_conventions(conventions, self.name)
        self.space = self.conventions.space(self.name)
        if camera is not None:
            self.folder.leaf(camera)
        self.cameras = self.folder.find_cameras(camera or self.conventions.camera)
        self.camera = self.cameras.chosen
        splits = self.folder.splits
        if split != "all" and split not in splits:
            raise InputError(f"{self.folder.path}: no split {split!r}; there are: {', '.join(splits)}, or all")
        self.split = split
        self.chosen = list(splits) if split == "all" else [split]
        self.parts: list[Part] = []
        self.indexes: dict[str, Index] = {}
        self.repeats: dict[str, set[int]] = {}
        self.repeated: Counter[tuple[str, str]] = Counter()
        self.contents: dict[int, tuple[Any, ...]] = {}
        seen: dict[tuple[int, int], str] = {}
        start = 0
        for name in self.chosen:
            for number, (file, _) in enumerate(splits[name]):
                index = self.indexes[str(file)] = scan(file) if file.is_file() else _missing(file)
                repeats = self.repeats.setdefault(str(file), set())
                for i, key in enumerate(index.identities()):
                    if key in seen:
                        repeats.add(i)
                        self.repeated[name, seen[key]] += 1
                    else:
                        seen[key] = name
                records = len(index) + (index.problem is not None)
                size = file.stat().st_size if file.is_file() else 0
                for first in range(0, records, EPISODES_PER_PART):
                    part = f"{self.name}-{name}-{number:05d}-{first:06d}"
                    count = min(EPISODES_PER_PART, records - first)
                    content = digest(index.contents()[first : first + count])
                    self.parts.append(Part(part, str(file), first, count, start + first, size, content))
                self.contents |= {start + i: (content,) for i, content in enumerate(index.contents())}
                start += records
        if not any(Path(file).is_file() for file in self.indexes):
            raise InputError(
                f"{next(iter(self.indexes), self.folder.path)}: the shard is not there, nor any other of split {split!r} that "
                f"{self.folder.path / 'dataset_info.json'} names"
            )
        self.reader = self.folder.reader(self.conventions.keys)
        self.image_shape = None if self.camera is None else self.folder.image_shape(self.camera)
        self._with_images: RldsReader | None = None

    @cached_property
    def notes(self) -> list[str]:
        """See :class:`~data.sources.Source`; flags, images and first actions are those of the first part's episodes."""
        out: list[str] = []
        where, splits = self.folder.path, self.folder.splits
        for name in self.chosen:
            for file, claimed in splits[name]:
                index = self.indexes[str(file)]
                if len(index) != claimed and index.problem is None:
                    out.append(f"{file}: holds {len(index)} records, dataset_info.json claims {claimed}")
        for (name, other), count in self.repeated.items():
            out.append(f"{where}: {count} records of split {name} repeat records of {other}; left out")
        mine = {key for index in self.indexes.values() for key in index.identities()}
        for name in splits:
            if name not in self.chosen:
                found = [key for file, _ in splits[name] if file.is_file() for key in scan(file).identities()]
                if repeats := sum(key in mine for key in found):
                    told = f"{repeats} of {len(found)} records of split {name} are also in {self.split}"
                    out.append(f"{where}: {told}; neither can be held out from the other")
        if (left := self.conventions.left_out) is not None:
            out.append(f"{where}: by its conventions, {left}")
        first = self.parts[0] if self.parts else None
        return out if first is None else [*out, *self._look_at(first)]

    def _look_at(self, part: Part) -> list[str]:
        """What flags, images and first actions of a part's records say that the metadata or the conventions do not."""
        out, where = [], self.folder.path
        flags = [name for name in FLAGS if name in self.folder.steps]
        reader = self.folder.reader([*flags, *([self.camera] if self.camera else [])])
        ended: Counter[str] = Counter()
        shown, has_image, read = False, [], 0
        for i, record in read_records(self.indexes[part.file], part.first, part.count):
            steps = record if isinstance(record, Problem) else reader.parse(record, part.file, i)
            if isinstance(record, Problem) or isinstance(steps, Problem):
                continue
            read += 1
            ended.update(name for name in flags if steps[name].any())
            if self.camera is not None:
                frames = steps[self.camera]
                check = ImageCheck(None)
                for t in {0, len(frames) // 2, len(frames) - 1}:
                    check.add(frames[t])
                shown = shown or check.coloured
                flag = reader.message.FromString(record).features.feature
                name = f"episode_metadata/has_{self.camera.rpartition('/')[2]}"
                if name in flag:
                    has_image.append(any(flag[name].int64_list.value))
        if flags and read and not ended:
            out.append(f"{where}: no step has {' or '.join(flags)} set; an episode ends where its record ends")
        if read and self.camera is not None:
            name = f"has_{self.camera.rpartition('/')[2]}"
            if not shown:
                out.append(f"{where}: the images of {self.camera} have one colour only: the camera was not connected")
            elif has_image and not any(has_image):
                out.append(f"{where}: episode_metadata/{name} is false, yet {self.camera} shows something; its images count")
        episodes = [e for e in self.episodes(part) if isinstance(e, Episode)]
        out += [*self.cameras.note, *several_words_note(str(where), episodes)]
        return [*out, *first_action_note(str(where), [e for e in episodes if not e.metadata.get("part")], self.space)]

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """See :class:`~data.sources.Source`. Images are encoded, as the shard holds them."""
        reader = self.reader
        if images:
            camera = self.cameras.require()
            self._with_images = self._with_images or self.folder.reader([*self.conventions.keys, camera])
            reader = self._with_images
        index, repeats = self.indexes[part.file], self.repeats[part.file]
        for i, record in read_records(index, part.first, part.count):
            if i in repeats:
                continue
            steps = record if isinstance(record, Problem) else reader.parse(record, part.file, i)
            if isinstance(steps, Problem):
                yield steps
            else:
                number = part.start + i - part.first
                facts = {"dataset": self.name, "named": True, "file": Path(part.file).name, "record": i, "number": number}
                facts["content"] = self.contents[number][0]
                cameras = {self.camera.rpartition("/")[2]: self.camera} if images and self.camera else {}
                found = standardize(steps, self.conventions, part.file, i, facts, cameras)
                yield from [found] if isinstance(found, Problem) else split_at_words(found, self._words(steps, found))
        if index.problem is not None and part.first <= len(index) < part.first + part.count:
            yield index.problem

    def _words(self, steps: Steps, episode: Episode) -> Words:
        """The words of each step that ``episode`` keeps."""
        if self.conventions.instruction is None:
            return Words([episode.instruction], np.zeros(len(episode), np.int64))
        values = steps[self.conventions.instruction]
        return Words.of(values[self.conventions.kept(len(values))], as_text)


def _missing(file: Path) -> Index:
    none = np.zeros(0, np.int64)
    return Index(file, none, none, none, Problem(str(file), "the shard is not there, though dataset_info.json names it"))


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


def _step_feature(features: Any, key: str, feature: Any) -> Any:
    """A description of episodes whose steps hold the feature ``key`` alone, for tfds to read."""
    import tensorflow_datasets as tfds

    nested: Any = feature
    for name in reversed(_split(key, features)):
        nested = {name: nested}
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(nested)})
