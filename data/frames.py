"""Single recorded frames for training a VLA: image, instruction, the teacher's action, and where things are in the image.

A store is read while others still write to it: :meth:`Frames.scan` picks up shards that were finished since the last scan,
so that a trainer can run beside the collector (DAgger). What a shard holds is copied once into an Arrow file in the cache
directory and memory-mapped from there: frames are read in any order, and no image stays in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.libero import project, rotation_matrix
from data.store import cache_directory
from data.windows import CALIBRATION_INIT_STATES, EVALUATION_INIT_STATES
from spvla.episodes import shard_info, vectors
from spvla.errors import InputError
from spvla.vlas.conventions import UInt8Array, decode_image

POINTS = ("hand", "place", "item")
CACHE_VERSION = 2
GIVEN_UP = 150  # a failed episode's later steps are left out: things lie where nobody can reach them


@dataclass(frozen=True)
class Frame:
    """One recorded step.

    Args:
        image: as the environment gave it, uint8 (H, W, 3).
        instruction: what was asked for.
        label: the teacher's action at this state, environment units, float32 (D,).
        points: where :data:`POINTS` are in ``image``, column and row in pixels, float32 (3, 2); NaN if unknown.
    """

    image: UInt8Array
    instruction: str
    label: NDArray[np.float32]
    points: NDArray[np.float32]


class Frames:
    """The labelled frames of stores that may still grow.

    Args:
        folders: rollout stores, finalised or not.
        validation: frames of initial states 20-29 that no student visited; else of all other episodes.

    Raises:
        InputError: an episode of initial states 30-49, which are for evaluation only, or a shard without images.
    """

    def __init__(self, folders: Sequence[Path], validation: bool = False) -> None:
        self.folders, self.validation = [Path(f) for f in folders], validation
        self._stamps: dict[Path, int] = {}
        self._shards: dict[Path, tuple[pa.Table, str]] = {}
        self._tables: list[tuple[pa.Table, str]] = []
        self.offsets = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def episodes(self) -> int:
        """Number of episodes in use."""
        return len(self._shards)

    def scan(self) -> int:
        """Take in shards that are new or were written anew; returns how many frames more there are."""
        before = len(self)
        for folder in self.folders:
            for shard in sorted((folder / ".shards").glob("[!.]*.parquet")):
                stamp = shard.stat().st_mtime_ns
                if stamp != self._stamps.get(shard):
                    self._stamps[shard] = stamp
                    self._add(shard)
        self._tables = list(self._shards.values())
        self.offsets = np.cumsum([0, *(table.num_rows for table, _ in self._tables)]).astype(np.int64)
        return len(self) - before

    def __getitem__(self, index: int) -> Frame:
        shard = int(np.searchsorted(self.offsets, index, side="right")) - 1
        (table, instruction), row = self._tables[shard], index - int(self.offsets[shard])
        return Frame(
            decode_image(table["image"][row].as_buffer().to_pybytes()),
            instruction,
            np.asarray(table["label"][row].values, np.float32),
            np.asarray(table["points"][row].values, np.float32).reshape(-1, 2),
        )

    def _add(self, shard: Path) -> None:
        episodes = shard_info(shard)["episodes"]
        if len(episodes) != 1:
            raise InputError(f"{shard}: {len(episodes)} episodes in one shard, expected 1")
        facts = episodes[0]["metadata"]
        state = facts.get("init_state")
        if state in EVALUATION_INIT_STATES:
            raise InputError(f"{shard}: holds initial state {state}; 30-49 are for evaluation only, never for training")
        held_out = state in CALIBRATION_INIT_STATES
        if held_out != self.validation or (held_out and "student" in facts):
            return
        if not episodes[0]["success"] and "student" not in facts:
            return  # the teacher's own failure teaches nothing
        table = _mapped(shard, facts)
        if not episodes[0]["success"]:
            table = table.slice(0, GIVEN_UP)
        self._shards[shard] = (table, episodes[0]["instruction"])


def _mapped(shard: Path, facts: dict[str, Any]) -> pa.Table:
    """The frames of a shard (image, label, points), memory-mapped from the cache."""
    status = shard.stat()
    key = repr((CACHE_VERSION, str(shard.resolve()), status.st_size, status.st_mtime_ns)).encode()
    path = cache_directory() / "frames" / f"{hashlib.sha256(key).hexdigest()[:24]}.arrow"
    if not path.exists():
        names = pq.read_schema(shard).names
        cameras = [n for n in names if n.startswith("observation.images.")]
        for needed in ("vla_action", "observation.environment_state"):
            if needed not in names:
                raise InputError(f"{shard}: has no {needed}, which training a VLA needs")
        if not cameras:
            raise InputError(f"{shard}: holds no images; collect with --images true")
        raw = pq.read_table(shard, columns=[cameras[0], "vla_action", "observation.environment_state"])
        labels, states = vectors(raw["vla_action"]), vectors(raw["observation.environment_state"])
        table = pa.table(
            {
                "image": raw[cameras[0]].combine_chunks().field("bytes"),
                "label": pa.FixedSizeListArray.from_arrays(labels.ravel(), labels.shape[1]),
                "points": pa.FixedSizeListArray.from_arrays(image_points(states, facts.get("scene")).ravel(), 6),
            }
        ).filter(~np.isnan(labels).any(1))
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(f".{os.getpid()}")
        with pa.OSFile(str(building), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        building.replace(path)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def image_points(states: NDArray[np.float32], scene: dict[str, Any] | None) -> NDArray[np.float32]:
    """Where :data:`POINTS` are in the images, float32 (T, 3, 2), NaN where unknown.

    Args:
        states: environment states, (T, E), see :meth:`data.libero.PrivilegedState.to_vector`.
        scene: what :func:`data.rollout.scene_facts` recorded, or None.
    """
    out = np.full((len(states), len(POINTS), 2), np.nan, np.float32)
    if scene is None:
        return out
    out[:, 0] = project(scene["camera"], states[:, :3])
    for k, name in ((1, scene["place"]), (2, scene["item"])):
        if name is None:
            continue
        body = scene["bodies"].index(name)
        poses = states[:, 8 + 7 * body : 15 + 7 * body].astype(np.float64)
        centres = [rotation_matrix(p[3:]) @ np.asarray(scene["centres"][body]) + p[:3] for p in poses]
        out[:, k] = project(scene["camera"], np.array(centres))
    return out
