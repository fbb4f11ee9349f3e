"""``python -m eval closed_loop | offline | latency | data | report``."""

import sys

from eval.closed_loop import closed_loop
from spvla.cli import run

if __name__ == "__main__":
    sys.exit(run({"closed_loop": closed_loop}, "Learned against linear, measured."))
