"""A VLA that plans in chunks and contradicts itself in a known way, and rollouts of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spvla.actions import LIBERO
from spvla.observation import Observation
from spvla.store import Episode, RolloutWriter
from spvla.vlas.base import VLAOutput

PLAN = 8


def fresh(step: int) -> np.ndarray:
    """What a fresh plan begins with at a step: a slow wave, the gripper closing in its second half."""
    action = np.zeros(LIBERO.dim, np.float32)
    action[0], action[6] = 0.5 * np.sin(step / 5), 1.0 if step % 40 >= 20 else -1.0
    return action


def plan(step: int, drift: float) -> np.ndarray:
    """A plan (PLAN, D) made at a step: its action of age k is off by ``k * drift`` from a fresh one."""
    out = np.stack([fresh(step + k) for k in range(PLAN)])
    out[:, 1] = drift * np.arange(PLAN)
    return out


class DriftingVLA:
    """Plans ahead as :func:`plan` has it; ``now`` is the control step."""

    needs_images = False
    action_space = LIBERO

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.now, self.asked = drift, 0, []

    def reset(self, instruction: str) -> None:
        self.asked = []

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        self.asked.append(self.now)
        return VLAOutput(plan(self.now, self.drift))


def play(policy, vla, steps: int) -> np.ndarray:
    """Run a policy for some steps of an episode; its actions (steps, D)."""
    policy.reset("go")
    out = []
    for vla.now in range(steps):
        out.append(policy.select_action(Observation(None, np.full(3, vla.now / 40, np.float32))))
    return np.array(out)


def drifting_episode(seed: int, drift: float, steps: int = 45, doubt: float = 0.0) -> Episode:
    """Whole plans executed one after another, with a fresh one at every state. At every second state the VLA was asked again,
    and the answer was off by ``doubt`` half of those times."""
    plans = np.stack([plan(t, drift) for t in range(steps)])
    ages = np.arange(steps) % PLAN
    again = np.full((steps, LIBERO.dim), np.nan, np.float32)
    asked = np.arange(0, steps, 2)
    again[asked] = plans[asked, 0]
    again[asked[::2], 2] += doubt
    actions = plans[np.arange(steps) - ages, ages]
    return Episode(
        actions,
        "go",
        np.arange(steps) / 20,
        states=np.repeat(np.arange(steps, dtype=np.float32)[:, None] / 40, 3, axis=1) + 0.001 * seed,
        sources=np.where(ages == 0, 0, 3).astype(np.uint8),
        vla_actions=plans[:, 0].copy(),
        vla_plans=plans.reshape(steps, -1),
        vla_again=again,
        success=True,
        metadata={"suite": "libero_synthetic", "task": 0, "init_state": seed % 30},
    )


def drifting_store(folder: Path, drift: float, episodes: int = 30, doubt: float = 0.0) -> Path:
    """A store of such episodes: initial states 0-29, so a third is for calibration."""
    writer = RolloutWriter(folder, LIBERO, policy="drifting")
    for seed in range(episodes):
        writer.write(f"job-{seed:03d}", [drifting_episode(seed, drift, doubt=doubt)])
    return writer.finalize()
