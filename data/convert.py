"""Data sets from elsewhere into the rollout store: ``python -m data convert``; what ``relabel`` shares with it.

Every part of the source becomes one shard, written whole or not at all; what could not be used is kept beside it, with the
size of what was read and when the files with problems were last changed. Workers share the parts, and a run that was stopped
continues with those that are not there yet, on as many workers as it likes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data.evidence import contradictions
from data.identity import number_of, place_of, read_note, require_new, settle
from data.images import encode_images
from data.parallel import chunks, run_groups
from data.parts import DataError, Part, Problem
from data.sources import Source, SourceName, open_source
from spvla.actions import ActionSpace
from spvla.cli import PositiveInt
from spvla.errors import InputError
from spvla.files import write_text
from spvla.store import Episode, RolloutWriter, finalize, read_action_space
from spvla.store.scale import with_scale

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
            :func:`data.identity.settle`).
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
            told = f"{part.file} (or what follows) held something else"
        elif changed := [f for f, time in _changed(values["problems"]).items() if time not in (None, values["changed"].get(f))]:
            told = f"{changed[0]} had a problem, it was changed since"
        if told is not None:
            raise InputError(
                f"{shard}: was made when {told}; delete {note.name} there to make it anew, or name another --output"
            )
        return shard.exists() or values["episodes"] == 0

    def write(self, part: Part, episodes: Sequence[Episode], problems: Sequence[Problem]) -> None:
        """Finish a part: first what was left out, then the shard."""
        note = self.note(part)
        told = [p.to_dict() for p in problems]
        values = {"size": part.size, "episodes": len(episodes), "problems": told, "changed": _changed(told)}
        values |= {"path": place_of(self.setting.path), "part": part.id, "content": part.content, "apart": self.setting.apart}
        write_text(note, json.dumps(values, indent=1) + "\n")
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
    from data.collect import parse_range

    numbers = None if episodes is None else tuple(parse_range(episodes, "episodes"))
    text = json.dumps(label, sort_keys=True, default=str) if label else ""
    return Setting(source, str(path), conventions, split, camera, images, numbers, text)


def require_one(command: str, data: Path | None, source: str | None, path: Path | None) -> None:
    """Raise :class:`InputError` unless ``command`` was given either a rollout store or a source and its path."""
    if (data is None) == (source is None) or (source is None) != (path is None):
        raise InputError(f"{command}: name either data (a rollout store) or source and path")


def require_apart(data: Path, output: Path) -> None:
    """Raise :class:`InputError` if a store is to be made in the folder of the data set that it is made from."""
    if data.resolve() == output.resolve():
        raise InputError(f"{output}: --output is the data set itself, which would be replaced; name another folder")


def no_episode(setting: Setting, problems: Sequence[Problem]) -> InputError:
    """Says that nothing of a data set could be used, and why."""
    reason = ""
    if problems:
        reason = f"; the first problem: {problems[0]}"
    elif setting.episodes is not None:
        reason = f"; none has a number that --episodes names ({min(setting.episodes)} to {max(setting.episodes)})"
    return InputError(f"{setting.path}: no episode could be used{reason}")


def tell(what: str, lines: Sequence[Any]) -> None:
    """Print lines that begin with ``what``, the first :data:`MOST_TOLD` of them."""
    for line in lines[:MOST_TOLD]:
        print(f"{what}: {line}")
    if len(lines) > MOST_TOLD:
        print(f"{what}: {len(lines) - MOST_TOLD} more")


def tell_end(output: Path, shards: Shards, parts: Sequence[Part]) -> None:
    """Finalise a store and print what it holds and what was left out."""
    problems = shards.problems(parts)
    if not any(shards.writer.finished(shards.setting.job(part)) for part in parts):
        tell("left out", problems)
        raise no_episode(shards.setting, problems)
    finalize(output)
    about = json.loads((output / "meta" / "spvla.json").read_text())
    problems += [Problem(**p) for p in about.get("left_out", [])]  # what only all the episodes together show
    tell("left out", problems)
    write_text(output / "problems.json", json.dumps([p.to_dict() for p in problems], indent=1) + "\n")
    info = json.loads((output / "meta" / "info.json").read_text())
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
    space, found = read_action_space(store), json.loads((store / "meta" / "stats.json").read_text())["action"]
    out = []
    for d, (low, high) in enumerate(zip(space.low, space.high, strict=True)):
        q01, q99 = found["q01"][d], found["q99"][d]
        if max(low - q01, q99 - high) > BEYOND * max(high - low, 1e-6):
            told = f"dimension {d} ({space.role(d)}) goes from {q01:.4g} to {q99:.4g}"
            out.append(f"{store}: {told}, its scale is for {low:.4g} to {high:.4g}; do units and signs agree?")
    return out


def record_of(episode: Episode) -> int | None:
    """The number by which the source's file knows an episode."""
    return episode.metadata.get("record", episode.metadata.get("number"))


