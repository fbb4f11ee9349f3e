"""A VLA on another machine, behind a vla-eval or an openpi WebSocket: the robot's computer asks it only when it has to.

With ``python -m spvla.serve`` at the other end everything travels that the VLA reports (confidence, features, tokens),
pruning works, and the server names its action space. Other vla-eval model servers and openpi's ``serve_policy`` return actions
alone; one that buffers chunks must be told not to (vla-eval: ``chunk_size: null``): skipped steps would make them old.

An answer that does not come in time, or a connection that breaks, raises :class:`~spvla.vlas.base.VLAUnavailable` at once; a
thread reconnects meanwhile. What the joint policy does then is its ``when_unavailable``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from spvla.actions import ActionSpace, read_space
from spvla.errors import InputError, needs_extra
from spvla.observation import WRIST, Observation
from spvla.pruning.selector import TokenSelector
from spvla.vlas.base import VLAOutput, VLAUnavailable
from spvla.vlas.conventions import Conventions, conventions_by_name
from spvla.wire import decode_array, encode_array

KEYS: dict[str, dict[str, str]] = {
    "vla-eval": {"image": "agentview", "wrist_image": "wrist", "state": "states", "instruction": "task_description"},
    "openpi": {
        "image": "observation/image",
        "wrist_image": "observation/wrist_image",
        "state": "observation/state",
        "instruction": "prompt",
    },
}
"""What each protocol calls our observation's fields, by default as its LIBERO configuration does."""

FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0  # seconds between attempts to reconnect


