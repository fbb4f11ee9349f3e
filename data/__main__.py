"""``python -m data collect | convert | relabel | stats | inspect``."""

import sys
from collections.abc import Callable

from data.collect import collect
from data.convert import convert
from data.inspect import inspect
from data.relabel import relabel
from data.stats import stats
from spvla.cli import run

COMMANDS: dict[str, Callable[..., None]] = {
    "collect": collect,
    "convert": convert,
    "relabel": relabel,
    "stats": stats,
    "inspect": inspect,
}

if __name__ == "__main__":
    sys.exit(run(COMMANDS, "Make, label and look at rollout stores."))
