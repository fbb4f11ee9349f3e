"""One LeRobot policy, many lanes: each environment of a batch has a history, plan, gate and counters of its own, and the policy
is asked once a step for all lanes that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy

from lerobot_policy_spvla.configuration_spvla import SpvlaConfig
from lerobot_policy_spvla.processor_spvla import Units
from spvla.actions import ActionSpace, FloatArray
from spvla.assemble import accelerate
from spvla.errors import InputError
from spvla.export import Export, load_export
from spvla.gates.base import eyes_of
from spvla.history import Source
from spvla.ledger import Ledger
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.steps import StepInfo
from spvla.vlas.base import VLAOutput


def require_supported(base: PreTrainedPolicy, export: Export) -> None:
    """Raise :class:`InputError` (code ``unsupported-base``) unless the base plans from a single observation and has as many
    action dimensions as the export."""
    config, name = base.config, base.config.type
    reason = None
    if getattr(config, "n_obs_steps", 1) != 1:
        reason = f"needs {config.n_obs_steps} observations in a row, but skipped steps record none"
    elif getattr(config, "temporal_ensemble_coeff", None) is not None:
        reason = "calls itself at every step (temporal ensembling); set n_action_steps instead"
    elif getattr(getattr(config, "rtc_config", None), "enabled", False):
        reason = "plans in real-time chunks"
    elif getattr(config, "n_action_steps", None) is None:
        reason = "does not plan chunks of actions"
    elif config.action_feature is not None and config.action_feature.shape[0] != export.space.dim:
        reason = f"has {config.action_feature.shape[0]} action dimensions, the export {export.space.dim}"
    if reason is not None:
        raise InputError(f"base of type {name!r}: {reason}: not supported", code="unsupported-base", field="base")


class Asked:
    """The base as one lane's VLA: its answer is there before it is asked for."""

    needs_images = False  # the batch holds them

    def __init__(self, space: ActionSpace) -> None:
        self.action_space = space
        self.answer: VLAOutput | None = None

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.answer = None

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """What the base answered for this lane in this step."""
        answer, self.answer = self.answer, None
        assert answer is not None, "the lane was not among those that asked"
        return answer


class Lane:
    """One environment's policy, with the base's plan as the base said it, (T, D)."""

    def __init__(self, policy: SPVLAPolicy, asked: Asked) -> None:
        self.policy, self.asked = policy, asked
        self.plan: torch.Tensor | None = None
        self.next = 0

    def act(self, state: FloatArray | None, units: Units, like: torch.Tensor) -> torch.Tensor:
        """The action (D,) of this step, in the base's scale: its own, untouched, where it is the base's."""
        action = self.policy.select_action(Observation(state=state))
        if self.policy.last_step.source == Source.VLA:
            assert self.plan is not None, "the base has answered"
            self.next += 1
            return self.plan[self.next - 1]
        return units.from_robot(action, like)


