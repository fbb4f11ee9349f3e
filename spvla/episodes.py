"""Episodes, and the rollout store that holds them on disk.

The store is a LeRobotDataset v3.0 folder (Parquet + JSON) with extra features: ``vla_action``, ``vla_confidence``,
``vla_features`` (what the teacher said at the visited state) and ``action.source`` (who acted). Only pyarrow and json are
needed to write it, so that a robot can record.

Writers put one shard per job under ``.shards/`` (temporary name, fsync, rename), so a killed recording leaves whole
episodes only; :func:`finalize` orders shards by job id and numbers episodes and frames. One writer or many, killed and
started again or not, the same jobs give the same store.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.files import write_text, writing
from spvla.gripper import GripperValues, judge_grippers
from spvla.history import Source
from spvla.statistics import Statistics

CODEBASE_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_FILE_BYTES = 100 * 2**20
SHARD_KEY = b"spvla"
SMALLEST_SCALE = 0.05
WIDEST_WITH_QUANTILES = 64  # entries of a feature; more (the VLA's pooled features) have mean and spread only
README_TITLE = "# Rollouts on "
VECTOR_COLUMNS = {  # Episode field -> feature name of the store
    "actions": "action",
    "states": "observation.state",
    "environment_states": "observation.environment_state",
    "vla_actions": "vla_action",
    "vla_confidence": "vla_confidence",
    "vla_features": "vla_features",
}
EPISODE_COLUMNS = {  # of meta/episodes, and what each entry is
    "length": int,
    "dataset_from_index": int,
    "data/file_index": int,
    "tasks": list,
    "success": bool | NoneType,
    "metadata": str,
}


@dataclass
class Episode:
    """One rollout of T steps.

    Args:
        actions: executed actions, float32 (T, D), environment units.
        instruction: what the policy was asked to do.
        timestamps: seconds since the episode's start, float64 (T,).
        states: proprioception before each action, float32 (T, S), or None.
        sources: who made each executed action (:class:`~spvla.history.Source`), uint8 (T,).
        vla_actions: the teacher's action at each visited state, (T, D), or None for demonstrations; NaN rows where the
            teacher was not asked.
        vla_confidence: its confidence, (T, D), or None.
        vla_features: its pooled features, (T, F), or None.
        environment_states: privileged simulator state, (T, E), or None; never an input of generators and gates.
        images: per camera, T encoded images (JPEG or PNG bytes).
        success: whether the task was solved, or None if unknown.
        metadata: JSON-ready facts: suite, task, init_state, seed, ...
    """

    actions: FloatArray
    instruction: str
    timestamps: NDArray[np.float64]
    states: FloatArray | None = None
    sources: NDArray[np.uint8] | None = None
    vla_actions: FloatArray | None = None
    vla_confidence: FloatArray | None = None
    vla_features: FloatArray | None = None
    environment_states: FloatArray | None = None
    images: dict[str, Sequence[bytes]] = field(default_factory=dict)
    success: bool | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)

    def check(self, space: ActionSpace, what: str) -> None:
        """Raise :class:`InputError` naming ``what`` and the field unless shapes agree and executed values are finite."""
        steps = len(self.actions)
        if steps == 0:
            raise InputError(f"{what}: the episode has no steps")
        if not isinstance(self.instruction, str):
            raise InputError(f"{what}: instruction is {self.instruction!r}, expected text")
        for name in VECTOR_COLUMNS:
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != 2 or len(value) != steps:
                raise InputError(f"{what}: {name} has shape {value.shape}, expected ({steps}, ...)")
            allow_gaps = name.startswith("vla_")
            bad = ~(np.isfinite(value) | (np.isnan(value) if allow_gaps else False)).all(1)
            if bad.any():
                raise InputError(f"{what}: {name} contains NaN or infinity at step {int(bad.argmax())}")
        for name in ("actions", "vla_actions"):
            value = getattr(self, name)
            if value is not None and value.shape[1] != space.dim:
                raise InputError(f"{what}: {name} have {value.shape[1]} dimensions, the action space {space.dim}")
        if self.timestamps.shape != (steps,) or not np.isfinite(self.timestamps).all():
            raise InputError(f"{what}: timestamps, shape {self.timestamps.shape}: expected {steps} finite ones")
        if self.sources is not None:
            if self.sources.shape != (steps,):
                raise InputError(f"{what}: sources has shape {self.sources.shape}, expected ({steps},)")
            _require_sources(self.sources, f"{what}: sources")
        for camera, frames in self.images.items():
            if len(frames) != steps:
                raise InputError(f"{what}: camera {camera!r} has {len(frames)} images for {steps} steps")


def _require_sources(sources: NDArray[np.integer], what: str) -> None:
    """Raise :class:`InputError` naming ``what`` unless all are a :class:`~spvla.history.Source`."""
    bad = ~np.isin(sources, list(Source))
    if bad.any():
        k = int(bad.argmax())
        raise InputError(f"{what} is {sources[k]} at step {k}, expected one of {', '.join(str(int(s)) for s in Source)}")


def _vectors(values: NDArray[np.floating]) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _to_table(episode: Episode) -> pa.Table:
    steps = len(episode)
    columns: dict[str, pa.Array] = {
        store: _vectors(getattr(episode, name)) for name, store in VECTOR_COLUMNS.items() if getattr(episode, name) is not None
    }
    sources = np.zeros(steps, np.int64) if episode.sources is None else episode.sources.astype(np.int64)
    columns["action.source"] = pa.array(sources)
    for camera, frames in episode.images.items():
        fields = [pa.array(list(frames), pa.binary()), pa.nulls(steps, pa.string())]
        columns[f"observation.images.{camera}"] = pa.StructArray.from_arrays(fields, ["bytes", "path"])
    columns["timestamp"] = pa.array(episode.timestamps.astype(np.float32))
    columns["frame_index"] = pa.array(np.arange(steps, dtype=np.int64))
    return pa.table(columns)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


class RolloutWriter:
    """Writes episodes into a rollout store, one atomic shard per job.

    Args:
        folder: the store; made if absent, extended if it is one already.
        space: the action space all episodes share. An existing store of another one is refused.
        policy: who acted or labelled, for the record.
        measured: :func:`finalize` gives the store's action space the scale and bounds of the actions found.

    Raises:
        InputError: a store of another action space, or a folder with ``data`` or ``meta`` that are not a store's.
    """

    def __init__(self, folder: str | Path, space: ActionSpace, policy: str = "", measured: bool = False) -> None:
        self.folder = Path(folder)
        self.space = space
        self.policy = policy
        self.measured = measured
        self.shards = self.folder / ".shards"
        _require_own(self.folder)
        self.shards.mkdir(parents=True, exist_ok=True)
        for shard in sorted(self.shards.glob("*.parquet"))[:1]:
            theirs = ActionSpace.from_dict(shard_info(shard)["action_space"], str(shard))
            space.require_compatible(theirs, f"{self.folder} (existing store)")

    def shard_path(self, job: str) -> Path:
        """Where the shard of ``job`` is (or will be)."""
        if not job or any(c in job for c in "/\\\0") or job.startswith("."):
            raise InputError(f"job id {job!r} cannot be a file name")
        return self.shards / f"{job}.parquet"

    def finished(self, job: str) -> bool:
        """Whether the shard of ``job`` is whole on disk."""
        return self.shard_path(job).exists()

    def write(self, job: str, episodes: Sequence[Episode]) -> None:
        """Write the episodes of ``job`` and make them durable; a second write of the same job replaces the first.

        Raises:
            InputError: no episodes, one that is not whole, or features that differ from those of the store's other shards;
                nothing is written then.
        """
        path = self.shard_path(job)
        tables: list[pa.Table] = []
        with os.scandir(self.shards) as entries:  # any shard will do, and there may be many
            other = next((Path(e) for e in entries if e.name.endswith(".parquet") and e.name != path.name), None)
        expected = None if other is None else (_shard_schema(other), str(other))
        for i, episode in enumerate(episodes):
            what = f"job {job}, episode {i}"
            episode.check(self.space, what)
            table = _to_table(episode)
            expected = expected or (table.schema, f"job {job}, episode 0")
            _require_features(table.schema, *expected, what)
            tables.append(table.select(expected[0].names))
        if not tables:
            raise InputError(f"job {job}: no episodes")
        info = {
            "action_space": self.space.to_dict(),
            "policy": self.policy,
            "measured": self.measured,
            "episodes": [
                {"length": len(e), "instruction": e.instruction, "success": e.success, "metadata": e.metadata} for e in episodes
            ],
        }
        try:
            text = json.dumps(info)
        except (TypeError, ValueError) as error:
            raise InputError(f"job {job}: metadata or success cannot be written as JSON ({error})") from None
        table = pa.concat_tables(tables).replace_schema_metadata({SHARD_KEY: text.encode()})
        with writing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    def finalize(self) -> Path:
        """See :func:`finalize`."""
        return finalize(self.folder)


def shard_info(path: Path) -> dict[str, Any]:
    """What a shard says of itself: ``action_space``, ``policy``, ``measured`` and one dict per episode (see
    :class:`RolloutWriter`)."""
    try:
        info: dict[str, Any] = json.loads(_shard_schema(path).metadata[SHARD_KEY])
        [e[name] for e in info["episodes"] for name in ("length", "instruction", "success", "metadata")]
        return {name: info[name] for name in ("action_space", "policy", "episodes")} | {"measured": info.get("measured", False)}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _not_whole(path, error) from None


def _shard_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _not_whole(path, error) from None


def _not_whole(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path}: not a whole shard of a rollout store ({_line(error)}); delete it to do its job again")


def _line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def _require_own(folder: Path) -> None:
    """Raise :class:`InputError` if :func:`finalize` would replace ``data`` or ``meta`` that it did not make from shards."""
    there = [folder / name for name in ("data", "meta") if (folder / name).exists()]
    shards = any((folder / ".shards").glob("*.parquet"))
    if there and not (shards and ((folder / "meta" / "spvla.json").exists() or not (folder / "meta").exists())):
        names = " and ".join(path.name for path in there)
        raise InputError(
            f"{folder}: has {names}, but no .shards of a rollout store that they were made from; choose another folder, or "
            "bring .shards along if it is a copy of a store"
        )
    for path in (p for kind in there for p in sorted(kind.rglob("[!.]*"))):
        if path.is_file() and path.suffix not in (".parquet", ".json"):
            raise InputError(f"{path}: not a rollout store's file, it would be deleted; move it, or choose another folder")


def _require_features(schema: pa.Schema, expected: pa.Schema, where: str, what: str) -> None:
    """Raise :class:`InputError` naming ``what`` and the features in which ``schema`` differs from that of ``where``."""

    def forms(schema: pa.Schema) -> dict[str, str]:
        return {f.name: f"{f.type.list_size} entries" if _is_vectors(f.type) else str(f.type) for f in schema}

    mine, theirs = forms(schema), forms(expected)
    odd = [n for n in sorted(mine.keys() | theirs.keys()) if mine.get(n) != theirs.get(n)]
    if odd:
        told = "; ".join(f"{n} ({mine.get(n, 'absent')}, there {theirs.get(n, 'absent')})" for n in odd)
        raise InputError(f"{what}: features differ from those of {where}: {told}; choose another store")


def _feature(column: pa.DataType, fps: float, image_shape: list[int]) -> dict[str, Any]:
    """A column as LeRobot's meta/info.json describes it."""
    if pa.types.is_fixed_size_list(column):
        return {"dtype": "float32", "shape": [column.list_size], "names": None, "fps": fps}
    if pa.types.is_struct(column):
        return {"dtype": "image", "shape": image_shape, "names": ["height", "width", "channel"], "fps": fps}
    return {"dtype": _dtype(column), "shape": [1], "names": None, "fps": fps}


