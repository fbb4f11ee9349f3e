"""The command ``spvla``: what a robot's computer needs without the repository."""

from __future__ import annotations

import sys
from collections.abc import Callable

from spvla.cli import run
from spvla.doctor.command import doctor
from spvla.info import print_info
from spvla.serve.command import serve_policy


def main() -> int:
    """The console script's entry point; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments in (["--version"], ["version"]):
        import spvla

        print(spvla.__version__)
        return 0
    if len(arguments) > 1 and arguments[0] == "info" and not arguments[1].startswith("-"):
        arguments = ["info", "--export", *arguments[1:]]  # the one argument that everybody gives
    commands: dict[str, Callable[..., None]] = {"serve": serve_policy, "info": print_info, "doctor": doctor}
    return run(commands, "SP-VLA: a frozen VLA, made faster.", arguments, prog="spvla")


if __name__ == "__main__":
    sys.exit(main())
