"""``python -m tests.soak kills | server``: see tests/soak. Something found: exit code 1."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from spvla.files import read_json, write_json
from tests.fuzz.__main__ import commit
from tests.soak.commands import COMMANDS
from tests.soak.kills import CLASSES, kill_command, kill_exports

EXPORT = "export"


def kills(options: argparse.Namespace) -> int:
    """Kill, a row for each command; with ``--output`` a run that was stopped goes on behind the last command."""
    began = time.monotonic()
    done: dict[str, Any] = {"commands": [], "export": [], "commits": [], "seconds": 0}
    if options.output and options.output.exists():
        done |= {k: v for k, v in read_json(options.output).items() if k in done}
    before = done["seconds"]
    if commit() not in done["commits"]:
        done["commits"].append(commit())
    for name in options.only or [EXPORT, *COMMANDS]:
        if name == EXPORT and not done["export"]:
            done["export"] = kill_exports(options.export_count or options.count, options.minutes)
        elif name in COMMANDS and name not in [row["command"] for row in done["commands"]]:
            done["commands"].append(kill_command(name, options.count, options.seed, options.minutes))
            print({k: v for k, v in done["commands"][-1].items() if k != "found"}, flush=True)
        done["seconds"] = round(before + time.monotonic() - began)
        if options.output:
            facts = {"kind": "kills", "command": "python -m tests.soak " + " ".join(sys.argv[1:]), "seed": options.seed}
            write_json(options.output, facts | {"cores": os.cpu_count(), "classes": CLASSES} | done, indent=1)
    rows = [*done["commands"], *done["export"]]
    return 1 if any(row[name] for row in rows for name in CLASSES if name != "same") else 0


def server(options: argparse.Namespace) -> int:
    """One good client beside each attack, and alone."""
    from tests.soak.server import LIMITS, beside_attacks

    found = beside_attacks(options.seconds)
    for row in found["rows"]:
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if options.output:
        facts = {"kind": "server", "command": "python -m tests.soak " + " ".join(sys.argv[1:]), "commits": [commit()]}
        write_json(options.output, facts | {"cores": os.cpu_count(), "limits": LIMITS} | found, indent=1)
    return 0 if all(row["within"] for row in found["rows"]) else 1


def main() -> int:
    """Run one of the harnesses."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Harnesses that take long.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("kills", help="SIGKILL while exports are saved and while the long commands run")
    one.add_argument("--count", type=int, default=200, help="kills of each command, and at each file operation of a save")
    one.add_argument("--export_count", type=int, help="kills at each file operation of a save, if another number")
    one.add_argument("--minutes", type=float, default=float("inf"), help="go on to the next command after so long")
    one.add_argument("--only", nargs="+", choices=[EXPORT, *COMMANDS], help="these alone")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=kills)
    other = commands.add_parser("server", help="one good client of the policy server beside each attack")
    other.add_argument("--seconds", type=float, default=10.0, help="of each attack, and alone")
    other.set_defaults(run=server)
    for command in (one, other):
        command.add_argument("--output", type=Path, help="figures as JSON")
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
