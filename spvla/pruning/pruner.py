"""A pruning's two parts, the policy's speed response and the VLA's token selector, from one mapping of fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from spvla.errors import InputError
from spvla.pruning.selector import TokenSelector
from spvla.pruning.speed import SPEEDS, SpeedResponse

PRESETS = ("fast_fewer", "slow_fewer")  # speed responses that need no further field
FORMER = {"release": "fast_fewer", "readme": "slow_fewer"}


@dataclass(frozen=True)
class Pruner:
    """What is kept at which speed (the policy's part), and which tokens these are (the VLA's part)."""

    speed: SpeedResponse
    selector: TokenSelector


def make_pruner(pruning: Pruner | Mapping[str, Any] | str | None, name: str = "pruning") -> Pruner | None:
    """The pruner that a configuration means.

    Args:
        pruning: a pruner; a speed response by its name (``fast_fewer``, ``slow_fewer``), constants as published for
            LIBERO-Object; ``none`` or None for no pruning; or fields: ``speed``, which is ``constant`` (needs ``keep``, in
            (0, 1)), ``fast_fewer`` or ``slow_fewer`` (take ``z_threshold`` and ``z_min``), and those of
            :class:`~spvla.pruning.selector.TokenSelector`. Without ``speed`` it is ``fast_fewer``.
        name: what the error calls it.

    Raises:
        InputError: an unknown name, or a field that does not fit; the message lists the known ones. Code ``renamed`` for
            ``release`` and ``readme``, which are the former names of ``fast_fewer`` and ``slow_fewer``.
    """
    if pruning is None or pruning == "none":
        return None
    if isinstance(pruning, Pruner):
        return pruning
    if isinstance(pruning, str):
        require_current(pruning, name)
        if pruning not in PRESETS:
            raise InputError(f"{name} {pruning!r} is unknown; available: none, {', '.join(PRESETS)}")
        pruning = {"speed": pruning}
    if not isinstance(pruning, Mapping):
        raise InputError(f"{name}: expected a name or fields, got {type(pruning).__name__}", field=name)
    given = dict(pruning)
    response = given.pop("speed", "fast_fewer")
    require_current(response, f"{name}: speed")
    if not isinstance(response, str) or response not in SPEEDS:
        raise InputError(f"{name}: speed {response!r} is not one of {', '.join(SPEEDS)}", field="speed")
    own = [f.name for f in fields(SPEEDS[response])]
    known = [*own, *(f.name for f in fields(TokenSelector))]
    for option in given:
        if option not in known:
            raise InputError(
                f"{name}: field {option!r} is unknown for speed {response!r}; available: {', '.join(['speed', *known])}",
                field=option,
            )
    if response == "constant" and "keep" not in given:
        raise InputError(f"{name}: speed 'constant' needs keep, how much is kept", field="keep")
    speed = SPEEDS[response](**{k: v for k, v in given.items() if k in own})
    return Pruner(speed, TokenSelector(**{k: v for k, v in given.items() if k not in own}))


def require_current(pruning: Any, name: str = "pruning") -> None:
    """Raise :class:`InputError` (code ``renamed``) if ``pruning`` is the former name of one."""
    if isinstance(pruning, str) and pruning in FORMER:
        raise InputError(f"{name} {pruning!r} is now called {FORMER[pruning]!r}", code="renamed", field="pruning")


def with_current_names(pruning: Any) -> Any:
    """A pruning as an older export holds it, by today's names."""
    if isinstance(pruning, Mapping) and "speed" in pruning:
        return {**pruning, "speed": FORMER.get(pruning["speed"], pruning["speed"])}
    return FORMER.get(pruning, pruning) if isinstance(pruning, str) else pruning
