"""Which parts of an accelerated policy are on, which are not, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from spvla.gates.base import Gate, eyes_of, reads_error
from spvla.gates.classifier import LearnedGate
from spvla.gates.live import LiveGate
from spvla.generators.features import FeatureConfig
from spvla.generators.learned import BoundGenerator
from spvla.ledger import FIRST
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.realtime import BridgePolicy
from spvla.recording import Policy, Recorder
from spvla.shadow import ShadowPolicy
from spvla.vlas.base import PrunableVLA, ReadsState, Timed, cameras_of

State = Literal["active", "limited", "refused", "off", "unknown"]


@dataclass(frozen=True)
class Part:
    """One part of a policy.

    Args:
        name: ``generator``, ``gate``, ``live``, ``verify``, ``pruning``, ``dtype``, ``cameras``, ``state``, ``noise`` or
            ``calls``.
        state: ``active``; ``limited``: on, with less effect than it could have; ``refused``: it was asked for and cannot act;
            ``off``; ``unknown``.
        why: in words.
    """

    name: str
    state: State
    why: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` finds; printed, it is a table.

    Args:
        parts: by name, in the order of the table.
        calls: of the VLA, counted where it is called.
        steps: control steps.
    """

    parts: Mapping[str, Part]
    calls: int
    steps: int

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def __str__(self) -> str:
        return "\n".join(f"{p.name:10s} {p.state:8s} {p.why}" for p in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def explain(policy: Policy, observation: Observation | None = None) -> Explanation:
    """Say which parts of ``policy`` are active, limited, refused or off, and why.

    What has an effect only shows after some steps: call it in or after an episode. The calls are counted where the VLA is
    called, not in the policy's records.

    Args:
        policy: what :func:`spvla.accelerate` returns.
        observation: if given, the VLA is asked about it twice, to measure how far its own answers lie apart.
    """
    inner = policy.policy if isinstance(policy, Recorder) else policy
    parts = [
        _generator(inner),
        _gate(inner),
        _live(inner),
        _verify(inner),
        _pruning(inner),
        _dtype(inner),
        Part("cameras", "active", _cameras(inner)),
        _state(inner),
        _noise(inner, observation),
        _calls(inner),
    ]
    return Explanation({part.name: part for part in parts}, inner.ledger.calls, inner.ledger.steps)


def deciding_gate(policy: SPVLAPolicy) -> Gate | None:
    """The gate that scores proposals: of a live one, the gate inside."""
    return policy.gate.gate if isinstance(policy.gate, LiveGate) else policy.gate


def _cameras(policy: SPVLAPolicy) -> str:
    seen = ", ".join(cameras_of(policy.vla)) or "none: the VLA sees no images"
    eyes = eyes_of(policy.gate)
    return seen if eyes is None else f"{seen}; the gate's eyes see {eyes.camera} at every step"


def name_of(part: object) -> str:
    """What a generator or gate is called."""
    return part.network.config.kind if isinstance(part, BoundGenerator) else type(part).__name__


def _generator(policy: SPVLAPolicy) -> Part:
    generator, ledger = policy.generator, policy.ledger
    if generator is None:
        return Part("generator", "off", "every step is the VLA's")
    told = f"{name_of(generator)}, from {generator.history_length} steps of history"
    if isinstance(policy, ShadowPolicy):
        return Part("generator", "limited", f"{told}; shadow mode: it proposes and never acts")
    if ledger.steps:
        told += f"; acted in {ledger.generated} of {ledger.steps} steps"
    if refused := ledger.reasons["refused"]:
        told += f"; {refused} proposals were out of bounds or too large a jump"
        if refused > ledger.generated:
            return Part("generator", "refused", told)
    limited = ledger.decided > 0 and not ledger.generated
    return Part("generator", "limited" if limited else "active", told)


def _gate(policy: SPVLAPolicy) -> Part:
    gate, inner, ledger = policy.gate, deciding_gate(policy), policy.ledger
    if gate is None:
        return Part("gate", "off", "there is nothing to decide without a generator")
    told = name_of(inner)
    if isinstance(inner, LearnedGate) and not isinstance(gate, LiveGate):
        if inner.threshold < 0:
            return Part("gate", "refused", "no step may be generated at this risk: allow more, or calibrate on more episodes")
        told += f", calibrated: probability of a deviation at most {inner.threshold:.3g}"
    elif not isinstance(inner, LearnedGate):
        told += ", set by hand: no bound on the risk"
    if reads_error(inner):
        told += "; reads the generator's error at the VLA's last call"
    others = {r: n for r, n in ledger.reasons.most_common() if r not in ("chunk", "waited")}
    if others:
        told += "; decided by " + ", ".join(f"{reason} {count}" for reason, count in others.items())
    limited = others and (others.get("unfamiliar state", 0) > ledger.decided / 2 or not ledger.generated)
    return Part("gate", "limited" if limited else "active", told)


def _live(policy: SPVLAPolicy) -> Part:
    if not isinstance(policy.gate, LiveGate):
        return Part("live", "off", "the threshold stays as calibrated; gate='live' lets it follow audits")
    found = policy.gate.stats()
    told = f"threshold {found['threshold']:.3g}, estimated risk {found['live_risk']:.3g} after {found['live_steps']:.0f} steps"
    if found["drift_alarms"]:
        told += f", {found['drift_alarms']:.0f} drift alarms"
    if paused := policy.gate.state.paused:
        told += "; paused, since most of what was generated was wrong"
    return Part("live", "limited" if paused or found["threshold"] <= 0 else "active", told)


def _verify(policy: SPVLAPolicy) -> Part:
    ledger = policy.ledger
    if policy.verifier is None:
        return Part("verify", "off", "the VLA decodes every answer from the start")
    told = f"proposals helped in {ledger.verified} of {ledger.answers} answers"
    if not ledger.answers:
        return Part("verify", "unknown", told)
    return Part("verify", "active" if ledger.verified else "limited", told)


def _pruning(policy: SPVLAPolicy) -> Part:
    ledger = policy.ledger
    if policy.pruner is None:
        able = isinstance(policy.vla, PrunableVLA)
        return Part("pruning", "off", "not asked for" if able else "this VLA cannot run on fewer visual tokens")
    told = name_of(policy.pruner.speed)
    if not ledger.total:
        return Part("pruning", "unknown", f"{told}; no call has reported its visual tokens")
    share = f"{told}: {ledger.kept} of {ledger.total} visual tokens in {ledger.answers} calls"
    return Part("pruning", "refused" if ledger.kept == ledger.total else "active", share)


def _dtype(policy: SPVLAPolicy) -> Part:
    if not isinstance(policy.vla, Timed):
        return Part("dtype", "unknown", f"{type(policy.vla).__name__} does not say what it runs on")
    backend = policy.vla.backend
    slow = backend.get("dtype") == "float32" and backend.get("device", "cpu") != "cpu"
    return Part("dtype", "limited" if slow else "active", ", ".join(f"{k} {v}" for k, v in backend.items()))


def features_of(policy: SPVLAPolicy) -> list[FeatureConfig]:
    """What the trained parts of a policy read."""
    gate = deciding_gate(policy)
    found = [policy.generator.network.config.features] if isinstance(policy.generator, BoundGenerator) else []
    return found + ([gate.classifier.config.features] if isinstance(gate, LearnedGate) else [])


def _state(policy: SPVLAPolicy) -> Part:
    read = features_of(policy)
    entries = sorted({i for f in read for i in f.state_dims})
    size = max((f.state_size for f in read if f.state_size is not None), default=None)
    told = "generator and gate read " + (f"entries {', '.join(map(str, entries))}" if entries else "none of it")
    told += "" if size is None else f" of {size}"
    if isinstance(policy.vla, ReadsState):
        told += f"; the VLA reads {policy.vla.state_dim or 'none'}"
    states = policy.history.states
    if states is None:
        return Part("state", "unknown", f"{told}; none was observed yet")
    seen = states.shape[1]
    return Part("state", "active" if seen >= (size or 0) else "refused", f"{told}; observed are {seen}")


def _noise(policy: SPVLAPolicy, observation: Observation | None) -> Part:
    if observation is None:
        return Part("noise", "unknown", "explain(policy, observation) and spvla.doctor measure it")
    first, second = (policy.space.normalize(policy.vla.predict(observation).actions[0]) for _ in range(2))
    floor = float(np.abs(first - second).max())
    return Part("noise", "limited" if floor else "active", f"two answers to one observation differ by {floor:.3g} (normalised)")


def _calls(policy: SPVLAPolicy) -> Part:
    ledger, gain = policy.ledger, policy.ledger.gain
    told = f"the VLA was asked {ledger.calls} times in {ledger.steps} steps"
    if not ledger.steps:
        return Part("calls", "unknown", told)
    if gain is None:
        return Part("calls", "refused", told)
    after = "a tick" if isinstance(policy, BridgePolicy) else "a step"
    told += f"; {gain.before:.2f} ms a step alone, {gain.after:.2f} ms {after} now"
    return Part("calls", "limited" if ledger.idle and ledger.steps >= FIRST else "active", told)
