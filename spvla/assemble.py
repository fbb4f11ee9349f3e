"""The one constructor of accelerated policies."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.export import PRUNING, Export, check_risk, load_export
from spvla.fields import check_values, naming
from spvla.gates import GATES, has_risk
from spvla.gates.base import Gate, reads_plan
from spvla.gates.floor import NoiseFloor
from spvla.generators import make_baseline
from spvla.policy import SPVLAPolicy
from spvla.pruning.pruner import Pruner, make_pruner
from spvla.realtime import BridgePolicy
from spvla.recording import Policy, Recorder
from spvla.shadow import ShadowPolicy
from spvla.vlas.foreign import as_vla


def accelerate(
    vla: Any,
    export: str | Path | Export | None = None,
    risk: float | None = None,
    *,
    generator: str | None = None,
    gate: str | None = None,
    rule: Mapping[str, float] | None = None,
    pruning: Pruner | Mapping[str, Any] | str | None = None,
    max_generated_run: int | None = None,
    shadow: bool = False,
    record: str | Path | None = None,
    when_unavailable: str = "raise",
    mode: Literal["wait", "bridge"] = "wait",
    verify: Literal["none", "exact", "tolerant"] = "none",
    scheduler: str | None = None,
) -> Policy:
    """Put a frozen VLA, a distilled generator and its gate together.

    Args:
        vla: the frozen policy, unmodified: a :class:`~spvla.vlas.base.VLA`, a LeRobot policy, or any object with
            ``select_action(observation)`` and ``reset()``; the latter two act in the export's action space
            (:mod:`spvla.vlas.foreign` has the adapters, with their options).
        export: an exported folder, hf://owner/name, or a loaded :class:`Export`; None for built-in parts alone.
        risk: the one knob: allowed fraction of an episode's steps that are generated and deviate; the export's default if
            None.
        generator: one of the export's generators, or of those that need no training; the export's default if None,
            ``"none"`` leaves every step to the VLA.
        gate: ``learned``, ``release``, ``paper`` or another name of :data:`~spvla.gates.GATES`; the export's default if
            None.
        rule: the gate's constants, such as those of a hand-set rule.
        pruning: visual tokens that the VLA's own pass keeps: what :func:`~spvla.pruning.make_pruner` takes, such as
            ``fast_fewer``; the export's default if None, ``"none"`` switches pruning off. A VLA that cannot prune is refused.
        max_generated_run: generated actions in a row; the export's default if None.
        shadow: the VLA acts on every step, what would have been skipped is recorded.
        record: folder of a rollout store for finished episodes; the policy is then a :class:`~spvla.recording.Recorder`.
        when_unavailable: what to do while a remote VLA does not answer: ``raise``, ``stop``, ``hold`` or ``generator``, see
            :class:`~spvla.policy.SPVLAPolicy`.
        mode: ``wait`` for the VLA where it is asked, or ``bridge``: never wait, see
            :class:`~spvla.realtime.BridgePolicy`, whose ``tick`` a control loop calls.
        verify: where the VLA is asked, let it check the generator's proposal in one pass instead of decoding token by token:
            ``exact``, the VLA's own answer, sooner; ``tolerant``, dimensions within the export's tolerance are accepted. A VLA
            that cannot verify is refused.
        scheduler: the former name of ``gate``.
    """
    if scheduler is not None:
        if gate is not None:
            raise InputError("accelerate: scheduler is the old name of gate; give only gate", field="scheduler")
        warnings.warn("accelerate: scheduler is now called gate", DeprecationWarning, stacklevel=2)
        gate = scheduler
    loaded = load_export(export) if isinstance(export, str | Path) else export
    if not isinstance(loaded, Export | None):
        raise InputError(f"accelerate: export must be a folder, hf://owner/name or an Export, got {type(loaded).__name__}")
    if risk is not None:
        check_risk(risk)
    check_values({"pruning": pruning}, PRUNING)
    defaults = dict(loaded.defaults) if loaded else {}
    vla = as_vla(vla, None if loaded is None else replace(loaded.space, max_jump=None))
    if loaded is not None:
        _require_same_actions(loaded, vla.action_space)
    space = vla.action_space if loaded is None else loaded.acting_space(vla.action_space)
    generator = generator or defaults.get("generator", "ridge")
    gate = gate or defaults.get("gate", "release")
    pruner = make_pruner(defaults.get("pruning") if pruning is None else pruning)
    options: dict[str, Any] = {
        "max_generated_run": defaults.get("max_generated_run", 20) if max_generated_run is None else max_generated_run,
        "when_unavailable": when_unavailable,
        "verify": verify,
    }
    if loaded is not None:
        options["tolerance"] = loaded.tolerance
    made: type[SPVLAPolicy] = ShadowPolicy if shadow else SPVLAPolicy
    if gate == "never" and verify == "none":
        raise InputError(
            "gate: 'never' needs verify, or nothing would come of the proposals", code="cannot-matter", field="gate"
        )
    if mode == "bridge":
        unfit = {
            "shadow mode": shadow,
            "when_unavailable: the generator acts for a while, then the robot stands": when_unavailable != "raise",
            "verify": verify != "none",
        }
        for what in (name for name, given in unfit.items() if given):
            raise InputError(f"accelerate: mode 'bridge' cannot be joined with {what}", field="mode")
        made = BridgePolicy
        if gate == "live":
            rule = {"executed": False, "agreement": False, **(rule or {})}
    elif mode != "wait":
        raise InputError(f"accelerate: mode {mode!r} is neither wait nor bridge", field="mode")
    part, decider = None, None
    if generator != "none":
        part = loaded.generator(generator, space) if loaded else make_baseline(generator, space)
        decider = make_gate(gate, space, loaded, generator, defaults.get("risk") if risk is None else risk, rule or {})
        if loaded is not None:
            options["space"] = loaded.limits(generator, space)
    else:
        GATES.get(gate)  # an unknown name is refused even where it does not matter
        if rule:
            raise InputError(f"rule: constants ({', '.join(rule)}) are given, but no gate is in use", field="rule")
    policy = made(vla, part, decider, pruner, **options)
    policy.ledger.announce = part is not None or pruner is not None
    return policy if record is None else Recorder(policy, record)


def make_gate(
    name: str, space: ActionSpace, export: Export | None, generator: str, risk: float | None, options: Mapping[str, Any]
) -> Gate:
    """The gate called ``name`` for ``generator``'s proposals on a robot of ``space``.

    Raises:
        InputError: an unknown name or option, or a gate that needs an export without one (code ``needs-export``).
    """
    gate = GATES.get(name)
    with naming("accelerate"):
        if has_risk(name):
            if export is None or risk is None:
                message = f"the gate {name!r} needs an export that holds a trained one"
                raise InputError(message, code="needs-export", field="export")
            made = gate.from_export(export, generator, risk, space, **options)
            if (floor := NoiseFloor.of(export.provenance)) is not None:
                floor.require(risk, reads_plan(made))
        else:
            made = gate(space, **options)
    return cast(Gate, made)


def _require_same_actions(export: Export, space: ActionSpace) -> None:
    """Refuse a VLA if its actions differ from the export's; warn if only their scale differs."""
    export.space.require_compatible(space, "accelerate")
    if far := export.space.scale_difference(space):
        warnings.warn(
            f"the export's action scale differs from the VLA's in {len(far)} of {space.dim} dimensions: {far[0]}. The "
            "generator keeps the export's scale; check that both use the same units",
            stacklevel=3,
        )
