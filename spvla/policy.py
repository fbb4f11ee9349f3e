"""The control loop: a generator, a gate, a pruner and an unmodified VLA.

Everything meets here and nowhere else. With generator, gate and pruner off, :class:`SPVLAPolicy` returns the VLA's own actions
bit for bit.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_options, naming
from spvla.gates.base import Decision, Gate, LearningGate, eyes_of, reads_error, reads_plan
from spvla.gates.live import LiveGate
from spvla.generators.base import ActionGenerator
from spvla.history import ActionHistory, Source
from spvla.judgement import Acted, Judged
from spvla.ledger import Ledger
from spvla.observation import Observation
from spvla.pruning.pruner import Pruner
from spvla.pruning.speed import require_translations
from spvla.steps import StepInfo, episode_stats
from spvla.vlas.base import VLA, PrunableVLA, VLAOutput, VLAUnavailable, checked, verifying

FIRST_STEPS = 40  # decided steps after which a policy says whether it is where its export was calibrated
WHEN_UNAVAILABLE = ("raise", "stop", "hold", "generator")
VERIFY = ("none", "exact", "tolerant")


class SPVLAPolicy:
    """A VLA that is asked only when it has to be.

    A VLA may answer with a plan of several actions. With a gate that reads plans, each step has three arms: keep the plan, let
    the generator act, or have the VLA look and plan again. With any other gate a plan is executed to its end before it decides.

    Args:
        vla: the frozen policy.
        generator: continues the motion on intuitive steps; None leaves every step to the VLA.
        gate: labels each step; None leaves every step to the VLA.
        pruner: what the VLA's pass keeps of its visual tokens; None switches pruning off. The policy asks its speed response
            how much, and acts through ``vla.with_pruner(pruner.selector)``, so ``vla`` itself is left as it is.
        space: the action space with the export's jump limits; by default the VLA's own.
        max_generated_run: actions in a row without a fresh look, generated or kept, before the VLA must act.
        when_unavailable: what to do while the VLA raises :class:`~spvla.vlas.base.VLAUnavailable`: ``raise``; ``stop``
            (:meth:`ActionSpace.stop`); ``hold``, repeat the last action, which in a space of deltas or velocities keeps the
            robot moving; ``generator``, follow its proposals up to ``max_generated_run``, then stop. Until the VLA answers
            again it is asked at every step. Before an episode's first action nothing is known to be safe: that raises.
        verify: where the VLA is asked, show it the generator's proposal, so that it answers sooner if that is right
            (:class:`~spvla.vlas.base.VerifyingVLA`): ``none``; ``exact``, its answers stay the same; ``tolerant``, a proposed
            dimension is accepted within ``tolerance``.
        tolerance: error beyond which an action deviates, normalised units.
    """

    waits = True  # for the VLA, in the steps in which it is asked

    def __init__(
        self,
        vla: VLA,
        generator: ActionGenerator | None = None,
        gate: Gate | None = None,
        pruner: Pruner | None = None,
        *,
        space: ActionSpace | None = None,
        max_generated_run: int = 20,
        when_unavailable: str = "raise",
        verify: str = "none",
        tolerance: float = 0.2,
    ) -> None:
        if (generator is None) != (gate is None):
            raise InputError("policy: a generator needs a gate and a gate needs a generator; give both or neither")
        with naming("policy"):
            check_options(SPVLAPolicy.__init__, {"max_generated_run": max_generated_run})
        if max_generated_run < 1:
            raise InputError(f"policy: max_generated_run must be at least 1, got {max_generated_run}")
        if when_unavailable not in WHEN_UNAVAILABLE:
            raise InputError(f"policy: when_unavailable {when_unavailable!r} is not one of {', '.join(WHEN_UNAVAILABLE)}")
        if verify not in VERIFY:
            raise InputError(f"policy: verify {verify!r} is not one of {', '.join(VERIFY)}", field="verify")
        if not tolerance > 0:
            raise InputError(f"policy: tolerance must be positive, got {tolerance}", field="tolerance")
        if pruner is not None:
            if not isinstance(vla, PrunableVLA):
                raise InputError(f"pruning: {type(vla).__name__} cannot run on fewer visual tokens (it has no with_pruner())")
            require_translations(pruner.speed, vla.action_space)
            vla = vla.with_pruner(pruner.selector)
        self.verifier = None if verify == "none" else verifying(vla, generator is not None)
        self.allowed = None if verify != "tolerant" else tolerance  # what a verified proposal may be off by
        self.tolerance = tolerance
        self.vla = vla
        self.generator = generator
        self.gate = gate
        self._learning = gate if isinstance(gate, LearningGate) else None
        self._arms = reads_plan(gate)
        self._errors = reads_error(gate)
        self._eyes = eyes_of(gate)
        if self._eyes is not None and not self.waits:
            told = "policy: a gate with eyes needs the camera at every step, which mode 'bridge' reads in another thread"
            raise InputError(told, code="unsupported", field="mode")
        if reads_plan(generator) and not self._arms:
            told = "policy: the generator reads the VLA's plans, but the gate does not; use the gate that was trained with it"
            raise InputError(told, code="no-plan", field="gate")
        self.pruner = pruner
        self.space = space or vla.action_space
        if generator is not None and generator.space.rescaling(self.space) is not None:
            raise InputError(
                "policy: the generator's normalised actions do not use the scale of the policy's action space",
                code="scale-mismatch",
                field="space",
            )
        self.max_generated_run = max_generated_run
        self.when_unavailable = when_unavailable
        length = max([1] + [part.history_length for part in (generator, gate) if part is not None])
        self.history = ActionHistory(self.space, length, self._arms, self._errors)
        self.steps: list[StepInfo] = []
        self.ledger = Ledger()  # what the VLA was asked, in all episodes
        self.last_output: VLAOutput | None = None  # VLA output that covers the last step; None if the generator made it
        self._queue: deque[FloatArray] = deque()  # the rest of a plan that is executed to its end
        self._waiting = False  # the VLA could not be asked in the last step
        self._prepared: Judged | None = None  # what prepare() has decided about the coming step
        self._decided = self._outside = 0  # steps that the gate decided, and how many were unfamiliar or refused
        self._instruction: str | None = None

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.vla.reset(instruction)
        self._begin(instruction)

    def _begin(self, instruction: str) -> None:
        self._instruction = instruction
        self.history.reset()
        self._queue.clear()
        self._waiting = False
        self._prepared = None
        self.steps = []
        if self._learning is not None:
            self._learning.begin(instruction)

    @property
    def live(self) -> LiveGate:
        """The live gate, which saves and loads what it has learned. Raises :class:`InputError` where the gate is another."""
        if not isinstance(self.gate, LiveGate):
            raise InputError("policy: there is no live gate; use accelerate(..., gate='live')", field="gate")
        return self.gate

    @property
    def last_step(self) -> StepInfo:
        """What happened in the last step."""
        if not self.steps:
            raise InputError("policy: no step has been taken since reset()")
        return self.steps[-1]

    def select_action(
        self,
        observation: Observation | Callable[[], Observation],
        state: NDArray[np.floating] | None = None,
    ) -> FloatArray:
        """The next action (D,), float32, environment units.

        Args:
            observation: what the robot sees, or a callable that captures it. A callable is only called when the VLA acts,
                so on intuitive steps no image is captured, decoded or preprocessed. A gate with eyes needs it at every step.
            state: current proprioception (S,) if ``observation`` is a callable; else the observation's own is used.
        """
        start = perf_counter()
        if self._instruction is None:
            raise InputError("policy: call reset(instruction) before the first select_action()")
        state = observation.state if isinstance(observation, Observation) else state
        times: dict[str, float] = {}
        frame = None
        if self._eyes is not None:
            observation = self._captured(observation, times)
            frame = self._eyes.look(observation)
        self.history.observe(state, frame)
        judged, self._prepared = self._prepared or self._judge(), None
        times["scheduling"] = 1e3 * (perf_counter() - start) - times.get("capture", 0.0)
        acted = self._act(judged, observation, times)
        step = self._account(judged, acted, times)
        times["total"] = 1e3 * (perf_counter() - start)
        self.steps.append(step)
        self.ledger.took(step, self.waits)
        return acted.action.copy()

    def prepare(self, state: NDArray[np.floating] | None) -> bool:
        """Decide ahead of :meth:`select_action`, which will be given the same ``state`` (S,), and say whether it will ask the
        VLA: for whoever asks one VLA for several policies at once. Raises :class:`InputError` (code ``unsupported``) for a gate
        with eyes, which would need the camera."""
        if self._eyes is not None:
            raise InputError("policy: a gate with eyes cannot decide ahead of the camera", code="unsupported", field="gate")
        if self._instruction is None:
            raise InputError("policy: call reset(instruction) before the first prepare()")
        self.history.observe(state)
        self._prepared = self._judge()
        return self._asks(self._prepared)

    def tick(
        self, observation: Observation | Callable[[], Observation], state: NDArray[np.floating] | None = None
    ) -> FloatArray | None:
        """The action of this control step: :meth:`select_action`, which waits where the VLA is asked. A
        :class:`~spvla.realtime.BridgePolicy` never waits, and has none (None) before its VLA's first answer."""
        return self.select_action(observation, state)

    def _judge(self) -> Judged:
        """Propose and decide. The VLA makes the first step, the step after a failed call, and the one after a long run."""
        if self._queue:
            return Judged(Decision(False, "chunk"), proposed=self._unasked())
        if self.generator is None or self.gate is None:
            return Judged(Decision(False, "off"))
        history = self.history
        window = history.window()
        proposals = self.generator.propose(window)[:, 0]  # (1, D), normalised
        proposal = self.space.denormalize(proposals[0])
        if history.vla_age == 0:
            return Judged(Decision(False, "first step"), proposal)
        if self._waiting:
            return Judged(Decision(False, "unavailable"), proposal, proposed=proposals[0])
        if self._steps_without_vla() >= self.max_generated_run:
            return Judged(Decision(False, "run limit"), proposal, proposed=proposals[0])
        decision = self.gate.decide(window, proposals)[0]
        if decision.kept and history.planned is not None:
            return Judged(decision, history.planned, proposed=proposals[0])
        refused = decision.refused or (decision.intuitive and not self.space.admissible(proposal, history.last_action))
        self._warn_if_far_from_calibration(decision, refused, proposals[0])
        return Judged(decision, proposal, refused, proposals[0])

    def _unasked(self) -> FloatArray | None:
        """What the generator would do, normalised (D,), where the gate is not asked but will read how far off that was."""
        return self.generator.propose(self.history.window())[0, 0] if self.generator is not None and self._errors else None

    def _steps_without_vla(self) -> int:
        """What the run limit counts."""
        return self.history.generated_run

    def _act(self, judged: Judged, observation: Observation | Callable[[], Observation], times: dict[str, float]) -> Acted:
        """Act: by the generator, an earlier plan, or the VLA."""
        proposal = judged.proposal if judged.skips else None
        source = Source.PLAN if judged.decision.kept else Source.GENERATOR
        if self._asks(judged):
            answered = self._ask(judged, observation, times)
            if proposal is None:
                return answered
            self._queue.clear()  # a silent audit
            unanswered = answered.unavailable is not None
            return answered if unanswered else replace(answered, action=proposal, source=source)
        if proposal is None:
            plan = self.history.vla_output
            assert plan is not None, "a queue is what is left of a plan"
            action = self._queue.popleft()
            planned = VLAOutput(action[None], confidence=plan.confidence, features=plan.features)
            return Acted(action, Source.VLA, planned=planned)
        return Acted(proposal, source)

    def _asks(self, judged: Judged) -> bool:
        """Whether the VLA is asked: for an audit, or because nobody else may act."""
        return judged.decision.audit if judged.skips and judged.proposal is not None else not self._queue

    def _ask(self, judged: Judged, observation: Observation | Callable[[], Observation], times: dict[str, float]) -> Acted:
        """Look at the scene and ask the VLA; where it does not answer, the safe action."""
        history = self.history
        keep_mass = 1.0 if self.pruner is None else self.pruner.speed(history.last_action, history.space)
        seen, asked = self._captured(observation, times), perf_counter()
        try:
            if (verifier := self.verifier) is None or (proposal := judged.proposal) is None:
                output = self.ledger.ask(lambda: self.vla.predict(seen, keep_mass=keep_mass))
            else:
                output = self.ledger.ask(lambda: verifier.verify(seen, proposal, self.allowed, keep_mass))
            output = checked(output, self.space.dim, self.vla)
        except VLAUnavailable as failure:
            action, source = self._safe_action(judged, failure)
            times["unavailable"] = 1e3 * (perf_counter() - asked)
            self._waiting = True
            return Acted(action, source, keep_mass=keep_mass, unavailable=str(failure))
        times["vla"] = 1e3 * (perf_counter() - asked)
        times |= {f"vla/{stage}": ms for stage, ms in output.timings.items()}
        self._waiting = False
        if not self._arms:
            self._queue.extend(output.actions[1:])
        return Acted(output.actions[0], Source.VLA, output, keep_mass=keep_mass)

    def _captured(self, observation: Observation | Callable[[], Observation], times: dict[str, float]) -> Observation:
        """The observation; the time that a callable takes to capture it is written down."""
        before = perf_counter()
        seen = observation if isinstance(observation, Observation) else observation()
        times.setdefault("capture", 1e3 * (perf_counter() - before))
        return seen

    def _account(self, judged: Judged, acted: Acted, times: dict[str, float]) -> StepInfo:
        """Add the action to the history; return what happened in this step."""
        propensity, age = self._propensity(judged, acted), self.history.vla_age
        self.history.act(acted.action, acted.source, acted.output, judged.proposed)
        self.last_output = acted.planned if acted.output is None else acted.output
        unavailable = acted.unavailable is not None
        self._learn(judged, acted)
        return StepInfo(
            source=acted.source,
            intuitive=judged.decision.intuitive,
            reason="refused" if judged.refused else "unavailable" if unavailable else judged.decision.reason,
            probability=judged.decision.probability,
            threshold=judged.decision.threshold,
            fallback=judged.refused,
            called_vla=acted.output is not None,
            keep_mass=acted.keep_mass,
            visual_tokens=None if acted.output is None else acted.output.visual_tokens,
            accepted=None if acted.output is None else acted.output.accepted,
            unavailable=acted.unavailable,
            propensity=propensity,
            plan_age=age if acted.source == Source.PLAN else None,
            milliseconds=times,
        )

    def _propensity(self, judged: Judged, acted: Acted) -> float | None:
        """See :class:`~spvla.steps.StepInfo`. Where a proposal would be refused no coin decides; where the VLA could not be
        asked, its action is not missing by chance."""
        if not isinstance(self.gate, LiveGate):
            return None
        coin = judged.decision.propensity
        if coin is None or judged.proposal is None or acted.unavailable is not None:
            return 1.0
        may = judged.decision.kept or self.space.admissible(judged.proposal, self.history.last_action)
        return coin if may else 1.0

    def _learn(self, judged: Judged, acted: Acted) -> None:
        """Tell a gate that learns how the step ended."""
        if self._learning is not None and acted.unavailable is None:
            self._learning.observe(judged.proposal, None if acted.output is None else acted.output.actions[0])

    def executed(self, action: FloatArray) -> None:
        """Tell the policy that another action (D,) than the selected one was executed: a safety filter's, or noise."""
        self.history.amend(action)

    def waited(self, action: FloatArray, state: NDArray[np.floating] | None = None) -> None:
        """Tell the policy that a control step went by without asking it: its last answer was late.

        Args:
            action: what was executed, (D,), environment units: what the robot holds meanwhile, or in the end the answer.
            state: proprioception (S,) before that step.
        """
        if not self.steps:
            raise InputError("policy: call waited() only after the select_action() that was late")
        self.history.observe(state)
        self.history.act(np.array(action, np.float32), Source.HELD)
        self.steps.append(StepInfo(Source.HELD, False, "waited", propensity=1.0 if isinstance(self.gate, LiveGate) else None))

    def finish(self, success: bool | None = None, **metadata: Any) -> None:
        """End the episode. Only a :class:`~spvla.recording.Recorder` has something to do then."""

    def close(self) -> None:
        """End the last episode. Only a :class:`~spvla.recording.Recorder` has something to do then."""

    def __enter__(self) -> Self:
        """For ``with policy:``, which closes it at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, float]:
        """Counts and costs since the last reset: see :func:`~spvla.steps.episode_stats`."""
        return episode_stats(self.steps) | ({} if self._learning is None else self._learning.stats())

    def _warn_if_far_from_calibration(self, decision: Decision, refused: bool, proposal: FloatArray) -> None:
        """Warn once if the robot is not where the export was calibrated: in most of the first steps that the gate decides,
        the state is unfamiliar or the proposal (D,), normalised, leaves the limits."""
        if self._decided >= FIRST_STEPS:
            return
        self._decided += 1
        self._outside += refused or decision.reason == "unfamiliar state"
        if self._decided == FIRST_STEPS and self._outside > FIRST_STEPS / 2:
            if refused:
                evidence = f"the last proposal was {np.round(proposal, 2).tolist()} in the export's scale"
                evidence += f", after {np.round(self.history.normalized[-1], 2).tolist()}"
            else:
                assert self.history.states is not None
                evidence = f"the last state was {np.round(self.history.states[-1], 3).tolist()}"
            warnings.warn(
                f"{self._outside} of the first {FIRST_STEPS} steps lie outside of what the export was calibrated on "
                f"({evidence}): units, the order of state entries or the robot itself may differ; the VLA acts on such steps",
                stacklevel=4,
            )

    def _safe_action(self, judged: Judged, error: VLAUnavailable) -> tuple[FloatArray, Source]:
        last, proposal, kept = self.history.last_action, judged.proposal, judged.decision.kept
        if self.when_unavailable == "raise" or last is None:
            raise error
        if self.when_unavailable == "hold":
            return last.copy(), Source.HELD
        may_go_on = self.when_unavailable == "generator" and self.history.generated_run < self.max_generated_run
        if may_go_on and proposal is not None and (kept or self.space.admissible(proposal, last)):
            return proposal, Source.PLAN if kept else Source.GENERATOR
        return self.space.stop(last), Source.HELD
