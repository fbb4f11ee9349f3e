"""Cut the small real episodes under ``tests/data`` out of the whole published data sets.

    python tests/data/cut_robot_data.py FOLDER

FOLDER holds ``bridge_rlds``, ``lerobot_cr5_banana`` and ``lerobot_v3_apple_storage`` as published (their NOTICE files say
where). Records, rows and video packets are copied as they are, and so are the faults that readers must survive: a
validation shard that repeats training records, a black camera, irregular time stamps, missing videos, wrong totals.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
BRIDGE_RECORDS = {"train": 10, "val": 1}
CR5_EPISODES = 34  # more than two parts of a conversion
CR5_STEPS = 12  # of episode 0, the one with a video


def cut_bridge(source: Path, target: Path) -> None:
    """The first records of each shard; the validation shard repeats the first training records, as the whole one does."""
    version = Path("bridge_dataset") / "1.0.0"
    (target / version).mkdir(parents=True)
    info = json.loads((source / version / "dataset_info.json").read_text())
    for split in info["splits"]:
        name = f"bridge_dataset-{split['name']}.tfrecord-00000-of-00001"
        content = (source / version / name).read_bytes()
        end = size = 0
        for _ in range(BRIDGE_RECORDS[split["name"]]):
            (length,) = struct.unpack_from("<Q", content, end)
            end, size = end + 16 + length, size + length
        (target / version / name).write_bytes(content[:end])
        split |= {"numBytes": str(size), "shardLengths": [str(BRIDGE_RECORDS[split["name"]])]}
    (target / version / "dataset_info.json").write_text(json.dumps(info, indent=2))
    shutil.copy(source / version / "features.json", target / version)


def cut_video(source: Path, target: Path, frames: int) -> None:
    """Copy the first ``frames`` packets without decoding them."""
    import av

    target.parent.mkdir(parents=True)
    with av.open(str(source)) as video, av.open(str(target), "w") as cut:
        stream = cut.add_stream_from_template(video.streams.video[0], opaque=True)
        packets = (packet for packet in video.demux(video=0) if packet.dts is not None)
        for _, packet in zip(range(frames), packets, strict=False):
            packet.stream = stream
            cut.mux(packet)


def statistics(table: Any) -> dict[str, dict[str, list[float]]]:
    """LeRobot's statistics of an episode's vectors."""
    out = {}
    for key in ("action", "observation.state"):
        x = np.array(table[key].to_pylist(), np.float32).astype(float)
        out[key] = {k: getattr(x, k)(0).tolist() for k in ("min", "max", "mean", "std")} | {"count": [len(x)]}
    return out


def cut_cr5(source: Path, target: Path) -> None:
    """The first episodes, of the first its first steps with their video; the other videos are not there."""
    import pyarrow.parquet as pq

    name = "data/chunk-000/episode_{:06d}.parquet"
    video = "videos/chunk-000/observation.images.top/episode_000000.mp4"
    (target / "data" / "chunk-000").mkdir(parents=True)
    (target / "meta").mkdir()
    lengths = []
    for k in range(CR5_EPISODES):
        shutil.copyfile(source / name.format(k), target / name.format(k))
        if k == 0:
            pq.write_table(pq.read_table(source / name.format(k)).slice(0, CR5_STEPS), target / name.format(k))
        lengths.append(pq.read_metadata(target / name.format(k)).num_rows)
    cut_video(source / video, target / video, CR5_STEPS)
    for file in ("episodes.jsonl", "episodes_stats.jsonl"):
        rows = [json.loads(line) for line in (source / "meta" / file).read_text().split("\n")[:CR5_EPISODES]]
        if file == "episodes.jsonl":
            rows[0]["length"] = CR5_STEPS
        else:
            rows[0]["stats"] |= statistics(pq.read_table(target / name.format(0)))
        (target / "meta" / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((source / "meta" / "info.json").read_text())
    info |= {"total_episodes": CR5_EPISODES, "total_frames": sum(lengths), "total_videos": CR5_EPISODES}
    info["splits"] = {"train": f"0:{CR5_EPISODES}"}
    (target / "meta" / "info.json").write_text(json.dumps(info, indent=4))
    shutil.copyfile(source / "meta" / "tasks.jsonl", target / "meta" / "tasks.jsonl")


def copy_apple(source: Path, target: Path) -> None:
    """Whole: it is small."""
    for folder in ("data", "meta"):
        shutil.copytree(source / folder, target / folder, copy_function=shutil.copyfile)


CHANGES = {
    "bridge_rlds": f"the first {BRIDGE_RECORDS['train']} training and {BRIDGE_RECORDS['val']} validation records, "
    "byte for byte; dataset_info.json has their counts",
    "lerobot_cr5_banana": f"the first {CR5_EPISODES} episodes; of episode 0 the first {CR5_STEPS} steps and video packets; "
    "meta/ has their counts",
    "lerobot_v3_apple_storage": "none",
}


def main(folder: Path) -> None:
    for name, cut in (
        ("bridge_rlds", cut_bridge),
        ("lerobot_cr5_banana", cut_cr5),
        ("lerobot_v3_apple_storage", copy_apple),
    ):
        target = HERE / name
        shutil.rmtree(target, ignore_errors=True)
        cut(folder / name, target)
        for licence in folder.joinpath(name).glob("LICENSE*"):
            shutil.copyfile(licence, target / licence.name)
        notice = (folder / name / "NOTICE").read_text().rstrip()
        (target / "NOTICE").write_text(f"{notice}\nChanges made here (tests/data/cut_robot_data.py): {CHANGES[name]}.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
