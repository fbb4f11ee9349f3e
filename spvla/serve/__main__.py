"""``python -m spvla.serve``: the same as ``spvla serve``."""

import sys

from spvla.cli import run
from spvla.serve.command import serve_policy

if __name__ == "__main__":
    sys.exit(run(serve_policy, "The accelerated policy, served to vla-eval."))
