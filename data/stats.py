"""Statistics of actions and states in one streaming pass, in the form OpenVLA publishes them: ``python -m data stats``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from data.derive import OnError, Setting, make_setting, no_episode, require_one, tell
from data.parallel import chunks, run_groups
from data.parts import DataError, Part, Problem
from data.sources import SourceName
from spvla.actions import ActionSpace
from spvla.files import write_text
from spvla.statistics import Statistics


@dataclass
class Measured:
    """What one pass over episodes found; ``lengths`` counts steps per episode."""

    actions: Statistics
    states: Statistics
    labels: Statistics
    lengths: list[int]
    problems: list[Problem]

    @classmethod
    def nothing(cls) -> Measured:
        """Before the first episode."""
        return cls(Statistics(), Statistics(), Statistics(), [], [])

    def merge(self, other: Measured) -> None:
        """Take in another pass."""
        for mine, theirs in zip(
            (self.actions, self.states, self.labels), (other.actions, other.states, other.labels), strict=True
        ):
            mine.merge(theirs)
        self.lengths += other.lengths
        self.problems += other.problems

    def result(self, space: ActionSpace) -> dict[str, Any]:
        """An entry of ``dataset_statistics.json``: action and proprio (with mask), num_transitions, num_trajectories."""
        mask = [d not in space.gripper for d in range(space.dim)]
        entry: dict[str, Any] = {"action": {**self.actions.result(), "mask": mask}}
        if self.states.count:
            entry["proprio"] = self.states.result()
        if self.labels.count:
            entry["vla_action"] = {**self.labels.result(), "mask": mask}
        return {**entry, "num_transitions": sum(self.lengths), "num_trajectories": len(self.lengths)}


def measure(setting: Setting, parts: Sequence[Part], on_error: OnError) -> Iterator[tuple[int, Measured]]:
    """Per part, how many episodes it was to have and what was found."""
    source = setting.open()
    for part in parts:
        out = Measured.nothing()
        for episode in setting.read(source, part):
            if isinstance(episode, Problem):
                if on_error == "stop":
                    raise DataError(episode)
                out.problems.append(episode)
            else:
                out.actions.add(episode.actions)
                out.lengths.append(len(episode))
                if episode.states is not None:
                    out.states.add(episode.states)
                if episode.vla_actions is not None:
                    out.labels.add(episode.vla_actions)
        yield part.count, out


@dataclass(frozen=True)
class _Group:
    setting: Setting
    parts: tuple[Part, ...]
    on_error: OnError


def _measure_group(group: _Group) -> Iterator[tuple[int, Measured]]:
    return measure(group.setting, group.parts, group.on_error)


def stats(
    data: Path | None = None,
    source: SourceName | None = None,
    path: Path | None = None,
    conventions: str | None = None,
    split: str = "train",
    episodes: str | None = None,
    output: Path | None = None,
    on_error: OnError = "stop",
    workers: int = 1,
) -> None:
    """Measure q01, q99, mean, std, min and max of a data set's actions and states in one pass.

    Args:
        data: a rollout store; or, in its place, source and path.
        source: what the data set is: rlds or lerobot.
        path: its folder.
        conventions: a name in configs/openx/datasets.yaml, or a YAML file with the fields of one entry; by the data set's
            own name if omitted.
        split: RLDS split, or all.
        episodes: only these numbers, such as 0-63 or 0,5,10.
        output: JSON file to write, in the form of OpenVLA's dataset_statistics.json.
        on_error: what to do about a record that cannot be used: stop, or skip it and say so.
        workers: processes.
    """
    from tqdm import tqdm

    require_one("stats", data, source, path)
    setting = make_setting(source or "lerobot", data or path or Path(), conventions, split, None, False, episodes)
    found = setting.open()
    tell("note", found.notes)
    total = Measured.nothing()
    groups = [_Group(setting, tuple(p), on_error) for p in chunks(found.parts, workers)]
    with tqdm(total=sum(p.count for p in found.parts), desc=f"stats {found.name}", unit="episode") as bar:
        results = _measure_group(groups[0]) if len(groups) == 1 else run_groups(_measure_group, groups, workers)
        for count, part in results:
            total.merge(part)
            bar.update(count)
            bar.set_postfix(
                steps=sum(total.lengths), per_second=f"{sum(total.lengths) / max(bar.format_dict['elapsed'], 1e-9):.0f}"
            )
    if not total.lengths:
        raise no_episode(setting, total.problems)
    entry = total.result(found.space)
    tell("left out", total.problems)
    print(f"{found.name}: {entry['num_trajectories']} episodes, {entry['num_transitions']} steps")
    for name in ("action", "vla_action", "proprio"):
        if name in entry:
            numbers = ("min", "q01", "mean", "q99", "max", "std")
            roles = [found.space.role(d) if name != "proprio" else "" for d in range(len(entry[name]["mean"]))]
            columns = {name: range(len(roles)), **{k: entry[name][k] for k in numbers}, "": roles}
            print(tabulate(columns, "keys", "plain", floatfmt=".4f"))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps({found.name: entry}, indent=1) + "\n")
        print(f"written: {output}")
