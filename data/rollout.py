"""One closed-loop episode in the simulator: the loop that collecting and evaluating share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.envs.base import Env, Privileged
from data.envs.perturb import Nudge, RealTime
from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.history import UNSEEN, Source
from spvla.observation import Observation
from spvla.realtime import BridgePolicy, SimulatedCalls
from spvla.recording import Policy, Record
from spvla.steps import StepInfo
from spvla.store import Episode
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
        self.rng = np.random.default_rng(seed)
        self.strength = self.rng.uniform(0, self.sigma)
        self.dims = list(space.translation or space.continuous)
        self.value = np.zeros(len(self.dims))
        self.push, self.push_left = np.zeros(len(self.dims)), 0

    def __call__(self, action: FloatArray) -> FloatArray:
        """The action (D,) with noise, inside the bounds, environment units."""
        g = self.rng
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
    """A finished episode: what was executed, what the policy's steps cost, and the teacher's labels in the episode.

    Args:
        episode: as recorded.
        steps: the policy's own record.
        outputs: per step what the policy's own VLA said, None where it was not asked.
        nudged: the step at which the object was moved, None if it was not.
    """

    episode: Episode
    steps: list[StepInfo]
    outputs: list[VLAOutput | None]
    nudged: int | None = None

    @property
    def reaction(self) -> int | None:
        """Control steps from the nudge to the VLA's next look at the scene, None without either."""
        if self.nudged is None:
            return None
        return next((i for i, s in enumerate(self.steps[self.nudged :]) if s.called_vla), None)


class Driver(Protocol):
    """Acts in the policy's place, whose action becomes a label: a student whose states a teacher labels."""

    def start(self, instruction: str, seed: int) -> None:
        """Begin an episode."""

    def drive(self, observe: Callable[[], Observation], label: FloatArray, step: int) -> FloatArray:
        """The action (D,) to execute at ``step``, where the policy would do ``label`` (D,); environment units."""


