"""The checks of an accelerated policy on a few of the robot's own observations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from spvla.actions import ActionSpace, FloatArray
from spvla.doctor.findings import Finding, Report, Sample
from spvla.doctor.images import orientation
from spvla.errors import InputError
from spvla.explanation import deciding_gate, features_of
from spvla.gates.calibration import Calibration
from spvla.gates.classifier import LearnedGate
from spvla.gates.live import LiveGate
from spvla.generators.features import HistoryFeatures
from spvla.history import UNSEEN
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.realtime import BridgePolicy
from spvla.recording import Policy, Recorder
from spvla.steps import StepInfo
from spvla.vlas.base import VLA, PrunableVLA, VLAOutput

SEED = 0  # of torch before each question, so that a VLA that samples can be compared
FAR = 3.0  # normalised: beyond this, answers are not in the units of the action space
HALF = 0.5


@dataclass
class Replay:
    """A policy's steps along the samples.

    Args:
        actions: what it did, one (D,) a step.
        steps: its records.
        proposals: the generator's, (D,), environment units, or None where it was not asked.
        calls: of the VLA, as the ledger counts them.
    """

    actions: list[FloatArray] = field(default_factory=list)
    steps: list[StepInfo] = field(default_factory=list)
    proposals: list[FloatArray | None] = field(default_factory=list)
    calls: int = 0


def examine(policy: Policy, samples: Sequence[Sample], curve: Calibration | None = None, risk: float | None = None) -> Report:
    """Check that ``policy`` is what it claims to be. It is reset; what a live gate has learned is put back afterwards.

    Args:
        policy: accelerated, not in mode ``bridge``.
        samples: beginnings of episodes; with more than a hundred steps in all it takes longer and finds little more.
        curve: the calibration of its gate, if it has one.
        risk: that it was made for.

    Raises:
        InputError: there are no observations, or the policy is a :class:`~spvla.realtime.BridgePolicy`.
    """
    inner = policy.policy if isinstance(policy, Recorder) else policy
    if isinstance(inner, BridgePolicy):
        raise InputError("doctor: examine the policy in mode 'wait'", code="unsupported", field="mode")
    if not any(sample.observations for sample in samples):
        raise InputError("doctor: there are no observations", code="no-observations", field="samples")
    vla = inner.vla.with_pruner(None) if isinstance(inner.vla, PrunableVLA) else inner.vla
    answers = [ask(vla, sample) for sample in samples]
    learned = inner.gate.to_dict() if isinstance(inner.gate, LiveGate) else None
    try:
        replays = [replay(inner, sample) for sample in samples]
    except InputError as error:
        refused = Finding("calls", "failed", str(error), error.code)
        return Report((_unchanged(vla, samples, answers), _actions(inner.space, answers), refused))
    finally:
        if learned is not None:
            inner.live.restore(learned)
    return Report(
        (
            _unchanged(vla, samples, answers),
            _actions(inner.space, answers),
            orientation(samples, answers, [r.proposals for r in replays], inner.space, partial(_answer, vla)),
            _calibration(inner, samples, replays, curve, risk),
            _calls(inner, replays),
            _pruning(inner),
            _latency(inner),
        )
    )


def _answer(vla: VLA, sample: Sample, observation: Observation) -> VLAOutput:
    vla.reset(sample.instruction)
    torch.manual_seed(SEED)
    return vla.predict(observation)


def ask(vla: VLA, sample: Sample) -> list[VLAOutput]:
    """The VLA's answer to every observation."""
    return [_answer(vla, sample, observation) for observation in sample.observations]


def replay(policy: SPVLAPolicy, sample: Sample) -> Replay:
    """Let ``policy`` act along a sample; where it is known what was executed, its history is that."""
    out = Replay()
    before = policy.ledger.calls
    policy.reset(sample.instruction)
    for t, observation in enumerate(sample.observations):
        torch.manual_seed(SEED)
        out.proposals.append(_proposal(policy, observation))
        out.actions.append(policy.select_action(observation))
        if sample.executed is not None:
            policy.executed(sample.executed[t])
    out.steps, out.calls = list(policy.steps), policy.ledger.calls - before
    return out