class Lanes:
    """The base and its lanes.

    Args:
        base: the LeRobot policy; its own queue stays unused.
        config: what accelerates it.
        units: of the base's processors.

    Raises:
        InputError: the base or the export cannot be used, or both do not fit.
    """

    def __init__(self, base: PreTrainedPolicy, config: SpvlaConfig, units: Units) -> None:
        if config.export is None:
            raise InputError("--policy.export: name the generators and gates", code="no-export", field="export")
        if config.mode != "wait":
            raise InputError(f"--policy.mode {config.mode!r}: is neither wait nor off", code="unsupported", field="mode")
        self.export = load_export(config.export)
        require_supported(base, self.export)
        self.base, self.config, self.units = base, config, units
        self.lanes: list[Lane] = []
        self.ledger = Ledger()  # of the base: a call may be for several lanes
        self.ledger.announce = config.generator != "none"
        self._fresh = True
        self._lane()  # so that what does not fit is refused now

    def _lane(self) -> Lane:
        asked, c = Asked(replace(self.export.space, max_jump=None)), self.config
        options: dict[str, Any] = {"generator": c.generator, "gate": c.scheduler, "max_generated_run": c.max_generated_run}
        policy = accelerate(asked, self.export, c.risk, pruning="none", **options)
        assert isinstance(policy, SPVLAPolicy), "nothing is recorded"
        if eyes_of(policy.gate) is not None:
            told = "--policy.export: its gates have eyes, which need a camera at every step; distil without --gate.eyes"
            raise InputError(told, code="unsupported", field="export")
        policy.ledger.announce = False  # it sees no time of the base's
        return Lane(policy, asked)

    def reset(self) -> None:
        """All lanes start an episode at the next step."""
        self._fresh = True
        self.base.reset()

    def act(self, batch: dict[str, Any]) -> torch.Tensor:
        """The actions of all lanes, (B, D), in the base's scale.

        Args:
            batch: after the base's preprocessor.
        """
        start = perf_counter()
        size, like = _size(batch)
        states = self.units.states(batch)
        self._start(size, batch)
        wants = [lane.policy.prepare(None if states is None else states[i]) for i, lane in enumerate(self.lanes)]
        asking = [i for i, want in enumerate(wants) if want]
        took = self._ask(batch, asking, size) if asking else 0.0
        out = [lane.act(None if states is None else states[i], self.units, like) for i, lane in enumerate(self.lanes)]
        times = {"total": 1e3 * (perf_counter() - start), "vla": took}
        told = self._telling(asking)
        self.ledger.took(replace(told, called_vla=bool(asking), milliseconds=times), waits=True)
        return torch.stack([o.to(like.device) for o in out])

    def _telling(self, asking: list[int]) -> StepInfo:
        """The step of one lane that stands for all: one that asked, else one about which somebody decided."""
        steps = [lane.policy.last_step for lane in self.lanes]
        return steps[asking[0]] if asking else next((s for s in steps if s.reason != "chunk"), steps[0])

    def _start(self, size: int, batch: dict[str, Any]) -> None:
        if not self._fresh and size == len(self.lanes):
            return
        self.lanes = [*self.lanes, *(self._lane() for _ in range(size - len(self.lanes)))][:size]
        tasks = batch.get("task")
        for i, lane in enumerate(self.lanes):
            lane.policy.reset(tasks[i] if isinstance(tasks, Sequence) and not isinstance(tasks, str) else str(tasks or ""))
        self._fresh = False

    def _ask(self, batch: dict[str, Any], asking: list[int], size: int) -> float:
        """Ask the base for some lanes; the milliseconds that it took."""
        steps = int(self.base.config.n_action_steps)
        start = perf_counter()
        with self.ledger.call() as call:
            chunk = self.base.predict_action_chunk(batch if len(asking) == size else take(batch, asking, size))[:, :steps]
            call.plan = chunk.shape[1]
        plans = self.units.to_robot(chunk)  # (b, T, D)
        took = 1e3 * (perf_counter() - start)
        for row, i in enumerate(asking):
            lane = self.lanes[i]
            lane.plan, lane.next = chunk[row], 0
            lane.asked.answer = VLAOutput(np.ascontiguousarray(plans[row]))
        return took

    def stats(self) -> list[dict[str, float]]:
        """What every lane counted since its episode began."""
        return [lane.policy.stats() for lane in self.lanes]


def _size(batch: dict[str, Any]) -> tuple[int, torch.Tensor]:
    """Lanes of a batch, and a tensor on its device."""
    seen = (v for k, v in batch.items() if k.startswith("observation.") and isinstance(v, torch.Tensor))
    tensor = next((v for v in seen if v.ndim), None)
    if tensor is None:
        raise InputError("batch: holds no observation", code="no-observations", field="batch")
    like = tensor if tensor.is_floating_point() else torch.zeros(1, device=tensor.device)
    return len(tensor), like


def take(batch: dict[str, Any], lanes: list[int], size: int) -> dict[str, Any]:
    """The part of a batch of ``size`` that belongs to some lanes."""
    out: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == size:
            out[key] = value[torch.tensor(lanes, device=value.device)]
        elif isinstance(value, list) and len(value) == size:
            out[key] = [value[i] for i in lanes]
        else:
            out[key] = value
    return out
