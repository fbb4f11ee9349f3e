"""``python -m tests.fuzz [--files N] [--messages N] [--kind K] [--seed S] [--output FILE]``; what is found: exit code 1.

With ``--output`` a run that was stopped goes on where it was, and ``--again KIND`` begins a kind anew, once it was mended.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spvla.files import read_json, write_json
from tests.fuzz.kinds import FILES, KINDS, MESSAGES
from tests.fuzz.runner import BAD, CLASSES, Fuzzer, found

ROUNDS = 20  # turns that the kinds take, so that a run that is stopped has seen each
ROOT = Path(__file__).parents[2]


def main() -> int:
    """Fuzz, print what was found, and write a summary."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Damage files and messages, and read them.")
    parser.add_argument("--files", type=int, default=500, help="files that are damaged, of all kinds together")
    parser.add_argument("--messages", type=int, default=500, help="messages, of all kinds together")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="summary as JSON; a run with the same seed goes on")
    parser.add_argument("--again", choices=KINDS, nargs="+", default=[], help="begin these kinds anew, the others go on")
    options = parser.parse_args()
    plan = planned(options.files, options.messages, options.kind)
    summary = resumed(options.output, options.seed, plan, options.again)
    total, done = sum(plan.values()), sum(row["inputs"] for row in summary["rows"])
    began, before = time.monotonic(), summary["seconds"]
    bar = tqdm(total=total, initial=done, desc="fuzz", unit="input", mininterval=1.0)
    for turn in range(1, ROUNDS + 1):
        for row in summary["rows"]:
            last = plan[row["kind"]] * turn // ROUNDS
            if row["inputs"] < last:
                fuzz(row, range(row["inputs"], last), options.seed, summary["findings"], bar)
                summary["seconds"] = round(before + time.monotonic() - began)
                if options.output:
                    write_json(options.output, summary, indent=1)
    bar.close()
    for row in summary["rows"]:
        counts = [f"{name} {row[name]}" for name in CLASSES if row[name]]
        print(f"{row['kind']}: {row['inputs']} inputs: {', '.join(counts)}; at most {row['memory']} MiB")
    return 1 if any(row[name] for row in summary["rows"] for name in BAD) else 0


def planned(files: int, messages: int, kind: str | None) -> dict[str, int]:
    """How many inputs of each kind."""
    plan = {name: round(files * KINDS[name].share) for name in FILES}
    plan |= {name: -(-messages // len(MESSAGES)) for name in MESSAGES}
    return plan if kind is None else {kind: messages if kind in MESSAGES else files}


def resumed(output: Path | None, seed: int, plan: dict[str, int], again: Sequence[str]) -> dict[str, Any]:
    """The summary as an earlier run left it, or one of nothing."""
    summary: dict[str, Any] = {
        "kind": "robustness",
        "command": "python -m tests.fuzz " + " ".join(sys.argv[1:]),
        "seed": seed,
        "seconds": 0,
        "processes": 1,
        "classes": CLASSES,
        "rows": [{"kind": name, "inputs": 0, "memory": 0.0, "largest": None, **dict.fromkeys(CLASSES, 0)} for name in plan],
        "findings": [],
    }
    if output is not None and output.exists():
        earlier = read_json(output)
        if earlier.get("seed") == seed and [row["kind"] for row in earlier["rows"]] == list(plan):
            new = {row["kind"]: row for row in summary["rows"]}
            summary["seconds"] = earlier["seconds"]
            summary["rows"] = [new[row["kind"]] if row["kind"] in again else row for row in earlier["rows"]]
            summary["findings"] = [f for f in earlier["findings"] if f["kind"] not in again]
    return summary


def commit() -> str:
    """The commit that is checked out."""
    line = ["git", "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def fuzz(row: dict[str, Any], numbers: range, seed: int, findings: list[dict[str, Any]], bar: Any) -> None:
    """Damage and read inputs of a kind, and count them in its row; ``memory`` is in MiB, ``largest`` the input that took it."""
    with Fuzzer(row["kind"], seed) as fuzzer:
        results, counts = [], Counter[str]()
        for result in fuzzer.run(numbers):
            bar.update()
            counts[result.result] += 1
            if result.result in BAD:
                results.append(result)
                bar.write(f"{result.kind} {result.number}: {result.result}: {result.file}, {result.how}: {result.message}")
            if result.memory > row["memory"]:
                row["memory"], row["largest"] = result.memory, result.number
    row["inputs"] += len(numbers)
    row["commits"] = list(dict.fromkeys([*row.get("commits", []), commit()]))
    for name, count in counts.items():
        row[name] += count
    findings.extend(found(results))


if __name__ == "__main__":
    sys.exit(main())
