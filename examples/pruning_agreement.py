r"""How often a VLA with some of its visual tokens acts as it does with all of them, pruning by pruning.

    python -m data collect --suite libero_object --vla nano_vla --tasks 0 3 4 6 7 --init_states 30-31 --images true \
        --output STORE
    python examples/pruning_agreement.py STORE results/nano/pruning/summary.json

Frames are spread evenly over the store. `fused` is a pruning score of one's own: a function in any file, named in the fields.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from spvla.observation import Observation
from spvla.pruning import make_pruner
from spvla.pruning.attention import attention_received
from spvla.pruning.contours import HIGH, LOW
from spvla.store import read_episodes
from spvla.vlas.base import PrunableVLA, VLAOutput
from spvla.vlas.conventions import decode_image
from spvla.vlas.registry import load_vla

FRAMES = 200
HALF = {"speed": "constant", "measure": "ratio", "keep": 0.5}
PRUNINGS = {
    "attention": {**HALF, "contours": False},
    "fused": {**HALF, "contours": False, "score": "pruning_agreement:fused"},
    **{f"contour_fraction {f:g}": {**HALF, "contour_fraction": f} for f in (0.1, 0.25, 0.5)},
}


def fused(queries: torch.Tensor, keys: torch.Tensor, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Ranks by attention and by the number of edge pixels, summed: (B, N), rows sum to 1."""
    attention = attention_received(queries, keys)
    grid = round(attention.shape[1] ** 0.5)
    edges = [cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), LOW, HIGH) for image in images]
    counts = [cv2.resize(e.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA).ravel() for e in edges]
    pixels = torch.from_numpy(np.stack(counts)).to(attention)
    ranks = attention.argsort(1).argsort(1).float() + pixels.argsort(dim=1, stable=True).argsort(1)
    return ranks / ranks.sum(1, keepdim=True)


def tokens_of(output: VLAOutput) -> np.ndarray:
    """The first action's tokens (D,)."""
    assert output.tokens is not None
    return output.tokens[0]


def main(store: str, output: str) -> None:
    vla = load_vla("nano_vla")
    assert isinstance(vla, PrunableVLA)
    pruned = {}
    for name, fields in PRUNINGS.items():
        pruner = make_pruner(fields)
        assert pruner is not None
        pruned[name] = vla.with_pruner(pruner.selector)
    episodes = list(read_episodes(store))
    total = sum(len(e.actions) for e in episodes)
    chosen = set(np.linspace(0, total - 1, FRAMES).astype(int).tolist())
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in ("all", *pruned)}
    kept: dict[str, list[np.ndarray]] = {name: [] for name in pruned}
    at = 0
    for episode in episodes:
        (images,) = episode.images.values()
        for policy in (vla, *pruned.values()):
            policy.reset(episode.instruction)
        for i in range(len(episode.actions)):
            if at + i in chosen:
                seen = Observation({"image": decode_image(images[i])})
                tokens["all"].append(tokens_of(vla.predict(seen)))
                for name, policy in pruned.items():
                    made = policy.predict(seen, 0.5)
                    tokens[name].append(tokens_of(made))
                    assert made.kept_tokens is not None
                    kept[name].append(made.kept_tokens)
        at += len(episode.actions)
    whole = np.stack(tokens["all"])  # (F, D)
    rows = []
    for name in pruned:
        off = np.abs(np.stack(tokens[name]) - whole)
        others = [len(set(a.tolist()) - set(b.tolist())) for a, b in zip(kept[name], kept["attention"], strict=True)]
        row: dict[str, float] = {
            "visual_tokens_mean": float(np.mean([len(k) for k in kept[name]])),
            "tokens_that_attention_drops_mean": float(np.mean(others)),
            "action_equal": float((off == 0).all(1).mean()),
            "action_within_one_bin": float((off <= 1).all(1).mean()),
            "action_tokens_equal": float((off == 0).mean()),
            "bins_off_mean": float(off.mean()),
            "gripper_equal": float((off[:, -1] == 0).mean()),
        }
        rows.append({"pruning": name, **row})
        print(name, "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    command = f"python examples/pruning_agreement.py STORE {output}"
    facts = {"kind": "pruning_agreement", "rows": rows, "frames": len(whole), "episodes": len(episodes), "command": command}
    Path(output).write_text(json.dumps({**facts, "prunings": PRUNINGS}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
