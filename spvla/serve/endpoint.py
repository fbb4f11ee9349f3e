"""The WebSocket connection to a :class:`~spvla.serve.server.PolicyServer`.

vla-eval's own runner takes that server too. This one adds what a server that stays up needs: a reply that says what was wrong
with a message, limits on what a client may send, hold and keep waiting, a token, ``GET /health`` and ``GET /metrics``, and a
stop that finishes what runs but waits for no client.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import time
import traceback
import uuid
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio.to_thread
from vla_eval.model_servers.base import SessionContext
from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from spvla.errors import InputError
from spvla.serve.messages import MAX_FRAME, decode, parse
from spvla.serve.metrics import CONTENT_TYPE
from spvla.serve.server import PolicyServer
from spvla.vlas.base import VLAUnavailable
from spvla.wire import shorten

logger = logging.getLogger("spvla.serve")

HELD_FRAMES = 2  # that a session may have waiting
STOPPING = (1001, "the server stops")
STOP_WAIT = 2.0  # seconds that a stop waits for steps and clients
SEND_WAIT = 10.0  # seconds that a client may leave an answer unread
MAX_ERROR = 400  # characters of an error that a client gets
REFUSED_RATE = 2**22  # bytes a second of messages that are refused: reading those takes time that other clients wait for


class Endpoint:
    """Serves a :class:`PolicyServer` at an address, until :meth:`stop`.

    Args:
        server: what answers.
        max_sessions: connections at once.
        max_per_host: of these from one address; None: as many.
        token: what a client must show, as ``Authorization: Bearer TOKEN`` or ``ws://host:port/?token=TOKEN``; None: nothing.
        first: seconds within which a new connection must send its first message.
        idle: seconds without a message after which a session ends.
    """

    def __init__(
        self,
        server: PolicyServer,
        max_sessions: int = 64,
        *,
        max_per_host: int | None = None,
        token: str | None = None,
        first: float = 10.0,
        idle: float = 3600.0,
    ) -> None:
        self.server, self.max_sessions, self.max_per_host = server, max_sessions, max_per_host
        self.token, self.first, self.idle = token, first, idle
        self.metrics = server.metrics
        self.metrics.sessions.set_function(lambda: self.sessions)
        self._open: dict[ServerConnection, bool] = {}  # whether a step of it runs
        self._stop = asyncio.Event()
        self._log = ClientLog()
        anyio.to_thread.current_default_thread_limiter().total_tokens = max_sessions + 8

    @property
    def sessions(self) -> int:
        """Connections that are open."""
        return len(self._open)

    async def run(self, host: str, port: int, ready: asyncio.Future[int] | None = None) -> None:
        """Serve; ``ready`` receives the port. After :meth:`stop` this returns within a few seconds, whatever clients do."""
        listening = await serve(
            self._connection,
            host,
            port,
            process_request=self._request,
            origins=[None],  # no page in a browser may connect
            compression=None,
            max_size=MAX_FRAME,
            max_queue=HELD_FRAMES,
            open_timeout=5,
            close_timeout=1,
            ping_interval=None,  # a simulator that loads a scene answers no ping; the kernel finds dead peers below
        )
        port = next(iter(listening.sockets)).getsockname()[1]
        logger.info("ready: ws://%s:%d, health at http://%s:%d/health", host, port, host, port)
        if ready is not None:
            ready.set_result(port)
        try:
            await self._stop.wait()
        finally:
            await self._close(listening)

    async def _close(self, listening: Server) -> None:
        logger.info("stopping: %d sessions, each ends after the step that runs", self.sessions)
        listening.close(close_connections=False)
        idle = [asyncio.ensure_future(ws.close(*STOPPING)) for ws, busy in self._open.items() if not busy]
        for wait in (STOP_WAIT, 0.5):
            end = time.monotonic() + wait
            while (self._open or not all(task.done() for task in idle)) and time.monotonic() < end:
                await asyncio.sleep(0.01)
            for ws in self._open:  # what is left after the first round: a client that does not read, or a step that hangs
                ws.transport.abort()

    def stop(self) -> None:
        """Close the sessions, each after the step that runs, and return from :meth:`run`."""
        self._stop.set()

    def _request(self, connection: ServerConnection, request: Any) -> Any:
        url = urlsplit(request.path)
        if url.path == "/health":
            status = {"status": "ok", "sessions": self.sessions, "max_sessions": self.max_sessions}
            return respond(connection, json.dumps(status) + "\n", "application/json")
        if self.token is not None:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            given = given or parse_qs(url.query).get("token", [""])[0]
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                self._log(connection, "refused: no token, or another one")
                self.metrics.refused.labels("token").inc()
                return connection.respond(HTTPStatus.UNAUTHORIZED, "the server's token is missing or another one\n")
        return respond(connection, self.metrics.text(), CONTENT_TYPE) if url.path == "/metrics" else None

    async def _connection(self, ws: ServerConnection) -> None:
        if self._stop.is_set():
            return await ws.close(*STOPPING)
        if self.sessions >= self.max_sessions:
            return await self._refuse(ws, "sessions", f"{self.max_sessions} sessions are open")
        if self.max_per_host is not None and sum(address(o) == address(ws) for o in self._open) >= self.max_per_host:
            return await self._refuse(ws, "address", f"{self.max_per_host} sessions are open from this address")
        self._open[ws] = False
        _keep_alive(ws)
        contexts: list[SessionContext] = []  # the running episode's, if any
        patience, reason = self.first, f"no message in {self.first:g} s"
        try:
            while True:
                try:
                    async with asyncio.timeout(patience):
                        frame = await ws.recv()
                except TimeoutError:
                    return await ws.close(1008, reason)
                patience, reason = self.idle, f"no message in {self.idle:g} s"
                self._open[ws] = True
                refused = await self._reply(ws, frame, contexts)
                self._open[ws] = False
                if refused:
                    await self._pause(ws, len(frame) / REFUSED_RATE)
                if self._stop.is_set():
                    return await ws.close(*STOPPING)
        except ConnectionClosed:
            pass
        finally:
            await self._end(contexts)
            del self._open[ws]

    async def _refuse(self, ws: ServerConnection, limit: str, reason: str) -> None:
        self.metrics.refused.labels(limit).inc()
        await ws.close(1013, reason)

    async def _pause(self, ws: ServerConnection, seconds: float) -> None:
        """Read nothing more from a client for so long, unless it hangs up or the server stops."""
        ends = [asyncio.ensure_future(self._stop.wait()), asyncio.ensure_future(ws.wait_closed())]
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()

    async def _reply(self, ws: ServerConnection, frame: bytes | str, contexts: list[SessionContext]) -> bool:
        """Answer one message. True if it was refused."""
        sequence, start = 0, time.perf_counter()
        reply: tuple[MessageType, dict[str, Any]] | None
        try:
            content = await anyio.to_thread.run_sync(decode, frame)
            if isinstance(content.get("seq"), int):
                sequence = content["seq"]
            kind, payload = parse(content)
            if kind == MessageType.ERROR:
                self._log(ws, f"the client reports: {payload.get('error')}")
            reply = await self._answer(kind, payload, contexts)
        except (InputError, VLAUnavailable) as error:
            reply = (MessageType.ERROR, {"error": shorten(str(error), MAX_ERROR)})
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._log(ws, f"a step failed at {where.filename}:{where.lineno}: {type(error).__name__}: {error}", logging.ERROR)
            reply = (MessageType.ERROR, {"error": shorten(f"{type(error).__name__}: {error}", MAX_ERROR)})
        if reply is None:
            return False
        try:
            async with asyncio.timeout(SEND_WAIT):
                await ws.send(pack_message(Message(*reply, seq=sequence)))
        except TimeoutError:
            self._log(ws, f"dropped: it has not read an answer in {SEND_WAIT:g} s")
            ws.transport.abort()
        if reply[0] == MessageType.ACTION:
            self.metrics.answer_seconds.observe(time.perf_counter() - start)
        self.metrics.errors.inc(reply[0] == MessageType.ERROR)
        return reply[0] == MessageType.ERROR

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
            return None
        raise InputError(f"message: a client must not send {kind.value!r}")

    async def _end(self, contexts: list[SessionContext]) -> None:
        while contexts:
            await self.server.on_episode_end({}, contexts.pop())


class ClientLog:
    """What clients bring about, in the log: one short line per address and second, the rest counted."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int]] = {}  # when a line was written, and how many were left out since

    def __call__(self, ws: ServerConnection, text: str, level: int = logging.WARNING) -> None:
        host, now = address(ws), time.monotonic()
        before, left_out = self._last.get(host, (-1.0, 0))
        if now - before < 1 and before >= 0:
            self._last[host] = (before, left_out + 1)
            return
        if len(self._last) > 1000:
            self._last.clear()
        self._last[host] = (now, 0)
        more = f" ({left_out} more lines left out)" if left_out else ""
        logger.log(level, "%s: %s%s", host, shorten(text), more)


def respond(connection: ServerConnection, text: str, content_type: str) -> Any:
    """An answer to a plain HTTP request."""
    response = connection.respond(HTTPStatus.OK, text)
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = content_type
    return response


def address(ws: ServerConnection) -> str:
    """The address that a client connects from."""
    peer = ws.remote_address
    return str(peer[0]) if peer else "unknown"


def _keep_alive(ws: ServerConnection) -> None:
    """Have the kernel probe an idle peer, so that a session whose machine went dark ends after about two minutes."""
    sock = ws.transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):  # not TCP, or a system without these options
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
