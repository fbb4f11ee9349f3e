"""Look at a rollout store, or at a data set before it is converted: ``python -m data inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from data.derive import make_setting, require_one, tell
from data.parts import Problem
from data.sources import Source, SourceName
from data.store import RolloutStore
from spvla.actions import ActionSpace
from spvla.cli import PositiveInt
from spvla.errors import InputError
from spvla.history import Source as Actor
from spvla.rerun_log import RerunLog
from spvla.store import Episode, read_episodes

MOST_STEPS = 2_000_000  # examined at once
BARS = " ▁▂▃▄▅▆▇█"


def inspect(
    data: Path | None = None,
    source: SourceName | None = None,
    path: Path | None = None,
    conventions: str | None = None,
    split: str = "train",
    camera: str | None = None,
    output: Path | None = None,
    trajectories: PositiveInt = 3,
    rerun: str | None = None,
) -> None:
    """Print what a rollout store or a data set holds: episodes, lengths, success, labels, action quantiles and histograms.

    Args:
        data: a rollout store; or, in its place, source and path.
        source: what the data set is: rlds or lerobot.
        path: its folder.
        conventions: a name in configs/openx/datasets.yaml, or a YAML file with the fields of one entry; by the data set's
            own name if omitted.
        split: RLDS split, or all.
        camera: image feature in place of the conventions' one.
        output: PNG, PDF or SVG file for a picture of some trajectories with their labels.
        trajectories: how many, spread over the episodes.
        rerun: show these in Rerun: an .rrd file, spawn, or a viewer's address rerun+http://... (needs rerun-sdk).
    """
    require_one("inspect", data, source, path)
    if output is not None and output.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"output: {output} is not an image file; its name must end in .png, .pdf or .svg")
    if data is not None:
        store = RolloutStore(data)
        _describe_store(store)
        space, shown = store.space, []
        if output is not None or rerun is not None:
            wanted = set(np.linspace(0, len(store.episodes) - 1, trajectories).astype(int).tolist())
            shown = [e for i, e in enumerate(read_episodes(data)) if i in wanted]
    else:
        setting = make_setting(source or "rlds", path or Path(), conventions, split, camera, False, None)
        found = setting.open()
        space = found.space
        tell("note", found.notes)
        sample = Sample.of(found)
        tell("cannot be used", sample.problems)
        good = sample.kept
        if not good:
            first = f"; the first problem: {sample.problems[0]}" if sample.problems else ""
            raise InputError(f"{path}: no episode can be used{first}")
        lengths = np.array(sample.lengths)
        told = f"{len(lengths)} episodes, {lengths.sum()} steps at {space.control_rate:g} Hz ({space.name}, {space.kind})"
        print(f"{path}: {told}; camera {found.camera}, {found.image_shape}")
        _lengths(lengths)
        for text, count in sorted(sample.instructions.items()):
            print(f"  {count:5d} episodes  {text or '(no instruction)'}")
        if sample.every > 1:
            print(f"of every {sample.every}th episode:")
        _actions(np.concatenate([e.actions for e in good]), space)
        shown = [good[i] for i in np.linspace(0, len(good) - 1, min(trajectories, len(good))).astype(int)]
    if output is not None:
        draw(shown, space, output)
        print(f"written: {output}")
    if rerun is not None:
        log = RerunLog(rerun, space)
        for i, episode in enumerate(shown):
            log.episode_of(episode, f"episode_{i:03d}")
        log.close()


@dataclass
class Sample:
    """What one pass over a data set finds, in constant memory: counts of all episodes, and every k-th one whole.

    Args:
        lengths: steps of each episode.
        instructions: episodes by instruction.
        problems: what cannot be used.
        kept: every ``every``-th usable episode, at most about :data:`MOST_STEPS` steps.
    """

    lengths: list[int] = field(default_factory=list)
    instructions: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    kept: list[Episode] = field(default_factory=list)
    every: int = 1

    @classmethod
    def of(cls, source: Source) -> Sample:
        """Read a data set."""
        from tqdm import tqdm

        out, steps = cls(), 0
        for part in tqdm(source.parts, desc=f"inspect {source.name}", unit="part", mininterval=1.0, leave=False):
            for found in source.episodes(part):
                if isinstance(found, Problem):
                    out.problems.append(found)
                    continue
                if len(out.lengths) % out.every == 0:
                    out.kept.append(found)
                    steps += len(found)
                out.lengths.append(len(found))
                out.instructions[found.instruction] += 1
                if steps > MOST_STEPS and len(out.kept) > 1:
                    out.kept, out.every = out.kept[::2], 2 * out.every
                    steps = sum(map(len, out.kept))
        return out


def _describe_store(store: RolloutStore) -> None:
    a, space = store.arrays, store.space
    lengths = np.array([e.length for e in store.episodes])
    known = [e.success for e in store.episodes if e.success is not None]
    told = f"{len(lengths)} episodes, {store.frames} steps at {space.control_rate:g} Hz ({space.name}, {space.kind})"
    print(f"{store.folder}: {told}")
    _lengths(lengths)
    print(f"success   {np.mean(known):.1%} of {len(known)}" if known else "success   unknown")
    labelled = ~np.isnan(a["targets"]).any(1)
    kind = "the teacher's actions" if store.labelled_by_teacher else "the recorded actions (demonstrations, no teacher)"
    print(f"labels    {kind}, {labelled.mean():.1%} of the steps")
    print(f"generated {(a['sources'] == Actor.GENERATOR).mean():.1%} of the steps")
    if "vla_plans" in a:
        told = (
            f"plans of {a['vla_plans'].shape[1]} actions for {(~np.isnan(a['vla_plans']).any((1, 2))).mean():.1%} of the steps"
        )
        print(f"plans     {told}; {(a['sources'] == Actor.PLAN).mean():.1%} of the steps were kept from an earlier one")
    groups = Counter((e.metadata.get("suite", "-"), e.metadata.get("task_name", e.instruction)) for e in store.episodes)
    for (suite, task), count in sorted(groups.items()):
        print(f"  {count:5d} episodes  {suite}  {task}")
    every = slice(None, None, 1 + store.frames // MOST_STEPS)
    _actions(space.denormalize(a["actions"][every]), space)
    if store.labelled_by_teacher and labelled[every].any():
        _actions(space.denormalize(a["targets"][every][labelled[every]]), space, "label", "the teacher's actions")


def _lengths(lengths: NDArray[Any]) -> None:
    print(f"lengths   median {np.median(lengths):g}, {lengths.min()} to {lengths.max()}   {histogram(lengths)}")


def _actions(actions: NDArray[np.float32], space: ActionSpace, name: str = "action", what: str = "as executed") -> None:
    idle = np.abs(np.delete(actions, list(space.gripper), axis=1)).max(1) < 1e-3
    quantiles = np.quantile(actions, [0.01, 0.25, 0.5, 0.75, 0.99], axis=0).T
    rows = [[d, *row, histogram(actions[:, d]), space.role(d)] for d, row in enumerate(quantiles)]
    headers = [name, "q01", "q25", "q50", "q75", "q99", f"({what}, environment units)"]
    print(tabulate(rows, [*headers, ""], "plain", floatfmt=".3f"))
    if not space.kind.endswith(("absolute", "position")):
        print(f"standing  {idle.mean():.1%} of the steps (every dimension but the gripper below 0.001)")


def histogram(values: NDArray[Any], cells: int = 24) -> str:
    """Values (N,) between their 0.5 % and 99.5 % quantiles as a bar of ``cells`` characters."""
    low, high = np.quantile(values, [0.005, 0.995])
    counts, _ = np.histogram(values, bins=cells, range=(low, high if high > low else low + 1))
    return "".join(BARS[int(np.ceil(c / max(counts.max(), 1) * (len(BARS) - 1)))] for c in counts)


def draw(episodes: Sequence[Episode], space: ActionSpace, output: Path) -> None:
    """A picture of trajectories: each dimension over time, as executed and as labelled, coloured by who acted."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise InputError("inspect: a picture needs matplotlib: pip install spvla[eval]") from None
    figure, axes = pyplot.subplots(
        space.dim, len(episodes), figsize=(4.5 * len(episodes), 1.1 * space.dim + 1), squeeze=False, sharex="col"
    )
    for column, episode in enumerate(episodes):
        times = np.arange(len(episode)) / space.control_rate
        for d in range(space.dim):
            panel = axes[d][column]
            panel.plot(times, episode.actions[:, d], color="tab:blue", linewidth=1, label="executed")
            if episode.sources is not None and (made := episode.sources == Actor.GENERATOR).any():
                panel.plot(
                    times[made], episode.actions[made, d], ".", color="tab:orange", markersize=3, label="by the generator"
                )
            if episode.vla_actions is not None:
                panel.plot(times, episode.vla_actions[:, d], "--", color="tab:green", linewidth=1, label="labelled")
            if column == 0:
                panel.set_ylabel(f"{d} {space.role(d)}", fontsize=7)
            panel.tick_params(labelsize=6)
        axes[0][column].set_title(episode.instruction[:60], fontsize=8)
        axes[-1][column].set_xlabel("seconds", fontsize=7)
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
