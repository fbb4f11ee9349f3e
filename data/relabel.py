"""What a VLA would do at every frame of a data set: ``python -m data relabel``.

The recorded action stays what was executed; the VLA's action (of a plan the first, and beside it the whole plan), confidence
and pooled features become the labels. Lightning
Fabric starts one process per device on every node; parts are dealt out by their place in the list, images are decoded
ahead in a worker process, and a batch never crosses a part, so that the result does not depend on how many processes
there were.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from data.batches import Frames, FrameStream, without_traceback
from data.derive import (
    OnError,
    Setting,
    Shards,
    finalize_and_report,
    make_setting,
    require_apart,
    require_new,
    require_one,
    settle,
    tell,
)
from data.identity import hub_name
from data.parts import DataError, deal
from data.sources import SourceName
from spvla.errors import InputError
from spvla.fields import naming
from spvla.files import locked
from spvla.observation import MAIN, Observation
from spvla.store import Episode
from spvla.vlas.base import VLA, BatchedVLA, VLAOutput
from spvla.vlas.registry import load_vla

SECONDS_SHOWN = 2.0  # between two states of the progress bar, however small a batch is


def label(vla: VLA, frames: Frames, running: int | None = None) -> list[VLAOutput]:
    """The VLA's output for each of the frames, in one call where it can (:class:`BatchedVLA`).

    Args:
        vla: the policy.
        frames: in order.
        running: the episode that the frame before these was of; a VLA that is asked frame by frame is not reset within one.
    """
    states = [None] * len(frames.images) if frames.states is None else list(frames.states.numpy())
    seen = [Observation({MAIN: image}, state) for image, state in zip(frames.images.numpy(), states, strict=True)]
    if isinstance(vla, BatchedVLA):
        return list(vla.predict_batch(seen, frames.instructions))
    outputs = []
    for observation, instruction, episode in zip(seen, frames.instructions, frames.episodes, strict=True):
        if episode != running:
            vla.reset(instruction)
        running = episode
        outputs.append(vla.predict(observation))
    return outputs


def labelled(episode: Episode, outputs: Sequence[VLAOutput]) -> Episode:
    """``episode`` with the VLA's outputs, one per step, as its labels; their whole plans, if those are equally long."""

    def stack(values: list[Any]) -> Any:
        return None if any(v is None for v in values) else np.stack(values).astype(np.float32)

    episode.vla_actions = stack([o.actions[0] for o in outputs])
    episode.vla_confidence = stack([o.confidence for o in outputs])
    episode.vla_features = stack([o.features for o in outputs])
    plans = [o.actions.ravel() if len(o.actions) > 1 else None for o in outputs]
    episode.vla_plans = stack(plans) if len({len(o.actions) for o in outputs}) == 1 else None
    episode.vla_again = None
    episode.vla_propensities = None
    return episode


@dataclass(frozen=True)
class Job:
    """The settings of every process of a relabelling run."""

    setting: Setting
    output: str
    vla: str
    checkpoint: str | None
    options: dict[str, Any]
    batch_size: int
    decode_ahead: bool
    on_error: OnError


def _run(job: Job, fabric: Any) -> None:
    """One process: label its share of the parts. The first one, of all nodes, sees to it that no other run writes there."""
    with locked(job.output) if fabric.global_rank == 0 else nullcontext():
        _label_parts(job, fabric)


def _label_parts(job: Job, fabric: Any) -> None:
    """Label this process's parts; the first process finalises the store when all are through."""
    source = job.setting.open()
    vla = load_vla(job.vla, job.checkpoint, job.options)
    source.space.require_compatible(vla.action_space, f"VLA {job.vla!r}")
    shards = Shards(Path(job.output), job.setting, vla.action_space, job.vla)
    require_new(shards, source)
    left = fabric.broadcast([i for i, part in enumerate(source.parts) if not shards.finished(part)])
    waiting = [source.parts[i] for i in left]  # as the first process sees it: shards appear while others start
    mine = deal(waiting, fabric.global_rank, fabric.world_size)
    stream = FrameStream(job.setting, mine, job.batch_size)
    ahead = {"num_workers": 1, "prefetch_factor": 4, "multiprocessing_context": "spawn"} if job.decode_ahead and mine else {}
    loader = torch.utils.data.DataLoader(stream, batch_size=None, **ahead)  # type: ignore[arg-type]
    outputs: dict[int, list[VLAOutput]] = {}
    running: int | None = None  # episode of the part at hand
    steps, start = 0, perf_counter()
    shown = start
    parent = multiprocessing.parent_process()
    total = sum(p.count for p in source.parts)
    from tqdm import tqdm

    name = f"relabel {source.name}"
    done = total - sum(p.count for p in waiting)
    with tqdm(total=total, initial=done, desc=name, unit="episode", disable=fabric.global_rank != 0) as bar:
        for item in without_traceback(loader):
            if isinstance(item, Frames):
                for episode, output in zip(item.episodes, label(vla, item, running), strict=True):
                    outputs.setdefault(episode, []).append(output)
                running = item.episodes[-1]
                steps += len(item.episodes)
                now = perf_counter()
                if now - shown >= SECONDS_SHOWN:
                    bar.set_postfix(steps_per_second=f"{steps / (now - start) * fabric.world_size:.1f}")
                    shown = now
                continue
            if item.problems and job.on_error == "stop":
                raise DataError(item.problems[0])
            if parent is not None and not parent.is_alive():
                return  # killed: another run may be writing this store by now
            shards.write(item.part, [labelled(e, outputs[i]) for i, e in item.episodes.items()], item.problems)
            outputs, running = {}, None
            bar.update(min(item.part.count * fabric.world_size, total - bar.n))  # the others are about as far
    fabric.barrier()
    if fabric.global_rank == 0:
        finalize_and_report(Path(job.output), shards, source.parts)


