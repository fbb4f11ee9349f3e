"""How fast data is read, beside the public ways to read it: ``python -m eval data``.

Rates are those of the fastest pass, by the clock and by the process's CPU time; on a busy machine the second says more.
``tfds`` with TensorFlow is compared through a file that tests/compare_tfds.py writes in an environment of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.parts import Problem
from data.rlds.features import RldsFolder, RldsReader
from data.rlds.tfrecord import read_records, scan
from data.sources import open_source
from data.store import RolloutStore
from data.windows import Windows
from eval.output import table, write_summary
from spvla.actions import LIBERO
from spvla.cli import NonNegativeInt, PositiveInt
from spvla.errors import InputError
from spvla.files import read_json, write_text
from spvla.store import Episode, RolloutWriter

EPISODE = 200  # steps of a made-up one
BATCHES = 50  # per pass


def anonymous_memory() -> float:
    """RssAnon of this process in MiB, from /proc (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def make_store(folder: Path, steps: int, seed: int = 0) -> None:
    """A rollout store of random motion with about ``steps`` steps, in shards of 50 episodes."""
    g = np.random.default_rng(seed)
    writer = RolloutWriter(folder, LIBERO, policy="random")
    per_shard = 50
    for shard in tqdm(range(max(1, steps // (EPISODE * per_shard))), desc="making a store", unit="shard"):
        episodes = []
        for _ in range(per_shard):
            actions = g.uniform(-1, 1, (EPISODE, LIBERO.dim)).astype(np.float32)
            states = np.cumsum(actions, axis=0) * 0.01
            sources = (g.random(EPISODE) < 0.5).astype(np.uint8)
            times = np.arange(EPISODE) / LIBERO.control_rate
            episodes.append(Episode(actions, "random motion", times, states, sources, vla_actions=actions))
        writer.write(f"shard-{shard:06d}", episodes)
    writer.finalize()


def rates(read: Callable[[], int], passes: int) -> dict[str, Any]:
    """Call ``read``, which returns how many steps it read, once to warm up and ``passes`` times.

    Returns steps per second of the fastest pass and what anonymous memory grew by after each pass, MiB.
    """
    read()
    wall, cpu, before, grown = 0.0, 0.0, anonymous_memory(), []
    for _ in range(passes):
        start, start_cpu = perf_counter(), process_time()
        steps = read()
        wall = max(wall, steps / (perf_counter() - start))
        cpu = max(cpu, steps / max(process_time() - start_cpu, 1e-9))
        grown.append(round(anonymous_memory() - before, 2))
    return {"per_second": wall, "per_cpu_second": cpu, "rss_anon_mib": anonymous_memory(), "rss_anon_growth_mib": grown}


def beside(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Two rows, the second one a public alternative, with the ratios of ours to it."""
    ratio = {f"ratio_{k}": ours[k] / theirs[k] for k in ("per_second", "per_cpu_second")}
    return [ours | {"beside": name} | ratio, theirs]


def bench_windows(store: RolloutStore, batch_size: int, passes: int, seed: int) -> list[dict[str, Any]]:
    """Windows from a memory-mapped store, batch-wise on one and two threads, and one by one through a torch DataLoader."""
    windows = Windows([store], history=12, horizon=4)
    g = np.random.default_rng(seed)
    rows = []
    for workers in (1, 2):
        with ThreadPoolExecutor(workers) as pool:

            def read(pool: ThreadPoolExecutor = pool) -> int:
                frames = [g.integers(0, store.frames, batch_size) for _ in range(BATCHES)]
                return sum(len(b.targets) for b in pool.map(windows.batch, frames))

            rows.append({"reader": f"windows, {workers} thread{'s' * (workers > 1)}", **rates(read, passes)})

    class Single(torch.utils.data.Dataset[Any]):
        """One window per item, put together by the loader: the usual way."""

        def __len__(self) -> int:
            return min(store.frames, 20 * 256)

        def __getitem__(self, index: int) -> list[Any]:
            batch = windows.batch(np.array([index]))
            return [batch.window.actions[0], batch.window.states[0], batch.targets[0], batch.valid[0]]

    loader = torch.utils.data.DataLoader(Single(), batch_size=256, shuffle=True)
    single = {"reader": "torch DataLoader, one window per item"}
    single |= rates(lambda: sum(len(item[0]) for item in loader), max(1, passes // 3))
    return [*beside(rows[0], single, single["reader"]), rows[1]]


def bench_rlds(path: Path, reference: Path | None, passes: int) -> list[dict[str, Any]]:
    """An RLDS data set's training split, images left encoded, beside what ``reference`` says of tfds with TensorFlow."""
    folder = RldsFolder(path)
    shards = [scan(file) for file, _ in folder.splits["train"]]
    again = 1 + 500 // max(1, sum(map(len, shards)))  # small samples several times per pass
    keys = ["action", "observation/state", "language_instruction"]
    cameras = [name for name in folder.steps["observation"] if name.startswith("image")]
    readers = [folder.reader([*keys, *(f"observation/{name}" for name in some)]) for some in (cameras[:1], cameras)]

    def read(reader: RldsReader) -> int:
        steps = 0
        for index in shards * again:
            for i, record in read_records(index):
                found = record if isinstance(record, Problem) else reader.parse(record, str(index.path), i)
                if isinstance(found, Problem):
                    raise InputError(str(found))
                steps += len(found["action"])
        return steps

    ours = [
        {"reader": f"RLDS without TensorFlow, {told} left encoded", **rates(partial(read, reader), 3 * passes)}
        for reader, told in zip(readers, ("one camera", f"all {len(cameras)} cameras"), strict=True)
    ]
    if reference is None:
        return ours
    measured = read_json(reference)["rates"]
    rows = [
        {"reader": f"tfds with TensorFlow, {name}", "per_second": r["wall"], "per_cpu_second": r["cpu"]}
        for name, r in measured.items()
    ]
    return [beside(ours[0], rows[0], rows[0]["reader"])[0], *beside(ours[1], rows[0], rows[0]["reader"]), *rows[1:]]


def bench_lerobot(path: Path, conventions: str | None, passes: int) -> list[dict[str, Any]]:
    """A LeRobot data set's episodes, beside Hugging Face ``datasets`` row by row on the same Parquet files."""
    import datasets

    source = open_source("lerobot", path, conventions)
    ours = {"reader": "LeRobot, whole episodes"}
    ours |= rates(lambda: sum(len(e) for p in source.parts for e in source.episodes(p) if isinstance(e, Episode)), passes)
    files = sorted(str(f) for f in (path / "data").rglob("*.parquet"))
    with tempfile.TemporaryDirectory() as cache:
        table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache).with_format("numpy")
        few = min(len(table), 2000)
        theirs = {"reader": "datasets, row by row"}
        theirs |= rates(lambda: sum(1 for i in range(few) if len(table[i]["action"])), max(1, passes // 3))
    return beside(ours, theirs, theirs["reader"])


def bench_data(
    output: Path,
    data: Path | None = None,
    rlds: Path | None = None,
    lerobot: Path | None = None,
    conventions: str | None = None,
    reference: Path | None = None,
    steps: PositiveInt = 1_000_000,
    batch_size: PositiveInt = 4096,
    repeats: PositiveInt = 10,
    seed: NonNegativeInt = 0,
) -> None:
    """Steps per second from RLDS, LeRobot and rollout stores beside public alternatives, and the memory that takes.

    Args:
        output: folder for summary.json (and for the store, if none is given).
        data: rollout store to read windows from; a store of random motion is made if omitted.
        rlds: an RLDS data set to read too.
        lerobot: a LeRobot data set to read too.
        conventions: of the LeRobot data set, see python -m data convert.
        reference: what tests/compare_tfds.py measured on the RLDS data set.
        steps: size of the store that is made.
        batch_size: windows per batch.
        repeats: passes; the fastest one counts, and anonymous memory is reported after each.
        seed: of motion and order.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if rlds is not None:
        rows += bench_rlds(rlds, reference, repeats)
    if lerobot is not None:
        rows += bench_lerobot(lerobot, conventions, repeats)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        folder = data
        if folder is None:
            folder = Path(scratch) / "store"
            make_store(folder, steps, seed)
        store = RolloutStore(folder)
        rows += bench_windows(store, batch_size, repeats, seed)
    path = write_summary(output, "data", rows, frames=store.frames, batch_size=batch_size, history=12, horizon=4)
    columns = ["reader", "per_second", "per_cpu_second", "beside", "ratio_per_second", "ratio_per_cpu_second"]
    lines = [table(rows, columns)]
    for row in rows:
        if "rss_anon_mib" in row:
            lines.append(
                f"{row['reader']}: RssAnon {row['rss_anon_mib']:.0f} MiB, growth by pass {row['rss_anon_growth_mib']} MiB"
            )
    write_text(output / "table.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"{store.frames} steps of windows; written: {path}")
