"""What comes from a VLA on another machine, checked in one place before anything of it reaches a robot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.vlas.base import VLAOutput
from spvla.wire import shorten

MAX_STEPS = 1000  # actions of one answer
LARGEST = 1e6  # absolute value of an action's entry or a feature
MAX_FEATURES = 2**16
MAX_TOKENS = 2**20  # visual tokens
MAX_TIMINGS = 100  # stages
SAME = ("protocol_version", "model_server", "model", "statistics_key", "action_space", "action_spec", "observation_spec")
"""What a vla-eval server says of itself that must be the same after a reconnect. All of it must be for openpi's."""


class ProtocolError(Exception):
    """The other end sent what cannot be used."""


def read_answer(reply: Mapping[str, Any], dim: int, features: int | None = None) -> VLAOutput:
    """An answer's fields as the VLA's output.

    Args:
        reply: what the server sent; fields that are not named in :class:`VLAOutput` are ignored.
        dim: entries of an action.
        features: entries of the features of earlier answers; None: there were none.

    Raises:
        ProtocolError: naming the field: not there, of another shape, not finite, or out of bounds.
    """
    if "actions" not in reply:
        raise ProtocolError(shorten(f"an answer without actions; it has: {', '.join(map(str, reply)) or 'nothing'}"))
    actions = _numbers(reply["actions"], "actions")
    if actions.ndim == 1:
        actions = actions[None]
    if actions.ndim != 2 or actions.shape[1] != dim or not 1 <= len(actions) <= MAX_STEPS:
        raise ProtocolError(f"actions have shape {actions.shape}, expected (T, {dim}) with T from 1 to {MAX_STEPS}")
    confidence = _vector(reply, "confidence", dim)
    if confidence is not None and not ((confidence >= 0) & (confidence <= 1.001)).all():
        raise ProtocolError("confidence is not within 0 and 1")
    pooled = _vector(reply, "features", features)
    tokens = None if reply.get("tokens") is None else _integers(reply["tokens"], "tokens")
    if tokens is not None and tokens.shape != actions.shape:
        raise ProtocolError(f"tokens have shape {tokens.shape}, the actions {actions.shape}")
    visual, kept = _visual_tokens(reply)
    return VLAOutput(
        actions.astype(np.float32),
        tokens=tokens,
        confidence=confidence,
        features=pooled,
        visual_tokens=visual,
        kept_tokens=kept,
        timings=_timings(reply.get("timings")),
    )


def difference(first: Mapping[str, Any], now: Mapping[str, Any], protocol: str) -> str | None:
    """What tells the server that answers ``now`` from the ``first`` one, or None: both say the same of themselves."""
    names = sorted(map(str, first.keys() | now.keys())) if protocol == "openpi" else SAME
    for name in names:
        before, after = first.get(name), now.get(name)
        if _canonical(before) != _canonical(after):
            return f"another server answers: its {shorten(name, 40)} is {_brief(after)}, it was {_brief(before)}"
    return None


def _canonical(value: Any) -> Any:
    """``value`` in a form that compares as equal exactly if the content is."""
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tobytes()]
    return repr(value)


def _brief(value: Any) -> str:
    return shorten(repr(value.get("name", value) if isinstance(value, Mapping) else value), 80)


def _numbers(value: Any, name: str, kinds: str = "iuf") -> NDArray[Any]:
    """``value`` as an array of finite numbers within bounds."""
    try:
        array = np.asarray(value)
    except Exception:  # rows of several lengths, nested too deeply
        raise ProtocolError(f"{name}: expected an array of numbers") from None
    if array.dtype.kind not in kinds:
        raise ProtocolError(f"{name}: expected an array of numbers, got {shorten(type(value).__name__)} of {array.dtype}")
    if not np.isfinite(array).all():
        raise ProtocolError(f"{name}: contain NaN or infinity")
    if array.size and max(-float(array.min()), float(array.max())) > LARGEST:
        raise ProtocolError(f"{name}: contain values beyond {LARGEST:g}")
    return array


def _integers(value: Any, name: str) -> NDArray[np.int64]:
    return _numbers(value, name, "iu").astype(np.int64)


def _vector(reply: Mapping[str, Any], name: str, width: int | None) -> NDArray[np.float32] | None:
    """The field ``name`` as float32 (width,), or None."""
    if reply.get(name) is None:
        return None
    vector = _numbers(reply[name], name)
    if vector.ndim != 1 or len(vector) != (len(vector) if width is None else width) or not 1 <= len(vector) <= MAX_FEATURES:
        raise ProtocolError(f"{name}: shape {vector.shape}, expected ({'F' if width is None else width},)")
    return vector.astype(np.float32)


def _visual_tokens(reply: Mapping[str, Any]) -> tuple[tuple[int, int] | None, NDArray[np.int64] | None]:
    """The fields ``visual_tokens`` and ``kept_tokens``."""
    visual, total = None, MAX_TOKENS
    if reply.get("visual_tokens") is not None:
        pair = _integers(reply["visual_tokens"], "visual_tokens")
        if pair.shape != (2,) or not 0 <= pair[0] <= pair[1] <= MAX_TOKENS:
            raise ProtocolError("visual_tokens: expected how many were kept, and of how many")
        visual, total = (int(pair[0]), int(pair[1])), int(pair[1])
    if reply.get("kept_tokens") is None:
        return visual, None
    kept = _numbers(reply["kept_tokens"], "kept_tokens")
    kept = _integers(kept if kept.size else kept.astype(np.int64), "kept_tokens")
    inside = kept.ndim == 1 and (not kept.size or (kept[0] >= 0 and kept[-1] < total and (np.diff(kept) > 0).all()))
    if not inside or (visual is not None and len(kept) != visual[0]):
        raise ProtocolError("kept_tokens: expected the ascending numbers of the visual tokens that were kept")
    return visual, kept


def _timings(value: Any) -> dict[str, float]:
    """Milliseconds by stage."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_TIMINGS:
        raise ProtocolError(f"timings: expected at most {MAX_TIMINGS} milliseconds by stage")
    for stage, ms in value.items():
        number = isinstance(ms, int | float | np.floating) and not isinstance(ms, bool)
        if not isinstance(stage, str) or len(stage) > 100 or not number or not 0 <= ms <= 1e9:
            raise ProtocolError("timings: expected milliseconds by stage")
    return {stage: float(ms) for stage, ms in value.items()}
