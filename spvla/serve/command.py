"""The command that serves a policy. Its help needs no extra; the server itself is imported when it starts."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

from spvla.errors import InputError, needs_extra
from spvla.serve.interface import Interface

PLAIN = Interface()


def serve_policy(
    vla: str,
    checkpoint: str | None = None,
    export: str | None = None,
    risk: float | None = None,
    generator: str | None = None,
    gate: str | None = None,
    pruning: str | dict[str, Any] | None = None,
    vla_options: dict[str, Any] | None = None,
    suite: str | None = None,
    interface: Interface = PLAIN,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_sessions: int = 64,
) -> None:
    """Serve the accelerated policy to vla-eval, until Ctrl-C or SIGTERM.

    Args:
        vla: a built-in name, an entry point of ``spvla.vlas``, or ``package.module:factory``.
        checkpoint: the VLA's folder or hub id.
        export: folder or hub id of the generators and gates; without one the built-in parts.
        risk: allowed share of generated, deviating steps; the export's default if left out.
        generator: exported or built-in; the export's default if left out, ``none``: the VLA acts on every step.
        gate: ``learned``, ``release`` or ``paper``; the export's default if left out.
        pruning: ``none``, ``fast_fewer``, ``slow_fewer`` or fields (see spvla.pruning.make_pruner);
            the export's default if left out.
        vla_options: the VLA's other options, such as ``device`` and ``unnorm_key``.
        suite: LIBERO suite that it will act in, for policies that ask for it.
        interface: the benchmark's conventions; see configs/serve.
        host: address to bind; 0.0.0.0 serves everyone who reaches this machine, without asking who they are.
        port: port to bind; 0 for any free one.
        max_sessions: connections at once; further ones are refused.
    """
    if max_sessions < 1:
        raise InputError(f"max_sessions must be at least 1, got {max_sessions}")
    with needs_extra("serve"):
        from spvla.serve.endpoint import Endpoint
        from spvla.serve.server import PolicyServer
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
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