def _dtype(column: pa.DataType) -> str:
    return str(column).replace("float", "float32")


def _image_shape(images: pa.ChunkedArray, what: str) -> list[int]:
    """Height, width and channels of the first image of a column; an :class:`InputError` names ``what`` if it is none."""
    try:
        with Image.open(io.BytesIO(images[0]["bytes"].as_py())) as image:
            return [image.height, image.width, len(image.getbands())]
    except UnidentifiedImageError:
        raise InputError(f"{what}: not an encoded image (JPEG or PNG)") from None


def _described(schema: pa.Schema) -> pa.Schema:
    """``schema`` with the note by which Hugging Face ``datasets`` decodes image columns."""

    def kind(column: pa.DataType) -> dict[str, Any]:
        if pa.types.is_struct(column):
            return {"_type": "Image"}
        if pa.types.is_fixed_size_list(column):
            return {"feature": kind(column.value_type), "length": column.list_size, "_type": "List"}
        return {"dtype": _dtype(column), "_type": "Value"}

    note = {"info": {"features": {f.name: kind(f.type) for f in schema}}}
    return schema.with_metadata({b"huggingface": json.dumps(note).encode()})


def finalize(folder: str | Path) -> Path:
    """Number the episodes of all finished shards, ordered by job id, and write the LeRobot v3.0 folder around them.

    The shards stay, so that a store can be extended and finalised again. In a measured store with a binary gripper, an episode
    in which the gripper has a value that is neither of its ends is left out; ``meta/spvla.json`` lists it. Returns the folder.

    Raises:
        InputError: no shards, damaged ones, ones that hold different features, ``data`` or ``meta`` that are not a store's, or
            grippers that are not binary where the action space says so.
    """
    folder = Path(folder)
    _require_own(folder)
    shards = sorted((folder / ".shards").glob("*.parquet"))
    if not shards:
        raise InputError(f"{folder}: no finished shards under .shards, nothing to finalise")
    infos = [shard_info(path) for path in shards]
    space = ActionSpace.from_dict(infos[0]["action_space"], str(shards[0]))
    schema = _shard_schema(shards[0]).remove_metadata()
    measured = any(info["measured"] for info in infos)
    grippers = _judge_grippers(shards, infos, space) if measured and space.binary_gripper and space.gripper else []
    left_out = _wrong_grippers(space, grippers)
    building = folder / ".building"
    shutil.rmtree(building, ignore_errors=True)
    (building / "data" / "chunk-000").mkdir(parents=True)

    tasks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    vectors_of = {f.name: f.type.list_size for f in schema if pa.types.is_fixed_size_list(f.type)}
    stats = {name: Statistics(quantiles=width <= WIDEST_WITH_QUANTILES) for name, width in vectors_of.items()}
    frames, file_index, writer, number, missing = 0, 0, None, 0, []
    full = schema
    for name in ("episode_index", "index", "task_index"):
        full = full.append(pa.field(name, pa.int64()))
    image_shapes: dict[str, list[int]] = {}
    if cameras := [f.name for f in schema if pa.types.is_struct(f.type)]:
        full = _described(full)
        first = read_parquet(shards[0], cameras)
        image_shapes = {name: _image_shape(first[name], f"{shards[0]}: {name}") for name in cameras}
    for path, info in zip(shards, infos, strict=True):
        table = read_parquet(path).replace_schema_metadata(None)
        _require_features(table.schema, schema, str(shards[0]), str(path))
        table = table.select(schema.names)
        if (length := sum(e["length"] for e in info["episodes"])) != table.num_rows:
            raise InputError(f"{path}: holds {table.num_rows} steps, its episodes have {length}; delete it to do its job again")
        kept = [number + i not in left_out for i in range(len(info["episodes"]))]
        missing += [
            {"file": str(path), "record": e["metadata"].get("number", i), "field": "action", "reason": left_out[number + i]}
            for i, e in enumerate(info["episodes"])
            if not kept[i]
        ]
        number += len(kept)
        if not any(kept):
            continue
        if not all(kept):
            table = table.filter(np.repeat(kept, [e["length"] for e in info["episodes"]]))
        for name, s in stats.items():
            s.add(vectors(table[name]))
        episode_index, task_index = [], []
        position = frames
        for e in (e for e, keep in zip(info["episodes"], kept, strict=True) if keep):
            task = tasks.setdefault(e["instruction"], len(tasks))
            rows.append(
                {
                    "episode_index": len(rows),
                    "data/chunk_index": 0,
                    "data/file_index": file_index,
                    "dataset_from_index": position,
                    "dataset_to_index": position + e["length"],
                    "tasks": [e["instruction"]],
                    "length": e["length"],
                    "success": e["success"],
                    "metadata": json.dumps({**e["metadata"], "job": path.stem, "policy": info["policy"]}),
                }
            )
            position += e["length"]
            episode_index += [len(rows) - 1] * e["length"]
            task_index += [task] * e["length"]
        table = table.append_column("episode_index", pa.array(episode_index, pa.int64()))
        table = table.append_column("index", pa.array(np.arange(frames, position)))
        table = table.append_column("task_index", pa.array(task_index, pa.int64())).replace_schema_metadata(full.metadata)
        frames = position
        if writer is None:
            target = building / DATA_PATH.format(chunk_index=0, file_index=file_index)
            writer = pq.ParquetWriter(target, full, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
        if target.stat().st_size > DATA_FILE_BYTES:
            writer.close()
            writer, file_index = None, file_index + 1
    if writer is not None:
        writer.close()
    if not rows:
        raise InputError(f"{folder}: every episode was left out; {missing[0]['reason']}", code="no-episodes", field="action")

    if measured:
        space = measured_space(space, stats["action"], [(g.low, g.high) for g in grippers])
    meta = building / "meta"
    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    episodes = meta / "episodes" / "chunk-000" / "file-000.parquet"
    pq.write_table(pa.Table.from_pylist(rows), episodes, write_page_checksum=True)
    _write_tasks(meta / "tasks.parquet", list(tasks))
    _write_json(meta / "stats.json", {k: s.result() for k, s in stats.items() if s.count})
    fps = space.control_rate
    info_json = {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": space.name,
        "total_episodes": len(rows),
        "total_frames": frames,
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "fps": int(fps) if float(fps).is_integer() else fps,
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": {f.name: _feature(f.type, fps, image_shapes.get(f.name, [])) for f in full},
        "data_files_size_in_mb": DATA_FILE_BYTES // 2**20,
    }
    _write_json(meta / "info.json", info_json)
    about = {"action_space": space.to_dict(), "policies": sorted({i["policy"] for i in infos})}
    _write_json(meta / "spvla.json", about | ({"left_out": missing} if missing else {}))
    for name in ("meta", "data"):  # meta goes first and comes last: a store with meta is whole
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("data", "meta"):
        (building / name).rename(folder / name)
    building.rmdir()
    readme = folder / "README.md"
    if not readme.exists() or README_TITLE in readme.read_text(errors="replace"):  # another one is somebody's own
        write_text(readme, _readme(space, rows, frames))
    return folder


def _judge_grippers(shards: Sequence[Path], infos: Sequence[dict[str, Any]], space: ActionSpace) -> list[GripperValues]:
    """What the grippers of all episodes say; an :class:`InputError` if one is not binary, as ``space`` says it is."""

    def values() -> Iterator[NDArray[np.float32]]:
        for path, info in zip(shards, infos, strict=True):
            actions = read_vectors(read_parquet(path, ["action"]), "action", str(path))[:, list(space.gripper)]
            yield from np.split(actions, np.cumsum([e["length"] for e in info["episodes"]])[:-1])

    found = judge_grippers(values)
    for dimension, gripper in zip(space.gripper, found, strict=True):
        if not gripper.binary:
            raise InputError(
                f"{shards[0].parents[1]}: the gripper (action entry {dimension}) is not binary, as the action space says: its "
                f"values are {gripper}; write binary_gripper: false in its conventions",
                code="gripper-not-binary",
                field="binary_gripper",
            )
    return found


def _wrong_grippers(space: ActionSpace, grippers: Sequence[GripperValues]) -> dict[int, str]:
    """The episodes in which a binary gripper is at neither end, and what to say of each."""
    out = {}
    for dimension, gripper in zip(space.gripper, grippers, strict=False):
        for number, (value, steps) in ({} if gripper.passing else gripper.strays).items():
            out[number] = (
                f"the gripper is at neither of its ends (action entry {dimension}: {gripper.low:g} and {gripper.high:g}) for "
                f"{steps} steps, mostly at {value:g}"
            )
    return out


def measured_space(space: ActionSpace, actions: Statistics, ends: Sequence[tuple[float, float]] = ()) -> ActionSpace:
    """``space`` with the scale (see :func:`with_scale`) and bounds of actions that were seen. The q01 and q99 of binary
    grippers are their ``ends``."""
    q01, q99 = actions.quantile(0.01), actions.quantile(0.99)
    for d, pair in zip(space.gripper, ends, strict=False):
        q01[d], q99[d] = pair
    return with_scale(space, q01, q99, actions.min, actions.max, fixed=space.gripper if ends else ())


def with_scale(
    space: ActionSpace, q01: ArrayLike, q99: ArrayLike, low: ArrayLike, high: ArrayLike, fixed: Sequence[int] = ()
) -> ActionSpace:
    """``space`` with a measured scale and bounds, (D,) each, wherever they were measured.

    A dimension that barely moves has no scale of its own: it gets at least :data:`SMALLEST_SCALE` of the widest one of its
    role, so that sensor noise on a joint at rest is not full motion. The dimensions ``fixed`` keep what they have.
    """
    q01, q99 = (np.array(q, np.float64) for q in (q01, q99))
    roles = [(space.role(d), d in space.moving) for d in range(space.dim)]
    for role in set(roles):
        alike = [d for d in range(space.dim) if roles[d] == role and d not in fixed]
        if not alike:
            continue
        least = SMALLEST_SCALE * (q99 - q01)[alike].max()
        lacking = np.maximum(least - (q99 - q01)[alike], 0) / 2
        q01[alike], q99[alike] = q01[alike] - lacking, q99[alike] + lacking
    first, last, least, most = (tuple(np.asarray(v, np.float64).tolist()) for v in (q01, q99, low, high))
    return replace(space, q01=first, q99=last, low=least, high=most)


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """LeRobot reads tasks as a data frame indexed by the instruction; this writes that form without pandas."""
    index = "__index_level_0__"
    column = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **column},
            {"name": None, "field_name": index, **text},
        ],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    pq.write_table(table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()}), path)


