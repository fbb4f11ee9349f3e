"""``python -m eval closed_loop | instructions | offline | latency | data | ticks | serving | summarise | report | picture``."""

import sys
from collections.abc import Callable

from eval.closed_loop import closed_loop
from eval.data import bench_data
from eval.instructions import instructions
from eval.latency import latency
from eval.offline import offline
from eval.picture import picture
from eval.report.command import report
from eval.rewrite import rewrite
from eval.serving import serving
from eval.ticks import ticks
from spvla.cli import run

COMMANDS: dict[str, Callable[..., None]] = {
    "closed_loop": closed_loop,
    "instructions": instructions,
    "offline": offline,
    "latency": latency,
    "data": bench_data,
    "ticks": ticks,
    "serving": serving,
    "summarise": rewrite,
    "report": report,
    "picture": picture,
}

if __name__ == "__main__":
    sys.exit(run(COMMANDS, "Learned against linear, measured."))
