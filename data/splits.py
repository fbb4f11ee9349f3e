"""Which recorded episodes train, and which calibrate: whole episodes, and all of a scene on one side."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from data.envs import training_part
from data.store import EpisodeInfo
from data.windows import Windows
from spvla.errors import InputError

SCENE = ("suite", "task", "init_state", "seed", "dataset", "file", "number")  # of an episode's metadata


@dataclass(frozen=True)
class Split:
    """Global frames of training and calibration episodes, and the episodes they come from.

    Args:
        train, calibration: per episode, its global frames as (first, length).
        by: how the split was made, for reports.
    """

    train: tuple[tuple[int, int], ...]
    calibration: tuple[tuple[int, int], ...]
    by: str


def split_episodes(windows: Windows, fraction: float = 0.2, seed: int = 0, whole: int = 0) -> Split:
    """Training and calibration episodes, whole episodes each.

    Episodes of scenes that their simulator has fixed are split as it says (:meth:`data.envs.base.Simulator.split`), and its
    evaluation data is refused. Of a store's other episodes ``fraction`` calibrate, chosen at random, where those that share a
    scene (suite, task and seed) or a recording (data set, file and number) are on one side in all stores; a store
    further back changes nothing before it.

    Args:
        windows: the data.
        fraction: of the episodes that no simulator assigns, for calibration.
        seed: of the choice.
        whole: so many of the stores, the last ones, only calibrate.

    Raises:
        InputError: for evaluation episodes, if either part is empty, or if a scene of the last stores is also trained on.
    """
    rng = np.random.default_rng(seed)
    spans: dict[bool, list[tuple[int, int]]] = {False: [], True: []}  # does it calibrate?
    known: dict[Hashable, bool] = {}  # scenes that have been assigned
    fixed = 0  # episodes that their simulator assigns
    for i, store in enumerate(windows.stores):
        only, first = i >= len(windows.stores) - whole, int(windows.offsets[i])
        scenes = [_scene(e) or (i, e.start) for e in store.episodes]
        free: list[Hashable] = []
        for scene, info in zip(scenes, store.episodes, strict=True):
            part = training_part(info.metadata, store.space.name, str(store.folder))
            if only and known.get(scene) is False:
                told = ", ".join(f"{k} {info.metadata[k]}" for k in SCENE if info.metadata.get(k) is not None)
                raise InputError(
                    f"{store.folder}: is for calibration, but {told} is also used for training",
                    code="calibration-leak",
                    field=str(store.folder),
                )
            if only or part is not None:
                known.setdefault(scene, only or part == "calibration")
            elif scene not in known:
                free.append(scene)
            fixed += part is not None
        free = list(dict.fromkeys(free))
        cut = round(fraction * len(free))
        known.update((free[k], rank < cut) for rank, k in enumerate(rng.permutation(len(free))))
        for scene, info in zip(scenes, store.episodes, strict=True):
            spans[known[scene]].append((first + info.start, info.length))
    by = "the simulator" if fixed else "random scenes"
    by += " and random scenes" if 0 < fixed < len(windows.episodes) else ""
    for name, chosen in (("training", spans[False]), ("calibration", spans[True])):
        if not chosen:
            raise InputError(
                f"no {name} episodes in {', '.join(str(s.folder) for s in windows.stores)} (split by {by}); "
                "collect more; of LIBERO initial states 0-19 are for training and 20-29 for calibration"
            )
    return Split(tuple(spans[False]), tuple(spans[True]), by)


def _scene(info: EpisodeInfo) -> Hashable | None:
    """What episodes share that belong on one side of a split: their simulated scene, or the recording that both were made from,
    converted and relabelled for example. None if their metadata name neither."""
    facts = info.metadata
    which = "seed" if facts.get("init_state") is None else "init_state"
    if facts.get("suite") is not None and facts.get(which) is not None:
        return facts["suite"], facts.get("task"), which, facts[which]
    if facts.get("content") and not facts.get("named"):  # the folder's name may be that of another data set too
        return "content", facts["content"]
    if facts.get("dataset") is not None and facts.get("number") is not None:
        return facts["dataset"], facts.get("file"), facts["number"]
    return None
