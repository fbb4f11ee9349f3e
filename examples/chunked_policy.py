"""A small chunked policy for LIBERO, trained here: eight actions a plan, from privileged poses.

Policies such as ACT, pi0 or CogACT plan a chunk of actions, execute it, and plan again. This one is the smallest of
them that can be trained in a minute, so that scheduling between chunks can be tried and measured on any machine:

    python -m data collect --suite libero_object --vla expert --init_states 0-19 --noise 0.4 --output runs/rollouts
    python examples/chunked_policy.py --data runs/rollouts --output runs/chunked
    python -m data collect --suite libero_object --vla examples.chunked_policy:load --checkpoint runs/chunked \
        --init_states 0-29 --noise 0.2 --output runs/chunked_rollouts
    python -m train distill --data runs/chunked_rollouts --output runs/chunked_export
    python -m eval closed_loop --suite libero_object --vla examples.chunked_policy:load --checkpoint runs/chunked \
        --export runs/chunked_export --output runs/results/chunked
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from data.envs.libero.env import LiberoEnv
from data.envs.libero.goals import parse_goal
from data.envs.libero.scene import LiberoObservation, PrivilegedState
from data.envs.libero.tasks import load_tasks
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.generators.learned import MLP
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput

CHUNK, WIDTH, INPUTS = 8, 256, 15
WEIGHTS = "model.safetensors"


def inputs(state: PrivilegedState, instruction: str) -> NDArray[np.float32]:
    """What the policy sees: hand and fingers, the asked object's bounds and the place seen from the hand, (15,), dm."""
    goal = parse_goal(instruction, state.scene)
    bounds = state.bounds(goal.item)
    place, half = state.region(goal.place)
    hand = state.eef_position
    low, high = bounds[:, 0].min(0) - hand, bounds[:, 1].max(0) - hand
    parts = [hand, [10 * state.finger_gap], low, high, place - hand, [half[2]], [np.linalg.norm((low + high) / 2)]]
    return (10 * np.concatenate(parts)).astype(np.float32)


class ChunkedPolicy:
    """Plans :data:`CHUNK` actions at a time. A VLA in all but its eyes."""

    needs_images = False
    action_space = LIBERO

    def __init__(self, network: MLP) -> None:
        self.network = network.eval()
        self.instruction = ""

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.instruction = instruction

    @torch.inference_mode()
    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """The next :data:`CHUNK` actions."""
        if not isinstance(observation, LiberoObservation):
            raise InputError("chunked policy: needs LIBERO's privileged state")
        x = torch.from_numpy(inputs(observation.privileged, self.instruction))[None]
        actions = self.network(x).view(CHUNK, LIBERO.dim).numpy().clip(-1, 1)
        return VLAOutput(LIBERO.snap_gripper(actions))


def load(checkpoint: str | None = None) -> ChunkedPolicy:
    """The trained policy in the folder ``checkpoint``."""
    path = Path(checkpoint or "") / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path}: missing; train it with examples/chunked_policy.py")
    network = MLP([INPUTS, WIDTH, WIDTH, WIDTH, CHUNK * LIBERO.dim])
    network.load_state_dict(load_file(path))
    return ChunkedPolicy(network)


def examples(data: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs (N, 15) and the teacher's next actions (N, CHUNK, 7) of a rollout store; the last one repeats at the end."""
    from spvla.store import read_episodes

    scenes = {}
    x, y = [], []
    for episode in read_episodes(data):
        where = (episode.metadata["suite"], episode.metadata["task"])
        if where not in scenes:
            with LiberoEnv(load_tasks(where[0], [where[1]])[0]) as env:
                scenes[where] = env.scene
        assert episode.environment_states is not None and episode.vla_actions is not None
        states = [PrivilegedState.from_vector(s, scenes[where]) for s in episode.environment_states]
        x.append(np.stack([inputs(s, episode.instruction) for s in states]))
        ahead = np.minimum(np.arange(len(episode))[:, None] + np.arange(CHUNK), len(episode) - 1)
        y.append(episode.vla_actions[ahead])
    return np.concatenate(x), np.concatenate(y)


def train(data: Path, output: Path, steps: int = 6000, batch_size: int = 512, seed: int = 0) -> None:
    """Behaviour cloning of whole chunks.

    Args:
        data: rollout store of the scripted expert.
        output: folder for the weights.
        steps: optimiser steps.
        batch_size: examples per step.
        seed: of weights and order.
    """
    from tqdm import tqdm

    torch.manual_seed(seed)
    x, y = (torch.from_numpy(a) for a in examples(data))
    network = MLP([INPUTS, WIDTH, WIDTH, WIDTH, CHUNK * LIBERO.dim])
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    with tqdm(range(steps), unit="step") as bar:
        for step in bar:
            rows = torch.randint(len(x), (batch_size,))
            loss = nn.functional.smooth_l1_loss(network(x[rows]).view(-1, CHUNK, LIBERO.dim), y[rows], beta=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    output.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), output / WEIGHTS)
    print(f"written: {output / WEIGHTS}")


if __name__ == "__main__":
    import sys

    from jsonargparse import auto_cli

    from spvla.cli import guard

    sys.exit(guard(lambda: auto_cli(train, as_positional=False)))
