"""An inspect-robots policy in the VLA's place: what the policy ``spvla`` and the controller share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from inspect_robots.policy import Policy
from inspect_robots.spaces import Box
from inspect_robots.types import Action
from inspect_robots.types import Observation as Seen

from spvla import ActionSpace, InputError, Observation, StepInfo, VLAOutput, accelerate, load_export
from spvla.actions import FloatArray, read_space

KINDS = {  # inspect-robots's control modes as spvla's
    "eef_delta_pose": "eef_delta",
    "eef_delta_pos": "eef_delta",
    "eef_abs_pose": "eef_absolute",
    "joint_pos": "joint_position",
    "joint_vel": "joint_velocity",
    "joint_delta": "joint_delta",
}
ROTATIONS = {"none": 0, "axis_angle": 3, "euler_xyz": 3, "quat_wxyz": 4, "quat_xyzw": 4, "rot6d": 6}  # dimensions
GRIPPERS = {"none": 0, "binary": 1, "continuous": 1}


def space_of(box: Box, rate: float | None, name: str) -> ActionSpace:
    """The action space of a box with bounds and semantics: one arm, as position, rotation and gripper, or joints.

    Raises:
        InputError: the box says too little, or is laid out in another way (code ``needs-space``).
    """
    meant, missing = box.semantics, None
    if meant is None or box.low is None or box.high is None:
        missing = "its action space has no semantics or no bounds"
    elif rate is None:
        missing = "nobody says its control rate"
    if missing is not None:
        raise InputError(f"{name}: {missing}; give space", code="needs-space", field="space")
    assert meant is not None and box.low is not None and box.high is not None and rate is not None
    kind, grippers = KINDS[meant.control_mode], GRIPPERS[meant.gripper]
    at_hand = kind.startswith("eef")
    positions = min(3, box.dim - grippers) if at_hand else box.dim - grippers
    rotations = ROTATIONS[meant.rotation_repr] if at_hand else 0
    if positions + rotations + grippers != box.dim:
        told = f"{name}: {box.dim} dimensions are not {positions} of position, {rotations} of rotation and {grippers} gripper"
        raise InputError(f"{told}; give space", code="needs-space", field="space")
    low, high = tuple(map(float, box.low)), tuple(map(float, box.high))
    return ActionSpace(
        name=name,
        kind=kind,
        control_rate=rate,
        q01=low,
        q99=high,
        low=low,
        high=high,
        translation=tuple(range(positions)) if at_hand else (),
        rotation=tuple(range(positions, positions + rotations)),
        gripper=tuple(range(box.dim - grippers, box.dim)),
        binary_gripper=meant.gripper == "binary",
    )


class BaseVLA:
    """A policy of inspect-robots as :class:`~spvla.VLA`. It is shown inspect-robots's own observation, with all it holds."""

    needs_images = False

    def __init__(self, policy: Policy, space: ActionSpace) -> None:
        self.policy, self.action_space = policy, space
        self.seen: Seen | None = None  # set before each step

    def reset(self, instruction: str) -> None:
        """Start an episode: inspect-robots has reset the policy with its scene."""

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """The policy's chunk as a plan."""
        assert self.seen is not None, "a step sets it"
        return VLAOutput(np.stack([np.asarray(action.data, np.float32) for action in self.policy.act(self.seen).actions]))


class Joint:
    """A base policy with its generator and gate.

    Args:
        base: any policy.
        box, rate: of its actions, where neither ``export`` nor ``space`` says them.
        export: folder or hf://owner/name; None: built-in parts.
        space: see :func:`~spvla.actions.read_space`; None: the export's, else from ``box``.
        state_keys: proprioception entries that make up the state, in this order; None: all that are observed, by name.
        parts: :func:`~spvla.accelerate`'s other options.
    """

    def __init__(
        self,
        base: Policy,
        box: Box,
        rate: float | None,
        export: str | None = None,
        space: Mapping[str, Any] | str | None = None,
        state_keys: Sequence[str] | None = None,
        **parts: Any,
    ) -> None:
        loaded = None if export is None else load_export(export)
        if space is not None:
            acts = read_space(space)
        else:
            acts = space_of(box, rate, base.info.name) if loaded is None else loaded.space
        if acts.dim != box.dim:
            raise InputError(f"{base.info.name}: {box.dim} action dimensions, but {acts.name} has {acts.dim}", field="export")
        self.state_keys = None if state_keys is None else list(state_keys)
        self.vla = BaseVLA(base, acts)
        self.policy = accelerate(self.vla, loaded, **parts)

    def begin(self, instruction: str | None) -> None:
        """Start an episode."""
        self.policy.reset(instruction or "")

    def act(self, observation: Seen) -> tuple[Action, StepInfo]:
        """The next action, and how it came about."""
        self.vla.seen = observation
        state = self._state(observation.state)
        action: FloatArray = self.policy.select_action(lambda: Observation(state=state), state)
        step = self.policy.last_step
        meta = {"source": step.source.name.lower(), "reason": step.reason, "called_base": step.called_vla}
        return Action(np.asarray(action, np.float64), meta), step

    def _state(self, state: Mapping[str, Any]) -> FloatArray | None:
        keys = sorted(state) if self.state_keys is None else self.state_keys
        if missing := [key for key in keys if key not in state]:
            has = ", ".join(state) or "nothing"
            raise InputError(f"state_keys: {missing[0]!r} is not observed; there is: {has}", field="state_keys")
        return np.concatenate([np.ravel(np.asarray(state[key], np.float32)) for key in keys]) if keys else None
