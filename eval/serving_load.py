"""Recorded robots for ``python -m eval serving``: clients that play episodes back, and a VLA that answers as it did then.

The server in between is the real one, in a process of its own, with its WebSockets and its messages. Simulated are the VLA's
time, during which a thread sleeps, and the robots: what they see does not depend on what they are told.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.pruning.selector import TokenSelector
from spvla.store.reader import read_action_space, read_episodes
from spvla.vlas.base import VLAOutput

IMAGE = (256, 256, 3)  # of every message, uncompressed
ANSWER_WAIT = 60.0  # seconds


def recorded_actions(episodes: Sequence[Any]) -> dict[bytes, FloatArray]:
    """The teacher's action (D,) by the bytes of the state (S,) that it was recorded in; the first one where states repeat."""
    actions: dict[bytes, FloatArray] = {}
    for episode in episodes:
        labels = episode.actions if episode.vla_actions is None else episode.vla_actions
        for state, action in zip(episode.states, labels, strict=True):
            actions.setdefault(np.asarray(state, np.float32).tobytes(), np.asarray(action, np.float32))
    return actions


class RecordedVLA:
    """Answers after a wait what the recorded teacher said in the same state.

    Args:
        space: of the actions.
        actions: see :func:`recorded_actions`.
        milliseconds: that a call takes.
    """

    needs_images = False

    def __init__(self, space: ActionSpace, actions: dict[bytes, FloatArray], milliseconds: float) -> None:
        self.action_space, self.actions, self.milliseconds = space, actions, milliseconds

    def with_pruner(self, selector: TokenSelector | None) -> RecordedVLA:
        """Another session's, with the same recordings."""
        return RecordedVLA(self.action_space, self.actions, self.milliseconds)

    def reset(self, instruction: str) -> None:
        """Start an episode."""

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """Wait, and answer."""
        time.sleep(self.milliseconds / 1e3)
        assert observation.state is not None, "recordings have states"
        return VLAOutput(self.actions[np.asarray(observation.state, np.float32).tobytes()][None])


def recorded(checkpoint: str | None = None, *, milliseconds: float = 50.0) -> RecordedVLA:
    """For ``spvla serve --vla eval.serving_load:recorded --checkpoint STORE``."""
    if checkpoint is None:
        raise InputError("recorded: give the rollout store as checkpoint", field="checkpoint")
    return RecordedVLA(read_action_space(checkpoint), recorded_actions(list(read_episodes(checkpoint))), milliseconds)


