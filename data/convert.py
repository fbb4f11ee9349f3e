"""Data sets from elsewhere into the rollout store: ``python -m data convert``.

Workers share the data set's parts, and a run that was stopped continues with those that are not there yet, on as many
workers as it likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.derive import (
    OnError,
    Setting,
    Shards,
    finalize_and_report,
    make_setting,
    record_of,
    require_apart,
    require_new,
    settle,
    tell,
)
from data.images import encode_images
from data.parallel import chunks, run_groups
from data.parts import DataError, Part, Problem
from data.sources import Source, SourceName
from spvla.actions import ActionSpace
from spvla.cli import PositiveInt
from spvla.errors import InputError
from spvla.files import locked, read_json
from spvla.store.scale import with_scale


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
    with locked(output):
        _convert(output, setting, found, statistics, conventions, on_error, workers)


def _convert(
    output: Path,
    setting: Setting,
    found: Source,
    statistics: Path | None,
    conventions: str | None,
    on_error: OnError,
    workers: int,
) -> None:
    """Write the store of ``found``, which nobody else writes to meanwhile; see :func:`convert`."""
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
    finalize_and_report(output, shards, found.parts)


def published_space(space: ActionSpace, file: Path, name: str | None = None) -> ActionSpace:
    """``space`` with the scale that a file of published statistics gives the data set ``name``, or the space's own name.

    An entry without ``mask`` is read as one whose gripper is not scaled, and this is said.

    Raises:
        InputError: no such file or entry, or one of another number of dimensions.
    """
    try:
        table = read_json(file)
        name = name if name in table else space.name
        entry = table[name]["action"]
        q01, q99, low, high = (list(map(float, entry[k])) for k in ("q01", "q99", "min", "max"))
    except KeyError as error:
        told = f"no usable entry for {name!r}: {error} is missing"
        known = [k for k, v in table.items() if isinstance(v, dict) and "action" in v]
        if name not in table and known:
            told += f"; available: {', '.join(known)}; choose this data set's entry with --conventions"
        raise InputError(f"{file}: {told}") from None
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not readable statistics ({error})") from None
    if not len(q01) == len(q99) == len(low) == len(high) == space.dim:
        raise InputError(f"{file}: {name!r} has actions of {len(q01)} dimensions, but the conventions say {space.dim}")
    mask = entry.get("mask")
    if mask is None:
        print(f"note: {file}: {name} has no mask; its gripper {list(space.gripper)} is taken as not scaled")
        mask = [d not in space.gripper for d in range(space.dim)]
    for d in range(space.dim):
        if not mask[d]:
            q01[d], q99[d] = low[d], high[d]
    return with_scale(space, q01, q99, low, high, fixed=[d for d in range(space.dim) if not mask[d]])
