"""What the doctor looks at, and what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spvla.actions import FloatArray
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.store import Episode, read_episodes
from spvla.vlas.cameras import recorded_camera
from spvla.vlas.conventions import decode_image

Verdict = Literal["ok", "warning", "failed", "unknown"]


@dataclass(frozen=True)
class Sample:
    """The beginning of an episode of the robot's.

    Args:
        instruction: what was asked for.
        observations: one for each control step, with images where the VLA sees them.
        executed: the actions that were executed, (T, D), environment units; None: unknown.
        labels: the VLA's own actions in those states, (T, D), NaN rows where it was not asked; None: unknown.
    """

    instruction: str
    observations: Sequence[Observation]
    executed: FloatArray | None = None
    labels: FloatArray | None = None


def recorded(folder: str | Path, episodes: int, steps: int) -> list[Sample]:
    """The first ``steps`` of the first ``episodes`` of a rollout store."""
    return [_sample(episode, steps) for episode in islice(read_episodes(folder), episodes)]


def _sample(episode: Episode, steps: int) -> Sample:
    cameras = {
        recorded_camera(name, len(episode.images)): [decode_image(frame) for frame in frames[:steps]]
        for name, frames in episode.images.items()
    }
    seen = [
        Observation(
            {name: frames[t] for name, frames in cameras.items()},
            None if episode.states is None else episode.states[t],
        )
        for t in range(min(steps, len(episode)))
    ]
    labels = None if episode.vla_actions is None else episode.vla_actions[:steps]
    return Sample(episode.instruction, seen, episode.actions[:steps], labels)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        check: ``unchanged``, ``calls``, ``latency``, ``pruning``, ``actions``, ``images`` or ``calibration``.
        verdict: ``failed`` means that the policy should not act so; ``unknown`` that the samples do not say.
        text: what was found.
        code: of a failure or warning, in lower case with hyphens; it never changes.
    """

    check: str
    verdict: Verdict
    text: str
    code: str | None = None


@dataclass(frozen=True)
class Report:
    """All findings; printed, they are a table."""

    findings: tuple[Finding, ...]

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Those that failed."""
        return tuple(f for f in self.findings if f.verdict == "failed")

    def __str__(self) -> str:
        return "\n".join(f"{f.check:12s} {f.verdict:8s} {f.text}" for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    def require(self) -> None:
        """Raise :class:`InputError` with the first failure's code, naming every one, if there are any."""
        if failures := self.failures:
            text = "; ".join(f"{f.check}: {f.text}" for f in failures)
            raise InputError(f"doctor: {text}", code=failures[0].code or "failed", field=failures[0].check)
