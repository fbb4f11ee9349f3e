"""One closed-loop episode in the simulator: the loop that collecting and evaluating share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.expert import parse_goal, predicates
from data.libero import CAMERA, LiberoEnv, LiberoObservation
from spvla.actions import ActionSpace, FloatArray
from spvla.episodes import Episode
from spvla.errors import InputError
from spvla.history import Source
from spvla.policy import SPVLAPolicy, StepInfo, record_to_episode
from spvla.vlas.base import VLA, VLAOutput
from spvla.vlas.conventions import encode_jpeg


@dataclass
class ActionNoise:
    """Exploration noise on the executed action: an Ornstein-Uhlenbeck process and random pushes.

    It is drawn for the continuous dimensions in normalised units and scaled by the action's own speed, so that slow,
    precise phases stay precise. The strength differs from episode to episode, up to ``sigma``.

    Args:
        sigma: largest standard deviation of the process.
        rho: its correlation from step to step.
        push_probability: chance per step that a push of 3 to 8 steps begins.
    """

    sigma: float
    rho: float = 0.8
    push_probability: float = 0.03

    def start(self, space: ActionSpace, seed: int) -> None:
        """Begin an episode with its own seed."""
        self.space = space
        self.generator = np.random.default_rng(seed)
        self.strength = self.generator.uniform(0, self.sigma)
        self.dims = list(space.translation or space.continuous)
        self.value = np.zeros(len(self.dims))
        self.push, self.push_left = np.zeros(len(self.dims)), 0

    def __call__(self, action: FloatArray) -> FloatArray:
        """The action (D,) with noise, inside the bounds, environment units."""
        g = self.generator
        innovation = np.sqrt(1 - self.rho**2) * self.strength
        self.value = self.rho * self.value + innovation * g.standard_normal(len(self.dims))
        if self.push_left == 0 and g.random() < self.push_probability:
            self.push, self.push_left = self.strength * 2 * g.standard_normal(len(self.dims)), int(g.integers(3, 9))
        self.push_left = max(0, self.push_left - 1)
        normalized = self.space.normalize(action)
        speed = min(1.0, float(np.abs(normalized[self.dims]).max()) / 0.5)
        normalized[self.dims] += speed * (self.value + (self.push if self.push_left else 0.0))
        return self.space.clip(self.space.denormalize(np.clip(normalized, -1, 1)))


@dataclass(frozen=True)
class Rollout:
    """A finished episode: what was executed, what the policy's steps cost, and the teacher's labels in the episode."""

    episode: Episode
    steps: list[StepInfo]


class Driver(Protocol):
    """Acts in the policy's place, whose action becomes a label: a student whose states a teacher labels."""

    def start(self, instruction: str, seed: int) -> None:
        """Begin an episode."""

    def drive(self, observe: Callable[[], LiberoObservation], label: FloatArray, step: int) -> FloatArray:
        """The action (D,) to execute at ``step``, where the policy would do ``label`` (D,); environment units."""


def rollout(
    env: LiberoEnv,
    policy: SPVLAPolicy,
    *,
    init_state: int | None,
    seed: int,
    noise: ActionNoise | None = None,
    teacher: VLA | None = None,
    driver: Driver | None = None,
    instruction: str | None = None,
    images: bool = False,
    shuffle: bool = False,
    max_steps: int | None = None,
) -> Rollout:
    """Run ``policy`` from an initial state until success or the step limit.

    Args:
        env: the task's simulation.
        policy: reset here with the task's instruction.
        init_state: index of an official initial state, or None for a reset seeded by ``seed``.
        seed: seed of the reset and of the noise.
        noise: added to the executed action; labels stay clean.
        teacher: labels every step that the policy's own VLA did not act on (never counted as the policy's time).
        driver: acts in the policy's place; the policy's own actions are labels then.
        instruction: what to ask for, and to judge by; None: the task's own. Another one must be the expert's to understand.
        images: keep what the camera saw at every step, as JPEG; the environment must render.
        shuffle: the objects, all but the one that things are placed in or on, trade places.
        max_steps: step limit; None: the suite's.
    """
    own = instruction is None or instruction == env.task.instruction
    instruction = env.task.instruction if instruction is None else instruction
    goal = None if own else predicates(parse_goal(instruction, env.scene))
    place = env.scene.body_of(parse_goal(instruction, env.scene).place) if shuffle else None
    env.reset(init_state, seed, goal, [name for name in env.scene.movable if name != place] if shuffle else ())
    policy.reset(instruction)
    if teacher is not None:
        teacher.reset(instruction)
    if noise is not None:
        noise.start(policy.space, seed)
    if driver is not None:
        driver.start(instruction, seed)
    frames: list[bytes] = []
    actions: list[FloatArray] = []
    states: list[FloatArray | None] = []
    labels: list[VLAOutput | None] = []
    privileged: list[FloatArray] = []
    done = False
    while not done and env.steps < (max_steps or env.task.max_steps):
        state = env.state()
        seen: list[LiberoObservation] = []

        def observe(seen: list[LiberoObservation] = seen) -> LiberoObservation:
            if not seen:
                seen.append(env.observe())
            return seen[0]

        action = policy.select_action(observe, state=state)
        output = policy.last_output
        if output is None and teacher is not None:
            output = teacher.predict(observe())
        if driver is not None:
            action = driver.drive(observe, action, env.steps)
            policy.executed(action)
        if noise is not None:
            action = noise(action)
            policy.executed(action)
        actions.append(action)
        states.append(state)
        labels.append(output)
        if images:
            frames.append(encode_jpeg(observe().require_image()))
        privileged.append(env.privileged().to_vector())
        done = env.step(action)
    episode = record_to_episode(actions, states, labels, policy.steps, policy.space)
    episode.instruction = instruction
    if images:
        episode.images = {CAMERA: frames}
    episode.environment_states = np.asarray(privileged, np.float32)
    episode.success = bool(done)
    return Rollout(episode, list(policy.steps))


def deviations(episode: Episode, space: ActionSpace, tolerance: float) -> NDArray[np.bool_]:
    """Per step (T,): generated, and off the teacher's label by more than the tolerance (False where unlabelled)."""
    if episode.vla_actions is None or episode.sources is None:
        return np.zeros(len(episode), bool)
    labelled = np.all(np.isfinite(episode.vla_actions), axis=1)
    reference = np.where(labelled[:, None], episode.vla_actions, episode.actions)
    off: NDArray[np.bool_] = space.deviation(space.normalize(episode.actions), space.normalize(reference), tolerance)
    out: NDArray[np.bool_] = off & labelled & (episode.sources == Source.GENERATOR)
    return out


def scene_facts(env: LiberoEnv, instruction: str) -> dict[str, Any]:
    """What makes recorded images and environment states readable, JSON-ready.

    Returns ``bodies`` (their order in the environment state), ``centres`` (see :meth:`data.libero.Scene.centres`), ``camera``
    (its projection, see :func:`data.libero.project`), and the bodies asked for, ``item`` and ``place``, None where the
    expert does not understand the instruction.
    """
    scene = env.scene
    try:
        goal = parse_goal(instruction, scene)
        item, place = goal.item, scene.body_of(goal.place)
    except InputError:
        item, place = None, None
    return {
        "bodies": list(scene.names),
        "centres": scene.centres().round(4).tolist(),
        "camera": env.camera_matrix().round(5).tolist(),
        "item": item,
        "place": place,
    }
