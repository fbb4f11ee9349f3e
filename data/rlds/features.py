"""The features of a TFDS folder, and records parsed into whole-episode arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.cameras import Cameras
from data.openx import Steps
from data.parts import Problem
from spvla.errors import InputError
from spvla.files import inside, parse_json, read_json

CLASS_NAMES = ("pythonClassName", "python_class_name", "type", "proto_cls")  # entries of features.json that tfds imports


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

        for name in ("dataset_info.json", "features.json"):
            _require_own_classes(read_json(inside(self.path, name)), self.path / name)
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
        try:
            return {
                name: [
                    (inside(self.path, Path(file).name), length)
                    for file, length in zip(split.filepaths, split.shard_lengths, strict=True)
                ]
                for name, split in self.builder.info.splits.items()
            }
        except InputError:
            raise
        except Exception as error:  # tfds fills in a template that the folder names
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: its splits cannot be read ({reason})", field=str(self.path)) from None

    def leaf(self, key: str) -> Any:
        """The feature called ``key`` (path with slashes inside a step). Raises :class:`InputError` if there is none."""
        flat = _leaves(self.steps)
        if key not in flat:
            raise InputError(f"{self.path}: no feature {key!r} in a step; available: {', '.join(sorted(flat))}")
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
            others.append(named)  # an unusual feature; reported later if it cannot be read
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


def _version_folder(path: Path) -> Path:
    if (path / "dataset_info.json").is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    versions = [p.parent for p in path.glob("*/dataset_info.json")]
    if not versions:
        raise InputError(f"{path}: not an RLDS data set: no dataset_info.json there or one folder below")
    return max(versions, key=lambda p: [int(n) if n.isdecimal() else -1 for n in p.name.split(".")])


def _require_own_classes(value: Any, file: Path) -> None:
    """Raise :class:`InputError` if a description names a class for tfds to import that is not its own: importing runs code."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        if key in CLASS_NAMES and isinstance(entry, str) and not re.fullmatch(r"tensorflow_datasets(\.\w+)+", entry):
            told = f"{key} is {entry!r}; only classes of tensorflow_datasets are read"
            raise InputError(f"{file}: {told}", code="foreign-class", field=str(file))
        if key == "content" and isinstance(entry, str) and entry.lstrip().startswith("{"):  # older files nest JSON as text
            entry = parse_json(entry, str(file))
        _require_own_classes(entry, file)


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
