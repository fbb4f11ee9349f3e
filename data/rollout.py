"""One closed-loop episode in the simulator: the loop that collecting and evaluating share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
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
    limit = max_steps or env.task.max_steps
    loop = _Loop(env, policy, seed, limit, noise, teacher, driver, images, plans, real_time, bridge, nudge)
    while not loop.over:
        loop.step()
    return loop.finished(instruction)


@dataclass(eq=False)
class _Loop:
    """A running episode: environment, policy and teacher are reset; what happens is kept step by step."""

    env: Env
    policy: Policy
    seed: int
    limit: int
    noise: ActionNoise | None
    teacher: VLA | None
    driver: Driver | None
    images: bool
    plans: bool
    real_time: RealTime | None
    bridge: BridgePolicy | None
    nudge: Nudge | None
    record: Record = field(default_factory=Record)
    outputs: list[VLAOutput | None] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    privileged: list[FloatArray] = field(default_factory=list)
    done: bool = False
    nudged: int | None = None

    @property
    def over(self) -> bool:
        return self.done or self.env.steps >= self.limit

    def step(self) -> None:
        """One decision of the policy, and the control step that it takes; more than one where the world moves on meanwhile."""
        env, policy = self.env, self.policy
        state = env.state()
        observe = functools.cache(env.observe)
        action = self._selected(observe, state) if self.bridge is None else self._bridged(observe, state)
        output, again = self._labels(observe)
        if self.driver is not None:
            action = self.driver.drive(observe, action, env.steps)
            policy.executed(action)
        if self.noise is not None:
            action = self.noise(action)
            policy.executed(action)
        if self.images:
            self.frames.append(encode_jpeg(observe().require_image()))
        delay = self.real_time.delay(policy.last_step, policy.space) if self.real_time and self.bridge is None else 0
        if delay:
            self._late(action, state, output, delay)
        else:
            self._execute(action, state, output, policy.last_step.source, policy.last_step.vla_age, again)

    def _selected(self, observe: Callable[[], Observation], state: FloatArray) -> FloatArray:
        action = self.policy.select_action(observe, state=state)
        self.outputs.append(self.policy.last_output)
        return action

    def _bridged(self, observe: Callable[[], Observation], state: FloatArray) -> FloatArray:
        """The next action of a policy that never waits. Before its VLA's first answer the robot stands, its gripper as that
        answer will command it."""
        bridge = self.bridge
        assert bridge is not None and isinstance(bridge.calls, SimulatedCalls), "set by rollout"
        action = bridge.tick(observe, state)
        self.outputs.append(None if action is None else bridge.last_output)
        for step, answer in bridge.arrived:
            self.outputs[step] = answer
        if action is not None:
            return action
        if bridge.calls.coming is None:
            raise InputError("real time: the VLA could not be asked in simulated time", field="vla")
        return bridge.space.stop(bridge.calls.coming.actions[0])

    def _labels(self, observe: Callable[[], Observation]) -> tuple[VLAOutput | None, FloatArray | None]:
        """What the VLA would do now, said by itself or by the teacher, and the first action of a second plan."""
        output, called = self.outputs[-1], self.policy.last_step.called_vla
        if self.teacher is None:
            return output, None
        elsewhere = (self.driver is not None or self.noise is not None) and not called
        if output is None or elsewhere:  # a plan's later actions are not for where noise led
            output = self.teacher.predict(observe())
        again = self.teacher.predict(observe()).actions[0] if self.plans and called else None
        return output, again

    def _late(self, action: FloatArray, state: FloatArray, output: VLAOutput | None, delay: int) -> None:
        """The answer comes ``delay`` control steps late: until then the robot holds."""
        assert self.real_time is not None
        policy = self.policy
        held = self.real_time.held(action, self.record.actions[-1] if self.record.actions else None, policy.space)
        policy.executed(held)
        self._execute(held, state, output, policy.last_step.source)
        for k in range(1, delay + 1):
            if self.over:
                return
            state = self.env.state()
            policy.waited(now := action if k == delay else held, state)
            self._execute(now, state, None, Source.HELD)

    def _execute(
        self,
        action: FloatArray,
        state: FloatArray,
        output: VLAOutput | None,
        source: Source,
        age: int | None = None,
        again: FloatArray | None = None,
    ) -> None:
        coin = self.policy.last_step.propensity if self.teacher is None else None  # a teacher labels whatever the coin says
        self.record.add(action, state, output, source, age, coin, again)
        if isinstance(self.env, Privileged):
            self.privileged.append(self.env.environment_state())
        self.done = self.env.step(action)
        if self.nudge is not None and not self.done and self.nudge.apply(self.env, self.seed):
            self.nudged = self.env.steps

    def finished(self, instruction: str) -> Rollout:
        """The episode as recorded."""
        episode = self.record.episode(self.policy.space)
        episode.instruction = instruction
        if self.images:
            episode.images = {self.env.camera: self.frames}
        if self.privileged:
            episode.environment_states = np.asarray(self.privileged, np.float32)
        episode.success = bool(self.env.success)
        return Rollout(episode, list(self.policy.steps), self.outputs, self.nudged)


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
