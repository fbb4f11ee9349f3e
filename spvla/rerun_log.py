"""Episodes in `Rerun <https://rerun.io>`_: cameras with the visual tokens that were kept, actions, who acted, the gate's
probability and threshold, and the risk so far. Needs ``pip install "spvla[rerun]"``.

Below an episode's name: ``camera/NAME`` and ``camera/NAME/kept``, ``action``, ``state``, ``who`` (0 the VLA, 1 the generator,
2 nobody, 3 an earlier plan of the VLA's), ``why``, ``gate/probability``, ``gate/threshold``, ``risk``. The timelines are ``step`` and ``seconds``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError, needs_extra
from spvla.gates.live import LiveGate
from spvla.history import Source
from spvla.observation import MAIN, Observation
from spvla.recording import Policy
from spvla.steps import StepInfo
from spvla.store import Episode
from spvla.vlas.base import VLAOutput
from spvla.vlas.cameras import recorded_camera
from spvla.vlas.conventions import decode_image

Image = NDArray[np.uint8] | bytes  # (H, W, 3), or as JPEG or PNG
SPAWN = "spawn"


class RerunLog:
    """Where episodes are logged: a file, or a viewer.

    Args:
        target: a file whose name ends in .rrd; ``spawn``, which opens the viewer; or a viewer's address, ``rerun+http://...``.
        space: names and rate of the actions.

    Raises:
        InputError: the target is none of these; Rerun is not installed (code ``missing-extra``).
    """

    def __init__(self, target: str | Path, space: ActionSpace) -> None:
        with needs_extra("rerun"):
            import rerun
        self.rr, self.space = rerun, space
        self.recording = rerun.RecordingStream("spvla")
        self.episode, self.steps = "episode", 0
        if str(target) == SPAWN:
            self.recording.spawn()
        elif str(target).startswith("rerun+"):
            self.recording.connect_grpc(str(target))
        elif Path(target).suffix == ".rrd":
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            self.recording.save(str(target))
        else:
            raise InputError(f"rerun: {target} is no .rrd file, no rerun+http:// address and not {SPAWN!r}", field="rerun")

    def begin(self, episode: str, instruction: str) -> None:
        """Start an episode of that name."""
        self.episode, self.steps = episode, 0
        names = [f"{d} {self.space.role(d)}" for d in range(self.space.dim)]
        self._log("instruction", self.rr.TextDocument(instruction), static=True)
        self._log("action", self.rr.SeriesLines(names=names), static=True)

    def step(
        self,
        action: ArrayLike | None,
        *,
        state: ArrayLike | None = None,
        images: Mapping[str, Image] | None = None,
        source: Source | None = None,
        info: StepInfo | None = None,
        output: VLAOutput | None = None,
        risk: float | None = None,
    ) -> None:
        """Log the next control step; what is None is left out.

        Args:
            action: what was executed, (D,), environment units.
            state: proprioception, (S,).
            images: what the cameras saw, by their names.
            source: who acted; None: as ``info`` says.
            info: the policy's record of the step.
            output: what the VLA answered, for its kept tokens.
            risk: the share of the steps so far that were generated and deviated.
        """
        self.recording.set_time("step", sequence=self.steps)
        self.recording.set_time("seconds", duration=self.steps / self.space.control_rate)
        self.steps += 1
        for name, values in (("action", action), ("state", state)):
            if values is not None and np.size(values):
                self._log(name, self.rr.Scalars(np.asarray(values, np.float64)))
        source = info.source if source is None and info is not None else source
        if source is not None:
            self._log("who", self.rr.Scalars(float(source)))
        if info is not None:
            self._log("why", self.rr.TextLog(info.reason))
        of_gate = {} if info is None else {"gate/probability": info.probability, "gate/threshold": info.threshold}
        for name, value in {**of_gate, "risk": risk}.items():
            if value is not None:
                self._log(name, self.rr.Scalars(float(value)))
        for name, image in (images or {}).items():
            self._image(name, image, output)

    def _image(self, camera: str, image: Image, output: VLAOutput | None) -> None:
        if isinstance(image, bytes):
            kind = "image/jpeg" if image.startswith(b"\xff\xd8") else "image/png"
            self._log(f"camera/{camera}", self.rr.EncodedImage(contents=image, media_type=kind))
            image = decode_image(image)
        else:
            self._log(f"camera/{camera}", self.rr.Image(image))
        if output is not None and output.kept_tokens is not None and output.visual_tokens is not None:
            centres = token_centres(output.kept_tokens, output.visual_tokens[1], image.shape[:2])
            if centres is not None and camera == MAIN:
                self._log(f"camera/{camera}/kept", self.rr.Points2D(centres, radii=2.0))

    def _log(self, name: str, value: Any, static: bool = False) -> None:
        self.recording.log(f"{self.episode}/{name}", value, static=static)

    def episode_of(
        self,
        recorded: Episode,
        name: str,
        infos: Sequence[StepInfo] | None = None,
        outputs: Sequence[VLAOutput | None] | None = None,
        risks: Sequence[float] | None = None,
    ) -> None:
        """Log a finished episode under ``name``, with the policy's records of its steps, the VLA's answers, and the risk after
        each step, as far as there are any."""
        self.begin(name, recorded.instruction)
        cameras = {recorded_camera(camera, len(recorded.images)): frames for camera, frames in recorded.images.items()}
        for t in range(len(recorded)):
            self.step(
                recorded.actions[t],
                state=None if recorded.states is None else recorded.states[t],
                images={camera: frames[t] for camera, frames in cameras.items()},
                source=None if recorded.sources is None else Source(recorded.sources[t]),
                info=None if infos is None else infos[t],
                output=None if outputs is None else outputs[t],
                risk=None if risks is None else risks[t],
            )

    def close(self) -> None:
        """Write what is left."""
        self.recording.flush()
        self.recording.disconnect()


def token_centres(kept: NDArray[np.int64], total: int, size: tuple[int, int]) -> NDArray[np.float32] | None:
    """Where the kept visual tokens of the main image are in it: column and row in pixels, (K, 2).

    Args:
        kept: their indices among all tokens, those of the main image first.
        total: tokens of one to three images of a square grid each; None is returned for another number.
        size: the image's (H, W).
    """
    grid = next((isqrt(total // n) for n in (1, 2, 3) if total % n == 0 and isqrt(total // n) ** 2 * n == total), None)
    if grid is None:
        return None
    rows, columns = np.divmod(kept[kept < grid * grid], grid)
    return np.stack([(columns + 0.5) * size[1] / grid, (rows + 0.5) * size[0] / grid], axis=1).astype(np.float32)


class Viewed:
    """A policy around ``policy`` that logs its steps while they happen. Everything else is ``policy``'s own.

    Args:
        policy: what acts.
        log: where to.
    """

    def __init__(self, policy: Policy, log: RerunLog) -> None:
        self.policy, self.log = policy, log
        self._episodes = 0
        self._seen: Mapping[str, Image] | None = None  # captured and not logged yet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.policy.reset(instruction)
        self.log.begin(f"episode_{self._episodes:03d}", instruction)
        self._episodes += 1

    def select_action(
        self, observation: Observation | Callable[[], Observation], state: NDArray[np.floating] | None = None
    ) -> FloatArray:
        """See :meth:`SPVLAPolicy.select_action`."""
        action = self.policy.select_action(self._watched(observation), state)
        self._step(action, observation.state if isinstance(observation, Observation) else state)
        return action

    def tick(
        self, observation: Observation | Callable[[], Observation], state: NDArray[np.floating] | None = None
    ) -> FloatArray | None:
        """See :meth:`SPVLAPolicy.tick`. What another thread captures is logged with the next step."""
        action = self.policy.tick(self._watched(observation), state)
        self._step(action, observation.state if isinstance(observation, Observation) else state)
        return action

    def _watched(self, observation: Observation | Callable[[], Observation]) -> Observation | Callable[[], Observation]:
        if isinstance(observation, Observation):
            self._seen = observation.images
            return observation

        def capture() -> Observation:
            seen = observation()
            self._seen = seen.images
            return seen

        return capture

    def _step(self, action: FloatArray | None, state: NDArray[np.floating] | None) -> None:
        images, self._seen = self._seen, None
        risk = self.policy.gate.stats()["live_risk"] if isinstance(self.policy.gate, LiveGate) else None
        info = self.policy.last_step
        self.log.step(action, state=state, images=images, info=info, output=self.policy.last_output, risk=risk)
