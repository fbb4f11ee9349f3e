"""One connection to a VLA on another machine: its two protocols, and which answer belongs to which request."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from spvla.errors import InputError, needs_extra
from spvla.vlas.answers import ProtocolError
from spvla.wire import bounds, decode_array, encode_array, shorten

MAX_ANSWER = 2**22  # bytes
T = TypeVar("T")


class Link:
    """A connection, and what the server says of itself (``hello``).

    vla-eval's messages are numbered, and an answer counts if it has its request's number. openpi's are not. There, a ping
    follows each answer; the next request waits until it has come back, when everything sent before has arrived as well. An
    answer that nobody waits for, or one with the bytes of an earlier one, casts doubt on the order: the connection has to end.

    Raises:
        ProtocolError: the server speaks something else.
        Exception: it cannot be reached within ``timeout`` seconds; many types.
    """

    def __init__(self, url: str, protocol: str, timeout: float, token: str | None = None) -> None:
        with needs_extra("remote"):
            import msgpack  # noqa: F401
            from websockets.sync.client import connect
        end = time.monotonic() + timeout
        self.protocol = protocol
        self.begun: Mapping[str, Any] | None = None  # the episode's start that the server has
        self._sequence = 0
        self._recent: deque[bytes] = deque(maxlen=8)
        self._fence: threading.Event | None = None
        self._connection = connect(
            url,
            additional_headers=None if token is None else {"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=MAX_ANSWER,
            open_timeout=timeout,
            close_timeout=0.1,
            ping_interval=None,
        )
        try:
            if protocol == "openpi":
                self.hello = _unpack(self._frame(end))
            else:
                self._send("hello", {"harness_version": "spvla", "protocol_version": 1})
                self.hello = self._receive("hello", end)
                if "error" in self.hello:
                    raise ProtocolError(self.hello["error"])
        except BaseException:
            self.close()
            raise

    def ask(self, message: Mapping[str, Any], start: Mapping[str, Any], end: float) -> dict[str, Any]:
        """The answer to an observation; ``{"error": ...}`` if the server could not use it and the connection goes on.

        Args:
            message: the observation in the protocol's terms.
            start: what the episode begins with; sent if the server has not got it yet.
            end: :func:`time.monotonic` at which to give up. Sending is not bounded by it: see :func:`within`.

        Raises:
            ProtocolError: an answer that cannot be used or may belong to another request.
            TimeoutError: no answer in time.
            Exception: the connection broke; many types.
        """
        if self.protocol == "openpi":
            return self._ask_openpi(message, end)
        if self.begun != start:
            self._send("episode_start", start)
            self.begun = start
        self._send("observation", message)
        return self._receive("action", end)

    def close(self) -> None:
        """End the connection at once, also while another thread sends."""
        with contextlib.suppress(OSError):
            self._connection.socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _ask_openpi(self, message: Mapping[str, Any], end: float) -> dict[str, Any]:
        if self._fence is not None and not self._fence.wait(end - time.monotonic()):
            raise TimeoutError
        with contextlib.suppress(TimeoutError):
            self._connection.recv(timeout=0)
            raise ProtocolError("an answer that nobody asked for: the next ones may belong to other requests")
        self._connection.send(_pack(message, openpi=True))
        answer = self._frame(end)
        if isinstance(answer, str):  # a traceback, after which the server hangs up
            raise ProtocolError(shorten((answer.strip().splitlines() or ["an empty text"])[-1]))
        if answer in self._recent:
            raise ProtocolError("an earlier answer once more: it may belong to an earlier request")
        self._recent.append(answer)
        self._fence = self._connection.ping()
        return _unpack(answer)

    def _send(self, kind: str, payload: Mapping[str, Any]) -> None:
        self._sequence += 1
        content = {"type": kind, "payload": payload, "seq": self._sequence, "timestamp": time.time()}
        self._connection.send(_pack(content))

    def _receive(self, kind: str, end: float) -> dict[str, Any]:
        """The answer to the last message sent; an error about one before it, such as the episode's start, counts first."""
        failed: dict[str, Any] | None = None
        while True:
            content = _unpack(self._frame(end))
            payload, number = content.get("payload"), content.get("seq")
            if not isinstance(payload, dict):
                raise ProtocolError(shorten(f"an answer without payload: {', '.join(map(str, content))}"))
            if not isinstance(number, int) or isinstance(number, bool):
                raise ProtocolError("an answer without a number (seq)")
            if content.get("type") == "error":
                self.begun = None  # begin the episode anew: the server may not have one
                failed = failed or {"error": shorten(str(payload.get("error", payload)))}
                if number == 0:  # about a message that it could not even read
                    raise ProtocolError(failed["error"])
            if number != self._sequence:
                continue  # of another request
            if failed is None and content.get("type") != kind:
                raise ProtocolError(f"expected an answer of type {kind!r}, got {shorten(repr(content.get('type')), 40)}")
            return failed or payload

    def _frame(self, end: float) -> bytes | str:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        frame: bytes | str = self._connection.recv(timeout=left)
        return frame


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, or TimeoutError after ``seconds``, whatever it is busy with. It runs in a thread of its
    own, which is left behind then: end what it waits for."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)


def reason(error: BaseException) -> str:
    """An error on one line."""
    if isinstance(error, ProtocolError):
        return str(error)
    lines = str(error).splitlines()
    return shorten(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _pack(content: Any, openpi: bool = False) -> bytes:
    """msgpack with arrays as maps; openpi's keys are bytes."""
    import msgpack

    packed: bytes = msgpack.packb(content, default=partial(encode_array, bytes_keys=openpi))
    return packed


def _unpack(frame: bytes | str) -> dict[str, Any]:
    """The map in a frame, arrays of numbers in it as numpy's. Raises :class:`ProtocolError` for anything else."""
    import msgpack

    try:
        content = msgpack.unpackb(frame, **bounds(decode_array))
    except InputError as error:
        raise ProtocolError(shorten(str(error))) from None
    except Exception as error:  # msgpack raises many types for damaged content
        raise ProtocolError(f"an answer that is not a msgpack map ({reason(error)})") from None
    if not isinstance(content, dict):
        raise ProtocolError(f"an answer of type {type(content).__name__} instead of a map")
    return content
