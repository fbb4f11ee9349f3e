"""Single recorded frames for training or adapting a VLA: image, instruction, the teacher's action, where things are in it.

A store is read while others still write to it: :meth:`Frames.scan` picks up shards that were finished since the last scan,
so that a trainer can run beside the collector (DAgger). What a shard holds is copied once into an Arrow file in the cache
directory and memory-mapped from there: frames are read in any order, and no image stays in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.envs import recorded_by, training_part
from data.envs.base import POINTS, Annotator, SplitPart
from data.images import is_upside_down
from data.store import cache_directory
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.files import parse_json, writing
from spvla.store.columns import read_parquet, read_vectors
from spvla.store.shards import shard_info
from spvla.vlas.conventions import UInt8Array, decode_image

LABELS = ("action", "vla_action", "observation.environment_state")  # what a label is made of
STATE = "observation.state"
UNKNOWN = {"label": 1, "state": 1, "points": 2 * len(POINTS), "positions": 3 * len(POINTS)}  # sizes of values without a label
CACHE_VERSION = 10
GIVEN_UP = 120  # a failed episode's later steps are left out: things lie where nobody can reach them
MISTAKE = 1.0  # how much more often than others a frame is drawn in which the student was wrong by half the range or more
HELD_OUT = 10  # of the episodes that no simulator assigns every tenth, by its name's hash, is for validation


@dataclass(frozen=True)
class Question:
    """Another thing that could have been asked for in a frame.

    Args:
        instruction: the words.
        label: what the teacher would do then, float32 (D,); NaN where that is not worth teaching: the hand is busy.
        item: where the asked object is in the image, column and row in pixels, float32 (2,).
        position: where it is in the world, metres, float32 (3,).
    """

    instruction: str
    label: NDArray[np.float32]
    item: NDArray[np.float32]
    position: NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """One recorded step.

    Args:
        image: upright, uint8 (H, W, 3).
        instruction: what was asked for.
        label: the teacher's action at this state, environment units, float32 (D,).
        points: where :data:`POINTS` are in ``image``, column and row in pixels, float32 (3, 2); NaN if unknown.
        positions: where they are in the world, metres, float32 (3, 3).
        ahead: the labels of this frame and of those that follow it, float32 (T, D); NaN from the episode's end on.
        state: the robot's, as recorded, float32 (S,); one NaN if none is.
        others: what else could have been asked for.
    """

    image: UInt8Array
    instruction: str
    label: NDArray[np.float32]
    points: NDArray[np.float32]
    positions: NDArray[np.float32]
    ahead: NDArray[np.float32]
    state: NDArray[np.float32]
    others: tuple[Question, ...] = ()


class Frames:
    """The frames of stores that may still grow.

    Args:
        folders: rollout stores, finalised or not.
        validation: frames of calibration episodes (:meth:`data.envs.base.Simulator.split`) that no student visited; else of all
            other episodes.
        others: also what the expert would do at each state if asked for the scene's other objects; needs a simulator that
            knows (:class:`~data.envs.base.Annotator`).
        labelled: frames with the teacher's label, of demonstrations and of students. Without, images and instructions
            are enough: every episode counts, of any robot, and one in ten of those that no simulator assigns is for validation.
        camera: whose images; None: the main one of the simulator, else the first.
        chunk: T, how many frames' labels :attr:`Frame.ahead` holds.

    Raises:
        InputError: an episode that is evaluation data, or a shard without such images.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        validation: bool = False,
        others: bool = False,
        labelled: bool = True,
        camera: str | None = None,
        chunk: int = 1,
    ) -> None:
        if others and not labelled:
            raise InputError("frames: training on other instructions needs labels; use labelled frames, or set questions: 1")
        self.folders, self.validation, self.others = [Path(f) for f in folders], validation, others
        self.labelled, self.camera, self.chunk = labelled, camera, chunk
        self._stamps: dict[Path, int] = {}
        self._shards: dict[Path, list[tuple[pa.Table, str, list[str]]]] = {}
        self._tables: list[tuple[pa.Table, str, list[str]]] = []
        self.offsets = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def episodes(self) -> int:
        """Number of episodes in use."""
        return len(self._tables)

    def scan(self) -> int:
        """Take in shards that are new or were written anew; returns how many frames more there are."""
        before = len(self)
        for folder in self.folders:
            for shard in sorted((folder / ".shards").glob("[!.]*.parquet")):
                stamp = shard.stat().st_mtime_ns
                if stamp != self._stamps.get(shard):
                    self._stamps[shard] = stamp
                    self._add(shard)
        self._tables = [episode for episodes in self._shards.values() for episode in episodes]
        self.offsets = np.cumsum([0, *(table.num_rows for table, *_ in self._tables)]).astype(np.int64)
        return len(self) - before

    def weights(self) -> NDArray[np.float64]:
        """How often to draw each frame in training, relative to the others, (len,): a student's mistakes more often."""
        return 1 + MISTAKE * np.concatenate([np.asarray(table["wrong"], np.float64) for table, *_ in self._tables])

    def __getitem__(self, index: int) -> Frame:
        shard = int(np.searchsorted(self.offsets, index, side="right")) - 1
        (table, instruction, asked), row = self._tables[shard], index - int(self.offsets[shard])

        def values(name: str, *shape: int) -> NDArray[np.float32]:
            return np.asarray(table[name][row].values, np.float32).reshape(shape)

        others: tuple[Question, ...] = ()
        if asked:
            count = len(asked)
            columns = (values(f"other_{name}", count, -1) for name in ("labels", "items", "positions"))
            others = tuple(map(Question, asked, *columns))
        image = decode_image(table["image"][row].as_buffer().to_pybytes())
        points, positions = values("points", -1, 2), values("positions", -1, 3)
        if (table.schema.metadata or {}).get(b"upside_down") == b"true":
            last = np.array(image.shape[1::-1], np.float32) - 1
            image, points = np.ascontiguousarray(image[::-1, ::-1]), last - points
            others = tuple(replace(other, item=last - other.item) for other in others)
        label = values("label", -1)
        ahead = np.full((self.chunk, len(label)), np.nan, np.float32)
        steps = np.asarray(table["step"][row : row + self.chunk])
        follow = steps == steps[0] + np.arange(len(steps))  # a step without a label is left out of the table
        found = np.stack(table["label"][row : row + self.chunk].to_numpy(zero_copy_only=False))
        ahead[: len(steps)][follow] = found[follow]
        return Frame(image, instruction, label, points, positions, ahead, values("state", -1), others)

    def _add(self, shard: Path) -> None:
        self._shards[shard] = []
        whole, first = None, 0
        info = shard_info(shard)
        episodes, space = info["episodes"], ActionSpace.from_dict(info["action_space"], str(shard))
        if self.labelled and len(episodes) != 1:
            raise InputError(f"{shard}: {len(episodes)} episodes in one shard, expected 1")
        for i, episode in enumerate(episodes):
            if self._belongs(episode, f"{shard.stem} {i}", training_part(episode["metadata"], space.name, str(shard))):
                if whole is None:
                    whole = self._mapped(shard, episode, space)
                asked = parse_json((whole.schema.metadata or {}).get(b"others", b"[]"), f"{shard}: others")
                length = episode["length"] if not self.labelled else whole.num_rows if episode["success"] else GIVEN_UP
                self._shards[shard].append((whole.slice(first, length), episode["instruction"], asked))
            first += episode["length"]

    def _belongs(self, episode: dict[str, Any], name: str, part: SplitPart | None) -> bool:
        """Whether an episode, which its simulator assigns to ``part``, is among these frames."""
        facts, held_out = episode["metadata"], part == "calibration"
        if not self.labelled:
            return self.validation == (held_out if part is not None else crc32(name.encode()) % HELD_OUT == 0)
        if held_out != self.validation or (held_out and "student" in facts):
            return False
        return bool(episode["success"] or "student" in facts)  # the teacher's own failure teaches nothing

    def _mapped(self, shard: Path, episode: dict[str, Any], space: ActionSpace) -> pa.Table:
        """The frames of a shard (image, label, state, points, positions, wrong, step), memory-mapped from the cache.

        With ``others`` also the labels and places of everything else (``other_labels``, ``other_items``, ``other_positions``);
        the schema's metadata ``others`` is the list of the instructions. Without labels only images are read.
        """
        status, asked = shard.stat(), episode["instruction"] if self.others else None
        key = (CACHE_VERSION, self.labelled, self.camera, asked, str(shard.resolve()), status.st_size, status.st_mtime_ns)
        path = cache_directory() / "frames" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.arrow"
        if not path.exists():
            names = pq.read_schema(shard).names
            cameras = [n for n in names if n.startswith("observation.images.")]
            known = recorded_by(episode["metadata"], space.name)
            camera = known.camera if self.camera is None and known is not None else self.camera
            wanted = [n for n in cameras if n == f"observation.images.{camera}"] or (cameras[:1] if self.camera is None else [])
            if not cameras:
                raise InputError(f"{shard}: holds no images; collect with --images true")
            if not wanted:
                found = ", ".join(n.removeprefix("observation.images.") for n in cameras)
                raise InputError(f"{shard}: has no camera {self.camera!r}; available: {found}")
            if self.labelled:
                for needed in LABELS:
                    if needed not in names:
                        raise InputError(f"{shard}: has no {needed}, which training a VLA needs")
                raw = read_parquet(shard, [*wanted, *LABELS, *[STATE] * (STATE in names)])
                table = _labelled(raw, raw[wanted[0]], episode["metadata"], asked, space, str(shard))
            else:
                raw = read_parquet(shard, wanted)[wanted[0]]
                nothing = {name: _lists(np.full((len(raw), n), np.nan, np.float32)) for name, n in UNKNOWN.items()}
                steps = np.arange(len(raw))
                table = pa.table({"image": _encoded(raw), **nothing, "wrong": np.zeros(len(raw)), "step": steps})
            turned = str(is_upside_down(episode["metadata"])).lower()
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), "upside_down": turned})
            with (
                writing(path) as temporary,
                pa.OSFile(str(temporary), "wb") as sink,
                pa.ipc.new_file(sink, table.schema) as writer,
            ):
                writer.write_table(table.combine_chunks())
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _labelled(
    raw: pa.Table,
    images: pa.ChunkedArray,
    facts: dict[str, Any],
    instruction: str | None,
    space: ActionSpace,
    what: str,
) -> pa.Table:
    """The labelled frames of the shard ``what``; with its ``instruction`` also what else could have been asked for."""
    actions, labels, scenes = (read_vectors(raw, name, what) for name in LABELS)
    known = recorded_by(facts, space.name) if "scene" in facts else None
    annotator = known if isinstance(known, Annotator) else None
    points = np.full((len(labels), 2 * len(POINTS)), np.nan, np.float32)
    places = np.full((len(labels), 3 * len(POINTS)), np.nan, np.float32)
    if annotator is not None:
        points, places = annotator.image_points(scenes, facts), annotator.positions(scenes, facts)
    columns = {"image": _encoded(images), "label": _lists(labels), "points": _lists(points), "positions": _lists(places)}
    states = read_vectors(raw, STATE, what) if STATE in raw.column_names else np.full((len(labels), 1), np.nan, np.float32)
    columns |= {"state": _lists(states.astype(np.float32)), "step": pa.array(np.arange(len(labels)))}
    columns["wrong"] = pa.array(mistakes(actions, labels, space) if "student" in facts else np.zeros(len(labels)))
    found: dict[str, tuple[NDArray[np.float32], ...]] = {}
    if annotator is not None and instruction is not None:
        found = {**annotator.other_questions(scenes, labels, facts, instruction)}
    for k, name in enumerate(("other_labels", "other_items", "other_positions")):
        if found:
            columns[name] = _lists(np.stack([answer[k] for answer in found.values()], 1))  # (T, M, ...)
    table = pa.table(columns).filter(~np.isnan(labels).any(1))
    return table.replace_schema_metadata({"others": json.dumps(list(found))})


def _encoded(images: pa.ChunkedArray) -> pa.Array:
    """JPEG or PNG bytes of a column of images."""
    return images.combine_chunks().field("bytes")


def _lists(values: NDArray[np.float32]) -> pa.Array:
    """Values (T, ...) as T lists."""
    return pa.FixedSizeListArray.from_arrays(values.ravel(), values[0].size)


def mistakes(actions: NDArray[np.float32], labels: NDArray[np.float32], space: ActionSpace) -> NDArray[np.float64]:
    """How wrong a student was: it gave ``actions`` (T, D), the teacher ``labels``; (T,), 1 from half the range on.

    Where the hand goes and what the gripper does counts; in a space without translations, everything.
    """
    dims = [*(space.translation or space.continuous), *space.gripper]
    wrong = np.abs(space.normalize(actions) - space.normalize(labels))[:, dims].max(1)
    return np.minimum(wrong, 1).astype(np.float64)
