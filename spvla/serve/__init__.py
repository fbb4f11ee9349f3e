"""Serving the accelerated policy over a WebSocket, see :mod:`spvla.serve.server` and :mod:`spvla.serve.endpoint`.

The server's names are imported when they are used, so that the command's help works without the extra ``serve``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spvla.errors import needs_extra
from spvla.serve.command import serve_policy
from spvla.serve.interface import Interface, euler_to_axis_angle

if TYPE_CHECKING:
    from spvla.serve.endpoint import Endpoint
    from spvla.serve.server import PolicyServer

__all__ = ["Endpoint", "Interface", "PolicyServer", "euler_to_axis_angle", "serve_policy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spvla.serve' has no attribute {name!r}")
    with needs_extra("serve"):
        from spvla.serve import endpoint, server
    return getattr(endpoint if name == "Endpoint" else server, name)
