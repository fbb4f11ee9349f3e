"""A rollout store that is derived from a data set: what :mod:`data.convert` and :mod:`data.relabel` share.

Every part of the data set becomes one shard, written whole or not at all; what could not be used is kept beside it, with the
size of what was read and when the files with problems were last changed. A run that was stopped continues with the parts
that are not there yet.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.evidence import contradictions
from data.identity import number_of, place_of, read_note
from data.jobs import parse_range
from data.parts import Part, Problem
from data.sources import Source, SourceName, open_source
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.files import read_json, write_json
from spvla.store import Episode, RolloutWriter, finalize, read_action_space
from spvla.store.shards import shard_info

OnError = Literal["skip", "stop"]
BEYOND = 0.75  # of a dimension's bounds: actions further out are of another unit or sign
MOST_TOLD = 20  # notes or problems of a kind, on the screen


@dataclass(frozen=True)
class Setting:
    """What determines a store made from a data set, beside the data itself.

    Args:
        source, path, conventions, split, camera: see :func:`data.sources.open_source`.
        images: keep the camera's images.
        episodes: keep only the episodes of these numbers.
        label: what else went into it: the policy that labelled it.
        apart: tells the data set apart, in job ids, from another one whose folder has the same name (see
            :func:`settle`).
    """

    source: SourceName
    path: str
    conventions: str | None = None
    split: str = "train"
    camera: str | None = None
    images: bool = False
    episodes: tuple[int, ...] | None = None
    label: str = ""
    apart: str = ""

    def open(self) -> Source:
        """The data set."""
        return open_source(self.source, self.path, self.conventions, self.split, self.camera)

    @property
    def tag(self) -> str:
        """A short hash that tells settings apart in job ids; a conventions file counts by its content."""
        values = {k: v for k, v in asdict(self).items() if k not in ("path", "split", "apart")}
        if self.conventions is not None and Path(self.conventions).is_file():
            values["conventions"] = Path(self.conventions).read_text()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    def job(self, part: Part) -> str:
        """The shard that a part becomes."""
        return f"{part.id}{self.apart}-{self.tag}"

    def read(self, source: Source, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """The episodes of a part that the store takes, and the problems of those; a problem of a whole file counts for all."""
        for found in source.episodes(part, images):
            if isinstance(found, Episode):
                number = number_of(found.metadata)
            else:
                number = None if found.record is None else part.start + found.record - part.first
            if self.episodes is None or number in self.episodes or (number is None and isinstance(found, Problem)):
                yield found


class Shards:
    """The shards of one setting in a store: which are there, and what was left out of them.

    Args:
        output: the store.
        setting: what is written into it.
        space: its action space.
        policy: who labelled it.
        measured: see :class:`~spvla.store.RolloutWriter`.
    """

    def __init__(self, output: Path, setting: Setting, space: ActionSpace, policy: str = "", measured: bool = False) -> None:
        self.setting = setting
        self.writer = RolloutWriter(output, space, policy, measured)

    def note(self, part: Part) -> Path:
        """Where it is kept what a part was made from, and what was left out of it."""
        return self.writer.shard_path(self.setting.job(part)).with_suffix(".json")

    def finished(self, part: Part) -> bool:
        """Whether a part is done: its note is there, and its shard, or it is known to hold nothing of use.

        Raises:
            InputError: it was made from another file than the one that is there now.
        """
        note, shard = self.note(part), self.writer.shard_path(self.setting.job(part))
        if not note.exists():
            return False
        values = read_note(note)
        told = None
        if values["size"] != part.size:
            told = f"{part.file} (and what follows) had {values['size']} bytes, now it has {part.size}"
        elif values["content"] not in (None, part.content):
            told = f"{part.file} (or what follows) has other content now"
        elif changed := [f for f, time in _changed(values["problems"]).items() if time not in (None, values["changed"].get(f))]:
            told = f"{changed[0]} had a problem and has changed since"
        if told is not None:
            raise InputError(
                f"{shard}: is out of date: {told}; delete {note.name} there to make it again, or choose another --output"
            )
        return shard.exists() or values["episodes"] == 0

    def write(self, part: Part, episodes: Sequence[Episode], problems: Sequence[Problem]) -> None:
        """Finish a part: first what was left out, then the shard."""
        note = self.note(part)
        told = [p.to_dict() for p in problems]
        values = {"size": part.size, "episodes": len(episodes), "problems": told, "changed": _changed(told)}
        values |= {"path": place_of(self.setting.path), "part": part.id, "content": part.content, "apart": self.setting.apart}
        write_json(note, values, indent=1)
        if episodes:
            self.writer.write(self.setting.job(part), episodes)
        else:
            self.writer.shard_path(self.setting.job(part)).unlink(missing_ok=True)

    def problems(self, parts: Sequence[Part]) -> list[Problem]:
        """What was left out of finished parts."""
        notes = [self.note(part) for part in parts]
        return [Problem(**p) for note in notes if note.exists() for p in read_note(note)["problems"]]


def _changed(problems: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """When the files that have ``problems`` were last changed, nanoseconds; None for one that is not there."""
    files = dict.fromkeys(p["file"] for p in problems)
    return {f: Path(f).stat().st_mtime_ns if Path(f).exists() else None for f in files}


def make_setting(
    source: SourceName,
    path: Path,
    conventions: str | None,
    split: str,
    camera: str | None,
    images: bool,
    episodes: str | None,
    label: Mapping[str, Any] | None = None,
) -> Setting:
    """A :class:`Setting` from a command's options."""
    numbers = None if episodes is None else tuple(parse_range(episodes, "episodes"))
    text = json.dumps(label, sort_keys=True, default=str) if label else ""
    return Setting(source, str(path), conventions, split, camera, images, numbers, text)


