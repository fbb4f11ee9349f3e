"""Are the images the right way up? The VLA itself says so: turned the other way, it should understand them less."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.doctor.findings import Finding, Sample
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput

TURNS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "turned by 180 degrees": lambda image: np.ascontiguousarray(image[::-1, ::-1]),
    "upside down": lambda image: np.ascontiguousarray(image[::-1]),
}
FEWEST, MOST = 6, 16  # observations that are compared
BETTER = 0.8  # an error this much smaller is no chance
AGREE = 0.75  # of the observations have to say the same


def orientation(
    samples: Sequence[Sample],
    answers: Sequence[Sequence[VLAOutput]],
    proposals: Sequence[Sequence[FloatArray | None]],
    space: ActionSpace,
    ask: Callable[[Sample, Observation], VLAOutput],
) -> Finding:
    """Compare the VLA's answers to images as they are and turned with what is known of the motion: its own labels in the
    recording, what was executed, or what the generator proposes.

    Args:
        samples: with images.
        answers: to every observation.
        proposals: of the generator at each step, (D,), environment units, or None.
        space: of all of them.
        ask: the VLA's answer to another observation of a sample.
    """
    known = [
        (sample, observation, output, wanted)
        for sample, own, proposed in zip(samples, answers, proposals, strict=True)
        for t, (observation, output) in enumerate(zip(sample.observations, own, strict=True))
        if observation.images and (wanted := _reference(sample, t, proposed[t])) is not None
    ]
    if not any(observation.images for sample in samples for observation in sample.observations):
        return Finding("images", "unknown", "the samples hold no images")
    if len(known) < FEWEST:
        return Finding("images", "unknown", f"only {len(known)} observations have both images and a known motion")
    known = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, MOST).astype(int))]
    upright = np.array([_error(space, output.actions[0], wanted) for _, _, output, wanted in known])
    told = []
    for name, turn in TURNS.items():
        turned = [(s, Observation({k: turn(v) for k, v in o.images.items()}, o.state), wanted) for s, o, _, wanted in known]
        errors = [_error(space, ask(sample, seen).actions[0], wanted) for sample, seen, wanted in turned]
        better, agree = float(np.mean(errors)) / max(float(upright.mean()), 1e-9), float(np.mean(errors < upright))
        told.append(f"{np.mean(errors):.3f} {name}")
        if better < BETTER and agree >= AGREE:
            text = f"the VLA understands the images better {name}: its error falls from {upright.mean():.3f} to {told[-1]}"
            return Finding("images", "failed", text, "image-orientation")
    if all(np.isclose(float(part.split()[0]), upright.mean(), atol=5e-4) for part in told):
        return Finding("images", "warning", "turning the images changes nothing: does the VLA see them?", "ignores-images")
    return Finding("images", "ok", f"upright: the VLA's error is {upright.mean():.3f} as they are, {', '.join(told)}")


def _reference(sample: Sample, step: int, proposal: FloatArray | None) -> FloatArray | None:
    """What the VLA should do at ``step``, as far as anybody knows."""
    for rows in (sample.labels, sample.executed):
        if rows is not None and np.isfinite(rows[step]).all():
            return np.asarray(rows[step], np.float32)
    return proposal


def _error(space: ActionSpace, answer: FloatArray, wanted: FloatArray) -> float:
    """Mean absolute error over the continuous dimensions, normalised."""
    off = np.abs(space.normalize(answer) - space.normalize(wanted))
    return float(off[list(space.continuous)].mean()) if space.continuous else float(off.mean())