def _readme(space: ActionSpace, rows: list[dict[str, Any]], frames: int) -> str:
    return (
        "---\nconfigs:\n- config_name: default\n  data_files: data/*/*.parquet\ntags:\n- LeRobot\n- robotics\n---\n\n"
        f"{README_TITLE}{space.name}\n\n{len(rows)} episodes, {frames} frames at {space.control_rate:g} Hz, in LeRobotDataset "
        f"{CODEBASE_VERSION} form.\n\nExtra features: `vla_action` (the teacher's action at the visited state), "
        "`vla_confidence`, `vla_features`, `action.source` (0: the VLA acted, 1: the generator did, 2: nobody, the robot "
        "held or stopped).\n"
    )


def vectors(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A fixed-size-list column as float32 (T, D)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    width = array.type.list_size
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)


def _is_vectors(column: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(column) and pa.types.is_floating(column.value_type))


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or those of ``columns`` that it has; check sums are verified.

    Raises:
        InputError: it is damaged or not there.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged Parquet file ({_line(error)})") from None


def _column(table: pa.Table, name: str, what: str, fits: Callable[[pa.DataType], bool], expected: str) -> pa.ChunkedArray:
    """A column without empty entries whose type ``fits``; an :class:`InputError` names ``what`` and the column if not."""
    if name not in table.column_names:
        raise InputError(f"{what}: no column {name}; there are: {', '.join(table.column_names)}")
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
    return vectors(_column(table, name, what, _is_vectors, "vectors of one size"))


