"""Records of a policy's episodes: in memory, and a wrapper around a policy that writes them to a rollout store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeAlias
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.gates.live import LiveGate
from spvla.history import Source
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.realtime import BridgePolicy
from spvla.steps import audit_steps
from spvla.store import Episode, RolloutWriter
from spvla.vlas.base import VLAOutput


@dataclass
class Record:
    """The running episode, one entry a control step.

    Args:
        actions: what was executed, (D,), environment units.
        states: proprioception before it, (S,), or None.
        outputs: the VLA's output at that step, or None where it was not asked.
        sources: who made the action.
        again: the first action (D,) of a second plan for the same state, or None.
        ages: of the VLA's last word, as :class:`~spvla.steps.StepInfo` has it.
        propensities: of the VLA's output, likewise.
    """

    actions: list[FloatArray] = field(default_factory=list)
    states: list[FloatArray | None] = field(default_factory=list)
    outputs: list[VLAOutput | None] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    again: list[FloatArray | None] = field(default_factory=list)
    ages: list[int | None] = field(default_factory=list)
    propensities: list[float | None] = field(default_factory=list)

    def add(
        self,
        action: FloatArray,
        state: NDArray[np.floating] | None,
        output: VLAOutput | None,
        source: Source,
        age: int | None = None,
        propensity: float | None = None,
        again: FloatArray | None = None,
    ) -> None:
        """Append a step; arrays are copied."""
        self.actions.append(np.array(action, np.float32))
        self.states.append(None if state is None else np.array(state, np.float32))
        self.outputs.append(output)
        self.sources.append(source)
        self.ages.append(age)
        self.propensities.append(propensity)
        self.again.append(again)

    def episode(self, space: ActionSpace) -> Episode:
        """The steps so far as an episode in ``space``, its instruction empty. Where the VLA was not asked its rows are NaN."""
        outputs = self.outputs
        plans = [None if o is None or len(o.actions) < 2 else o.actions.ravel() for o in outputs]
        return Episode(
            actions=np.asarray(self.actions, np.float32),
            instruction="",
            timestamps=np.arange(len(self.actions)) / space.control_rate,
            states=_rows(self.states),
            sources=np.array(self.sources, np.uint8),
            vla_ages=None if None in self.ages else np.array(self.ages, np.int64),
            vla_propensities=None if None in self.propensities else np.array(self.propensities, np.float32),
            vla_actions=_rows([None if o is None else o.actions[0] for o in outputs]),
            vla_confidence=_rows([None if o is None else o.confidence for o in outputs]),
            vla_features=_rows([None if o is None else o.features for o in outputs]),
            vla_plans=_rows(plans),
            vla_again=_rows(self.again),
        )


def _rows(values: list[FloatArray | None]) -> FloatArray | None:
    """Vectors as rows of the width that most have; None where there is none at all. NaN where there is no vector, one of
    another width, or infinity: what a VLA reports beside its action must not cost the episode."""
    widths = Counter(len(v) for v in values if v is not None)
    width = max(widths, key=widths.__getitem__, default=0)
    if not width:
        return None
    out = np.full((len(values), width), np.nan, np.float32)
    for row, value in zip(out, values, strict=True):
        if value is not None and len(value) == width:
            row[:] = value
    out[np.isinf(out)] = np.nan
    return out


class Recorder:
    """A policy around ``policy`` that writes its finished episodes to a rollout store. Everything else is ``policy``'s own.

    ``with recorder:`` closes the store at the end. An episode that an exception ends is written like any other, its success
    unknown, and its metadata name the exception's type.

    Args:
        policy: what acts.
        folder: the rollout store; several recorders may fill one.
    """

    def __init__(self, policy: SPVLAPolicy, folder: str | Path) -> None:
        self.policy = policy
        self._writer = RolloutWriter(folder, policy.space, policy=type(policy.vla).__name__)
        # Jobs sort by time, and no two recorders have the same ones.
        self._name = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid4().hex[:8]}"
        self._episodes = 0
        self._instruction = ""
        self._record = Record()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def reset(self, instruction: str) -> None:
        """Start an episode. One that :meth:`finish` did not close is kept, its success unknown."""
        self.finish()
        self.policy.reset(instruction)
        self._instruction = instruction
        self._before: list[NDArray[np.floating] | None] = []  # states before a late first answer

    def tick(
        self, observation: Observation | Callable[[], Observation], state: NDArray[np.floating] | None = None
    ) -> FloatArray | None:
        """See :meth:`SPVLAPolicy.tick`. Answers that come late are written to the steps that they are about."""
        record, policy = self._record, self.policy
        action = policy.tick(observation, state)
        state = observation.state if isinstance(observation, Observation) else state
        if action is None:
            self._before.append(state)
            return None
        if isinstance(policy, BridgePolicy) and policy.still is not None:
            for earlier in self._before:
                record.add(policy.still, earlier, None, Source.HELD, 0)
        self._before = []
        self._add(record, action, state)
        return action

    def _add(self, record: Record, action: FloatArray, state: NDArray[np.floating] | None) -> None:
        step = self.policy.last_step
        record.add(action, state, self.policy.last_output, step.source, step.vla_age, step.propensity)
        for asked, output in self.policy.arrived if isinstance(self.policy, BridgePolicy) else ():
            record.outputs[asked] = output

    def select_action(
        self, observation: Observation | Callable[[], Observation], state: NDArray[np.floating] | None = None
    ) -> FloatArray:
        """See :meth:`SPVLAPolicy.select_action`."""
        record = self._record  # a step that ends after its episode does not count for the next
        action = self.policy.select_action(observation, state)
        state = observation.state if isinstance(observation, Observation) else state
        self._add(record, action, state)
        return action

    def executed(self, action: FloatArray) -> None:
        """See :meth:`SPVLAPolicy.executed`."""
        self.policy.executed(action)
        if self._record.actions:
            self._record.actions[-1] = np.array(action, np.float32)

    def waited(self, action: FloatArray, state: NDArray[np.floating] | None = None) -> None:
        """See :meth:`SPVLAPolicy.waited`."""
        self.policy.waited(action, state)
        step = self.policy.last_step
        self._record.add(action, state, None, step.source, propensity=step.propensity)

    def finish(self, success: bool | None = None, **metadata: Any) -> None:
        """Close the episode and write it, with whether it succeeded and other facts about it."""
        record, self._record = self._record, Record()
        if not record.actions:
            return
        episode = record.episode(self.policy.space)
        if isinstance(self.policy.gate, LiveGate):
            metadata = {"live": self._live(), **metadata}
        episode.instruction, episode.success, episode.metadata = self._instruction, success, metadata
        self._writer.write(f"{self._name}-{self._episodes:06d}", [episode])
        self._episodes += 1

    def _live(self) -> dict[str, Any]:
        """What the live gate has found when an episode ends, and where it audited."""
        gate, steps = self.policy.live, self.policy.steps
        held = sum(s.source == Source.HELD for s in steps)
        counts = {"risk": gate.risk, "steps": len(steps), "held": held, "audit_steps": audit_steps(steps)}
        return counts | gate.stats()

    def close(self) -> None:
        """Finish the running episode and finalise the store."""
        self.finish()
        if any(self._writer.shards.glob("*.parquet")):
            self._writer.finalize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.finish(exception=kind.__name__)
        self.close()


Policy: TypeAlias = SPVLAPolicy | Recorder  # what :func:`spvla.accelerate` returns
