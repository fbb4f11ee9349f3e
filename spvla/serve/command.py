"""The command that serves a policy. Its help needs no extra; the server itself is imported when it starts."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import signal
import threading
from typing import Any, Literal

from spvla.errors import InputError, needs_extra
from spvla.serve.interface import Interface
from spvla.wire import read_token

PLAIN = Interface()
LAST_RESORT = 4.0  # seconds from a signal to the end of the process


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can connect to ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def serve_policy(
    vla: str,
    checkpoint: str | None = None,
    export: str | None = None,
    risk: float | None = None,
    generator: str | None = None,
    gate: str | None = None,
    pruning: str | dict[str, Any] | None = None,
    vla_options: dict[str, Any] | None = None,
    mode: Literal["wait", "bridge"] = "wait",
    suite: str | None = None,
    interface: Interface = PLAIN,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_sessions: int = 64,
    max_per_host: int = 16,
    idle_limit: float = 3600.0,
    max_batch: int = 8,
    deadline: float | None = None,
    when_late: Literal["stop", "hold", "generator"] = "stop",
    token_file: str | None = None,
    insecure: bool = False,
) -> None:
    """Serve the accelerated policy to vla-eval, until Ctrl-C or SIGTERM.

    Args:
        vla: a built-in name, an entry point of ``spvla.vlas``, or ``package.module:factory``.
        checkpoint: the VLA's folder or hf://owner/name.
        export: folder or hf://owner/name of the generators and gates; without one the built-in parts.
        risk: allowed share of generated, deviating steps; the export's default if left out.
        generator: exported or built-in; the export's default if left out, ``none``: the VLA acts on every step.
        gate: ``learned``, ``release`` or ``paper``; the export's default if left out.
        pruning: ``none``, ``fast_fewer``, ``slow_fewer`` or fields (see spvla.pruning.make_pruner);
            the export's default if left out.
        vla_options: the VLA's other options, such as ``device`` and ``unnorm_key``.
        mode: wait for the VLA where it is asked, or bridge: answer every request at once, the generator's actions while the VLA
            thinks; only an episode's first request waits.
        suite: LIBERO suite that it will act in, for policies that ask for it.
        interface: the benchmark's conventions; see configs/serve.
        host: address to bind; 0.0.0.0 serves everyone who reaches this machine and has the token.
        port: port to bind; 0 for any free one.
        max_sessions: connections at once; further ones are refused.
        max_per_host: of these from one address, unless only this machine can connect.
        idle_limit: seconds without a message after which a session ends.
        max_batch: calls of the VLA by different sessions that one pass may answer, if the VLA can; 1: one at a time.
        deadline: seconds within which the VLA must answer, the wait for its turn included; longer than its own time.
        when_late: what the robot does if it has not: stop, hold (repeat the last action), or generator (go on for a while).
        token_file: file with a token of at least 16 characters that every client must show.
        insecure: serve other machines without a token.
    """
    for name, value in (("max_sessions", max_sessions), ("max_per_host", max_per_host), ("idle_limit", idle_limit)):
        if not 1 <= value < math.inf:
            raise InputError(f"{name} must be at least 1, got {value}", field=name)
    token = None if token_file is None else read_token(token_file)
    local = is_loopback(host)
    if not (local or token or insecure):
        raise InputError(
            f"serving at {host} lets other machines in: give token_file, or insecure if everyone on the network may connect",
            code="token-required",
            field="token_file",
        )
    with needs_extra("serve"):
        from spvla.serve.endpoint import Endpoint
        from spvla.serve.server import PolicyServer
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # it logs a traceback for every bad handshake
    server = PolicyServer(
        vla,
        checkpoint,
        export,
        risk,
        vla_options=vla_options,
        suite=suite,
        generator=generator,
        gate=gate,
        pruning=pruning,
        mode=mode,
        interface=interface,
        max_batch=max_batch,
        deadline=deadline,
        when_late=when_late,
    )

    async def main() -> None:
        per_host = None if local else max_per_host
        endpoint = Endpoint(server, max_sessions, max_per_host=per_host, token=token, idle=idle_limit)

        def stop() -> None:
            endpoint.stop()
            end = threading.Timer(LAST_RESORT, os._exit, (1,))  # a VLA that hangs must not keep the process
            end.daemon = True
            end.start()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            await endpoint.run(host, port)
        except (OSError, OverflowError) as error:
            raise InputError(f"cannot serve at {host}:{port}: {getattr(error, 'strerror', None) or error}") from None

    asyncio.run(main())