def read_sources(table: pa.Table, what: str) -> NDArray[np.uint8]:
    """The column ``action.source`` as uint8 (T,).

    Raises:
        InputError: naming ``what``: not there, empty entries, another value than a :class:`~spvla.history.Source`.
    """
    column = _column(table, "action.source", what, pa.types.is_integer, "integers").to_numpy()
    _require_sources(column, f"{what}: action.source")
    return np.asarray(column, np.uint8)


def read_steps(table: pa.Table, what: str) -> NDArray[np.int64]:
    """The column ``frame_index``, each frame's step in its episode, as int64 (T,). Errors as for :func:`read_sources`."""
    return np.asarray(_column(table, "frame_index", what, pa.types.is_integer, "integers").to_numpy(), np.int64)


def read_episodes(folder: str | Path) -> Iterator[Episode]:
    """The episodes of a finalised store, in order, images left encoded. See ``data.store`` for training arrays.

    Raises:
        InputError: naming file or episode and field for whatever is damaged.
    """
    folder = Path(folder)
    rows, space = read_episode_table(folder), read_action_space(folder)
    loaded, path, part_of = -1, folder, pa.table({})
    for number, row in enumerate(rows):
        if row["data/file_index"] != loaded:  # one file in memory at a time
            loaded, first = row["data/file_index"], row["dataset_from_index"]
            path = folder / DATA_PATH.format(chunk_index=0, file_index=loaded)
            part_of = read_parquet(path)
        part, what = part_of.slice(row["dataset_from_index"] - first, row["length"]), f"{path}, episode {number}"
        if part.num_rows != row["length"]:
            raise InputError(f"{what}: holds {part.num_rows} of the {row['length']} steps that meta/episodes claims")
        names = part.column_names
        values = {
            field: read_vectors(part, store, what)
            for field, store in VECTOR_COLUMNS.items()
            if store in names or field == "actions"
        }
        images = {
            n.removeprefix("observation.images."): _column(part, n, what, pa.types.is_struct, "images")
            .combine_chunks()
            .field("bytes")
            .to_pylist()
            for n in names
            if n.startswith("observation.images.")
        }
        times = _column(part, "timestamp", what, pa.types.is_floating, "numbers")
        episode = Episode(
            **values,
            instruction=row["tasks"][0],
            timestamps=times.to_numpy().astype(np.float64),
            sources=read_sources(part, what),
            images=images,
            success=row["success"],
            metadata=json.loads(row["metadata"]),
        )
        episode.check(space, what)
        yield episode


