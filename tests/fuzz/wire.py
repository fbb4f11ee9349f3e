"""Messages both ways: to the policy server, and from the servers that a remote VLA asks, each in its protocol.

No sockets: the server's side is called as its connection calls it, and a remote VLA gets a connection whose frames are given.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgpack
import numpy as np
from PIL import Image

from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.pruning.selector import TokenSelector
from spvla.vlas.answers import ProtocolError
from spvla.vlas.base import VLAUnavailable
from spvla.vlas.remote import RemoteVLA
from spvla.wire import encode_array
from tests.fuzz.base import Outcome, digest
from tests.fuzz.mutations import MESSAGE

FRAME = f"message{MESSAGE}"
ARRAY = np.arange(8, dtype=np.float32)
SEEN = Observation(np.zeros((8, 8, 3), np.uint8), ARRAY)


def write(folder: Path, name: str, content: Any) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / FRAME).write_bytes(msgpack.packb(content, default=encode_array))
    return folder / name


def message(kind: str, payload: Any, seq: int = 1) -> dict[str, Any]:
    return {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.5}


def make_requests(folder: Path) -> list[Path]:
    encoded = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(encoded, "PNG")
    images = {"agentview": np.zeros((8, 8, 3), np.uint8), "x": {"__image__": True, "format": "png", "data": encoded.getvalue()}}
    seen = {"images": images, "states": ARRAY, "task_description": "stack the cups"}
    return [
        write(folder, "hello", message("hello", {"harness_version": "fuzz", "protocol_version": 1})),
        write(folder, "episode_start", message("episode_start", {"task": {"name": "a"}})),
        write(
            folder, "pruned", message("episode_start", {"task": {"name": "a"}, "vla": True, "pruning": asdict(TokenSelector())})
        ),
        write(folder, "observation", message("observation", seen)),
        write(folder, "observation of the VLA", message("observation", {**seen, "keep_mass": 0.5})),
    ]


@functools.cache
def server(process: int) -> Any:
    """This process's own: its threads do not survive a fork."""
    from spvla.serve.interface import Interface
    from spvla.serve.server import PolicyServer

    interface = Interface(image="agentview", state="states")
    return PolicyServer("tests.test_serve:sharing", interface=interface, generator="last", gate="release")


def read_request(folder: Path) -> Outcome:
    """What the server answers; an answer to an observation comes after the start of an episode."""
    from vla_eval.protocol.messages import Message, MessageType, pack_message

    from spvla.serve.endpoint import Endpoint
    from spvla.serve.messages import decode, parse

    async def answer() -> Any:
        endpoint, contexts = Endpoint(server(os.getpid())), list[Any]()
        if folder.name.startswith("observation"):
            start = {"task": {"name": "a"}, "vla": folder.name.endswith("VLA")}
            await endpoint._answer(MessageType.EPISODE_START, start, contexts)
        try:
            return await endpoint._answer(*parse(decode((folder / FRAME).read_bytes())), contexts)
        finally:
            await endpoint._end(contexts)

    reply = asyncio.run(answer())
    if reply is None:
        return Outcome("nothing")
    reply[1].pop("timings", None)
    return Outcome(digest(pack_message(Message(*reply, seq=1, timestamp=0.5))))


ANSWER = {
    "actions": np.full((2, 7), 0.25, np.float32),
    "tokens": np.arange(14).reshape(2, 7),
    "confidence": np.full(7, 0.5, np.float32),
    "features": ARRAY,
    "visual_tokens": [2, 4],
    "kept_tokens": [0, 3],
    "timings": {"total": 1.5},
}
HELLO = {"protocol_version": 1, "model_server": "spvla", "model": "openvla A", "action_space": LIBERO.to_dict()}
WHOLE: dict[str, dict[str, Any]] = {
    "vla-eval": {"hello": message("hello", HELLO), "answer": message("action", ANSWER, 3)},
    "openpi": {"hello": {"robot": "arm", "action_horizon": 2}, "answer": ANSWER},
}


def make_answers(protocol: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        messages = dict(WHOLE[protocol])
        if protocol == "vla-eval":
            messages["error"] = message("error", {"error": "out of memory"}, 3)
            messages["error about the start"] = message("error", {"error": "no such pruner"}, 2)
        return [write(folder, name, content) for name, content in messages.items()]

    return make


class Frames:
    """A connection on which these frames arrive, and then nothing."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = deque(frames)
        self.socket = SimpleNamespace(shutdown=lambda how: None)

    def recv(self, timeout: float) -> bytes:
        if timeout == 0 or not self.frames:
            raise TimeoutError
        return self.frames.popleft()

    def ping(self) -> threading.Event:
        event = threading.Event()
        event.set()
        return event

    def send(self, frame: bytes) -> None:
        """Nobody reads it."""

    def close(self) -> None:
        """Nothing is open."""


class Once(RemoteVLA):
    """Does not reconnect."""

    def _drop(self, link: Any) -> None:
        self._link = None


def read_answers(protocol: str) -> Callable[[Path], Outcome]:
    """What a remote VLA makes of a server whose hello, or whose answer, is the given frame; the other one is whole."""

    def read(folder: Path) -> Outcome:
        given = (folder / FRAME).read_bytes()
        hello, answer = (msgpack.packb(content, default=encode_array) for content in WHOLE[protocol].values())
        frames = (given, answer) if folder.name == "hello" else (hello, given, answer)
        space = LIBERO if protocol == "openpi" else None
        try:
            with patch("websockets.sync.client.connect", lambda *_, **__: Frames(*frames)):
                vla = Once("ws://127.0.0.1:1", space, protocol=protocol, timeout=30.0)
            vla.reset("stack the cups")
            output = vla.predict(SEEN, 0.5)
        except (InputError, VLAUnavailable) as error:
            cause = error.__context__
            if isinstance(error, VLAUnavailable) and cause is None:
                return Outcome(digest(str(error)))  # the server's own words
            anything = isinstance(error, VLAUnavailable) or "server answers at" in str(error)  # also what nobody thought of
            if anything and not isinstance(cause, ProtocolError | TimeoutError | InputError):
                raise cause or error from None
            raise InputError(str(error)) from None
        output.timings.pop("round_trip")
        said = {name: value for name, value in vla.server_info.items() if name in HELLO}
        return Outcome(digest(vla.action_space.to_dict(), sorted(said.items(), key=str), *vars(output).values()))

    return read
