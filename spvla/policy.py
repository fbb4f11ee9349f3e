"""The joint policy: generator, gate, pruner and an unmodified VLA in one control loop.

Everything meets here and nowhere else. With generator, gate and pruner off, :class:`SPVLAPolicy` returns the VLA's
own actions bit for bit.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.episodes import Episode, RolloutWriter
from spvla.errors import InputError
from spvla.fields import check_options, naming
from spvla.gates.base import Decision, Gate, Learning
from spvla.gates.live import LiveGate
from spvla.generators.base import ActionGenerator, Proposal
from spvla.history import ActionHistory, Source
from spvla.observation import Observation
from spvla.pruning.pruner import TokenPruner
from spvla.vlas.base import VLA, PrunableVLA, VLAOutput, VLAUnavailable

FIRST_STEPS = 40  # decided steps after which a policy says whether it is where its export was calibrated
UNDECIDED = ("off", "chunk", "first step", "unavailable", "run limit")  # reasons of steps that no gate decided
WHEN_UNAVAILABLE = ("raise", "stop", "hold", "generator")


@dataclass(frozen=True)
class StepInfo:
    """What happened in one control step and what it cost.

    Args:
        source: who made the executed action.
        intuitive: the gate's label (False if it was not asked).
        reason: what decided.
        probability: the classifier's probability of deviating, or None.
        fallback: labelled intuitive, but the proposal was refused and the VLA acted in the same step.
        deviates: shadow mode only: whether the skipped proposal would have deviated from the VLA's action.
        error: shadow mode only: its largest absolute error over the continuous dimensions, normalised units.
        keep_mass: attention mass the pruner asked for, or None if the VLA was not called.
        visual_tokens: (kept, total) visual tokens of the VLA's pass, or None.
        unavailable: why the VLA could not be asked, or None; the action is then the safe one.
        milliseconds: wall clock by stage: ``capture`` (of a callable observation), ``scheduling``, ``vla``, the VLA's own
            stages as ``vla/<stage>``, ``unavailable`` (asking in vain), ``total``.
    """

    source: Source
    intuitive: bool
    reason: str
    probability: float | None = None
    fallback: bool = False
    deviates: bool | None = None
    error: float | None = None
    keep_mass: float | None = None
    visual_tokens: tuple[int, int] | None = None
    unavailable: str | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Record:
    """The running episode, kept only if it is to be recorded."""

    actions: list[FloatArray] = field(default_factory=list)
    states: list[FloatArray | None] = field(default_factory=list)
    outputs: list[VLAOutput | None] = field(default_factory=list)
    steps: list[StepInfo] = field(default_factory=list)


class SPVLAPolicy:
    """A VLA that is asked only when it has to be.

    Args:
        vla: the frozen policy.
        generator: continues the motion on intuitive steps; None switches scheduling off.
        gate: labels each step; None switches scheduling off.
        pruner: what the VLA's pass keeps of its visual tokens; None switches pruning off. The policy then acts through
            ``vla.with_pruner(pruner)``, so ``vla`` itself is left as it is.
        space: the action space with the export's jump limits; by default the VLA's own.
        max_generated_run: generated actions in a row before the VLA must act.
        tolerance: error beyond which a proposal counts as deviating (normalised units; shadow mode).
        shadow: the VLA acts on every step; what would have been skipped, and how far off it was, is recorded. The run
            limit and the published rules' share of VLA actions count a step that would have been skipped as generated.
        record: folder of a rollout store that finished episodes are written to.
        when_unavailable: what to do while the VLA raises :class:`~spvla.vlas.base.VLAUnavailable`: ``raise``; ``stop``
            (:meth:`ActionSpace.stop`); ``hold``, repeat the last action, which in a space of deltas or velocities keeps the
            robot moving; ``generator``, follow its proposals up to ``max_generated_run``, then stop. Until the VLA answers
            again it is asked at every step. Before an episode's first action nothing is known to be safe: that raises.
    """

    def __init__(
        self,
        vla: VLA,
        generator: ActionGenerator | None = None,
        gate: Gate | None = None,
        pruner: TokenPruner | None = None,
        *,
        space: ActionSpace | None = None,
        max_generated_run: int = 20,
        tolerance: float = 0.2,
        shadow: bool = False,
        record: str | Path | None = None,
        when_unavailable: str = "raise",
    ) -> None:
        if (generator is None) != (gate is None):
            raise InputError("policy: a generator needs a gate and a gate a generator; give both or neither")
        with naming("policy"):
            check_options(SPVLAPolicy.__init__, {"max_generated_run": max_generated_run, "tolerance": tolerance})
        if max_generated_run < 1:
            raise InputError(f"policy: max_generated_run must be at least 1, got {max_generated_run}")
        if when_unavailable not in WHEN_UNAVAILABLE:
            raise InputError(f"policy: when_unavailable {when_unavailable!r} is not one of {', '.join(WHEN_UNAVAILABLE)}")
        if pruner is not None:
            if not isinstance(vla, PrunableVLA):
                raise InputError(f"pruning: {type(vla).__name__} cannot run on fewer visual tokens (it has no with_pruner())")
            pruner.require(vla.action_space)
            vla = vla.with_pruner(pruner)
        self.vla = vla
        self.generator = generator
        self.gate = gate
        self._learning = gate if isinstance(gate, Learning) else None
        self.pruner = pruner
        self.space = space or vla.action_space
        self.max_generated_run = max_generated_run
        self.tolerance = tolerance
        self.shadow = shadow
        self.when_unavailable = when_unavailable
        length = max([1] + [part.history_length for part in (generator, gate) if part is not None])
        self.history = ActionHistory(self.space, length)
        self.steps: list[StepInfo] = []
        self.last_output: VLAOutput | None = None  # what the VLA says or said about the last step; None if it has no say
        self._queue: deque[FloatArray] = deque()
        self._waiting = False  # the VLA could not be asked in the last step
        self._decided = self._outside = 0  # steps that the gate decided, and those outside of what it knows
        self._instruction: str | None = None
        self._writer = None if record is None else RolloutWriter(record, self.space, policy=type(vla).__name__)
        # Jobs in the order of time, and no two recorders' alike: several robots may fill one store.
        self._recorder = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:8]}"
        self._episodes = 0
        self._record = _Record()

    def reset(self, instruction: str) -> None:
        """Start an episode. A recorded episode that :meth:`finish` did not close is kept, its success unknown."""
        self.finish()
        self.vla.reset(instruction)
        self._instruction = instruction
        self.history.reset()
        self._queue.clear()
        self._waiting = False
        self.steps = []
        self._record = _Record()
        if self._learning is not None:
            self._learning.begin(instruction)

    @property
    def live(self) -> LiveGate:
        """The live gate, to save and load what it has learned. Raises :class:`InputError` if the policy has another gate."""
        if not isinstance(self.gate, LiveGate):
            raise InputError("policy: there is no live gate; use accelerate(..., gate='live')", field="gate")
        return self.gate

    @property
    def last_step(self) -> StepInfo:
        """What happened in the last step."""
        if not self.steps:
            raise InputError("policy: no step was taken since reset()")
        return self.steps[-1]

    def select_action(
        self,
        observation: Observation | Callable[[], Observation],
        state: NDArray[np.floating] | None = None,
    ) -> FloatArray:
        """The next action (D,), float32, environment units.

        Args:
            observation: what the robot sees, or a callable that captures it. A callable is only called when the VLA acts,
                so on intuitive steps no image is captured, decoded or preprocessed.
            state: current proprioception (S,) if ``observation`` is a callable; else the observation's own is used.
        """
        start = perf_counter()
        if self._instruction is None:
            raise InputError("policy: reset(instruction) comes before the first select_action()")
        if isinstance(observation, Observation):
            state = observation.state
        history = self.history
        history.observe(state)

        decision, proposal = Decision(False, "off"), None
        if self._queue:
            decision = Decision(False, "chunk")
        elif self.generator is not None and self.gate is not None:
            proposal = self.generator.propose(history)
            decision = self._decide(history, proposal)
        intuitive = decision.intuitive
        previous = history.last_action
        refused = decision.refused or (
            intuitive and (proposal is None or not self.space.admissible(proposal.actions[0], previous))
        )
        self._notice(decision, refused, proposal)
        scheduled = perf_counter()
        times = {"scheduling": 1e3 * (scheduled - start)}

        output: VLAOutput | None = None
        planned: VLAOutput | None = None
        keep_mass: float | None = None
        unavailable: str | None = None
        generates = proposal is not None and intuitive and not refused and not self.shadow
        if generates and not decision.audit:
            assert proposal is not None
            action, source = proposal.actions[0], Source.GENERATOR
        elif self._queue:
            action, source = self._queue.popleft(), Source.VLA
            plan = history.vla_output
            assert plan is not None, "a queue is what is left of a plan"
            planned = VLAOutput(action[None], confidence=plan.confidence, features=plan.features)
        else:
            keep_mass = 1.0 if self.pruner is None else self.pruner.keep_mass(history)
            seen = observation if isinstance(observation, Observation) else observation()
            asked = perf_counter()
            times["capture"] = 1e3 * (asked - scheduled)
            try:
                output = self._check(self.vla.predict(seen, keep_mass=keep_mass))
            except VLAUnavailable as failure:
                action, source = self._safe_action(proposal, failure)
                unavailable = str(failure)
                times["unavailable"] = 1e3 * (perf_counter() - asked)
            else:
                times["vla"] = 1e3 * (perf_counter() - asked)
                times |= {f"vla/{stage}": ms for stage, ms in output.timings.items()}
                action, source = output.actions[0], Source.VLA
                if generates and proposal is not None:  # an audit that the robot does not wait for
                    action, source = proposal.actions[0], Source.GENERATOR
                else:
                    self._queue.extend(output.actions[1:])
            self._waiting = unavailable is not None

        deviates, error = None, None
        if self.shadow and output is not None and proposal is not None and previous is not None:
            proposed, reference = self.space.normalize(proposal.actions[0]), self.space.normalize(action)
            deviates = bool(self.space.deviation(proposed, reference, self.tolerance))
            error = float(np.abs(proposed - reference)[list(self.space.continuous)].max(initial=0.0))
        if self._learning is not None and unavailable is None:
            proposed_action = None if proposal is None else proposal.actions[0]
            self._learning.observe(proposed_action, None if output is None else output.actions[0])
        skipped = self.shadow and intuitive and not refused
        history.act(action, source, output, maker=Source.GENERATOR if skipped else None)
        self.last_output = planned if output is None else output
        times["total"] = 1e3 * (perf_counter() - start)
        step = StepInfo(
            source=source,
            intuitive=intuitive,
            reason="refused" if refused else "unavailable" if unavailable is not None else decision.reason,
            probability=decision.probability,
            fallback=refused,
            deviates=deviates,
            error=error,
            keep_mass=keep_mass,
            visual_tokens=None if output is None else output.visual_tokens,
            unavailable=unavailable,
            milliseconds=times,
        )
        self._remember(action, state, self.last_output, step)
        return action.copy()

    def executed(self, action: FloatArray) -> None:
        """Tell the policy that another action (D,) than the selected one was executed: a safety filter's, or noise."""
        self.history.amend(action)
        if self._writer is not None:
            self._record.actions[-1] = np.array(action, np.float32)

    def waited(self, action: FloatArray, state: NDArray[np.floating] | None = None) -> None:
        """Tell the policy that a control step went by without asking it: its last answer was late.

        Args:
            action: what was executed, (D,), environment units: what the robot holds meanwhile, or in the end the answer.
            state: proprioception (S,) before that step.
        """
        if not self.steps:
            raise InputError("policy: waited() comes after the select_action() that was waited for")
        action = np.array(action, np.float32)
        self.history.observe(state)
        self.history.act(action, Source.HELD)
        self._remember(action, state, None, StepInfo(Source.HELD, False, "waited"))

    def _remember(
        self, action: FloatArray, state: NDArray[np.floating] | None, output: VLAOutput | None, step: StepInfo
    ) -> None:
        """Keep a step, and what an episode needs of it if it is recorded."""
        self.steps.append(step)
        if self._writer is not None:
            self._record.actions.append(action.copy())
            self._record.states.append(None if state is None else np.array(state, np.float32))
            self._record.outputs.append(output)
            self._record.steps.append(step)

    def _decide(self, history: ActionHistory, proposal: Proposal) -> Decision:
        assert self.gate is not None
        if history.vla_age == 0:
            return Decision(False, "first step")
        if self._waiting:
            return Decision(False, "unavailable")
        if history.generated_run >= self.max_generated_run:
            return Decision(False, "run limit")
        return self.gate.decide(history, proposal)

    def _notice(self, decision: Decision, refused: bool, proposal: Proposal | None) -> None:
        """Warn once if the robot is not where the export was calibrated: in most of the first steps that the gate decides,
        the state is unfamiliar or the proposal leaves the limits."""
        if self._decided >= FIRST_STEPS or proposal is None or decision.reason in UNDECIDED:
            return
        self._decided += 1
        self._outside += refused or decision.reason == "unfamiliar state"
        if self._decided == FIRST_STEPS and self._outside > FIRST_STEPS / 2:
            if refused:
                off, last = self.space.normalize(proposal.actions[0]), self.history.last_action
                told = f"its last proposal was {np.round(off, 2).tolist()} in the export's scale"
                told += "" if last is None else f", after {np.round(self.space.normalize(last), 2).tolist()}"
            else:
                assert self.history.states is not None
                told = f"the last state was {np.round(self.history.states[-1], 3).tolist()}"
            warnings.warn(
                f"{self._outside} of the first {FIRST_STEPS} steps lie outside of what the export was calibrated on ({told}): "
                "units, order of the state or the robot itself may differ; the VLA acts in their place",
                stacklevel=3,
            )

    def _safe_action(self, proposal: Proposal | None, error: VLAUnavailable) -> tuple[FloatArray, Source]:
        last = self.history.last_action
        if self.when_unavailable == "raise" or last is None:
            raise error
        if self.when_unavailable == "hold":
            return last.copy(), Source.HELD
        may_go_on = self.when_unavailable == "generator" and self.history.generated_run < self.max_generated_run
        if may_go_on and proposal is not None and self.space.admissible(proposal.actions[0], last):
            return proposal.actions[0], Source.GENERATOR
        return self.space.stop(last), Source.HELD

    def _check(self, output: Any) -> VLAOutput:
        actions = output.actions if isinstance(output, VLAOutput) else None
        if not isinstance(output, VLAOutput) or not isinstance(actions, np.ndarray):
            found = type(output if actions is None else actions).__name__
            raise InputError(
                f"VLA {type(self.vla).__name__}: predict() must return a VLAOutput with an array of actions, got {found}"
            )
        if actions.ndim != 2 or actions.shape[1] != self.space.dim or not len(actions):
            raise InputError(f"VLA: returned actions of shape {actions.shape}, expected (T, {self.space.dim})")
        if not np.isfinite(actions).all():
            raise InputError("VLA: returned an action with NaN or infinity")
        return output if actions.dtype == np.float32 else replace(output, actions=actions.astype(np.float32))

    def finish(self, success: bool | None = None, **metadata: Any) -> None:
        """Close the episode; with ``record=`` it is written to the rollout store. Facts about it go in as keywords."""
        record, self._record = self._record, _Record()
        if self._writer is None or not record.actions or self._instruction is None:
            return
        episode = record_to_episode(record.actions, record.states, record.outputs, record.steps, self.space)
        episode.instruction, episode.success, episode.metadata = self._instruction, success, metadata
        self._writer.write(f"{self._recorder}-{self._episodes:06d}", [episode])
        self._episodes += 1

    def close(self) -> None:
        """Finish the running episode and, if recording, finalise the store."""
        self.finish()
        if self._writer is not None and any(self._writer.shards.glob("*.parquet")):
            self._writer.finalize()

    def stats(self) -> dict[str, float]:
        """Counts and costs since the last reset: see :func:`episode_stats`; with a live gate ``audits`` of the episode, and
        the deployment's :meth:`~spvla.gates.live.LiveGate.stats`."""
        learned = {} if self._learning is None else self._learning.stats()
        return episode_stats(self.steps) | learned


