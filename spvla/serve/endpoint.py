"""The WebSocket connection to a :class:`~spvla.serve.server.PolicyServer`.

vla-eval's own runner takes that server too. This one adds what a server that stays up needs: a reply that says what was wrong
with a message, limits on frames, images and sessions, ``GET /health``, and a stop that finishes what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import socket
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import anyio.to_thread
import msgpack
import numpy as np
from PIL import Image
from vla_eval.model_servers.base import SessionContext
from vla_eval.protocol.image_codec import is_encoded_image
from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from spvla.errors import InputError
from spvla.serve.server import PolicyServer
from spvla.wire import decode_array

logger = logging.getLogger("spvla.serve")

MAX_FRAME = 16 * 2**20  # bytes; two uncompressed 1080p images
MAX_PIXELS = 2**23  # of one image, decoded
HELD_FRAMES = 2  # that a session may have waiting
STOPPING = (1001, "the server stops")


def decode(frame: bytes | str) -> dict[str, Any]:
    """A frame's content, images as arrays. Raises :class:`InputError` for anything but a msgpack map, or an image too large."""
    if isinstance(frame, str):
        raise InputError("message: expected a binary frame (msgpack), got text")
    try:
        content = msgpack.unpackb(frame, object_hook=_decode_array, raw=False, strict_map_key=False)
    except InputError:
        raise
    except Exception as error:  # msgpack, numpy and Pillow raise many types for damaged content
        raise InputError(f"message: not readable as msgpack with arrays ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise InputError(f"message: expected a map, got {type(content).__name__}")
    return content


def _decode_array(content: Any) -> Any:
    if is_encoded_image(content) and content["format"] != "raw":
        with Image.open(io.BytesIO(content["data"]), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:  # known before anything is decompressed
                raise InputError(f"image: {image.height} x {image.width} pixels are more than {MAX_PIXELS}")
            return np.array(image)
    return decode_array({"__ndarray__": True, **content} if is_encoded_image(content) else content)


def parse(content: Mapping[str, Any]) -> tuple[MessageType, dict[str, Any]]:
    """A message's type and payload. Raises :class:`InputError` that names the field."""
    try:
        kind = MessageType(content.get("type"))
    except ValueError:
        known = ", ".join(t.value for t in MessageType)
        raise InputError(f"message: type {content.get('type')!r} is not one of {known}") from None
    payload = content.get("payload")
    if not isinstance(payload, dict):
        raise InputError(f"message: payload must be a map, got {type(payload).__name__}")
    return kind, payload


class Endpoint:
    """Serves a :class:`PolicyServer` at an address, until :meth:`stop`."""

    def __init__(self, server: PolicyServer, max_sessions: int = 64) -> None:
        self.server, self.max_sessions = server, max_sessions
        self._open: dict[ServerConnection, bool] = {}  # whether a step of it runs
        self._stop = asyncio.Event()
        anyio.to_thread.current_default_thread_limiter().total_tokens = max_sessions + 8

    @property
    def sessions(self) -> int:
        """Connections that are open."""
        return len(self._open)

    async def run(self, host: str, port: int, ready: asyncio.Future[int] | None = None) -> None:
        """Serve; ``ready`` receives the port."""
        async with serve(
            self._connection,
            host,
            port,
            process_request=self._request,
            compression=None,
            max_size=MAX_FRAME,
            max_queue=HELD_FRAMES,
            ping_interval=None,  # a simulator that loads a scene answers no ping; the kernel finds dead peers below
        ) as listening:
            port = next(iter(listening.sockets)).getsockname()[1]
            logger.info("ready: ws://%s:%d, health at http://%s:%d/health", host, port, host, port)
            if ready is not None:
                ready.set_result(port)
            await self._stop.wait()
            await self._close(listening)

    async def _close(self, listening: Server) -> None:
        logger.info("stopping: %d sessions, each ends after the step that runs", self.sessions)
        listening.close(close_connections=False)
        await asyncio.gather(*(ws.close(*STOPPING) for ws, busy in list(self._open.items()) if not busy))
        while self._open:
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        """Close the sessions, each after the step that runs, and return from :meth:`run`."""
        self._stop.set()

    def _request(self, connection: ServerConnection, request: Any) -> Any:
        if request.path != "/health":
            return None
        status = {"status": "ok", "sessions": self.sessions, "max_sessions": self.max_sessions}
        response = connection.respond(HTTPStatus.OK, json.dumps(status) + "\n")
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    async def _connection(self, ws: ServerConnection) -> None:
        if self.sessions >= self.max_sessions:
            await ws.close(1013, f"{self.max_sessions} sessions are open")
            return
        self._open[ws] = False
        _keep_alive(ws)
        contexts: list[SessionContext] = []  # the running episode's, if any
        try:
            async for frame in ws:
                sequence, self._open[ws] = 0, True
                try:
                    content = await anyio.to_thread.run_sync(decode, frame)
                    if isinstance(content.get("seq"), int):
                        sequence = content["seq"]
                    reply = await self._answer(*parse(content), contexts)
                except InputError as error:
                    reply = (MessageType.ERROR, {"error": str(error)})
                except Exception as error:
                    logger.exception("a session's step failed")
                    reply = (MessageType.ERROR, {"error": f"{type(error).__name__}: {error}"})
                if reply is not None:
                    await ws.send(pack_message(Message(*reply, seq=sequence)))
                self._open[ws] = False
                if self._stop.is_set():
                    await ws.close(*STOPPING)
        except ConnectionClosed:
            pass
        finally:
            await self._end(contexts)
            del self._open[ws]

    async def _answer(
        self, kind: MessageType, payload: dict[str, Any], contexts: list[SessionContext]
    ) -> tuple[MessageType, dict[str, Any]] | None:
        server = self.server
        if kind == MessageType.HELLO:
            said = {
                "observation_params": server.get_observation_params(),
                "action_spec": {name: spec.to_dict() for name, spec in server.get_action_spec().items()},
                "observation_spec": {name: spec.to_dict() for name, spec in server.get_observation_spec().items()},
                "action_space": server.space.to_dict(),
                **server.identity,
            }
            return kind, make_hello_payload(model_server="spvla", capabilities={}, **said)
        if kind == MessageType.OBSERVATION:
            if not contexts:
                raise InputError("observation: send episode_start first")
            return MessageType.ACTION, await server.act(payload, contexts[0])
        if kind in (MessageType.EPISODE_START, MessageType.EPISODE_END):
            await self._end(contexts)
            if kind == MessageType.EPISODE_START:
                ctx = SessionContext(str(uuid.uuid4()), str(uuid.uuid4()))
                await server.on_episode_start(payload, ctx)
                contexts.append(ctx)
            return None
        if kind == MessageType.ERROR:
            logger.warning("a client reports: %s", payload)
            return None
        raise InputError(f"message: a client does not send {kind.value!r}")

    async def _end(self, contexts: list[SessionContext]) -> None:
        while contexts:
            await self.server.on_episode_end({}, contexts.pop())


def _keep_alive(ws: ServerConnection) -> None:
    """Have the kernel probe an idle peer, so that a session whose machine went dark ends after about two minutes."""
    sock = ws.transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):  # not TCP, or a system without these options
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
