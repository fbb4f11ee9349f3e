"""A controller that decides at each step whether the policy is asked: the gate's own interface in inspect-robots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inspect_robots.controller import _INFER_KEY  # where the rollout reads from how often a policy was asked
from inspect_robots.policy import Policy
from inspect_robots.types import Action, Observation

from inspect_robots_spvla.joint import Joint

_TRIAL = "_spvla_trial"


class SpvlaController:
    """Asks the policy only where the gate says so; else the generator acts. For ``eval(..., controller=SpvlaController(...))``.

    Args:
        export: folder or hf://owner/name of generator and gate, distilled from the policy; None: built-in parts.
        risk: the one knob; the export's default if None.
        space, state_keys: see :class:`~inspect_robots_spvla.joint.Joint`.
        control_hz: where neither the policy nor ``export`` nor ``space`` says it.
        parts: :func:`spvla.accelerate`'s other options, such as ``generator`` and ``gate``.
    """

    def __init__(
        self,
        export: str | None = None,
        risk: float | None = None,
        *,
        space: Mapping[str, Any] | str | None = None,
        state_keys: Sequence[str] | None = None,
        control_hz: float | None = None,
        **parts: Any,
    ) -> None:
        self._options = {"export": export, "risk": risk, "space": space, "state_keys": state_keys, **parts}
        self._control_hz = control_hz
        self.joint: Joint | None = None  # around the policy that acted last

    def next_action(self, policy: Policy, observation: Observation, t: int, store: dict[str, Any]) -> Action:
        """Step ``t``'s action."""
        joint = self.joint
        if joint is None or joint.vla.policy is not policy:
            rate = policy.info.control_hz or self._control_hz
            joint = self.joint = Joint(policy, policy.info.action_space, rate, **self._options)
        if _TRIAL not in store:
            store[_TRIAL] = True
            joint.begin(observation.instruction)
        action, step = joint.act(observation)
        if step.called_vla:
            store.setdefault(_INFER_KEY, []).append((step.milliseconds["vla"] / 1e3, joint.policy.ledger.plan))
        return action
