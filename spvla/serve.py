"""The accelerated policy as a `vla-eval <https://github.com/allenai/vla-evaluation-harness>`_ model server.

    python -m spvla.serve --policy openvla --checkpoint PATH --export EXPORT --risk 0.05 --config configs/serve/libero.yaml

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
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.export import accelerate, load_export
from spvla.fields import check_fields, naming
from spvla.history import ActionHistory
from spvla.observation import Observation, check_image
from spvla.policy import SPVLAPolicy
from spvla.pruning.pruner import make_pruner
from spvla.vlas.base import VLA, PrunableVLA, VLAOutput
from spvla.vlas.registry import load_vla, second_vla

try:
    import anyio.to_thread
    import msgpack
    from vla_eval import specs
    from vla_eval.model_servers.base import ModelServer, SessionContext
    from vla_eval.protocol.image_codec import is_encoded_image
    from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message
    from vla_eval.protocol.numpy_codec import decode_ndarray
    from websockets.asyncio.server import Server, ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
except ImportError as missing:
    if __name__ != "__main__":
        raise ImportError(f"spvla.serve needs {missing.name}: pip install 'spvla[serve]'") from None
    print(f"error: spvla.serve needs {missing.name}: pip install 'spvla[serve]'", file=sys.stderr)
    sys.exit(2)

logger = logging.getLogger("spvla.serve")

MAX_FRAME = 16 * 2**20  # bytes; two uncompressed 1080p images
MAX_PIXELS = 2**23  # of one image, decoded
HELD_FRAMES = 2  # that a session may have waiting
STOPPING = (1001, "the server stops")


@dataclass(frozen=True)
class Interface:
    """What a benchmark sends and expects, where it differs from the policy's own environment. Specs are vla-eval's.

    Args:
        image: key of the main camera in an observation's ``images``.
        wrist_image: key of the second camera, or None.
        state: key of the proprioception in an observation, or None where none is used.
        image_size: height and width that images must have, or None for any.
        rotate_180: turn images upside down, for a benchmark whose images the policy knows the other way up.
        euler_to_axis_angle: the policy's rotations are extrinsic xyz Euler angles, the benchmark reads rotation vectors.
        gripper_from, gripper_to: the policy's and the benchmark's values for closed and open; None: the same.
        action_spec: names of constants in ``vla_eval.specs`` by component, declared to the benchmark.
        observation_spec: likewise.
        benchmark: parameters that vla-eval hands to the benchmark's constructor, for example ``{send_state: true}``.
    """

    image: str = "agentview"
    wrist_image: str | None = None
    state: str | None = None
    image_size: tuple[int, int] | None = None
    rotate_180: bool = False
    euler_to_axis_angle: bool = False
    gripper_from: tuple[float, float] | None = None
    gripper_to: tuple[float, float] | None = None
    action_spec: dict[str, str] = field(default_factory=dict)
    observation_spec: dict[str, str] = field(default_factory=dict)
    benchmark: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with naming("interface"):
            check_fields(self, at_least={"image_size": 1})
        known = [name for name, value in vars(specs).items() if isinstance(value, specs.DimSpec)]
        for name in (*self.action_spec.values(), *self.observation_spec.values()):
            if name not in known:
                raise InputError(f"interface: vla-eval has no spec {name!r}; it has: {', '.join(known)}")
        if (self.gripper_from is None) != (self.gripper_to is None):
            raise InputError("interface: gripper_from and gripper_to belong together")
        if self.gripper_from is not None and self.gripper_from[0] == self.gripper_from[1]:
            raise InputError("interface: gripper_from has the same value for closed and open")

    def observation(self, payload: Mapping[str, Any]) -> Observation:
        """A benchmark's observation as the policy takes it. Raises :class:`InputError` that names the field."""
        images = payload.get("images")
        if not isinstance(images, dict):
            raise InputError(f"images: expected a dict of arrays by camera, got {type(images).__name__}")
        state = None
        if self.state is not None:
            try:
                state = np.asarray(payload[self.state], np.float32)
            except KeyError:
                raise InputError(f"{self.state}: missing; the observation has: {', '.join(map(str, payload))}") from None
            except (TypeError, ValueError):
                raise InputError(f"{self.state}: expected numbers, got {type(payload[self.state]).__name__}") from None
        wrist = None if self.wrist_image is None else self._image(images, self.wrist_image)
        return Observation(self._image(images, self.image), state, wrist)

    def _image(self, images: Mapping[Any, Any], key: str) -> NDArray[np.uint8]:
        if key not in images:
            raise InputError(f"images[{key!r}]: missing; the observation has: {', '.join(map(str, images)) or 'none'}")
        image = check_image(images[key], f"images[{key!r}]")
        if self.image_size is not None and image.shape[:2] != tuple(self.image_size):
            raise InputError(f"images[{key!r}]: is {image.shape[:2]}, this server was set up for {tuple(self.image_size)}")
        return np.ascontiguousarray(image[::-1, ::-1]) if self.rotate_180 else image

    def action(self, action: FloatArray, space: ActionSpace) -> FloatArray:
        """An action (..., D) of the policy as the benchmark takes it."""
        out = np.array(action, np.float32)
        if self.euler_to_axis_angle and space.rotation:
            dims = list(space.rotation)
            out[..., dims] = euler_to_axis_angle(out[..., dims])
        if self.gripper_from is not None and self.gripper_to is not None:
            (closed, opened), (to_closed, to_opened) = self.gripper_from, self.gripper_to
            g = list(space.gripper)
            out[..., g] = to_closed + (out[..., g] - closed) / (opened - closed) * (to_opened - to_closed)
        return out