def _proposal(policy: SPVLAPolicy, observation: Observation) -> FloatArray | None:
    """What the generator would do now, (D,), environment units; None before the VLA has acted."""
    if policy.generator is None or not policy.history.steps:
        return None
    policy.history.observe(observation.state)
    return policy.space.denormalize(policy.generator.propose(policy.history.window())[0, 0])


def _unchanged(vla: VLA, samples: Sequence[Sample], answers: Sequence[list[VLAOutput]]) -> Finding:
    """With everything off the policy's actions are the VLA's, bit for bit."""
    off, differing, total = SPVLAPolicy(vla), 0, 0
    for sample, own in zip(samples, answers, strict=True):
        acted = replay(off, Sample(sample.instruction, sample.observations)).actions
        plan: list[FloatArray] = []
        for action, output in zip(acted, own, strict=True):
            plan = plan or list(output.actions)
            total += 1
            differing += not np.array_equal(action, plan.pop(0))
    again = [vla.action_space.normalize(_answer(vla, samples[0], samples[0].observations[0]).actions[0]) for _ in range(2)]
    if floor := float(np.abs(again[0] - again[1]).max()):
        told = f"from one seed the VLA answers one observation differently, by {floor:.3g} (normalised): nothing to compare"
        return Finding("unchanged", "warning", told, "answers-differ")
    if differing:
        told = f"with everything off {differing} of {total} actions are not the VLA's own: does it keep a state between calls?"
        return Finding("unchanged", "failed", told, "changed-actions")
    return Finding("unchanged", "ok", f"with everything off all {total} actions are the VLA's own, bit for bit")


def _calls(policy: SPVLAPolicy, replays: Sequence[Replay]) -> Finding:
    """The VLA is asked, and not in every step that somebody decides."""
    steps = [step for r in replays for step in r.steps]
    calls, claimed = sum(r.calls for r in replays), sum(step.called_vla for step in steps)
    generated = sum(step.source in UNSEEN for step in steps)
    decided = [step for step in steps if step.reason != "chunk"]
    told = f"the VLA was called {calls} times in {len(steps)} steps"
    if not calls:
        return Finding("calls", "failed", f"{told}: what acts is not the VLA", "never-called")
    if calls != claimed:
        return Finding("calls", "failed", f"{told}, and the policy claims {claimed}", "miscounted")
    if policy.generator is None:
        return Finding("calls", "ok", f"{told}; there is no generator")
    if policy.verifier is not None:
        return Finding(
            "calls", "ok", f"{told}; the generator acted in {generated}, proposals helped {policy.ledger.verified} times"
        )
    opened = sum(step.intuitive for step in steps)
    if len(decided) <= len(replays):
        return Finding("calls", "unknown", f"{told}, whose plans cover all of them: take longer samples")
    why = ", ".join(f"{k} {n}" for k, n in Counter(step.reason for step in steps).most_common(4))
    if not opened:
        return Finding("calls", "failed", f"{told}: the gate never opens ({why})", "gate-never-opens")
    if not generated:
        return Finding("calls", "failed", f"{told}: in each step that was decided ({why})", "called-every-step")
    return Finding("calls", "ok", f"{told}; the generator acted in {generated}")


def _latency(policy: SPVLAPolicy) -> Finding:
    gain = policy.ledger.gain
    if gain is None:
        return Finding("latency", "unknown", "no call was timed")
    told = f"{gain.before:.2f} ms a step with the VLA alone, {gain.after:.2f} ms accelerated ({gain.factor:.2f}x)"
    return Finding("latency", "ok", told) if gain.factor > 1 else Finding("latency", "warning", told, "not-faster")


