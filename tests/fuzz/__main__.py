"""``python -m tests.fuzz --count N [--kind K] [--seed S] [--first F] [--minutes M] [--output FILE]``; findings: exit code 1."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import BAD, CLASSES, Result, run

BATCH = 100  # inputs of a kind before the next kind's turn


def main() -> int:
    """Fuzz, print what was found, and write a summary."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Damage files and messages, and read them.")
    parser.add_argument("--count", type=int, default=1000, help="inputs of all kinds together")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--output", type=Path, help="summary as JSON")
    options = parser.parse_args()
    kinds = [options.kind] if options.kind else list(KINDS)
    each = -(-options.count // len(kinds))
    began, results = time.monotonic(), list[Result]()
    deadline = began + 60 * options.minutes
    for first in range(options.first, options.first + each, BATCH if options.minutes < 1e9 else each):
        last = min(first + (BATCH if options.minutes < 1e9 else each), options.first + each)
        for kind in kinds if time.monotonic() < deadline else ():
            for result in run(kind, range(first, last), options.seed, deadline):
                results.append(result)
                if result.result in BAD:
                    print(f"{kind} {result.number}: {result.result}: {result.file}, {result.how}: {result.message}", flush=True)
    seconds = time.monotonic() - began
    counts = {kind: Counter(r.result for r in results if r.kind == kind) for kind in kinds}
    rows = [{"kind": kind, "inputs": sum(c.values()), **{name: c[name] for name in CLASSES}} for kind, c in counts.items()]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items() if value))
    print(f"{len(results)} inputs in {seconds:.0f} s")
    if options.output:
        told = "python -m tests.fuzz " + " ".join(sys.argv[1:])
        found = [vars(r) | {"message": r.message[:300]} for r in results if r.result in BAD]
        facts = {"command": told, "seconds": round(seconds), "processes": 1, "cores": os.cpu_count(), "inputs": len(results)}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"kind": "robustness", **facts, "classes": CLASSES, "rows": rows, "findings": found}, indent=1)
        options.output.write_text(text + "\n")
    return 1 if any(r.result in BAD for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
