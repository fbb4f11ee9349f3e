"""A VLA on another machine, behind a vla-eval or an openpi WebSocket: the robot's computer asks it only when it has to.

With ``python -m spvla.serve`` at the other end everything travels that the VLA reports (confidence, features, tokens),
pruning works, and the server names its action space. Other vla-eval model servers and openpi's ``serve_policy`` return actions
alone; one that buffers chunks must be told not to (vla-eval: ``chunk_size: null``): skipped steps would make them old.

An answer that does not come in time or cannot be used, or a connection that breaks, raises
:class:`~spvla.vlas.base.VLAUnavailable` at once; a thread reconnects meanwhile, and accepts only a server that says the same of
itself as the first one did. What the joint policy does then is its ``when_unavailable``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from spvla.actions import ActionSpace, read_space
from spvla.errors import InputError
from spvla.observation import WRIST, Observation
from spvla.pruning.selector import TokenSelector
from spvla.vlas.answers import ProtocolError, difference, read_answer
from spvla.vlas.base import VLAOutput, VLAUnavailable
from spvla.vlas.conventions import Conventions, conventions_by_name
from spvla.vlas.link import Link, reason, within
from spvla.wire import read_token

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
LONGEST_TIMEOUT = 3600.0  # seconds


class RemoteVLA:
    """A VLA behind a WebSocket.

    Args:
        url: ``ws://host:port``.
        space: the space of its actions; None: the server says so (ours does).
        protocol: ``vla-eval`` or ``openpi``.
        timeout: seconds for a whole request, from sending to the checked answer, and for a connection.
        keys: names of observation fields that differ from :data:`KEYS`, and of further cameras; None as a name: the field is
            not sent.
        conventions: image steps to take here, for example ``{rotate_180: true}``; ours take them at the server.
        selector: which tokens the server's VLA keeps.
        token_file: file with the token that the server asks for (``--token_file``).

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
        token_file: str | None = None,
    ) -> None:
        try:
            known = urlsplit(url).hostname and urlsplit(url).port != 0
        except ValueError:  # an invalid port
            known = False
        if not known or not url.startswith(("ws://", "wss://")):
            raise InputError(f"policy 'remote' needs a server's address as checkpoint, ws://host:port, got {url!r}")
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise InputError(f"remote: timeout must be positive, got {timeout} (at most {LONGEST_TIMEOUT:g} s)")
        if protocol not in KEYS:
            raise InputError(f"remote: protocol {protocol!r} is not one of {', '.join(KEYS)}")
        unknown = [name for name in keys or {} if name not in KEYS[protocol]]
        if unknown:
            raise InputError(f"remote: keys: {unknown[0]!r} is not one of {', '.join(KEYS[protocol])}")
        self.url, self.protocol, self.timeout, self.selector = url, protocol, timeout, selector
        self.keys: dict[str, str | None] = {**KEYS[protocol], **(keys or {})}
        self.conventions = conventions_by_name(conventions)
        self.instruction: str | None = None
        self._lock = threading.Lock()  # guards the two below
        self._link: Link | None = None
        self._reconnecting = False
        self._closed = False
        self._why = ""  # the last connection ended
        self._token_file = token_file
        self._token = None if token_file is None else read_token(token_file)
        self._features: int | None = None  # entries of the features, once an answer had some
        try:
            self._link = Link(url, protocol, timeout, self._token)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"remote: no {protocol} server answers at {url} ({reason(error)})") from None
        self.server_info = self._link.hello
        try:
            self.action_space = self._space(space)
        except BaseException:
            self.close()
            raise

    def _space(self, space: ActionSpace | Mapping[str, Any] | str | None) -> ActionSpace:
        """The action space: ``space``, else what the server says."""
        theirs = self.server_info.get("action_space")
        if space is None and theirs is None:
            raise InputError(f"remote: the server at {self.url} does not say what its actions are; give action_space")
        if self.selector is not None and self.server_info.get("model_server") != "spvla":
            raise InputError(
                f"pruning: the server at {self.url} cannot run on fewer visual tokens (it does not run spvla.serve)"
            )
        if space is not None:
            return read_space(space)
        if not isinstance(theirs, dict) or not all(isinstance(name, str) for name in theirs):  # never the name of a file here
            raise InputError(f"remote: the server at {self.url} does not describe its action space by fields")
        return ActionSpace.from_dict(theirs, f"the action space of {self.url}")

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that the server looks through: those with a key. The one in the hand counts where openpi's protocol is
        spoken, or where the server asks for it."""
        named = {name: key for name, key in self.keys.items() if name not in ("state", "instruction") and key is not None}
        wanted = self.server_info.get("observation_params")
        asked = self.protocol == "openpi" or (isinstance(wanted, dict) and bool(wanted.get("send_wrist_image")))
        return tuple(name for name in named if name != WRIST or asked)

    def with_pruner(self, selector: TokenSelector | None) -> RemoteVLA:
        """The same VLA with another selector, over a connection of its own."""
        twin = RemoteVLA(
            self.url,
            self.action_space,
            protocol=self.protocol,
            timeout=self.timeout,
            keys=self.keys,
            conventions=self.conventions,
            selector=selector,
            token_file=self._token_file,
        )
        if (why := difference(self.server_info, twin.server_info, self.protocol)) is not None:
            twin.close()
            raise InputError(f"remote: {self.url}: {why}")
        return twin

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.instruction = instruction
        with self._lock:
            if self._link is not None:
                self._link.begun = None

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """Ask the server; ``timings`` holds its stages and the ``round_trip``. Returns or raises within ``timeout``.

        Raises:
            VLAUnavailable: no answer in time, an error, or an answer that cannot be used (:func:`read_answer`).
            InputError: no :meth:`reset`.
        """
        if self.instruction is None:
            raise InputError("predict: call reset(instruction) first")
        start = time.perf_counter()
        end = time.monotonic() + self.timeout
        with self._lock:
            link = self._link
        if link is None:
            raise VLAUnavailable(f"{self.url}: {self._why}; reconnecting")
        message = self._message(observation, keep_mass)
        episode: dict[str, Any] = {"task": {"name": self.instruction}, "vla": True}
        if self.selector is not None:
            episode["pruning"] = asdict(self.selector)

        def ask() -> VLAOutput | str:
            reply = link.ask(message, episode, end)
            return reply["error"] if "error" in reply else read_answer(reply, self.action_space.dim, self._features)

        try:
            output = within(end - time.monotonic(), ask)
        except Exception as error:  # of whatever type: the robot's policy must learn that there is no answer
            self._why = f"no answer in {self.timeout:g} s" if isinstance(error, TimeoutError) else reason(error)
            self._drop(link)
            raise VLAUnavailable(f"{self.url}: {self._why}") from None
        if isinstance(output, str):
            raise VLAUnavailable(f"{self.url}: {output}")
        if output.features is not None:
            self._features = len(output.features)
        return replace(output, timings={**output.timings, "round_trip": 1e3 * (time.perf_counter() - start)})

    def close(self) -> None:
        """End the connection."""
        self._closed = True
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

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

    def _drop(self, link: Link) -> None:
        with self._lock:
            self._link = None
            if self._reconnecting or self._closed:
                return
            self._reconnecting = True
        threading.Thread(target=self._reconnect, args=(link,), daemon=True).start()

    def _reconnect(self, old: Link) -> None:
        old.close()
        wait = FIRST_WAIT
        while not self._closed:
            try:
                link = Link(self.url, self.protocol, self.timeout, self._token)
                if (why := difference(self.server_info, link.hello, self.protocol)) is not None:
                    link.close()
                    raise ProtocolError(why)
            except Exception as error:  # whatever it is, the next attempt may succeed
                self._why = reason(error)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
                continue
            with self._lock:
                self._link, self._reconnecting = link, False
            if self._closed:
                self.close()
            return


def load(
    checkpoint: str | None = None,
    *,
    action_space: Mapping[str, Any] | str | None = None,
    protocol: str = "vla-eval",
    timeout: float = 1.0,
    keys: dict[str, str | None] | None = None,
    conventions: Mapping[str, Any] | str | None = None,
    token_file: str | None = None,
) -> RemoteVLA:
    """The policy ``remote``: :class:`RemoteVLA` with options as a configuration file writes them.

    Args:
        checkpoint: the server's address, ``ws://host:port``.
        action_space: see :func:`~spvla.actions.read_space`; None: the server says so.
        protocol, timeout, keys, conventions, token_file: see :class:`RemoteVLA`.
    """
    options: dict[str, Any] = {"protocol": protocol, "timeout": timeout, "keys": keys, "conventions": conventions}
    return RemoteVLA(checkpoint or "", action_space, **options, token_file=token_file)