class RemoteVLA:
    """A VLA behind a WebSocket.

    Args:
        url: ``ws://host:port``.
        space: the space of its actions; None: the server says so (ours does).
        protocol: ``vla-eval`` or ``openpi``.
        timeout: seconds to wait for an answer, and for a connection.
        keys: names of observation fields that differ from :data:`KEYS`, and of further cameras; None as a name: the field is
            not sent.
        conventions: image steps to take here, for example ``{rotate_180: true}``; ours take them at the server.
        selector: which tokens the server's VLA keeps.

    Raises:
        InputError: nobody answers at ``url``, or something else than this protocol does.
    """

    def __init__(
        self,
        url: str,
        space: ActionSpace | Mapping[str, Any] | str | None = None,
        *,
        protocol: str = "vla-eval",
        timeout: float = 1.0,
        keys: Mapping[str, str | None] | None = None,
        conventions: Conventions | Mapping[str, Any] | str | None = None,
        selector: TokenSelector | None = None,
    ) -> None:
        try:
            known = urlsplit(url).hostname and urlsplit(url).port != 0
        except ValueError:  # a port that is none
            known = False
        if not known or not url.startswith(("ws://", "wss://")):
            raise InputError(f"policy 'remote' needs a server's address as checkpoint, ws://host:port, got {url!r}")
        if not timeout > 0:
            raise InputError(f"remote: timeout must be positive, got {timeout}")
        if protocol not in KEYS:
            raise InputError(f"remote: protocol {protocol!r} is not one of {', '.join(KEYS)}")
        unknown = [name for name in keys or {} if name not in KEYS[protocol]]
        if unknown:
            raise InputError(f"remote: keys: {unknown[0]!r} is not one of {', '.join(KEYS[protocol])}")
        self.url, self.protocol, self.timeout, self.selector = url, protocol, timeout, selector
        self.keys: dict[str, str | None] = {**KEYS[protocol], **(keys or {})}
        self.conventions = conventions_by_name(conventions)
        self.instruction: str | None = None
        self._lock = threading.Lock()  # of the two below
        self._connection: Any = None
        self._reconnecting = False
        self._closed = False
        self._why = ""  # the last connection ended
        self._told: str | None = None  # the instruction that this connection's episode began with
        self._sequence = 0
        try:
            self._connection, self.server_info = self._connect()
        except (OSError, TimeoutError, _ProtocolError, _websockets().exceptions.WebSocketException) as error:
            raise InputError(f"remote: no {protocol} server answers at {url} ({_short(error)})") from None
        if space is None and "action_space" not in self.server_info:
            raise InputError(f"remote: the server at {url} does not say what its actions are; give action_space")
        self.action_space = read_space(self.server_info["action_space"] if space is None else space)
        if selector is not None and self.server_info.get("model_server") != "spvla":
            raise InputError(f"pruning: the server at {url} cannot run on fewer visual tokens (it is no spvla.serve)")

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that the server looks through: those with a key. The one in the hand counts where openpi's protocol is
        spoken, or where the server asks for it."""
        named = {name: key for name, key in self.keys.items() if name not in ("state", "instruction") and key is not None}
        asked = self.protocol == "openpi" or bool((self.server_info.get("observation_params") or {}).get("send_wrist_image"))
        return tuple(name for name in named if name != WRIST or asked)

    def with_pruner(self, selector: TokenSelector | None) -> RemoteVLA:
        """The same VLA with another selector, over a connection of its own."""
        return RemoteVLA(
            self.url,
            self.action_space,
            protocol=self.protocol,
            timeout=self.timeout,
            keys=self.keys,
            conventions=self.conventions,
            selector=selector,
        )

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.instruction, self._told = instruction, None

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """Ask the server; ``timings`` holds its stages and the ``round_trip``.

        Raises:
            VLAUnavailable: it does not answer in time, or answers with an error.
            InputError: no :meth:`reset`, or an answer without actions.
        """
        if self.instruction is None:
            raise InputError("predict: call reset(instruction) first")
        with self._lock:
            connection = self._connection
        if connection is None:
            raise VLAUnavailable(f"{self.url}: {self._why}; reconnecting")
        start = time.perf_counter()
        try:
            reply = self._ask(connection, self._message(observation, keep_mass))
        except (OSError, TimeoutError, _ProtocolError, _websockets().exceptions.WebSocketException) as error:
            self._why = f"no answer in {self.timeout:g} s" if isinstance(error, TimeoutError) else _short(error)
            self._drop(connection)
            raise VLAUnavailable(f"{self.url}: {self._why}") from None
        if "error" in reply:
            raise VLAUnavailable(f"{self.url}: {reply['error']}")
        try:
            actions = np.atleast_2d(np.asarray(reply["actions"], np.float32))
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"remote: {self.url} answered without actions: {', '.join(map(str, reply)) or 'nothing'}"
            ) from None
        tokens = reply.get("visual_tokens")
        timings = reply.get("timings") or {}
        return VLAOutput(
            actions,
            tokens=reply.get("tokens"),
            confidence=reply.get("confidence"),
            features=reply.get("features"),
            visual_tokens=None if tokens is None else (int(tokens[0]), int(tokens[1])),
            kept_tokens=reply.get("kept_tokens"),
            timings={**timings, "round_trip": 1e3 * (time.perf_counter() - start)},
        )

    def close(self) -> None:
        """End the connection."""
        self._closed = True
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # ------------------------------------------------------------------------------------------------- the protocols

    def _message(self, observation: Observation, keep_mass: float) -> dict[str, Any]:
        """The observation in the protocol's terms."""
        images: dict[str, Any] = {}
        fields: dict[str, Any] = {}
        for name, image in observation.images.items():
            if (key := self.keys.get(name)) is not None:
                images[key] = np.ascontiguousarray(self.conventions.apply_image(image, max(image.shape[:2])))
        if observation.state is not None and self.keys["state"] is not None:
            fields[self.keys["state"]] = np.asarray(observation.state, np.float32)
        if self.keys["instruction"] is not None:
            fields[self.keys["instruction"]] = self.instruction
        if self.protocol == "openpi":
            return {**images, **fields}
        return {"images": images, **fields, "keep_mass": float(keep_mass)}

    def _connect(self) -> tuple[Any, dict[str, Any]]:
        """A connection, and what the server says of itself."""
        from websockets.sync.client import connect

        connection = connect(
            self.url, compression=None, max_size=None, open_timeout=self.timeout, close_timeout=0.1, ping_interval=None
        )
        try:
            if self.protocol == "openpi":
                return connection, _unpack(connection.recv(timeout=self.timeout))
            self._send(connection, "hello", {"harness_version": "spvla", "protocol_version": 1})
            return connection, self._receive(connection)
        except BaseException:
            connection.close()
            raise

    def _ask(self, connection: Any, message: dict[str, Any]) -> dict[str, Any]:
        if self.protocol == "openpi":
            connection.send(_pack(message, openpi=True))
            answer = connection.recv(timeout=self.timeout)
            if isinstance(answer, str):  # a traceback, after which the server hangs up
                raise _ProtocolError(answer.strip().splitlines()[-1])
            return _unpack(answer)
        if self._told != self.instruction:
            episode = {"task": {"name": self.instruction}, "vla": True}
            if self.selector is not None:
                episode["pruning"] = asdict(self.selector)
            self._send(connection, "episode_start", episode)
            self._told = self.instruction
        self._send(connection, "observation", message)
        return self._receive(connection)

    def _send(self, connection: Any, kind: str, payload: dict[str, Any]) -> None:
        self._sequence += 1
        content = {"type": kind, "payload": payload, "seq": self._sequence, "timestamp": time.time()}
        connection.send(_pack(content))

    def _receive(self, connection: Any) -> dict[str, Any]:
        """The answer to the last message sent; an error about one before it, such as the episode's start, counts first."""
        failed: dict[str, Any] | None = None
        while True:
            content = _unpack(connection.recv(timeout=self.timeout))
            payload = content.get("payload")
            if not isinstance(payload, dict):
                raise _ProtocolError(f"an answer without payload: {', '.join(map(str, content))}")
            if content.get("type") == "error":
                self._told = None  # begin the episode anew: the server may not have one
                failed = failed or {"error": str(payload.get("error", payload))}
            if content.get("seq", self._sequence) == self._sequence:
                return failed or payload

    # ------------------------------------------------------------------------------------------------- reconnecting

    def _drop(self, connection: Any) -> None:
        with self._lock:
            self._connection, self._told = None, None
            if self._reconnecting or self._closed:
                return
            self._reconnecting = True
        threading.Thread(target=self._reconnect, args=(connection,), daemon=True).start()

    def _reconnect(self, old: Any) -> None:
        old.close()
        wait = FIRST_WAIT
        while not self._closed:
            try:
                connection, _ = self._connect()
            except Exception as error:  # whatever it is, the next attempt may succeed
                self._why = _short(error)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
                continue
            with self._lock:
                self._connection, self._reconnecting = connection, False
            if self._closed:
                self.close()
            return


