"""``python -m data collect | inspect``."""

import sys
from collections.abc import Callable

from data.collect import collect
from data.inspect import inspect
from spvla.cli import run

COMMANDS: dict[str, Callable[..., None]] = {"collect": collect, "inspect": inspect}

if __name__ == "__main__":
    sys.exit(run(COMMANDS, "Make and look at rollout stores."))
