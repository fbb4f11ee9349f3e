"""What is fuzzed: for each kind whole folders to begin with, and a reader that says what a folder means."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from spvla.store import Episode
from tests.conftest import BRIDGE, DATA, smooth_episode
from tests.lerobot_sets import STEPS, write_set

CAMERA = "observation.images.top"


@dataclass(frozen=True)
class Outcome:
    """What came of reading a folder: a digest of what it means, and the problems that were named."""

    meaning: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Args:
        make: writes whole folders below a path, and returns them.
        read: reads one.
        summed: whether check sums cover a file, so that it must not mean something else once its bytes are damaged.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Outcome]
    summed: Callable[[Path], bool] = lambda file: False


def digest(*values: Any) -> str:
    out = hashlib.sha256()
    for value in values:
        out.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode("utf-8", "surrogatepass"))
    return out.hexdigest()[:16]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG" if seed % 2 else "PNG")
    return out.getvalue()


def weights(module: Any) -> list[Any]:
    return [x for name, tensor in sorted(module.state_dict().items()) for x in (name, tensor.float().numpy())]


def make_exports(folder: Path) -> list[Path]:
    from spvla import save_export
    from tests.test_export import make_export

    return [save_export(make_export(), folder / "export")]


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
    for k in range(3):
        episode = smooth_episode(k, steps=12)
        episode.images = {"main": [picture(12 * k + t) for t in range(12)]}
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
        write_set(folder / f"set-{version}", version, extra=extra, cameras={CAMERA: "image"}) for version in ("v2.1", "v3.0")
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


def make_wire(folder: Path) -> list[Path]:
    import msgpack

    from spvla.wire import encode_array

    folder.mkdir(parents=True, exist_ok=True)
    observation = {
        "images": {"main": np.zeros((8, 8, 3), np.uint8), "wrist": {"__image__": True, "format": "png", "data": picture(0)}},
        "state": np.arange(8, dtype=np.float32),
        "instruction": "stack the cups",
    }
    payloads = {"hello": {"version": 1}, "episode_start": {"task": {"name": "a"}}, "observation": observation}
    for name, payload in payloads.items():
        (folder / name).mkdir()
        message = {"type": name, "payload": payload, "seq": 1, "timestamp": 0.5}
        (folder / name / "message.msgpack").write_bytes(msgpack.packb(message, default=encode_array))
    return [folder / name for name in payloads]


def read_wire(folder: Path) -> Outcome:
    from spvla.serve.messages import decode, parse

    content = decode((folder / "message.msgpack").read_bytes())
    return Outcome(digest(parse(content), content))


KINDS: dict[str, Kind] = {
    "exports": Kind(make_exports, read_export, lambda file: file.suffix == ".safetensors"),
    "stores": Kind(make_stores, read_store, lambda file: file.suffix == ".parquet"),
    "openvla": Kind(make_openvla, read_openvla),
    "openvla_oft": Kind(make_openvla_oft, read_openvla_oft),
    "lerobot": Kind(make_lerobot, read_source("lerobot")),
    "rlds": Kind(make_rlds, read_source("rlds"), lambda file: ".tfrecord" in file.name),
    "wire": Kind(make_wire, read_wire),
}