class _ProtocolError(Exception):
    """The other end speaks something else."""


def _websockets() -> Any:
    with needs_extra("remote"):
        import msgpack  # noqa: F401
        import websockets.exceptions
    return websockets


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0] if str(error) else type(error).__name__


def _pack(content: Any, openpi: bool = False) -> bytes:
    """msgpack with arrays as maps; openpi's keys are bytes."""
    import msgpack

    packed: bytes = msgpack.packb(content, default=partial(encode_array, bytes_keys=openpi))
    return packed


def _unpack(frame: bytes | str) -> dict[str, Any]:
    """The map in a frame, arrays of numbers in it as numpy's. Raises :class:`_ProtocolError` for anything else."""
    import msgpack

    try:
        content = msgpack.unpackb(frame, object_hook=decode_array, strict_map_key=False)
    except InputError as error:
        raise _ProtocolError(str(error)) from None
    except Exception as error:  # msgpack raises many types for damaged content
        raise _ProtocolError(f"an answer that is no msgpack map ({_short(error)})") from None
    if not isinstance(content, dict):
        raise _ProtocolError(f"an answer that is no map but {type(content).__name__}")
    return content


def load(
    checkpoint: str | None = None,
    *,
    action_space: Mapping[str, Any] | str | None = None,
    protocol: str = "vla-eval",
    timeout: float = 1.0,
    keys: dict[str, str | None] | None = None,
    conventions: Mapping[str, Any] | str | None = None,
) -> RemoteVLA:
    """The policy ``remote``: :class:`RemoteVLA` with options as a configuration file writes them.

    Args:
        checkpoint: the server's address, ``ws://host:port``.
        action_space: see :func:`~spvla.actions.read_space`; None: the server says so.
        protocol, timeout, keys, conventions: see :class:`RemoteVLA`.
    """
    return RemoteVLA(checkpoint or "", action_space, protocol=protocol, timeout=timeout, keys=keys, conventions=conventions)