def euler_to_axis_angle(euler: FloatArray) -> FloatArray:
    """Extrinsic xyz Euler angles (..., 3) as rotation vectors (..., 3), angles up to pi."""
    half = np.asarray(euler, np.float64) / 2
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(half), -1, 0), np.moveaxis(np.sin(half), -1, 0)
    w = cx * cy * cz + sx * sy * sz
    xyz = [sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz]
    vector = np.stack(xyz, -1) * np.where(w < 0, -1.0, 1.0)[..., None]
    sine = np.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, np.abs(w)[..., None])
    return (vector * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2.0)).astype(np.float32)


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
        policy, checkpoint, policy_options, suite: which VLA, as for :func:`~spvla.vlas.registry.load_vla`. One that can share
            its weights (``with_pruner``) does so between sessions; another one is loaded once per session at a time.
        export: folder or hub id of the export; None for built-in generators and rules.
        risk, generator, scheduler, pruning: as for :func:`~spvla.accelerate`.
        interface: the benchmark's conventions.
    """

    def __init__(
        self,
        policy: str,
        checkpoint: str | None = None,
        export: str | None = None,
        risk: float | None = None,
        *,
        policy_options: dict[str, Any] | None = None,
        suite: str | None = None,
        generator: str | None = None,
        scheduler: str | None = None,
        pruning: Any = None,
        interface: Interface | None = None,
    ) -> None:
        self.interface = interface or Interface()
        self._source = (policy, checkpoint, policy_options, suite)
        self._vla = load_vla(*self._source)
        self._export = None if export is None else load_export(export)
        self._parts = {"risk": risk, "generator": generator, "scheduler": scheduler, "pruning": pruning}
        self._turn = threading.Lock()
        self._sessions: WeakKeyDictionary[SessionContext, _Session] = WeakKeyDictionary()
        self._spare = [self._make(first=True)]  # made now, so that what does not fit is told before anyone connects
        self.space = self._vla.action_space
        if self.interface.state is None:
            self._require_no_state(self._spare[0].policy)

    @staticmethod
    def _require_no_state(policy: SPVLAPolicy) -> None:
        """Raise :class:`InputError` if generator or scheduler read the state, which this interface does not hand on."""
        if policy.generator is None or policy.scheduler is None:
            return
        history = ActionHistory(policy.space, policy.history.length)
        history.observe(None)
        with naming("interface.state is not given, though the generator or its gate needs it"):
            policy.scheduler.decide(history, policy.generator.propose(history))

    def _make(self, first: bool = False) -> _Session:
        # A VLA that cannot share its weights serves the first session itself; further ones load their own.
        vla = self._vla if first and not isinstance(self._vla, PrunableVLA) else second_vla(self._vla, *self._source)
        policy = accelerate(vla, self._export, **self._parts)
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
                if not isinstance(keep_mass, float):
                    raise InputError(f"keep_mass: expected a number, got {type(keep_mass).__name__}")
                output = session.plain.predict(observation, keep_mass=keep_mass)
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
        content = msgpack.unpackb(frame, object_hook=_decode_array, raw=False)
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
    return decode_ndarray(content)


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


def serve_policy(
    policy: str,
    checkpoint: str | None = None,
    export: str | None = None,
    risk: float | None = None,
    generator: str | None = None,
    scheduler: str | None = None,
    pruning: str | dict[str, Any] | None = None,
    policy_options: dict[str, Any] | None = None,
    suite: str | None = None,
    interface: Interface = Interface(),
    host: str = "127.0.0.1",
    port: int = 8000,
    max_sessions: int = 64,
) -> None:
    """Serve the accelerated policy to vla-eval, until Ctrl-C or SIGTERM.

    Args:
        policy: a built-in name, an entry point of ``spvla.vlas``, or ``package.module:factory``.
        checkpoint: path or hub id, for the policy.
        export: folder or hub id of the generators and gates; without one the built-in parts.
        risk: allowed share of generated, deviating steps; the export's default if left out.
        generator: exported or built-in; the export's default if left out, ``none``: the VLA acts on every step.
        scheduler: ``learned``, ``release`` or ``paper``; the export's default if left out.
        pruning: ``none``, ``release``, ``readme`` or a pruner's fields; the export's default if left out.
        policy_options: keyword arguments for the policy, such as ``device`` and ``unnorm_key``.
        suite: LIBERO suite that it will act in, for policies that ask for it.
        interface: the benchmark's conventions; see configs/serve.
        host: address to bind; 0.0.0.0 serves everyone who reaches this machine, without asking who they are.
        port: port to bind; 0 for any free one.
        max_sessions: connections at once; further ones are refused.
    """
    if max_sessions < 1:
        raise InputError(f"max_sessions must be at least 1, got {max_sessions}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    server = PolicyServer(
        policy,
        checkpoint,
        export,
        risk,
        policy_options=policy_options,
        suite=suite,
        generator=generator,
        scheduler=scheduler,
        pruning=pruning,
        interface=interface,
    )

    async def main() -> None:
        endpoint = Endpoint(server, max_sessions)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, endpoint.stop)
        try:
            await endpoint.run(host, port)
        except (OSError, OverflowError) as error:
            raise InputError(f"cannot serve at {host}:{port}: {getattr(error, 'strerror', None) or error}") from None

    asyncio.run(main())


if __name__ == "__main__":
    from jsonargparse import auto_cli

    from spvla.cli import guard

    sys.exit(
        guard(
            lambda: auto_cli(
                serve_policy,
                as_positional=False,
                prog="python -m spvla.serve",
                description="The accelerated policy, served to vla-eval.",
            )
        )
    )