def relabel(
    output: Path,
    vla: str,
    checkpoint: str | None = None,
    vla_options: dict[str, Any] = {},  # noqa: B006
    data: Path | None = None,
    source: SourceName | None = None,
    path: Path | None = None,
    conventions: str | None = None,
    split: str = "train",
    camera: str | None = None,
    images: bool = False,
    episodes: str | None = None,
    on_error: OnError = "stop",
    batch_size: int = 32,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    decode_ahead: bool = True,
) -> None:
    """Run a VLA over the frames of a data set and store its actions, confidence and features beside the recorded actions.

    Call it again with the same options to continue after an interruption, on as many devices as there are then.

    Args:
        output: rollout store to make or extend.
        vla: openvla, nano_vla, an entry point of spvla.vlas, or package.module:factory.
        checkpoint: the VLA's folder or hf://owner/name.
        vla_options: the VLA's other options, for openvla such as {unnorm_key: bridge_orig} (see spvla.vlas.openvla.load).
        data: a rollout store with images; or, in its place, source and path.
        source: what the data set is: rlds or lerobot.
        path: its folder.
        conventions: a name in configs/openx/datasets.yaml, or a YAML file with the fields of one entry; by the data set's
            own name if omitted.
        split: RLDS split, or all.
        camera: image feature in place of the conventions' one.
        images: store the camera's images too.
        episodes: keep only these numbers, such as 0-63 or 0,5,10.
        on_error: what to do about a record that cannot be used: stop, or skip it and say so.
        batch_size: frames per call of the VLA.
        accelerator: cpu, cuda, ... as Lightning names it.
        devices: processes on each node, one per device.
        num_nodes: nodes; start the command on each, as Lightning Fabric describes for clusters (or with torchrun or SLURM).
        decode_ahead: decode images in a worker process while the VLA computes.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    require_one("relabel", data, source, path)
    facts = {"vla": vla, "checkpoint": checkpoint, "options": vla_options}
    where = data if data is not None else path
    assert where is not None
    require_apart(where, output)
    if batch_size < 1:
        raise InputError(f"relabel: batch_size must be at least 1, got {batch_size}")
    setting = make_setting(source or "lerobot", where, conventions, split, camera, images, episodes, facts)
    found = setting.open()
    found.cameras.require()
    tell("note", found.notes)
    setting = settle(output, setting, found)
    job = Job(setting, str(output), vla, checkpoint, dict(vla_options), batch_size, decode_ahead, on_error)
    several = devices * num_nodes > 1
    strategy = (
        DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(days=30)) if several else "auto"
    )
    with naming(f"relabel: accelerator {accelerator}, devices {devices}, num_nodes {num_nodes}"):
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    try:
        fabric.launch(partial(_run, job))
    except torch.multiprocessing.ProcessRaisedException as error:  # type: ignore[attr-defined]
        last = str(error).strip().splitlines()[-1]
        kind, _, message = last.partition(": ")
        if kind.rpartition(".")[2] in (InputError.__name__, DataError.__name__):
            raise InputError(message) from None
        print(str(error), file=sys.stderr)
        raise


def relabel_into(folder: Path, options: Mapping[str, Any]) -> Path:
    """Relabel a data set as ``options`` say, arguments of :func:`relabel` but ``output``, into a store under ``folder``.

    The store's name tells its options apart: what is finished there is not done again. Returns the store.

    Raises:
        InputError: an unknown option, or what :func:`relabel` raises.
    """
    known = [name for name in signature(relabel).parameters if name != "output"]
    for name in options:
        if name not in known:
            raise InputError(f"relabel: option {name!r} is unknown; available: {', '.join(known)}")
    if "vla" not in options:
        raise InputError("relabel: option 'vla' is missing")
    values: dict[str, Any] = {k: Path(v) if k in ("data", "path") and v is not None else v for k, v in options.items()}
    where = Path(values.get("data") or values.get("path") or ".")
    text = json.dumps({k: v for k, v in options.items() if k not in ("devices", "num_nodes")}, sort_keys=True, default=str)
    name = (
        hub_name(where) or where.resolve().name if not where.name.replace(".", "").isdecimal() else where.resolve().parent.name
    )
    store = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    relabel(store, **values)
    return store
