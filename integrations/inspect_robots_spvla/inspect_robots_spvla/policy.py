"""The policy ``spvla``: any registered policy, asked only where it has to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from inspect_robots.embodiment import EmbodimentInfo
from inspect_robots.policy import PolicyConfig, PolicyInfo
from inspect_robots.registry import resolve
from inspect_robots.rollout import TrialRecord
from inspect_robots.scene import Scene
from inspect_robots.spaces import ObservationSpace
from inspect_robots.types import ActionChunk, Observation

from inspect_robots_spvla.joint import Joint
from spvla import InputError
from spvla.files import parse_object
from spvla.recording import Recorder


class SpvlaPolicy:
    """Acts in chunks of one step, so that inspect-robots's default controller asks it at every step; it then decides itself
    whether the base is asked.

    Args:
        base: the registered name of the policy.
        base_options: its options, or these as JSON, for a command line.
        export: folder or hf://owner/name of generator and gate, distilled from the base; None: built-in parts.
        risk: the one knob; the export's default if None.
        space, state_keys: see :class:`~inspect_robots_spvla.joint.Joint`; the keys also as one text, with commas.
        record: folder of a rollout store for finished trials, to distil from.
        parts: :func:`spvla.accelerate`'s other options; ``generator="none"`` leaves every step to the base.
    """

    def __init__(
        self,
        base: str,
        base_options: Mapping[str, Any] | str | None = None,
        export: str | None = None,
        risk: float | None = None,
        *,
        space: Mapping[str, Any] | str | None = None,
        state_keys: Sequence[str] | str | None = None,
        record: str | None = None,
        **parts: Any,
    ) -> None:
        if base == "spvla":
            raise InputError("base: 'spvla' cannot be its own base", field="base")
        if isinstance(base_options, str):
            base_options = parse_object(base_options, "base_options")
        if isinstance(state_keys, str):
            state_keys = [key.strip() for key in state_keys.split(",")]
        self.base = resolve("policy", base, **(base_options or {}))
        self._options = {"export": export, "risk": risk, "space": space, "state_keys": state_keys, "record": record, **parts}
        theirs = self.base.info
        read = theirs.observation_space
        if state_keys is not None and not set(state_keys) <= read.state_keys:
            read = ObservationSpace(read.cameras, read.state_keys | frozenset(state_keys))
        self.info = PolicyInfo(f"spvla({theirs.name})", theirs.action_space, read, theirs.control_hz, theirs.checkpoint)
        self.config = PolicyConfig(action_horizon=1, temperature=self.base.config.temperature)
        self._box, self._rate = theirs.action_space, theirs.control_hz
        self.joint: Joint | None = None

    def bind(self, embodiment_info: EmbodimentInfo) -> None:
        """Learn the embodiment's bounds and control rate, where the base does not say them."""
        self._forward("bind", embodiment_info)
        self._box = embodiment_info.action_space if self._box.low is None else self._box
        self._rate = self._rate or embodiment_info.control_hz

    def bind_task(self, envelope: Any) -> None:
        """For the base."""
        self._forward("bind_task", envelope)

    def on_trial_start(self, scene_id: str, epoch: int, log_dir: str, run_id: str) -> None:
        """For the base."""
        self._forward("on_trial_start", scene_id, epoch, log_dir, run_id)

    def reset(self, scene: Scene) -> None:
        """Begin a scene."""
        self.base.reset(scene)
        if self.joint is None:
            self.joint = Joint(self.base, self._box, self._rate, **self._options)
        self.joint.begin(scene.instruction)

    def act(self, observation: Observation) -> ActionChunk:
        """The next action."""
        if self.joint is None:
            raise InputError("spvla: reset(scene) has to come first")
        start = perf_counter()
        action, _ = self.joint.act(observation)
        return ActionChunk([action], control_hz=self._rate, inference_latency_s=perf_counter() - start)

    def on_trial_end(self, record: TrialRecord, log_dir: str, run_id: str) -> None:
        """Note in the log what was asked, and write the episode if it is recorded."""
        self._forward("on_trial_end", record, log_dir, run_id)
        if self.joint is None:
            return
        record.metadata["spvla"] = self._counts()
        success = record.termination_reason == "success" if record.terminated else None
        self.joint.policy.finish(success, scene=record.scene_id, seed=record.seed)

    def transcript(self) -> dict[str, Any]:
        """Who acted how often in this trial, and the base's own transcript."""
        return {"spvla": self._counts(), "base": self._forward("transcript")}

    def close(self) -> None:
        """Finish the store of what was recorded."""
        if self.joint is not None and isinstance(self.joint.policy, Recorder):
            self.joint.policy.close()

    def _counts(self) -> dict[str, int]:
        stats = {} if self.joint is None else self.joint.policy.stats()
        return {name: int(stats.get(name, 0)) for name in ("steps", "vla_calls", "generated", "kept", "held", "audits")}

    def _forward(self, hook: str, *arguments: Any) -> Any:
        """The base's optional hook, if it has it."""
        call = getattr(self.base, hook, None)
        return call(*arguments) if callable(call) else None
