"""The accelerated policy as a `vla-eval <https://github.com/allenai/vla-evaluation-harness>`_ model server.

    python -m spvla.serve --vla openvla --checkpoint PATH --export EXPORT --risk 0.05 --config configs/serve/libero.yaml

Each session (one WebSocket connection) has a joint policy of its own around one set of VLA weights; the VLA runs one
observation at a time, and an intuitive step of one session never waits for another's VLA call. A session may also ask for
the VLA itself, with all it reports: that is how :class:`~spvla.vlas.remote.RemoteVLA` runs generator and gate on a robot.

vla-eval's own runner takes :class:`PolicyServer` too. This one adds what a server that stays up needs: a reply that says
what was wrong with a message, limits on frames, images and sessions, ``GET /health``, and a stop that finishes what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import socket
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import anyio.to_thread
import msgpack
import numpy as np
from PIL import Image
from vla_eval import specs
from vla_eval.model_servers.base import ModelServer, SessionContext
from vla_eval.protocol.image_codec import is_encoded_image
from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from spvla.assemble import accelerate
from spvla.errors import InputError
from spvla.export import load_export
from spvla.fields import naming
from spvla.history import ActionHistory
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.pruning.pruner import make_pruner
from spvla.serve.interface import Interface
from spvla.vlas.base import VLA, PrunableVLA, VLAOutput
from spvla.vlas.registry import load_vla, second_vla
from spvla.wire import decode_array

logger = logging.getLogger("spvla.serve")

MAX_FRAME = 16 * 2**20  # bytes; two uncompressed 1080p images
MAX_PIXELS = 2**23  # of one image, decoded
HELD_FRAMES = 2  # that a session may have waiting
STOPPING = (1001, "the server stops")


class InTurn:
    """A session's VLA, asked one session at a time; the wait is reported as the stage ``turn``."""

    def __init__(self, vla: VLA, lock: threading.Lock) -> None:
        self.vla, self.lock, self.action_space = vla, lock, vla.action_space

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.vla.reset(instruction)

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """As the VLA's own."""
        start = perf_counter()
        with self.lock:
            waited = 1e3 * (perf_counter() - start)
            output = self.vla.predict(observation, keep_mass=keep_mass)
        return replace(output, timings={"turn": waited, **output.timings})


@dataclass
class _Session:
    """One connection's episode: with a joint policy, or with the VLA itself (``plain``)."""

    policy: SPVLAPolicy
    vla: VLA
    plain: InTurn | None = None
    instruction: str | None = None
    spoiled: bool = False  # something unforeseen happened in it: it is not used again


