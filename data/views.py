"""What a gate's eyes see of a store's frames: derived once, in the user's cache directory, and memory-mapped.

What they are to notice is a scene that has changed since the VLA was last asked. Two kinds of windows show that in training:
recordings in which something was moved (``data collect --nudge``), and windows whose earlier frame is that of another episode.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.envs import recorded_by
from data.images import is_upside_down
from data.store import RolloutStore, cache_directory
from spvla.errors import InputError
from spvla.files import building, open_array
from spvla.gates.eyes import EyesConfig
from spvla.observation import MAIN
from spvla.store.columns import read_column, read_parquet
from spvla.vlas.conventions import decode_image

CACHE_VERSION = 1
PREFIX = "observation.images."


def views(store: RolloutStore, eyes: EyesConfig) -> NDArray[np.uint8]:
    """What ``eyes`` see at each of a store's N frames, uint8 (N, S, S, 3).

    Raises:
        InputError: the store has no images of their camera (code ``missing-feature``), or a damaged one.
    """
    column = PREFIX + _camera(store, eyes)
    key = repr((CACHE_VERSION, store.fingerprint, column, asdict(eyes)))
    cache = cache_directory() / f"views-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    if not (cache / "views.npy").exists():
        with building(cache) as temporary:
            _derive(store, eyes, column, temporary / "views.npy")
            try:
                temporary.rename(cache)
            except OSError:
                if not (cache / "views.npy").exists():  # else another process made the same first
                    raise
    return np.load(cache / "views.npy", mmap_mode="r").view(np.ndarray)


@dataclass(frozen=True)
class Scenes:
    """What eyes see of a store, and where its scenes change.

    Args:
        views: what they see at each frame, uint8 (N, S, S, 3).
        moved: the first frame of each frame's episode after something was moved, (N,); -1 where nothing was.
        episode: number of each frame's episode, (N,).
        start, length: first frame and frames of each episode, (E,).
        others: per episode, the other ones with its instruction.
    """

    views: NDArray[np.uint8]
    moved: NDArray[np.int64]
    episode: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    others: list[NDArray[np.int64]]

    @classmethod
    def of(cls, store: RolloutStore, eyes: EyesConfig) -> Scenes:
        """Those of a store. Errors as for :func:`views`."""
        start, length = (np.array([getattr(e, name) for e in store.episodes]) for name in ("start", "length"))
        steps = [(e.metadata.get("nudge") or {}).get("step") for e in store.episodes]
        moved = np.array([-1 if step is None else e.start + step for e, step in zip(store.episodes, steps, strict=True)])
        names = np.array([e.instruction for e in store.episodes])
        others = [np.flatnonzero((names == name) & (np.arange(len(names)) != i)) for i, name in enumerate(names)]
        episode = np.repeat(np.arange(len(start)), length)
        return cls(views(store, eyes), moved[episode], episode, start, length, others)

    def changed(self, last: NDArray[np.int64], frames: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether something was moved after frames ``last`` (B,) and before ``frames`` (B,), or just before them."""
        moved = self.moved[frames]
        return (last < moved) & (moved <= frames)

    def elsewhere(self, frames: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each of ``frames`` (B,), the same step of another episode with its instruction, chosen by ``draws`` (B,); the
        frame itself where the draw is 0 or there is no other."""
        out = frames.copy()
        for k in np.flatnonzero(draws):
            episode = self.episode[frames[k]]
            if len(others := self.others[episode]):
                other = others[draws[k] % len(others)]
                out[k] = self.start[other] + min(frames[k] - self.start[episode], self.length[other] - 1)
        return out


def _files(store: RolloutStore) -> list[Path]:
    return sorted((store.folder / "data").glob("*/*.parquet"))


def _camera(store: RolloutStore, eyes: EyesConfig) -> str:
    """What the store calls the camera of ``eyes``."""
    names = [n.removeprefix(PREFIX) for n in pq.read_schema(_files(store)[0]).names if n.startswith(PREFIX)]
    if not names:
        raise InputError(
            f"{store.folder}: holds no images, which a gate with eyes learns from; collect with --images true, or leave out "
            "--gate.eyes",
            code="missing-feature",
            field="images",
        )
    if eyes.camera in names:
        return eyes.camera
    if eyes.camera == MAIN:
        known = recorded_by(store.episodes[0].metadata, store.space.name)
        return known.camera if known is not None and known.camera in names else names[0]
    raise InputError(
        f"{store.folder}: has no camera {eyes.camera!r}, which the gate's eyes see; available: {', '.join(names)}",
        code="missing-feature",
        field="images",
    )


def _derive(store: RolloutStore, eyes: EyesConfig, column: str, path: Path) -> None:
    """Write the views, one data file of the store in memory at a time."""
    turned = np.repeat([is_upside_down(e.metadata) for e in store.episodes], [e.length for e in store.episodes])
    out, frame = open_array(path, np.dtype(np.uint8), (store.frames, eyes.size, eyes.size, 3)), 0
    for file in _files(store):
        found = read_column(read_parquet(file, [column]), column, str(file), pa.types.is_struct, "images")
        for encoded in found.combine_chunks().field("bytes"):
            try:
                image = decode_image(encoded.as_py())
            except InputError as error:
                raise InputError(f"{file}: the image of frame {frame} {error}", code=error.code, field=column) from None
            out[frame] = eyes.view(np.ascontiguousarray(image[::-1, ::-1]) if turned[frame] else image)
            frame += 1
    out.flush()  # type: ignore[attr-defined]
