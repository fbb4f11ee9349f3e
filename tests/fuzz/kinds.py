"""What is fuzzed: for each kind whole folders to begin with, and a reader that says what a folder means."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from spvla.store import Episode
from tests.conftest import BRIDGE, DATA, smooth_episode
from tests.fuzz import wire
from tests.fuzz.base import Kind, Outcome, digest
from tests.lerobot_sets import STEPS, write_set

CAMERA = "observation.images.top"


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG" if seed % 2 else "PNG")
    return out.getvalue()


def weights(module: Any) -> list[Any]:
    return [x for name, tensor in sorted(module.state_dict().items()) for x in (name, tensor.float().numpy())]


def make_exports(folder: Path) -> list[Path]:
    """Two networks and three gates, with risk curves of a few points instead of 512, which take most of the time to read."""
    from spvla import save_export
    from spvla.gates.calibration import Calibration
    from tests.test_export import make_export

    curve = Calibration((0.1, 0.5, 1.0), (0.05, 0.1, 0.3), (0.2, 0.6, 1.0), (0.0, 0.1, 0.2), 60)
    return [save_export(make_export(calibration=dict.fromkeys(("mlp", "transformer", "ridge"), curve)), folder / "export")]


def read_export(folder: Path) -> Outcome:
    from spvla import load_export

    export = load_export(folder)
    parts: list[tuple[str, Any]] = [*export.generators.items(), *export.gates.items()]
    values = [x for name, part in parts for x in (name, asdict(part.config), *weights(part))]
    curves = {name: c.to_dict() for name, c in export.calibration.items()}
    facts = (export.space.to_dict(), export.tolerance, dict(export.defaults), dict(export.provenance), curves)
    return Outcome(digest(*values, *facts, export.notes()))


def make_stores(folder: Path) -> list[Path]:
    from spvla.actions import LIBERO
    from spvla.store import RolloutWriter

    writer = RolloutWriter(folder / "store", LIBERO, policy="fuzz")
    for k in range(2):
        episode = smooth_episode(k, steps=8)
        episode.images = {"main": [picture(8 * k + t) for t in range(8)]}
        writer.write(f"job-{k}", [episode])
    writer.finalize()
    shards = folder / "recording"
    (shards / ".shards").mkdir(parents=True)
    for shard in sorted((folder / "store" / ".shards").glob("*.parquet")):
        shutil.move(shard, shards / ".shards" / shard.name)
    return [folder / "store", shards]


def read_store(folder: Path) -> Outcome:
    """A finalised store, or a recording that is finalised first."""
    from data.store import RolloutStore
    from spvla.store import finalize, read_episodes

    recorded = not (folder / "meta").exists() and (folder / ".shards").exists()
    if recorded:
        finalize(folder)
    episodes = list(read_episodes(folder))
    derived = RolloutStore(folder).arrays
    return Outcome(
        digest(*map(described, episodes), *(x for name, a in sorted(derived.items()) for x in (name, np.asarray(a))))
    )


def described(episode: Episode) -> str:
    vectors = [episode.actions, episode.states, episode.vla_actions, episode.timestamps, episode.sources]
    images = [image for frames in episode.images.values() for image in frames]
    facts = {k: v for k, v in episode.metadata.items() if k not in ("dataset", "content", "file")}
    return digest(*vectors, episode.instruction, episode.success, sorted(facts.items(), key=str), *images)


def make_openvla(folder: Path) -> list[Path]:
    return [shutil.copytree(DATA / "openvla_tiny", folder / "openvla", ignore=shutil.ignore_patterns("golden*"))]


def read_openvla(folder: Path) -> Outcome:
    from spvla.vlas.openvla import from_pretrained

    vla: Any = from_pretrained(folder, unnorm_key="bridge_orig")
    return Outcome(digest(*weights(vla.model), vla.action_space.to_dict(), repr(vla.model.config)))


def make_openvla_oft(folder: Path) -> list[Path]:
    reference = DATA / "openvla_oft_tiny"
    target = shutil.copytree(reference, folder / "openvla_oft", ignore=shutil.ignore_patterns("golden*", "film"))
    shutil.copy(reference / "film" / "vision_backbone--150000_checkpoint.pt", target)
    return [target]


def read_openvla_oft(folder: Path) -> Outcome:
    from spvla.vlas.openvla_oft import from_pretrained

    vla: Any = from_pretrained(folder, recipe="libero")
    return Outcome(digest(*weights(vla.model), vla.action_space.to_dict(), repr(vla.model.vla.config), vla.state_dim))


def make_lerobot(folder: Path) -> list[Path]:
    def images(episode: int) -> pa.Array:
        files = pa.array([picture(100 * episode + t) for t in range(STEPS)], pa.binary())
        return pa.StructArray.from_arrays([files, pa.nulls(STEPS, pa.string())], ["bytes", "path"])

    extra: dict[str, Any] = {CAMERA: images}
    return [
        write_set(folder / f"set-{version}", version, episodes=2, extra=extra, cameras={CAMERA: "image"})
        for version in ("v2.1", "v3.0")
    ]


def make_rlds(folder: Path) -> list[Path]:
    """Two records of the real set, so that reading takes a moment only."""
    from data.rlds.tfrecord import FOOTER, scan

    target = folder / "bridge_dataset" / "1.0.0"
    shutil.copytree(BRIDGE, target)
    info = json.loads((target / "dataset_info.json").read_text())
    for split in info["splits"]:
        file = next(target.glob(f"*-{split['name']}.tfrecord*"))
        index, count = scan(file), min(2, sum(map(int, split["shardLengths"])))
        end = int(index.offsets[count - 1] + index.lengths[count - 1]) + FOOTER.size
        file.write_bytes(file.read_bytes()[:end])
        split["shardLengths"] = [str(count)]
    (target / "dataset_info.json").write_text(json.dumps(info))
    return [target]


def read_source(kind: str) -> Callable[[Path], Outcome]:
    def read(folder: Path) -> Outcome:
        from data.images import encode_images
        from data.parts import Problem
        from data.sources import open_source

        source = open_source(kind, folder)
        images = bool(source.cameras.chosen)
        meanings, problems = [], [*source.notes]
        for part in source.parts:
            for found in source.episodes(part, images=images):
                if isinstance(found, Problem):
                    problems.append(str(found))
                elif (reason := encode_images(found, source.image_shape)) is not None:
                    problems.append(reason)
                else:
                    found.check(source.space, "episode")
                    meanings.append(described(found))
        return Outcome(digest(*meanings, source.space.to_dict()), tuple(problems))

    return read


KINDS: dict[str, Kind] = {
    "exports": Kind(make_exports, read_export, 0.4, lambda file: file.suffix == ".safetensors"),
    "stores": Kind(make_stores, read_store, 0.25, lambda file: file.suffix == ".parquet"),
    "openvla": Kind(make_openvla, read_openvla, 0.08),
    "lerobot": Kind(make_lerobot, read_source("lerobot"), 0.12),
    "rlds": Kind(make_rlds, read_source("rlds"), 0.1, lambda file: ".tfrecord" in file.name),
    "to the server": Kind(wire.make_requests, wire.read_request),
    "from a vla-eval server": Kind(wire.make_answers("vla-eval"), wire.read_answers("vla-eval")),
    "from an openpi server": Kind(wire.make_answers("openpi"), wire.read_answers("openpi")),
    "openvla_oft": Kind(make_openvla_oft, read_openvla_oft, 0.05),  # last: the number of a kind is part of its seeds
}
FILES = [name for name, kind in KINDS.items() if kind.share]
MESSAGES = [name for name, kind in KINDS.items() if not kind.share]