def _pruning(policy: SPVLAPolicy) -> Finding:
    ledger = policy.ledger
    if policy.pruner is None:
        return Finding("pruning", "ok", "off")
    if not ledger.total:
        return Finding("pruning", "unknown", "the VLA does not report how many visual tokens it kept")
    told = f"{ledger.kept} of {ledger.total} visual tokens were kept"
    if ledger.kept == ledger.total:
        return Finding("pruning", "failed", told, "prunes-nothing")
    return Finding("pruning", "ok", told)


def _actions(space: ActionSpace, answers: Sequence[list[VLAOutput]]) -> Finding:
    """The VLA's answers lie in the scale of the action space in which generator and gate were trained."""
    actions = np.concatenate([output.actions[:1] for own in answers for output in own])
    normalized = space.normalize(actions)  # (N, D)
    typical = np.median(np.abs(normalized), axis=0)
    for d in (d for d in space.continuous if typical[d] > FAR):
        told = (
            f"dimension {d} ({space.role(d)}) of the VLA's actions is typically {typical[d]:.1f} times the export's range "
            f"({space.q01[d]:.3g} to {space.q99[d]:.3g}): other units, or another robot"
        )
        return Finding("actions", "failed", told, "other-units")
    if space.binary_gripper and space.gripper:
        ends = np.abs(np.abs(normalized[:, list(space.gripper)]) - 1)
        if np.median(ends) > HALF:
            return Finding("actions", "failed", "the gripper's values are neither of its two ends", "gripper")
    outside = float((np.abs(normalized[:, list(space.continuous)]) > 1.5).any(1).mean()) if space.continuous else 0.0
    told = f"{len(actions)} answers lie in the action space's scale, {outside:.0%} of them somewhat outside"
    return Finding("actions", "ok", told) if outside < HALF else Finding("actions", "warning", told, "scale")


def _calibration(
    policy: SPVLAPolicy, samples: Sequence[Sample], replays: Sequence[Replay], curve: Calibration | None, risk: float | None
) -> Finding:
    """These observations are like those that the gate was calibrated on."""
    gate = deciding_gate(policy)
    if not isinstance(gate, LearnedGate):
        return Finding("calibration", "ok", "nothing is calibrated: there is no trained gate")
    steps = [step for r in replays for step in r.steps]
    states = [o.state for sample in samples for o in sample.observations if o.state is not None]
    strange = _unfamiliar(gate.classifier.features, states)
    if strange > HALF:
        entries = ", ".join(map(str, features_of(policy)[-1].state_dims))
        told = f"{strange:.0%} of the states lie far beyond the calibration's (entries {entries}): another robot or order"
        return Finding("calibration", "failed", told, "unfamiliar-states")
    decided = [step for step in steps if step.probability is not None]
    refused = sum(step.fallback for step in steps)
    if decided and refused > HALF * len(decided):
        told = f"{refused} of {len(decided)} proposals are out of bounds or too large a jump: another robot"
        return Finding("calibration", "failed", told, "refused-proposals")
    if curve is None or risk is None or not decided:
        return Finding("calibration", "ok", f"{1 - strange:.0%} of the states are familiar")
    expected, opened = curve.coverage_at(risk), sum(step.intuitive for step in decided) / len(decided)
    told = f"{1 - strange:.0%} of the states are familiar; the gate opens in {opened:.0%} of the steps that it decides, "
    told += f"in calibration it let {expected:.0%} of the steps be generated"
    sparse = opened < expected / 4
    return Finding("calibration", "warning", told, "opens-rarely") if sparse else Finding("calibration", "ok", told)


def _unfamiliar(features: HistoryFeatures, states: Sequence[FloatArray]) -> float:
    """The share of states that are out of reach of what training saw."""
    return float(1 - features.familiar(np.stack(states)).mean()) if states and features.config.state_dims else 0.0
