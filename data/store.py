"""The rollout store as training reads it: flat arrays, derived once, memory-mapped.

A finalised store (see ``spvla.store``) is turned into ``.npy`` files in the user's cache directory, keyed by a
fingerprint of the store, so that every later run maps them without decoding Parquet again and without holding them in
anonymous memory.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.files import building, open_array, parse_object, read_json
from spvla.history import UNSEEN, Source
from spvla.store import read_action_space, read_episode_table
from spvla.store.columns import read_ages, read_parquet, read_propensities, read_sources, read_steps, read_vectors

CACHE_VERSION = 1
FLOAT_FIELDS = {
    "actions": "action",
    "states": "observation.state",
    "vla_actions": "vla_action",
    "vla_confidence": "vla_confidence",
    "vla_features": "vla_features",
    "vla_plans": "vla_plan",
    "vla_again": "vla_again",
}


def cache_directory() -> Path:
    """Where derived arrays live: ``$SPVLA_CACHE``, else ``spvla`` in the user's cache directory."""
    root = os.environ.get("SPVLA_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spvla"


@dataclass(frozen=True)
class EpisodeInfo:
    """What the store says of one episode."""

    start: int
    length: int
    instruction: str
    success: bool | None
    metadata: dict[str, Any]


class RolloutStore:
    """A finalised store as memory-mapped arrays over all N frames, episodes one after the other.

    Args:
        folder: the store.

    Attributes:
        space: its action space.
        episodes: one :class:`EpisodeInfo` each.
        arrays: ``actions`` and ``targets`` (the teacher's, else the executed action), both normalised, (N, D); ``states``
            (N, S); ``sources`` uint8 (N,); ``start`` int64 (N,), first frame of the frame's episode; ``end``, one past its
            last; ``last_vla`` int64 (N,), the frame of the episode that the VLA had last answered about: the last earlier one
            in which it acted, an older one where its answers come late, -1 before the first; where the store has them
            ``vla_confidence`` (N, D), ``vla_features`` (N, F), ``vla_plans`` (N, P, D), the teacher's whole plan at each
            visited state, and ``vla_again`` (N, D), the first action of a second one, both normalised, NaN where there is none;
            ``propensities`` float32 (N,), the probability with which a step was to get the teacher's action.

    Raises:
        InputError: naming file, field, episode and step for a NaN in what was executed, and for damaged files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.space: ActionSpace = read_action_space(self.folder)
        self.episodes = [
            EpisodeInfo(
                int(row["dataset_from_index"]),
                int(row["length"]),
                row["tasks"][0],
                row["success"],
                parse_object(row["metadata"], "metadata"),
            )
            for row in read_episode_table(self.folder)
        ]
        cache = cache_directory() / f"store-{self.fingerprint}"
        if not (cache / "done").exists():
            self._derive(cache)
        # Plain arrays over the mapped files: indexing numpy's memmap class costs more than the rows that are read.
        self.arrays: dict[str, NDArray[Any]] = {
            p.stem: np.load(p, mmap_mode="r").view(np.ndarray) for p in sorted(cache.glob("*.npy"))
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the store holds and of the cache's version: names and sizes of the data files, and all of meta,
        which has every episode's job and the statistics of every feature. The same for a copy, or when finalised again."""
        digest = hashlib.sha256(str(CACHE_VERSION).encode())
        for path in sorted(p for kind in ("data", "meta") for p in (self.folder / kind).rglob("*") if p.is_file()):
            name = path.relative_to(self.folder)
            digest.update(f"{name} {path.stat().st_size} ".encode())
            if name.parts[0] == "meta":
                digest.update(path.read_bytes())
        return digest.hexdigest()[:24]

    @property
    def state_names(self) -> tuple[str, ...]:
        """What the entries of the state are called, where ``meta/info.json`` says; else nothing."""
        info = read_json(self.folder / "meta" / "info.json")
        names = (info.get("features", {}).get("observation.state") or {}).get("names")
        if not isinstance(names, list) or len(names) != self.arrays["states"].shape[1]:
            return ()
        return tuple(names) if all(isinstance(n, str) for n in names) else ()

    @property
    def frames(self) -> int:
        """Number of frames N."""
        return len(self.arrays["sources"])

    @property
    def labelled_by_teacher(self) -> bool:
        """Whether targets are a teacher's labels (else: distilled from demonstrations)."""
        return bool(self.arrays["labelled"][0])

    def unlabelled(self, frames: slice = slice(None)) -> bool:
        """Whether somebody acted in ``frames`` without a fresh look where the teacher did not say what it would have done."""
        return bool(self._missing(frames).any())

    def propensities(self, frames: slice) -> NDArray[np.float32] | None:
        """Probability with which each of ``frames`` was to get the teacher's action, (T,). None where a generated one lacks it
        for another reason than the coin, and where the store does not say."""
        if "propensities" not in self.arrays:
            return None
        propensities: NDArray[np.float32] = self.arrays["propensities"][frames]
        return None if (self._missing(frames) & (propensities >= 1)).any() else propensities

    def _missing(self, frames: slice) -> NDArray[np.bool_]:
        unseen = np.isin(self.arrays["sources"][frames], UNSEEN)
        missing: NDArray[np.bool_] = unseen & np.isnan(self.arrays["targets"][frames]).any(1)
        return missing

    def _derive(self, cache: Path) -> None:
        """Write the arrays into ``cache``, whole or not at all."""
        with building(cache) as temporary:
            self._write_arrays(temporary)
            try:
                temporary.rename(cache)
            except OSError:
                if not (cache / "done").exists():  # else another process derived the same store first
                    raise

    def _write_arrays(self, folder: Path) -> None:
        """Write the arrays, one data file of the store in memory at a time."""
        starts = np.array([e.start for e in self.episodes], np.int64)
        lengths = np.array([e.length for e in self.episodes], np.int64)
        total = int(lengths.sum())
        arrays: dict[str, NDArray[Any]] = {}

        def part(name: str, like: NDArray[Any]) -> NDArray[Any]:
            """The array ``name`` on disk, and in it the frames of the file at hand."""
            if name not in arrays:
                shape = (total, *like.shape[1:])
                arrays[name] = open_array(folder / f"{name}.npy", like.dtype, shape)
            return arrays[name][first : first + len(like)]

        first, labelled = 0, False
        widths: dict[str, int] = {}
        for path in sorted((self.folder / "data").glob("*/*.parquet")):
            table = read_parquet(path, [*FLOAT_FIELDS.values(), "action.source", "vla_age", "vla_propensity", "frame_index"])
            if first + table.num_rows > total:
                raise InputError(f"{self.folder}: data holds more frames than meta/episodes claims ({total})")
            raw: dict[str, NDArray[np.float32]] = {}
            for name, column in FLOAT_FIELDS.items():
                if column in table.column_names or name == "actions":
                    raw[name] = read_vectors(table, column, str(path))
                    self._require_finite(raw[name], column, first, allow_missing=name.startswith("vla_"))
            for name in raw.keys() & {"actions", "vla_actions", "vla_plans", "vla_again"}:
                width = raw[name].shape[1]
                if width % self.space.dim if name == "vla_plans" else width != self.space.dim:
                    raise InputError(f"{path}: {FLOAT_FIELDS[name]} has {width} entries; the action space has {self.space.dim}")
            found = {name: value.shape[1] for name, value in raw.items()}
            widths = widths or found
            if found != widths:
                raise InputError(f"{path}: features are {found}, but the first data file has {widths}")
            labelled = "vla_actions" in raw
            actions = self.space.normalize(raw["actions"])
            sources = read_sources(table, str(path))
            inside = (starts >= first) & (starts < first + table.num_rows)  # a file holds whole episodes
            start = np.repeat(starts[inside], lengths[inside])
            steps = np.arange(first, first + table.num_rows)
            of_episode = read_steps(table, str(path))
            if len(start) != len(steps) or not np.array_equal(steps - start, of_episode):
                raise InputError(f"{path}: frame_index does not agree with the episodes of meta/episodes")
            new: dict[str, NDArray[Any]] = {
                "actions": actions,
                "targets": self.space.normalize(raw["vla_actions"]) if labelled else actions,
                "states": raw.get("states", np.zeros((len(actions), 0), np.float32)),
                "sources": sources,
                "start": start,
                "end": start + np.repeat(lengths[inside], lengths[inside]),
                "last_vla": last_vla_frame(sources, start - first),
            }
            if (ages := read_ages(table, of_episode, str(path))) is not None:  # answers that came late
                new["last_vla"] = np.where(ages > 0, steps - first - ages, -1)
            if (propensities := read_propensities(table, str(path))) is not None:
                new["propensities"] = propensities
            new["last_vla"] += np.where(new["last_vla"] >= 0, first, 0)
            new |= {k: raw[k] for k in ("vla_confidence", "vla_features") if k in raw}
            for name in raw.keys() & {"vla_plans", "vla_again"}:
                shape = (len(actions), -1, self.space.dim) if name == "vla_plans" else actions.shape
                new[name] = self.space.normalize(raw[name].reshape(shape))
            for name, value in new.items():
                part(name, value)[:] = value
            first += table.num_rows
        if first != total:
            raise InputError(f"{self.folder}: data holds {first} frames, meta/episodes claims {total}")
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        np.save(folder / "labelled.npy", np.array([labelled]))
        (folder / "done").touch()

    def _require_finite(self, values: NDArray[np.float32], column: str, first: int, allow_missing: bool) -> None:
        bad = ~np.isfinite(values).all(1)
        if allow_missing:  # NaN rows say that the teacher was not asked; half a row, or infinity, is damage
            bad &= ~np.isnan(values).all(1)
        if bad.any():
            frame = first + int(bad.argmax())
            i = next(i for i, e in enumerate(self.episodes) if e.start <= frame < e.start + e.length)
            step = frame - self.episodes[i].start
            raise InputError(f"{self.folder}: {column} contains NaN or infinity in episode {i} at step {step}")


def last_vla_frame(sources: NDArray[np.uint8], start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Per frame, the last earlier frame of its episode in which the VLA acted, or -1: (N,) from (N,)."""
    frames = np.arange(len(sources), dtype=np.int64)
    acted = np.where(sources == Source.VLA, frames, -1)
    before = np.concatenate([[-1], np.maximum.accumulate(acted)[:-1]]) if len(frames) else acted
    return np.where(before >= start, before, -1)
