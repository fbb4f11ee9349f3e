"""A gate that corrects itself while it runs: its threshold follows what audits find.

An inner gate gives each step a score u in [0, 1]; the generator may act if u < L, the live threshold. A coin with a fixed
probability p, thrown before anything is known of the answer, then decides whether the VLA is asked as well: an *audit*. If
the proposal deviates from the answer, h = 1/p, in all other cases (no audit, no deviation, the VLA was called anyway) h = 0,
and the threshold moves by

    L <- min(1, max(-eta/p, L + eta (a - h)))

**Scale.** u is the rank of the inner gate's probability among those of the export's calibration steps, and 1 for a probability
beyond all of them. So L is a fraction of the calibration steps: at L = 0.8 the generator may act on what were the 80 % most
certain ones; found deviations lower it by eta/p, 0.1 by default. At L <= 0 nothing is generated.

**Promise.** Let l = 1 on steps that are generated (or kept from an earlier plan, or audited) and deviate, else 0. Given
everything before the coin, h has the mean l: the coin is independent of the answer. The lower clip never acts: at L <= 0 the
VLA is called on every step, h = 0 and L rises; at L > 0 one step leads no lower than L - eta/p. So L_{T+1} <= L_1 + eta (a T -
sum h), and L_{T+1} >= -eta/p, hence

    E[(1/T) sum l]  <=  a + (L_1 + eta/p) / (eta T).

Nothing else is assumed: the world may change, be an adversary, or know the threshold and all coins thrown so far. It is a
bound on the average over a deployment of T steps, not on any one episode. An *executed* audit puts the VLA's action in the
place of the proposal, so of the losses a fraction of only 1 - p happens; the allowed rate is then a = risk / (1 - p), and
what happens on average is at most risk + (1 - p) (L_1 + eta/p) / (eta T). In the line of conformal decision theory
(arXiv 2310.05921) with intermittent feedback (2410.08852, 2503.10345).

**Pauses.** Where audits show that most of what is generated is wrong (:func:`~spvla.gates.meter.mostly_wrong`), as on tasks
that the export does not know, nobody gains by it, though the risk holds. The gate says so and calls the VLA on every step for
``pause`` steps, then for twice as many, and so on. A paused step loses nothing and leaves L as it is: the promise holds
for the steps between pauses, and so for all.

**Late answers.** Where the robot moves on while the VLA thinks (:mod:`spvla.realtime`), an audit's h arrives steps later. While
at most m answers are outstanding, L falls no lower than -(1 + m) eta/p, since at L <= 0 no further audit begins; with that
in the place of eta/p the same holds for all steps whose audits have been answered.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.files import read_json, write_text
from spvla.gates.base import Decisions, Gate, eyes_of, reads_error, reads_plan
from spvla.gates.classifier import LearnedGate
from spvla.gates.eyes import EyesConfig
from spvla.gates.meter import DriftAlarm, losses_bound, mostly_wrong
from spvla.history import Window

if TYPE_CHECKING:
    from spvla.export import Export

FORMAT = 1
NO, YES = np.array([False]), np.array([True])
AUDIT, DISAGREED, PAUSED = np.array(["audit"]), np.array(["disagreed"]), np.array(["paused"])
PATH_LENGTH = 512  # remembered thresholds; of a longer path every second one goes


@dataclass(frozen=True)
class LiveOptions:
    """How a live gate watches and moves.

    Args:
        audit: probability p that a step on which the generator may act is audited.
        step: eta: how far one step's surplus moves the threshold, as a fraction of the calibration steps.
        executed: an audit's answer is executed; else the robot goes on with the proposal and the answer only counts.
        agreement: after a call on which proposal and answer disagreed, the VLA is called until they agree.
        start: the first threshold; None: the export's calibrated one for this risk. 0 calls the VLA on every step at first.
        pause: steps of the first pause where most of what is generated is wrong; 0: no pauses.
        per_task: a threshold and a meter for each instruction.
        seed: of the coin.
    """

    audit: float = 0.1
    step: float = 0.01
    executed: bool = True
    agreement: bool = True
    start: float | None = None
    pause: int = 2000
    per_task: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        with naming("gate 'live'"):
            check_fields(self, at_least={"start": 0, "pause": 0, "seed": 0})
            if not 0 < self.audit < 1:
                raise InputError(f"audit must lie between 0 and 1, got {self.audit}", field="audit")
            if not self.step > 0:
                raise InputError(f"step must be positive, got {self.step}", field="step")


@dataclass
class LiveState:
    """What a deployment has seen.

    Args:
        threshold: L.
        steps: control steps that count (T).
        audits: audits that were answered.
        found: deviations among them (K).
        evidence: of the drift alarm.
        alarms: drift alarms so far.
        path: (steps, threshold) now and then.
        wrong: evidence that most of what is generated is wrong.
        pauses: so far.
        until: the step at which the last pause ends.
    """

    threshold: float
    steps: int = 0
    audits: int = 0
    found: int = 0
    evidence: float = 1.0
    alarms: int = 0
    path: list[tuple[int, float]] = field(default_factory=list)
    every: int = 16  # steps between two entries of the path
    wrong: float = 1.0
    pauses: int = 0
    until: int = 0

    @property
    def paused(self) -> bool:
        """The VLA is called on every step."""
        return self.steps < self.until


def advance(threshold: float, surplus: float, step: float, floor: float) -> float:
    """The next threshold; ``surplus`` is what is allowed less what was found."""
    return min(1.0, max(floor, threshold + step * surplus))


class LiveGate:
    """An audited controller around any gate.

    Args:
        gate: the inner gate, wide open: it labels intuitive what the generator may do at all, with a probability, or without
            one if it is a rule; that is a score of 1/2.
        grid: ascending probabilities, evenly spread over the calibration steps: what a score is a rank among.
        start: the first threshold, in [0, 1].
        risk: allowed fraction of all steps that are generated and deviate.
        space: the action space that proposals and answers are compared in.
        tolerance: error beyond which a proposal deviates, normalised units.
        options: see :class:`LiveOptions`.
        identity: what a saved state belongs to.
    """

    def __init__(
        self,
        gate: Gate,
        grid: Sequence[float],
        start: float,
        risk: float,
        space: ActionSpace,
        tolerance: float,
        options: LiveOptions | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.gate, self.grid, self.risk, self.space, self.tolerance = gate, grid, risk, space, tolerance
        self.reads_error = reads_error(gate)
        self.options = options = options or LiveOptions()
        self.start = start if options.start is None else options.start
        self.allowed = risk / (1 - options.audit) if options.executed else risk
        self.alarm = DriftAlarm(self.allowed, options.audit)
        self.identity = dict(identity or {})
        self.rng = np.random.default_rng(options.seed)
        self.states: dict[str, LiveState] = {}
        self.outstanding = 0  # answers to audits that may be on their way at a time
        self._coin: bool | None = None  # of the running step; one that was not finished keeps it
        self._audited = False
        self._first = True  # the episode's first step, at which a generator knows nothing yet
        self._last_answer: tuple[FloatArray, FloatArray] | None = None  # with its proposal, until they are known to agree
        self.begin("")

    @classmethod
    def from_export(cls, export: Export, generator: str, risk: float, space: ActionSpace, **options: Any) -> LiveGate:
        """The learned gate of ``generator`` under a controller that starts at the calibrated threshold of ``risk``; where the
        calibration episodes are too few for that risk it starts by calling the VLA on every step."""
        chosen = LiveOptions(**options)
        inner = LearnedGate.from_export(export, generator, 1.0, space)
        curve = export.calibration[generator]
        calibrated = curve.threshold(risk) if risk >= curve.smallest_risk else -1.0
        grid = curve.thresholds
        return cls(
            replace(inner, threshold=1.0),
            grid,
            bisect_right(grid, calibrated) / len(grid),
            risk,
            export.limits(generator, space),
            export.tolerance,
            chosen,
            identity_of(export.space, generator, curve.to_dict()),
        )

    @property
    def history_length(self) -> int:
        """Steps of history that the inner gate reads."""
        return self.gate.history_length

    @property
    def reads_plan(self) -> bool:
        """Whether the inner gate decides about the VLA's plans, too: audits then judge what it would have executed."""
        return reads_plan(self.gate)

    @property
    def eyes(self) -> EyesConfig | None:
        """What the inner gate sees at every step."""
        return eyes_of(self.gate)

    def begin(self, instruction: str) -> None:
        """Start an episode. The thresholds stay what they are."""
        self.state = self.states.setdefault(instruction if self.options.per_task else "", LiveState(self.start))
        self._audited, self._first, self._last_answer = False, True, None

    def score(self, probability: float | None) -> float:
        """A probability's rank among the calibration steps, in [0, 1]: the generator may act where it is below L."""
        return 0.5 if probability is None else bisect_left(self.grid, probability) / len(self.grid)

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Label the coming step (B = 1); an audit has the reason "audit"."""
        if len(proposals) != 1:
            raise InputError(f"gate 'live': decides one step at a time, got {len(proposals)}")
        if self._coin is None:
            self._coin = bool(self.rng.random() < self.options.audit)
        self._audited = False
        inner = self.gate.decide(window, proposals)
        if not inner.intuitive[0] or (inner.refused is not None and inner.refused[0]):
            return inner
        threshold, intuitive, reason, audit = self.state.threshold, inner.intuitive, inner.reason, None
        propensity = None
        if self.state.paused:
            intuitive, reason = NO, PAUSED
        elif self.score(None if inner.probability is None else float(inner.probability[0])) >= threshold:
            intuitive = NO
        elif self._disagree():
            intuitive, reason = NO, DISAGREED
        else:
            propensity = self.options.audit
            if self._coin:
                self._audited = True
                intuitive, reason, audit = (NO if self.options.executed else YES), AUDIT, YES
        limit = self._probability_at(threshold)
        return Decisions(intuitive, reason, inner.probability, inner.refused, audit, limit, propensity, inner.kept)

    def _disagree(self) -> bool:
        """Whether the VLA's last answer was off its proposal: found out when it matters, and once."""
        if self._last_answer is not None and not self._deviates(*self._last_answer):
            self._last_answer = None
        return self._last_answer is not None

    def _probability_at(self, rank: float) -> float:
        """The probability at a rank among the calibration steps; 0 below all of them."""
        return float(self.grid[min(len(self.grid) - 1, int(rank * len(self.grid)))]) if rank > 0 and len(self.grid) else 0.0

    def observe(self, proposal: FloatArray | None, answer: FloatArray | None) -> None:
        """Take in a step's end.

        Args:
            proposal: what the inner gate judged, the generator's action (D,) or the plan's, environment units; None where
                there was none.
            answer: the VLA's action (D,) at this step; None if it was not asked, or has not answered yet: see :meth:`settle`.
        """
        state, estimate = self.state, 0.0
        if answer is not None and proposal is not None and self.options.agreement and not self._first:
            self._last_answer = proposal, answer.copy()
        late = self._audited and answer is None
        if self._audited and answer is not None:
            estimate = self._found(proposal is not None and self._deviates(proposal, answer))
        if not state.paused or self._audited:
            self._advance(self.allowed - estimate)
            if not late:
                self._watch(estimate)
        if state.steps % state.every == 0:
            state.path.append((state.steps, round(state.threshold, 4)))
            if len(state.path) > PATH_LENGTH:
                state.path, state.every = state.path[::2], 2 * state.every
        state.steps += 1
        self._coin, self._audited, self._first = None, False, False

    def settle(self, proposal: FloatArray, answer: FloatArray, audit: bool) -> None:
        """Take in the VLA's answer (D,) to an earlier step, at which the generator proposed ``proposal`` (D,), environment
        units; ``audit`` says whether that step was one."""
        if self.options.agreement:
            self._last_answer = proposal, answer.copy()
        if audit:
            estimate = self._found(self._deviates(proposal, answer))
            self._advance(-estimate)
            self._watch(estimate)

    def unanswered(self) -> None:
        """An audit of an earlier step will never be answered: that step does not count."""
        self._advance(-self.allowed)
        self.state.steps -= 1

    def _deviates(self, proposal: FloatArray, answer: FloatArray) -> bool:
        a, b = self.space.normalize(proposal), self.space.normalize(answer)
        return True in self.space.deviating(a, b, self.tolerance).tolist()  # for so few values faster than any()

    def _found(self, deviates: bool) -> float:
        """Count an audit; its estimate h of the step's loss."""
        state = self.state
        state.audits += 1
        state.found += deviates
        state.wrong, enough = mostly_wrong(state.wrong, deviates)
        if enough and self.options.pause:
            self._pause()
        return deviates / self.options.audit

    def _pause(self) -> None:
        """Generating is worth nothing here."""
        state = self.state
        length = self.options.pause * 2**state.pauses
        state.pauses += 1
        state.until = state.steps + 1 + length
        warnings.warn(
            f"gate 'live': most of what the generator does here is wrong ({state.found} of {state.audits} audited proposals "
            f"deviated so far): the VLA is called on each of the next {length} steps. Distil an export for these tasks",
            stacklevel=2,
        )

    def _advance(self, surplus: float) -> None:
        floor = -(1 + self.outstanding) * self.options.step / self.options.audit
        self.state.threshold = advance(self.state.threshold, surplus, self.options.step, floor)

    def _watch(self, estimate: float) -> None:
        self.state.evidence, alarm = self.alarm.advance(self.state.evidence, estimate)
        self.state.alarms += alarm

    def stats(self) -> dict[str, float]:
        """The deployment so far, over all tasks.

        ``live_risk`` is the estimated fraction of the steps that were generated and deviated; the true one is below
        ``live_risk_bound95`` with a probability of 95 %, at all times. Also ``live_steps``, ``drift_alarms``, ``live_pauses``
        and ``threshold`` (L), where thresholds are kept per task that of the running one."""
        counts = (sum(getattr(s, k) for s in self.states.values()) for k in ("found", "steps", "alarms", "pauses"))
        found, steps, alarms, pauses = counts
        p, executed = self.options.audit, self.options.executed
        happened = 1 - p if executed else 1.0
        most = losses_bound(found, p) - (found if executed else 0)
        return {
            "live_risk": happened * found / p / max(1, steps),
            "live_risk_bound95": min(1.0, most / max(1, steps)),
            "threshold": self.state.threshold,
            "live_steps": steps,
            "drift_alarms": alarms,
            "live_pauses": pauses,
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form of the state, the coin's included."""
        return {
            "format": FORMAT,
            "identity": self.identity,
            "audit": self.options.audit,
            "executed": self.options.executed,
            "states": {task: asdict(state) for task, state in self.states.items()},
            "coin": self.rng.bit_generator.state,
        }

    def restore(self, values: Mapping[str, Any], where: str = "live state") -> None:
        """Go on from :meth:`to_dict`'s form. Raises :class:`InputError` if it belongs to another export, generator or
        action space, or was audited in another way; ``where`` names it."""
        mine = json.loads(json.dumps(self.to_dict()))
        for name in ("format", "identity", "audit", "executed"):
            if values.get(name) != mine[name]:
                raise InputError(f"{where}: {name} is {values.get(name)}, this policy's is {mine[name]}", field=name)
        with naming(where):
            try:
                states = {task: LiveState(**state) for task, state in values["states"].items()}
                self.rng.bit_generator.state = values["coin"]
            except (KeyError, TypeError, AttributeError, OverflowError) as error:
                raise InputError(f"not a saved live state ({error!r})", code="damaged") from None
        self.states = states
        self._coin = None
        self.begin("")

    def save(self, path: str | Path) -> None:
        """Write the state to a JSON file, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def load(self, path: str | Path) -> None:
        """Go on from a saved state, see :meth:`restore`."""
        self.restore(read_json(Path(path)), str(path))


def identity_of(space: ActionSpace, generator: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """What a saved live state belongs to: action space, generator, and a short hash of the space and the gate's calibration."""
    text = json.dumps([space.to_dict(), facts], sort_keys=True)
    return {"action_space": space.name, "generator": generator, "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16]}
