"""What happened in a control step, and the statistics of an episode's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spvla.history import UNSEEN, Source


@dataclass(frozen=True)
class StepInfo:
    """What happened in one control step and what it cost.

    Args:
        source: who made the executed action.
        intuitive: the gate's label (False if it was not asked).
        reason: what decided.
        probability: the gate's probability that the proposal deviates, or None.
        threshold: the largest probability at which the gate would have let the generator act, or None.
        fallback: labelled intuitive, but the proposal was refused and the VLA acted in the same step.
        deviates: shadow mode only: whether the skipped proposal would have deviated from the VLA's action.
        error: shadow mode only: its largest absolute error over the continuous dimensions, normalised units.
        called_vla: the VLA was asked in this step and answered; where answers come late (:mod:`spvla.realtime`): it was asked.
        keep_mass: attention mass the pruner asked for, or None if the VLA was not called.
        visual_tokens: (kept, total) visual tokens of the VLA's pass, or None.
        accepted: leading dimensions of the proposal that the VLA agreed with, or None if it was not verified.
        unavailable: why the VLA could not be asked, or None; the action is then the safe one.
        vla_age: control steps since the state that the VLA had last answered about, 0 before its first answer; None where its
            answers come in the step in which it is asked.
        propensity: with a live gate, the probability with which the VLA was to be asked in this step, given everything before:
            that of an audit where the generator may act, whatever the coin said, else 1. None with other gates, and where
            answers come late.
        plan_age: control steps since the plan was made whose next action was kept (source ``PLAN``), else None.
        milliseconds: wall clock by stage: ``capture`` (of a callable observation), ``scheduling`` (generator and gate),
            ``vla``, the VLA's own stages as ``vla/<stage>``, ``unavailable`` (asking in vain), ``total``.
    """

    source: Source
    intuitive: bool
    reason: str
    probability: float | None = None
    threshold: float | None = None
    fallback: bool = False
    deviates: bool | None = None
    error: float | None = None
    called_vla: bool = False
    keep_mass: float | None = None
    visual_tokens: tuple[int, int] | None = None
    accepted: int | None = None
    unavailable: str | None = None
    vla_age: int | None = None
    propensity: float | None = None
    plan_age: int | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)


def run_lengths(generated: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Lengths of the maximal runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], generated.astype(np.int8), [0]])))
    return np.asarray(edges[1::2] - edges[::2], np.int64)


def audit_steps(steps: Sequence[StepInfo]) -> list[int]:
    """On which steps a live gate audited, counted without those that were only waited for, as the gate counts them."""
    return [i for i, s in enumerate(s for s in steps if s.source != Source.HELD) if s.reason == "audit"]


def episode_stats(steps: Sequence[StepInfo]) -> dict[str, float]:
    """Counts and costs of an episode's steps.

    Returns ``steps, vla_calls, generated, kept`` (by an earlier plan), ``held, fallbacks, audits, unavailable, switches``
    (between steps with and without a fresh look), ``generated_runs`` (of steps without), ``generated_run_length_mean``,
    ``policy_ms_p50|p95|p99``, ``policy_seconds``, in shadow mode ``would_skip`` and ``would_deviate`` (steps),
    ``visual_tokens_mean`` if the VLA reports them, and ``accepted_mean`` (leading dimensions) where proposals are verified.
    """
    if not steps:
        return {
            "steps": 0,
            "vla_calls": 0,
            "generated": 0,
            "kept": 0,
            "held": 0,
            "fallbacks": 0,
            "audits": 0,
            "unavailable": 0,
            "switches": 0,
        }
    unseen = np.array([s.source in UNSEEN for s in steps])
    runs = run_lengths(unseen)
    ms = np.array([s.milliseconds["total"] for s in steps if "total" in s.milliseconds])
    out: dict[str, float] = {
        "steps": len(steps),
        "vla_calls": sum(s.called_vla for s in steps),
        "generated": sum(s.source == Source.GENERATOR for s in steps),
        "kept": sum(s.source == Source.PLAN for s in steps),
        "held": sum(s.source == Source.HELD for s in steps),
        "fallbacks": sum(s.fallback for s in steps),
        "audits": sum(s.reason == "audit" for s in steps),
        "unavailable": sum(s.unavailable is not None for s in steps),
        "switches": int((unseen[1:] != unseen[:-1]).sum()),
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
    accepted = [s.accepted for s in steps if s.accepted is not None]
    if accepted:
        out["accepted_mean"] = float(np.mean(accepted))
    return out