def settle(output: Path, setting: Setting, source: Source) -> Setting:
    """``setting`` with what tells the data set apart in the store from another one whose folder has the same name. A data set
    that its publisher named needs none, and one that was moved is known by its data."""
    if source.named:
        return setting
    contents = {part.id: part.content for part in source.parts}
    notes = [read_note(note) for note in sorted((output / ".shards").glob("*.json"))]
    namesakes = [n for n in notes if n["part"] in contents]
    for n in namesakes:
        if n["path"] == place_of(setting.path) or n["content"] == contents[n["part"]]:
            return replace(setting, apart=n["apart"])
    place = hashlib.sha256(place_of(setting.path).encode()).hexdigest()[:6]
    return replace(setting, apart=f"-{place}") if namesakes else setting


def require_new(shards: Shards, source: Source) -> None:
    """Raise :class:`InputError`, code ``episode-twice``, if the store would hold episodes of ``source`` twice: those that are
    there were made with other options, or read from a copy or another state of it elsewhere."""
    setting = shards.setting
    mine = {setting.job(part) for part in source.parts}
    wanted = {f"{part.id}{setting.apart}" for part in source.parts}
    chosen = source.contents.keys() if setting.episodes is None else set(setting.episodes)
    contents = {content for number, content in source.contents.items() if number in chosen}
    for shard in sorted(shards.writer.shards.glob("*.parquet")):
        if shard.stem in mine:
            continue
        there = [e["metadata"] for e in shard_info(shard)["episodes"]]
        how = "made with other options"
        if shard.stem.rpartition("-")[0] in wanted:
            twice = [m for m in there if setting.episodes is None or number_of(m) in setting.episodes]
        else:
            twice = [m for m in there if {(m.get("content"),), (m.get("content"), m.get("part"))} & contents]
            how = f"read from {read_note(shard.with_suffix('.json')).get('path')}"
        if twice:
            raise _twice(shard, f"holds {len(twice)} of these episodes already, {how}")
    _require_same_place(shards, source)