@dataclass(frozen=True)
class Group:
    """Parts for one worker process."""

    setting: Setting
    parts: tuple[Part, ...]
    output: str
    space: ActionSpace
    measured: bool
    on_error: OnError


def _convert_group(group: Group) -> Iterator[tuple[int, int]]:
    source = group.setting.open()
    shards = Shards(Path(group.output), group.setting, group.space, measured=group.measured)
    for part in group.parts:
        episodes, problems = [], []
        for found in group.setting.read(source, part, group.setting.images):
            if isinstance(found, Problem):
                problem = found
            elif (wrong := encode_images(found, source.image_shape)) is not None:
                problem = Problem(part.file, wrong, record_of(found), source.camera)
            else:
                episodes.append(found)
                continue
            if group.on_error == "stop":
                raise DataError(problem)
            problems.append(problem)
        shards.write(part, episodes, problems)
        yield part.count, sum(len(e) for e in episodes)


def convert(
    source: SourceName,
    path: Path,
    output: Path,
    conventions: str | None = None,
    split: str = "train",
    camera: str | None = None,
    images: bool = False,
    episodes: str | None = None,
    statistics: Path | None = None,
    on_error: OnError = "stop",
    workers: PositiveInt = 1,
) -> None:
    """Convert an Open-X RLDS or LeRobot data set into a rollout store.

    Call it again with the same options to continue after an interruption, or with others to extend the store.

    Args:
        source: what the data set is: rlds or lerobot.
        path: its folder.
        output: rollout store to make or extend.
        conventions: a name in configs/openx/datasets.yaml, or a YAML file with the fields of one entry; by the data set's
            own name if omitted.
        split: RLDS split, or all.
        camera: image feature in place of the conventions' one.
        images: store the camera's images.
        episodes: keep only these numbers, such as 0-63 or 0,5,10.
        statistics: JSON file of published statistics, by data set; the action space takes its scale from it, and from the
            converted actions if omitted.
        on_error: what to do about a record that cannot be used: stop, or skip it and say so.
        workers: processes.
    """
    require_apart(path, output)
    setting = make_setting(source, path, conventions, split, camera, images, episodes)
    found = setting.open()
    if images:
        found.cameras.require()
    tell("note", found.notes)
    setting = settle(output, setting, found)
    space = found.space if statistics is None else published_space(found.space, statistics, conventions)
    measured = statistics is None
    shards = Shards(output, setting, space, measured=measured)
    require_new(shards, found)
    waiting = [part for part in found.parts if not shards.finished(part)]
    groups = [Group(setting, tuple(p), str(output), space, measured, on_error) for p in chunks(waiting, workers)]
    from tqdm import tqdm

    total, steps = sum(p.count for p in found.parts), 0
    done = total - sum(p.count for p in waiting)
    with tqdm(total=total, initial=done, desc=f"convert {found.name}", unit="episode") as bar:
        results = _convert_group(groups[0]) if len(groups) == 1 else run_groups(_convert_group, groups, workers)
        for count, added in results:
            steps += added
            bar.update(count)
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix(steps=steps, per_second=f"{steps / elapsed:.0f}")
    tell_end(output, shards, found.parts)


def published_space(space: ActionSpace, file: Path, name: str | None = None) -> ActionSpace:
    """``space`` with the scale that a file of published statistics gives the data set ``name``, or the space's own name.

    An entry without ``mask`` is read as one whose gripper is not scaled, and this is said.

    Raises:
        InputError: no such file or entry, or one of another number of dimensions.
    """
    try:
        table = json.loads(file.read_bytes())
        name = name if name in table else space.name
        entry = table[name]["action"]
        q01, q99, low, high = (list(map(float, entry[k])) for k in ("q01", "q99", "min", "max"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except KeyError as error:
        told = f"no usable entry for {name!r}: {error} is missing"
        known = [k for k, v in table.items() if isinstance(v, dict) and "action" in v]
        if name not in table and known:
            told += f"; there are: {', '.join(known)}; say with --conventions which entry is this data set's"
        raise InputError(f"{file}: {told}") from None
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not readable statistics ({error})") from None
    if not len(q01) == len(q99) == len(low) == len(high) == space.dim:
        raise InputError(f"{file}: {name!r} has actions of {len(q01)} dimensions, the conventions say {space.dim}")
    mask = entry.get("mask")
    if mask is None:
        print(f"note: {file}: {name} has no mask; its gripper {list(space.gripper)} is taken as not scaled")
        mask = [d not in space.gripper for d in range(space.dim)]
    for d in range(space.dim):
        if not mask[d]:
            q01[d], q99[d] = low[d], high[d]
    return with_scale(space, q01, q99, low, high, fixed=[d for d in range(space.dim) if not mask[d]])