class PolicyServer(ModelServer):
    """Joint policies for any number of sessions over one VLA.

    Args:
        vla, checkpoint, vla_options, suite: which VLA, as for :func:`~spvla.vlas.registry.load_vla`. One that can share
            its weights (``with_pruner``) does so between sessions; another one is loaded once per session at a time.
        export: folder or hub id of the export; None for built-in generators and rules.
        risk, generator, gate, pruning: as for :func:`~spvla.accelerate`.
        interface: the benchmark's conventions.
    """

    def __init__(
        self,
        vla: str,
        checkpoint: str | None = None,
        export: str | None = None,
        risk: float | None = None,
        *,
        vla_options: dict[str, Any] | None = None,
        suite: str | None = None,
        generator: str | None = None,
        gate: str | None = None,
        pruning: Any = None,
        interface: Interface | None = None,
    ) -> None:
        self.interface = interface or Interface()
        self._source = (vla, checkpoint, vla_options, suite)
        self._vla = load_vla(*self._source)
        self._export = None if export is None else load_export(export)
        self._parts = {"risk": risk, "generator": generator, "gate": gate, "pruning": pruning}
        self._turn = threading.Lock()
        self._sessions: WeakKeyDictionary[SessionContext, _Session] = WeakKeyDictionary()
        self._spare = [self._make(first=True)]  # made now, so that what does not fit is told before anyone connects
        self.space = self._vla.action_space
        if self.interface.state is None:
            self._require_no_state(self._spare[0].policy)

    @staticmethod
    def _require_no_state(policy: SPVLAPolicy) -> None:
        """Raise :class:`InputError` if generator or gate read the state, which this interface does not hand on."""
        if policy.generator is None or policy.gate is None:
            return
        history = ActionHistory(policy.space, policy.history.length)
        history.observe(None)
        with naming("interface.state is not given, though the generator or its gate needs it"):
            window = history.window()
            policy.gate.decide(window, policy.generator.propose(window)[:, 0])

    def _make(self, first: bool = False) -> _Session:
        # A VLA that cannot share its weights serves the first session itself; further ones load their own.
        vla = self._vla if first and not isinstance(self._vla, PrunableVLA) else second_vla(self._vla, *self._source)
        policy = accelerate(vla, self._export, **self._parts)
        assert isinstance(policy, SPVLAPolicy), "a server records nothing"
        policy.vla = InTurn(policy.vla, self._turn)
        return _Session(policy, vla)

    def get_action_spec(self) -> dict[str, specs.DimSpec]:
        """vla-eval's spec per action component."""
        return {name: getattr(specs, spec) for name, spec in self.interface.action_spec.items()}

    def get_observation_spec(self) -> dict[str, specs.DimSpec]:
        """vla-eval's spec per observation component; image sizes are in the description."""
        out = {name: getattr(specs, spec) for name, spec in self.interface.observation_spec.items()}
        size = self.interface.image_size
        for name in (self.interface.image, self.interface.wrist_image):
            if size is not None and name in out:
                out[name] = replace(out[name], description=f"{size[0]} x {size[1]}")
        return out

    def get_observation_params(self) -> dict[str, Any]:
        """What the benchmark's constructor is told."""
        return dict(self.interface.benchmark)

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Begin an episode. ``config["vla"]``: serve the VLA itself; ``config["pruning"]``: with this pruner."""
        session = await anyio.to_thread.run_sync(self._start, config)
        self._sessions[ctx] = session

    def _start(self, config: Mapping[str, Any]) -> _Session:
        try:
            session = self._spare.pop()
        except IndexError:
            session = self._make()
        if config.get("vla"):
            vla, pruning = session.vla, config.get("pruning")
            if pruning is not None:
                try:
                    if not isinstance(vla, PrunableVLA):
                        raise InputError(f"pruning: {type(vla).__name__} cannot run on fewer visual tokens")
                    vla = vla.with_pruner(make_pruner(pruning))
                except InputError:
                    self._spare.append(session)
                    raise
            session.plain = InTurn(vla, self._turn)
        return session

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Act, and send the action."""
        await ctx.send_action(await self.act(obs, ctx))

    async def act(self, obs: Any, ctx: SessionContext) -> dict[str, Any]:
        """The reply to an observation: ``actions`` (D,), and who made it.

        A session that asked for the VLA itself gets ``actions`` (T, D), ``tokens``, ``confidence``, ``features``,
        ``visual_tokens`` and ``timings``; its observations may hold ``keep_mass``.

        Raises:
            InputError: the observation cannot be used; the message names the field. The session goes on.
        """
        session = self._sessions.get(ctx)
        if session is None:
            raise InputError("observation: send episode_start first")
        if not isinstance(obs, dict):
            raise InputError(f"observation: expected a dict, got {type(obs).__name__}")
        return await anyio.to_thread.run_sync(self._act, session, obs)

    def _act(self, session: _Session, obs: dict[str, Any]) -> dict[str, Any]:
        instruction = obs.get("task_description")
        if not isinstance(instruction, str):
            raise InputError(f"task_description: expected the instruction, got {type(instruction).__name__}")
        observation = self.interface.observation(obs)
        try:
            if session.plain is not None:
                if instruction != session.instruction:
                    session.plain.reset(instruction)
                    session.instruction = instruction
                keep_mass = obs.get("keep_mass", 1.0)
                if not isinstance(keep_mass, float | np.floating):
                    raise InputError(f"keep_mass: expected a number, got {type(keep_mass).__name__}")
                output = session.plain.predict(observation, keep_mass=float(keep_mass))
                return dict(vars(output))
            if instruction != session.instruction or obs.get("episode_restart"):
                session.policy.reset(instruction)
                session.instruction = instruction
            action = session.policy.select_action(observation)
        except InputError:
            raise
        except Exception:
            session.spoiled = True
            raise
        step = session.policy.last_step
        del session.policy.steps[:-1]  # an episode may be endless
        return {"actions": self.interface.action(action, self.space), "source": step.source.name.lower(), "reason": step.reason}

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Free what the session held."""
        session = self._sessions.pop(ctx, None)
        if session is not None and not session.spoiled:
            session.instruction = session.plain = None
            self._spare.append(session)


# --------------------------------------------------------------------------------------------------- the connection


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