def _require_same_place(shards: Shards, source: Source) -> None:
    """The same for shards of the very same jobs. A stopped run goes on from a copy of the data set, a finished one does not."""
    place = place_of(shards.setting.path)
    notes = {part: read_note(shards.note(part)) for part in source.parts if shards.note(part).exists()}
    elsewhere = {part: n for part, n in notes.items() if n["path"] not in (None, place)}
    for part, n in elsewhere.items():
        if source.named and n["content"] != part.content:
            told = f"already holds another version of these episodes of {source.name}, read from {n['path']}"
            raise _twice(shards.note(part), told)
    if len(elsewhere) == len(source.parts) and all(map(shards.finished, source.parts)):
        there = next(n["path"] for n in elsewhere.values())
        if Path(there).exists():
            raise _twice(shards.writer.folder, f"holds all episodes of {place} already, read from {there}")


def _twice(where: Path, told: str) -> InputError:
    message = f"{where}: {told}; choose another --output or other --episodes"
    return InputError(message, code="episode-twice", field=str(where))


def require_one(command: str, data: Path | None, source: str | None, path: Path | None) -> None:
    """Raise :class:`InputError` unless ``command`` was given either a rollout store or a source and its path."""
    if (data is None) == (source is None) or (source is None) != (path is None):
        raise InputError(f"{command}: give either data (a rollout store) or source and path")


def require_apart(data: Path, output: Path) -> None:
    """Raise :class:`InputError` if a store is to be made in the folder of the data set that it is made from."""
    if data.resolve() == output.resolve():
        raise InputError(f"{output}: --output is the data set itself, which would be replaced; name another folder")


def no_episode(setting: Setting, problems: Sequence[Problem]) -> InputError:
    """The error for a data set without a usable episode, with the reason."""
    reason = ""
    if problems:
        reason = f"; the first problem: {problems[0]}"
    elif setting.episodes is not None:
        reason = f"; --episodes selects none of them ({min(setting.episodes)} to {max(setting.episodes)})"
    return InputError(f"{setting.path}: no episode could be used{reason}")


def tell(what: str, lines: Sequence[Any]) -> None:
    """Print lines that begin with ``what``, the first :data:`MOST_TOLD` of them."""
    for line in lines[:MOST_TOLD]:
        print(f"{what}: {line}")
    if len(lines) > MOST_TOLD:
        print(f"{what}: {len(lines) - MOST_TOLD} more")


def finalize_and_report(output: Path, shards: Shards, parts: Sequence[Part]) -> None:
    """Finalise a store and print what it holds and what was left out."""
    problems = shards.problems(parts)
    if not any(shards.writer.finished(shards.setting.job(part)) for part in parts):
        tell("left out", problems)
        raise no_episode(shards.setting, problems)
    finalize(output)
    about = read_json(output / "meta" / "spvla.json")
    problems += [Problem(**p) for p in about.get("left_out", [])]  # what only all the episodes together show
    tell("left out", problems)
    write_json(output / "problems.json", [p.to_dict() for p in problems], indent=1)
    info = read_json(output / "meta" / "info.json")
    tell("note", contradictions(output))
    if not shards.writer.measured:
        tell("note", beyond_scale(output))
    reasons = Counter(p.reason.split("(")[0].strip() for p in problems)
    told = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
    print(
        f"{output}: {info['total_episodes']} episodes, {info['total_frames']} steps; left out {len(problems)} {told}".rstrip()
    )


def beyond_scale(store: Path) -> list[str]:
    """What contradicts the scale that a store was given from outside: a line per dimension whose actions (q01 to q99) leave
    its bounds by most of their width, as they do in another unit or with another gripper."""
    space, found = read_action_space(store), read_json(store / "meta" / "stats.json")["action"]
    out = []
    for d, (low, high) in enumerate(zip(space.low, space.high, strict=True)):
        q01, q99 = found["q01"][d], found["q99"][d]
        if max(low - q01, q99 - high) > BEYOND * max(high - low, 1e-6):
            told = f"dimension {d} ({space.role(d)}) goes from {q01:.4g} to {q99:.4g}"
            out.append(f"{store}: {told}, but its scale is for {low:.4g} to {high:.4g}; do units and signs agree?")
    return out


def record_of(episode: Episode) -> int | None:
    """The number by which the source's file knows an episode."""
    return episode.metadata.get("record", episode.metadata.get("number"))
