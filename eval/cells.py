"""Cells of generator x gate x pruning: their names and prunings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.export import Export
from spvla.gates import has_risk
from spvla.policy import VERIFY
from spvla.pruning.pruner import PRESETS, Pruner, make_pruner, require_current

MODES = ("wait", "bridge", "paused")
RULES = {
    "plan": ("plan", "horizon"),
    "pace": ("plan", "pace"),
    "reuse": ("last", "reuse"),
}  # baselines for plans, by their names


@dataclass(frozen=True)
class Cell:
    """One configuration of the policy. ``none`` as generator leaves every step to the VLA, as pruning every token.

    ``mode`` is what happens in real time: ``wait`` or ``bridge`` (see :func:`spvla.accelerate`), or ``paused``, where the world
    stands still while the policy thinks; None: the evaluation's own. ``verify`` is how proposals are verified (``none``,
    ``exact`` or ``tolerant``). ``horizon`` is how many actions of each plan are executed, for the gate of that name.
    """

    generator: str
    gate: str
    risk: float | None = None
    pruning: str = "none"
    mode: str | None = None
    verify: str = "none"
    horizon: int | None = None

    @property
    def name(self) -> str:
        """Readable and unique."""
        rule = next((name for name, parts in RULES.items() if parts == (self.generator, self.gate)), None)
        scheduling = rule or ("vla" if self.generator == "none" else f"{self.generator}+{self.gate}")
        pruning = "" if self.pruning == "none" else f"+{self.pruning}"
        mode = "" if self.mode is None else f":{self.mode}"
        mode += "" if self.verify == "none" else f":{self.verify}"
        number = self.horizon if self.risk is None else self.risk
        return scheduling + pruning + mode + ("" if number is None else f"@{number:g}")

    @property
    def live(self) -> bool:
        """The gate learns from episode to episode: all episodes of the cell are one deployment, in their order."""
        return self.gate == "live"


def parse_cells(cells: Sequence[str], risks: Sequence[float | None]) -> list[Cell]:
    """Cells from their names; the VLA alone always leads.

    ``vla``, ``ridge+release``, ``mlp+learned`` (once per risk), ``mlp+learned@0.05``; each with a pruning after it:
    ``vla+slow_fewer``, ``ridge+release+fast_fewer``, ``mlp+learned+budget@0.05``; in real time with a mode of its own:
    ``vla:paused``, ``mlp+learned:bridge@0.2``; with proposals verified where the VLA is asked: ``mlp+never:exact``,
    ``mlp+learned:tolerant@0.1``. For a VLA that plans in chunks ``plan@4`` executes four actions of each plan, ``pace`` and
    ``reuse`` are the rules of :mod:`spvla.gates.plans`.
    """
    out = [Cell("none", "none")]
    for text in cells:
        parts, at, risk = text.partition("@")
        parts, *words = parts.split(":")
        chosen: dict[str, Any] = {}
        for word in words:
            kind = "mode" if word in MODES else "verify" if word in VERIFY[1:] else None
            if kind is None or kind in chosen:
                raise InputError(
                    f"cell {text!r}: {word!r} is no mode ({', '.join(MODES)}) and no way to verify ({', '.join(VERIFY[1:])})",
                    code="unknown-name",
                    field="cells",
                )
            chosen[kind] = word
        names = parts.split("+")
        if names[0] == "vla":
            names = ["none", "none", *names[1:]]
        if names[0] in RULES and names[1:2] != [RULES[names[0]][1]]:
            names = [*RULES[names[0]], *names[1:]]
        if names[:2] == ["plan", "horizon"]:
            if not risk.isdecimal() or int(risk) < 1 or len(names) > 3:
                raise InputError(f"cell {text!r}: expected plan@ and how many actions of a plan are executed", field="cells")
            pruning = names[2] if len(names) > 2 else "none"
            out.append(Cell("plan", "horizon", None, pruning, horizon=int(risk), **chosen))
            continue
        if not (2 <= len(names) <= 3 and all(names)) or (at and names[0] == "none"):
            raise InputError(f"cell {text!r}: expected vla or generator+gate, optionally with +pruning, :mode and @risk")
        if at and not has_risk(names[1]):
            raise InputError(f"cell {text!r}: the gate {names[1]!r} does not take a risk")
        try:
            asked = [float(risk)] if at else (list(risks) if has_risk(names[1]) else [None])
        except ValueError:
            raise InputError(f"cell {text!r}: {risk!r} is not a risk") from None
        pruning = names[2] if len(names) > 2 else "none"
        out += [Cell(names[0], names[1], r, pruning, **chosen) for r in asked]
    return list(dict.fromkeys(out))


def default_cells(space: ActionSpace, export: Export | None) -> list[str]:
    """Linear against learned, as far as there are both: the published rule reads three translations, and what is learned comes
    from an export."""
    linear = ["ridge+release"] if len(space.translation) >= 3 else []
    return linear if export is None else [*linear, f"{export.defaults['generator']}+learned"]


def cell_pruner(name: str, named: Mapping[str, Mapping[str, Any]]) -> Pruner | None:
    """The pruner called ``name`` among the ``named`` ones; the published two need no entry, one changes them."""
    require_current(name)
    if name in named:
        speed = {"speed": name} if name in PRESETS else {}
        return make_pruner({**speed, **named[name]}, f"pruning {name!r}")
    if name not in ("none", *PRESETS):
        raise InputError(f"pruning {name!r} is unknown; available: {', '.join(dict.fromkeys((*named, *PRESETS)))}")
    return make_pruner(name)
