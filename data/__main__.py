"""``python -m data collect | inspect``."""

import sys

from data.collect import collect
from data.inspect import inspect
from spvla.cli import run

if __name__ == "__main__":
    sys.exit(run({"collect": collect, "inspect": inspect}, "Make and look at rollout stores."))