def read_episode_table(folder: str | Path) -> list[dict[str, Any]]:
    """One dict per episode of a finalised store (length, tasks, success, metadata as JSON text, frame range).

    Raises:
        InputError: not finalised, or naming file, episode and field for whatever is damaged.
    """
    folder = Path(folder)
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        if (folder / ".shards").is_dir():
            raise InputError(
                f"{folder}: recording is not finalised; run its command again, or call spvla.episodes.finalize(folder)"
            )
        raise InputError(f"{folder}: not a rollout store (no meta/episodes)")
    rows: list[dict[str, Any]] = []
    frames = 0
    for file in files:
        for row in read_parquet(file).to_pylist():
            _check_row(row, frames, f"{file}, episode {len(rows)}")
            rows.append(row)
            frames += row["length"]
    if not rows:
        raise InputError(f"{files[0]}: lists no episodes")
    return rows


def _check_row(row: dict[str, Any], frames: int, what: str) -> None:
    """Raise :class:`InputError` unless a row of meta/episodes is whole and follows an episode that ends at ``frames``."""
    for name, kind in EPISODE_COLUMNS.items():
        if name not in row or not isinstance(row[name], kind):
            raise InputError(f"{what}: {name} is {row[name]!r}" if name in row else f"{what}: {name} is missing")
    if row["length"] < 1 or row["dataset_from_index"] != frames:
        told = f"dataset_from_index is {row['dataset_from_index']} and length {row['length']}"
        raise InputError(f"{what}: {told}; the episode before ends at {frames}")
    if not row["tasks"] or not isinstance(row["tasks"][0], str):
        raise InputError(f"{what}: tasks is {row['tasks']}, expected an instruction")
    try:
        whole = isinstance(json.loads(row["metadata"]), dict)
    except json.JSONDecodeError:
        whole = False
    if not whole:
        raise InputError(f"{what}: metadata is {row['metadata']!r}, expected a JSON object")


def read_action_space(folder: str | Path) -> ActionSpace:
    """The action space that a finalised store was recorded in."""
    path = Path(folder) / "meta" / "spvla.json"
    if not path.exists():
        raise InputError(f"{folder}: not a finalised rollout store (no meta/spvla.json)")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(values, dict) or "action_space" not in values:
        raise InputError(f"{path}: no action_space")
    return ActionSpace.from_dict(values["action_space"], str(path))
