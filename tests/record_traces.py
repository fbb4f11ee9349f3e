"""Record what the packaged policies do, step by step: ``python -m tests.record_traces``.

A trace holds what a policy was given (proprioception, the VLA's answers or the images it saw) and what it did (actions,
who made them, the gate's probability), so that ``tests/test_traces.py`` can replay it without a simulator. Record again
only when a change of behaviour is intended.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

import spvla
from data.envs import load_tasks, make_env
from data.envs.base import Env
from spvla.vlas.registry import load_vla

SUITE = "libero_object"
TRACES = Path(__file__).parent / "data" / "traces.npz"
EXPERT_CELLS = (
    ("generator_libero_expert", {"generator": "mlp", "gate": "learned", "risk": 0.05}),
    ("generator_libero_expert", {"generator": "transformer", "gate": "learned", "risk": 0.1}),
    ("generator_libero_expert", {"generator": "ridge", "gate": "learned", "risk": 0.1}),
    (None, {"generator": "ridge", "gate": "release"}),
    (None, {"generator": "ridge_paper", "gate": "paper"}),
)
NANO_CELLS = (
    (None, {"generator": "none"}, 3),
    ("generator_nano", {"pruning": {"speed": "constant", "measure": "ratio", "keep": 0.5, "contours": False}}, 24),
)


def record_expert(env: Env) -> dict[str, np.ndarray]:
    """The scripted teacher's traces: states (T, 8), its answer at every state (T, 7), and what each cell did."""
    out = {}
    for i, (export, options) in enumerate(EXPERT_CELLS):
        policy, teacher = (
            spvla.accelerate(load_vla("expert", suite=SUITE), export, **options),
            load_vla("expert", suite=SUITE),
        )
        env.reset(30, seed=30)
        policy.reset(env.task.instruction)
        teacher.reset(env.task.instruction)
        rows: dict[str, list] = {"states": [], "labels": [], "actions": []}
        while not env.success and env.steps < env.task.max_steps:
            observation = env.observe()
            rows["states"].append(observation.state)
            rows["labels"].append(teacher.predict(observation).actions[0])
            rows["actions"].append(policy.select_action(observation))
            env.step(rows["actions"][-1])
        assert env.success
        out |= {f"expert{i}/{k}": np.array(v, np.float32) for k, v in rows.items()} | _steps(f"expert{i}", policy)
    return out


def record_nano(env: Env) -> dict[str, np.ndarray]:
    """The small VLA's traces: images as PNG, at the steps at which it was asked."""
    out = {}
    for i, (export, options, steps) in enumerate(NANO_CELLS):
        policy = spvla.accelerate(load_vla("nano_vla"), export, **options)
        env.reset(30, seed=30)
        policy.reset(env.task.instruction)
        rows: dict[str, list] = {"states": [], "actions": []}
        images = []
        for _ in range(steps):

            def observe(images=images):
                seen = env.observe()
                images.append(cv2.imencode(".png", seen.image)[1])
                return seen

            rows["states"].append(env.state())
            rows["actions"].append(policy.select_action(observe, state=rows["states"][-1]))
            env.step(rows["actions"][-1])
        out |= {f"nano{i}/{k}": np.array(v, np.float32) for k, v in rows.items()} | _steps(f"nano{i}", policy)
        out[f"nano{i}/images"] = np.concatenate([image.ravel() for image in images])
        out[f"nano{i}/image_sizes"] = np.array([image.size for image in images])
    return out


def _steps(name: str, policy: spvla.SPVLAPolicy) -> dict[str, np.ndarray]:
    probability = [np.nan if s.probability is None else s.probability for s in policy.steps]
    return {
        f"{name}/sources": np.array([s.source for s in policy.steps], np.uint8),
        f"{name}/reasons": np.array([s.reason for s in policy.steps]),
        f"{name}/probability": np.array(probability, np.float32),
    }


if __name__ == "__main__":
    task = load_tasks(SUITE, [0])[0]
    with make_env(task, render="fast") as env:
        found = record_expert(env) | record_nano(env)
    np.savez_compressed(TRACES, **found)
    print(f"{TRACES}: {TRACES.stat().st_size / 1e3:.0f} kB, {sum(k.endswith('/sources') for k in found)} traces")