def rollout(
    env: Env,
    policy: Policy,
    *,
    init_state: int | None,
    seed: int,
    noise: ActionNoise | None = None,
    teacher: VLA | None = None,
    driver: Driver | None = None,
    instruction: str | None = None,
    images: bool = False,
    shuffle: bool = False,
    plans: bool = False,
    max_steps: int | None = None,
    real_time: RealTime | None = None,
    nudge: Nudge | None = None,
) -> Rollout:
    """Run ``policy`` from an initial state until success or the step limit.

    Args:
        env: the task's simulation.
        policy: reset here with the task's instruction.
        init_state: index of an official initial state, or None for a reset seeded by ``seed``.
        seed: seed of the reset and of the noise.
        noise: added to the executed action; labels stay clean.
        teacher: labels every step that the policy's own VLA did not act on, and with noise or a driver those that it had
            planned before (never counted as the policy's time).
        driver: acts in the policy's place; the policy's own actions are labels then.
        instruction: what to ask for, and to judge by; None: the task's own. Another one must be the expert's to understand.
        images: keep what the main camera saw at every step, as JPEG; the environment must render.
        shuffle: the objects trade places, see :meth:`data.envs.base.Env.reset`.
        plans: where the policy's own VLA plans, the teacher makes a second plan for the same state.
        max_steps: step limit; None: the suite's.
        real_time: the world moves on while the policy thinks (not to be joined with noise, driver or images); None: it waits.
            In its mode ``bridge`` the policy is one that never waits, and is told to ask in simulated time.
        nudge: the asked object is moved while the hand is on its way.
    """
    instruction = env.task.instruction if instruction is None else instruction
    bridge: BridgePolicy | None = None
    if real_time is not None and real_time.mode == "bridge":
        if not isinstance(policy, BridgePolicy):
            raise InputError("real time: bridge needs a policy that never waits", code="unsupported", field="mode")
        bridge = policy
        bridge.calls = SimulatedCalls(bridge.ledger.counted(bridge.vla), real_time.steps(bridge.space))
    env.reset(init_state, seed, instruction, shuffle)
    policy.reset(instruction)
    if teacher is not None:
        teacher.reset(instruction)
    if noise is not None:
        noise.start(policy.space, seed)
    if driver is not None:
        driver.start(instruction, seed)
    frames: list[bytes] = []
    record = Record()
    outputs: list[VLAOutput | None] = []
    privileged: list[FloatArray] = []
    done = False
    nudged: int | None = None
    limit = max_steps or env.task.max_steps

    def execute(
        action: FloatArray,
        state: FloatArray,
        output: VLAOutput | None,
        source: Source,
        age: int | None = None,
        again: FloatArray | None = None,
    ) -> bool:
        nonlocal nudged
        coin = policy.last_step.propensity if teacher is None else None  # a teacher labels whatever the coin says
        record.add(action, state, output, source, age, coin, again)
        if isinstance(env, Privileged):
            privileged.append(env.environment_state())
        over = env.step(action)
        if nudge is not None and not over and nudge.apply(env, seed):
            nudged = env.steps
        return over

    def act(bridge: BridgePolicy, observe: Callable[[], Observation], state: FloatArray) -> FloatArray:
        """The next action of a policy that never waits. Before its VLA's first answer the robot stands, its gripper as that
        answer will command it."""
        action = bridge.tick(observe, state)
        outputs.append(None if action is None else bridge.last_output)
        for step, answer in bridge.arrived:
            outputs[step] = answer
        if action is not None:
            return action
        assert isinstance(bridge.calls, SimulatedCalls), "set above"
        if bridge.calls.coming is None:
            raise InputError("real time: the VLA could not be asked in simulated time", field="vla")
        return bridge.space.stop(bridge.calls.coming.actions[0])

    while not done and env.steps < limit:
        state = env.state()
        seen: list[Observation] = []

        def observe(seen: list[Observation] = seen) -> Observation:
            if not seen:
                seen.append(env.observe())
            return seen[0]

        if bridge is not None:
            action = act(bridge, observe, state)
        else:
            action = policy.select_action(observe, state=state)
            outputs.append(policy.last_output)
        output, source = outputs[-1], policy.last_step.source
        elsewhere = (driver is not None or noise is not None) and not policy.last_step.called_vla
        if teacher is not None and (output is None or elsewhere):  # a plan's later actions are not for where noise led
            output = teacher.predict(observe())
        again = None
        if plans and teacher is not None and policy.last_step.called_vla:
            again = teacher.predict(observe()).actions[0]
        if driver is not None:
            action = driver.drive(observe, action, env.steps)
            policy.executed(action)
        if noise is not None:
            action = noise(action)
            policy.executed(action)
        if images:
            frames.append(encode_jpeg(observe().require_image()))
        delay = real_time.delay(policy.last_step, policy.space) if real_time and bridge is None else 0
        if real_time and delay:
            held = real_time.held(action, record.actions[-1] if record.actions else None, policy.space)
            policy.executed(held)
            done = execute(held, state, output, source)
            for k in range(1, delay + 1):
                if done or env.steps >= limit:
                    break
                state = env.state()
                policy.waited(now := action if k == delay else held, state)
                done = execute(now, state, None, Source.HELD)
        else:
            done = execute(action, state, output, source, policy.last_step.vla_age, again)
    episode = record.episode(policy.space)
    episode.instruction = instruction
    if images:
        episode.images = {env.camera: frames}
    if privileged:
        episode.environment_states = np.asarray(privileged, np.float32)
    episode.success = bool(env.success)
    return Rollout(episode, list(policy.steps), outputs, nudged)


def deviations(episode: Episode, space: ActionSpace, tolerance: float) -> NDArray[np.bool_]:
    """Per step (T,): generated or kept from an earlier plan, and off the teacher's label by more than the tolerance (False
    where unlabelled)."""
    if episode.vla_actions is None or episode.sources is None:
        return np.zeros(len(episode), bool)
    labelled = np.all(np.isfinite(episode.vla_actions), axis=1)
    reference = np.where(labelled[:, None], episode.vla_actions, episode.actions)
    off: NDArray[np.bool_] = space.deviation(space.normalize(episode.actions), space.normalize(reference), tolerance)
    out: NDArray[np.bool_] = off & labelled & np.isin(episode.sources, UNSEEN)
    return out
