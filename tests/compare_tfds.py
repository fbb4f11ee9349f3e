"""What ``tfds`` with TensorFlow returns for an RLDS data set, and how fast: the reference of data/rlds.

Run once, in an environment of its own, since nothing here depends on TensorFlow:

    python3 -m venv tfds && tfds/bin/pip install tensorflow-cpu tensorflow-datasets
    tfds/bin/python tests/compare_tfds.py BRIDGE_RLDS/bridge_dataset/1.0.0 results/data/tfds_reference.json

The file holds one digest per episode and feature, which tests/test_rlds.py compares with what data/rlds reads, and the
steps per second that ``python -m eval data`` compares its own with. Iterated as the Open-X notebooks do (the nested data
set of steps, images decoded), and once more with images left encoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

FEATURES = ("action", "observation/state", "language_instruction", "observation/image_0")


def digest(value: bytes) -> str:
    """sha256 in short."""
    return hashlib.sha256(value).hexdigest()[:32]


def steps_per_second(make: Callable[[], Any], least: float = 5.0) -> dict[str, float]:
    """Steps per second over whole passes of at least ``least`` seconds, by the clock and by the process's CPU time."""
    steps, start, cpu = 0, perf_counter(), process_time()
    while perf_counter() - start < least:
        for episode in make():
            for _ in episode["steps"]:
                steps += 1
    return {"wall": steps / (perf_counter() - start), "cpu": steps / (process_time() - cpu), "steps": steps}


def main(folder: str, output: str) -> None:
    """Write digests and rates of the data set in ``folder`` to ``output``."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import numpy as np
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    cameras = [name for name in builder.info.features["steps"]["observation"] if name.startswith("image")]
    skip = {"steps": {"observation": {name: tfds.decode.SkipDecoding() for name in cameras}}}
    digests: dict[str, Any] = {}
    for split in builder.info.splits:
        digests[split] = []
        for episode in builder.as_dataset(split=split, decoders=skip, shuffle_files=False):
            steps = list(episode["steps"])
            row: dict[str, Any] = {"steps": len(steps)}
            for feature in FEATURES:
                values = []
                for step in steps:
                    value: Any = step
                    for name in feature.split("/"):
                        value = value[name]
                    values.append(value.numpy())
                joined = b"\0".join(values) if isinstance(values[0], bytes) else np.stack(values).tobytes()
                row[feature] = digest(joined)
            digests[split].append(row)
    train = {
        "nested, images decoded": lambda: builder.as_dataset(split="train"),
        "nested, images left encoded": lambda: builder.as_dataset(split="train", decoders=skip),
    }
    result = {
        "kind": "tfds with TensorFlow",
        "data": Path(folder).parent.name,
        "digests": digests,
        "rates": {name: steps_per_second(make) for name, make in train.items()},
        "versions": {"tensorflow": tf.__version__, "tensorflow_datasets": tfds.__version__, "numpy": np.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rates"], indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
