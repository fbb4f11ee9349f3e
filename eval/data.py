"""How fast training reads windows: ``python -m eval data``."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
from tqdm import tqdm

from data.store import RolloutStore
from data.windows import Windows
from eval.output import table, write_summary
from spvla.actions import LIBERO
from spvla.episodes import Episode, RolloutWriter

EPISODE = 200


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
            actions = g.uniform(-1, 1, (EPISODE, 7)).astype(np.float32)
            states = np.cumsum(actions[:, [0, 1, 2, 3, 4, 5, 6, 6]], axis=0) * 0.01
            sources = (g.random(EPISODE) < 0.5).astype(np.uint8)
            times = np.arange(EPISODE) / 20
            episodes.append(Episode(actions, "random motion", times, states, sources, vla_actions=actions))
        writer.write(f"shard-{shard:06d}", episodes)
    writer.finalize()


def bench_data(
    output: Path,
    data: Path | None = None,
    steps: int = 1_000_000,
    batch_size: int = 4096,
    repeats: int = 5,
    seed: int = 0,
) -> None:
    """Windows per second from a memory-mapped store, and the anonymous memory that takes.

    Args:
        output: folder for summary.json (and for the store, if none is given).
        data: rollout store to read; a store of random motion is made if omitted.
        steps: size of that store.
        batch_size: windows per batch.
        repeats: passes of 200 batches; the median counts.
        seed: of motion and order.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        folder = data
        if folder is None:
            folder = Path(scratch) / "store"
            make_store(folder, steps, seed)
        store = RolloutStore(folder)
        rows = []
        for workers in (1, 2):
            windows = Windows([store], history=12, horizon=4)
            g = np.random.default_rng(seed)
            before = anonymous_memory()
            rates = []
            with ThreadPoolExecutor(workers) as pool:
                for _ in range(repeats + 1):
                    frames = [g.integers(0, store.frames, batch_size) for _ in range(200)]
                    start = perf_counter()
                    for _ in pool.map(windows.batch, frames):
                        pass
                    rates.append(200 * batch_size / (perf_counter() - start))
            rows.append(
                {
                    "reader": "windows, memory-mapped",
                    "threads": workers,
                    "windows_per_second": float(np.median(rates[1:])),
                    "rss_anon_mib": anonymous_memory(),
                    "rss_anon_growth_mib": anonymous_memory() - before,
                }
            )
    path = write_summary(output, "data", rows, frames=store.frames, batch_size=batch_size, history=12, horizon=4)
    print(table(rows, list(rows[0])))
    print(f"{store.frames} steps; written: {path}")
