"""A rollout store opened by others: the ``lerobot`` package's own reader, and Hugging Face ``datasets``.

Run in an environment of its own, since lerobot brings another OpenCV and its own bounds on torch (Python 3.12):

    python3.12 -m venv lerobot && lerobot/bin/pip install "lerobot[dataset]"
    lerobot/bin/python tests/check_lerobot.py STORE

Reads every frame both ways and compares it with the Parquet files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


def main(folder: str) -> None:
    """Compare what the two readers make of the store in ``folder`` with its Parquet files."""
    import datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    store = Path(folder).resolve()
    table = pq.read_table(sorted((store / "data").glob("*/*.parquet")))
    columns = [n for n in table.column_names if not n.startswith("observation.images")]
    rows = {name: np.array(table[name].to_pylist()) for name in columns}

    lerobot = LeRobotDataset(f"local/{store.name}", root=store)
    assert len(lerobot) == table.num_rows, (len(lerobot), table.num_rows)
    every = range(0, len(lerobot), max(1, len(lerobot) // 200))
    for i in every:
        frame: dict[str, Any] = lerobot[i]
        for name in columns:
            np.testing.assert_allclose(np.asarray(frame[name]), rows[name][i], rtol=1e-6)
        for name in table.column_names:
            if name.startswith("observation.images"):
                assert frame[name].ndim == 3 and frame[name].shape[0] == 3, frame[name].shape
        assert isinstance(frame["task"], str)
    print(f"lerobot: {len(every)} of {len(lerobot)} frames equal, {lerobot.num_episodes} episodes, {lerobot.fps} Hz")

    loaded = datasets.load_dataset(str(store), split="train").with_format("numpy")
    assert loaded.num_rows == table.num_rows
    for name in columns:
        np.testing.assert_allclose(np.asarray(loaded[name]), rows[name], rtol=1e-6)
    print(f"datasets {datasets.__version__}: {loaded.num_rows} rows equal")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