def record_to_episode(
    actions: list[FloatArray],
    states: list[FloatArray | None],
    outputs: list[VLAOutput | None],
    steps: list[StepInfo],
    space: ActionSpace,
) -> Episode:
    """An :class:`Episode` from what a policy did. Where the VLA was not asked, its rows are NaN."""
    count = len(actions)

    def gather(values: list[FloatArray | None]) -> FloatArray | None:
        width = next((len(v) for v in values if v is not None), 0)
        if not width:
            return None
        out = np.full((count, width), np.nan, np.float32)
        for i, v in enumerate(values):
            if v is not None:
                out[i] = v
        return out

    return Episode(
        actions=np.asarray(actions, np.float32),
        instruction="",
        timestamps=np.arange(count) / space.control_rate,
        states=gather(states),
        sources=np.array([s.source for s in steps], np.uint8),
        vla_actions=gather([None if o is None else o.actions[0] for o in outputs]),
        vla_confidence=gather([None if o is None else o.confidence for o in outputs]),
        vla_features=gather([None if o is None else o.features for o in outputs]),
    )


def run_lengths(generated: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Lengths of the maximal runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], generated.astype(np.int8), [0]])))
    return np.asarray(edges[1::2] - edges[::2], np.int64)


def episode_stats(steps: list[StepInfo]) -> dict[str, float]:
    """Counts and costs of an episode's steps.

    Returns ``steps, vla_calls, generated, held, fallbacks, unavailable, switches`` (changes of who acts), ``generated_runs``,
    ``generated_run_length_mean``, ``policy_ms_p50|p95|p99``, ``policy_seconds``, in shadow mode ``would_skip`` and
    ``would_deviate`` (steps), and ``visual_tokens_mean`` if the VLA reports them.
    """
    if not steps:
        return {"steps": 0, "vla_calls": 0, "generated": 0, "held": 0, "fallbacks": 0, "unavailable": 0, "switches": 0}
    generated = np.array([s.source == Source.GENERATOR for s in steps])
    runs = run_lengths(generated)
    ms = np.array([s.milliseconds["total"] for s in steps if "total" in s.milliseconds])
    out: dict[str, float] = {
        "steps": len(steps),
        "vla_calls": sum("vla" in s.milliseconds for s in steps),
        "generated": int(generated.sum()),
        "held": sum(s.source == Source.HELD for s in steps),
        "fallbacks": sum(s.fallback for s in steps),
        "audits": sum(s.reason == "audit" for s in steps),
        "unavailable": sum(s.unavailable is not None for s in steps),
        "switches": int((generated[1:] != generated[:-1]).sum()),
        "generated_runs": len(runs),
        "generated_run_length_mean": float(runs.mean()) if len(runs) else 0.0,
        "policy_seconds": float(ms.sum() / 1e3),
    }
    out |= {f"policy_ms_p{q}": float(np.percentile(ms, q)) for q in (50, 95, 99)}
    shadow = [s for s in steps if s.deviates is not None]
    if shadow:
        out["would_skip"] = sum(s.intuitive and not s.fallback for s in shadow)
        out["would_deviate"] = sum(s.intuitive and not s.fallback and bool(s.deviates) for s in shadow)
    tokens = [s.visual_tokens[0] for s in steps if s.visual_tokens is not None]
    if tokens:
        out["visual_tokens_mean"] = float(np.mean(tokens))
    return out
