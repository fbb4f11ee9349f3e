"""What ``data convert`` makes of the real episodes; ``tests/test_golden_conversion.py`` compares.

    python tests/data/golden_conversion.py                   write golden_conversion.npz from the cuts beside this file
    python tests/data/golden_conversion.py FOLDER            compare the whole published sets in FOLDER with whole_sets.json
    python tests/data/golden_conversion.py FOLDER --record   write whole_sets.json

Written once, before the readers were changed. Write it again only for a change that is meant to give other numbers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data.convert import convert
from spvla.store import read_action_space, read_episodes

HERE = Path(__file__).parent
ARRAYS, WHOLE = HERE / "golden_conversion.npz", HERE / "whole_sets.json"
REACHY = HERE.parents[1] / "configs" / "openx" / "lerobot_reachy2.yaml"
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "bridge_rlds/bridge_dataset/1.0.0": ("rlds", {}),
    "lerobot_cr5_banana": ("lerobot", {}),
    "lerobot_v3_apple_storage": ("lerobot", {"conventions": REACHY}),
}


def converted(folder: Path, name: str, output: Path) -> dict[str, np.ndarray]:
    """All steps of a data set in the order of its episodes, and its scale."""
    source, options = SETS[name]
    convert(source, folder / name, output, **options)
    episodes, space = list(read_episodes(output)), asdict(read_action_space(output))
    arrays = {k: np.concatenate([getattr(e, k) for e in episodes]) for k in ("actions", "states", "timestamps")}
    arrays["lengths"] = np.array([len(e) for e in episodes])
    arrays["instructions"] = np.array([e.instruction for e in episodes])
    arrays |= {k: np.array(space[k]) for k in ("q01", "q99")}
    facts = ("kind", "control_rate", "translation", "rotation", "gripper", "binary_gripper")
    return arrays | {"facts": np.array(json.dumps({k: space[k] for k in facts if k in space}))}


def sampled(key: str, value: np.ndarray) -> np.ndarray:
    """What is kept in golden_conversion.npz: of the steps every fourth."""
    return value[::4] if key in ("actions", "states", "timestamps") else value


def summary(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    steps = ("actions", "states", "timestamps", "lengths")
    out: dict[str, Any] = {k: hashlib.sha256(np.ascontiguousarray(arrays[k]).tobytes()).hexdigest()[:32] for k in steps}
    out |= {f"{k}_mean": np.atleast_1d(arrays[k].mean(0, dtype=float)).tolist() for k in ("actions", "states")}
    out |= {k: arrays[k].tolist() for k in ("q01", "q99")}
    return out | {"episodes": len(arrays["lengths"]), "steps": int(arrays["lengths"].sum()), "facts": str(arrays["facts"])}


def main(folder: Path | None, record: bool) -> None:
    with TemporaryDirectory() as temporary:
        stores = {n: converted(folder or HERE, n, Path(temporary) / str(i)) for i, n in enumerate(SETS)}
    if folder is None:
        np.savez_compressed(ARRAYS, **{f"{n}:{k}": sampled(k, v) for n, arrays in stores.items() for k, v in arrays.items()})
        return
    found = {n: summary(arrays) for n, arrays in stores.items()}
    if record:
        WHOLE.write_text(json.dumps(found, indent=1) + "\n")
        return
    recorded = json.loads(WHOLE.read_text())
    different = [(n, k) for n in SETS for k in recorded[n] if recorded[n][k] != found[n][k]]
    print(*(f"{n}: {k} was {recorded[n][k]}, is {found[n][k]}" for n, k in different), sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    paths = [a for a in sys.argv[1:] if a != "--record"]
    main(Path(paths[0]) if paths else None, "--record" in sys.argv)