@contextmanager
def served(store: Path, milliseconds: float, options: Sequence[str]) -> Iterator[str]:
    """A server of the recorded VLA in a process of its own; yields its address, ``host:port``.

    Raises:
        InputError: it does not start; with its own reason.
    """
    vla = ["--vla", "eval.serving_load:recorded", "--checkpoint", str(store)]
    vla += ["--vla_options", f"{{milliseconds: {milliseconds:g}}}", "--interface.state", "states", "--port", "0"]
    with subprocess.Popen([sys.executable, "-m", "spvla.serve", *vla, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        address = None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"ready: ws://([\w.]+:\d+)", line):
                address = found[1]
                break
        try:
            if address is None:
                raise InputError(f"serving: the server does not start: {(said or ['without a word'])[-1].strip()}")
            yield address
        finally:
            process.terminate()
            process.stderr.read()


@dataclass
class Heard:
    """What one robot got, an entry for each step but the first of an episode.

    Args:
        seconds: from sending the observation to the action.
        held: whether the robot was told to stand still.
        generated: whether the generator made the action.
        deviates: whether it is further from the teacher's than the tolerance.
        begun, ended: when the counted time began and ended, :func:`time.monotonic`.
        first: seconds of the counted time that went by in first steps of episodes.
    """

    seconds: list[float] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    generated: list[bool] = field(default_factory=list)
    deviates: list[bool] = field(default_factory=list)
    begun: float = 0.0
    ended: float = 0.0
    first: float = 0.0

    def on_time(self, period: float) -> float:
        """Share of the steps that got their answer within ``period`` seconds."""
        return float(np.mean(np.array(self.seconds) <= period)) if self.seconds else 0.0

    @property
    def rate(self) -> float:
        """Actions per second, those to stand still left out."""
        acted = len(self.held) - sum(self.held)
        return acted / max(1e-9, self.ended - self.begun - self.first)


class Robot:
    """A client that plays recorded episodes back at a fixed rate: it sends what it sees, waits for the action, and sends the
    next observation when its time has come, or at once where the answer took longer.

    Args:
        episodes: played one after another from ``number`` on, forever.
        space, tolerance: by which an action deviates.
        number: of the robot.
    """

    def __init__(self, episodes: Sequence[Any], space: ActionSpace, tolerance: float, number: int) -> None:
        self.episodes, self.space, self.tolerance, self.number = episodes, space, tolerance, number
        self.heard = Heard()
        self._sequence = 0

    async def drive(self, address: str, start: float, warm_up: float, seconds: float) -> Heard:
        """From ``start`` on (:func:`time.monotonic`) for ``warm_up`` seconds, and for ``seconds`` that count."""
        from websockets.asyncio.client import connect

        period, image = 1 / self.space.control_rate, np.zeros(IMAGE, np.uint8)
        count_from, end = start + warm_up, start + warm_up + seconds
        async with connect(f"ws://{address}", compression=None, max_size=None, ping_interval=None) as ws:
            await asyncio.sleep(max(0.0, start - time.monotonic()))
            due, number = time.monotonic(), self.number
            while True:
                episode = self.episodes[number % len(self.episodes)]
                number += 1
                await self._tell(ws, "episode_start", {"task": {"name": episode.instruction}})
                labels = episode.actions if episode.vla_actions is None else episode.vla_actions
                for t, (state, label) in enumerate(zip(episode.states, labels, strict=True)):
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    sent = time.monotonic()
                    if sent >= end:
                        self.heard.ended = sent
                        return self.heard
                    seen = {"images": {"agentview": image}, "states": np.asarray(state, np.float32)}
                    answer = await self._ask(ws, {**seen, "task_description": episode.instruction})
                    now = time.monotonic()
                    due, took = max(due + period, now), now - sent
                    if sent >= count_from:
                        self._note(answer, label, took, due - sent, first=t == 0, sent=sent)

    async def _tell(self, ws: Any, kind: str, payload: dict[str, Any]) -> None:
        from vla_eval.protocol.messages import Message, MessageType, pack_message

        self._sequence += 1
        await ws.send(pack_message(Message(MessageType(kind), payload, self._sequence)))

    async def _ask(self, ws: Any, observation: dict[str, Any]) -> dict[str, Any]:
        from vla_eval.protocol.messages import MessageType, unpack_message

        await self._tell(ws, "observation", observation)
        async with asyncio.timeout(ANSWER_WAIT):
            reply = unpack_message(await ws.recv())
        if reply.type != MessageType.ACTION:
            raise InputError(f"serving: the server refuses an observation: {reply.payload.get('error')}")
        return reply.payload

    def _note(
        self, answer: dict[str, Any], label: NDArray[Any], took: float, lasted: float, *, first: bool, sent: float
    ) -> None:
        heard = self.heard
        heard.begun = heard.begun or sent
        if first:
            heard.first += lasted
            return
        heard.seconds.append(took)
        heard.held.append(answer["source"] == "held")
        heard.generated.append(answer["source"] == "generator")
        heard.deviates.append(self._deviates(np.asarray(answer["actions"], np.float32), np.asarray(label, np.float32)))

    def _deviates(self, action: FloatArray, label: FloatArray) -> bool:
        return bool(self.space.deviation(self.space.normalize(action), self.space.normalize(label), self.tolerance))
