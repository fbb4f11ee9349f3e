"""How much a VLA contradicts itself: a floor under any risk that is measured against what it would do after a fresh look.

Two plans for the same state differ where a VLA draws at random, and a plan made some steps ago differs from a fresh one. Which
of the two limits a policy depends on what it can do. One that executes plans to their end cannot help being wrong as often as
plans of all ages are, on average: a smaller risk cannot be kept. One that may plan again at every step can always avoid stale
plans; but nobody can be expected to foresee a step better than the VLA repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spvla.errors import InputError
from spvla.fields import check_fields, naming


@dataclass(frozen=True)
class NoiseFloor:
    """Fractions of the states in which the VLA deviates from a fresh plan's first action, by the export's tolerance.

    Args:
        stale: by the action of age k of a plan made k steps before, (P,); the first is 0.
        fresh: by a second plan for the same state; None where the VLA was not asked twice.
    """

    stale: tuple[float, ...]
    fresh: float | None = None

    def __post_init__(self) -> None:
        with naming("noise floor"):
            check_fields(self, at_least={"stale": 0, "fresh": 0})
        if not self.stale:
            raise InputError("noise floor: stale is empty")

    def horizon(self, steps: int | None = None) -> float:
        """The fraction of deviating steps if ``steps`` actions of every plan are executed; None: all of them."""
        kept = self.stale[:steps]
        return sum(kept) / len(kept)

    def require(self, risk: float, arms: bool) -> None:
        """Raise :class:`InputError` (code ``below-floor``) for an allowed ``risk`` that no threshold can keep; ``arms`` says
        whether the policy may plan again at every step."""
        floor = (self.fresh or 0.0) if arms else self.horizon()
        if risk >= floor:
            return
        reason = "two plans for the same state deviate in" if arms else "a policy that executes plans to their end deviates in"
        advice = "" if arms else "; distil with --vla_plan true, so that it may plan again at every step"
        raise InputError(
            f"risk {risk:g} is below the noise floor of this VLA: {reason} {floor:.1%} of the states{advice}",
            code="below-floor",
            field="risk",
        )

    def lines(self) -> list[str]:
        """What it says, for people."""
        ages = ", ".join(f"{100 * share:.1f}" for share in self.stale)
        out = [f"noise floor: % of states in which a plan of age 0, 1, ... deviates from a fresh one: {ages}"]
        out.append(f"noise floor: {self.horizon():.1%} if plans are executed whole; that is the least risk of such a policy")
        fresh = "unknown (nobody asked the VLA twice)" if self.fresh is None else f"{self.fresh:.1%}"
        return [*out, f"noise floor: two fresh plans for the same state deviate in: {fresh}"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> NoiseFloor | None:
        """What an export's provenance says of it, None if nothing."""
        values = provenance.get("noise_floor")
        return None if values is None else cls(tuple(values["stale"]), values.get("fresh"))
