"""The command ``python -m spvla.doctor``, also ``spvla doctor``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Any

from spvla.assemble import accelerate
from spvla.cli import PositiveInt
from spvla.doctor.checks import examine
from spvla.doctor.findings import recorded
from spvla.explanation import explain
from spvla.export import load_export
from spvla.vlas.registry import load_vla


def doctor(
    vla: str,
    data: Path,
    checkpoint: str | None = None,
    export: str | None = None,
    risk: float | None = None,
    generator: str | None = None,
    gate: str | None = None,
    pruning: str | dict[str, Any] | None = None,
    vla_options: dict[str, Any] | None = None,
    suite: str | None = None,
    episodes: PositiveInt = 2,
    steps: PositiveInt = 40,
    json: bool = False,
) -> None:
    """Check an accelerated policy on a few recorded observations. Exits with code 2 and the reason if a check fails.

    Args:
        vla: a built-in name, an entry point of spvla.vlas, or package.module:factory.
        data: a rollout store with images of the robot on which it will act (from data collect or data convert).
        checkpoint: the VLA's folder or hf://owner/name.
        export: folder, hf://owner/name or packaged name of the generators and gates; without one the built-in parts.
        risk: the one knob; the export's default if left out.
        generator: exported or built-in; the export's default if left out.
        gate: learned, live, release, paper or another; the export's default if left out.
        pruning: none, fast_fewer, slow_fewer or fields; the export's default if left out.
        vla_options: the VLA's other options, such as device.
        suite: simulator suite, for VLAs that ask for it.
        episodes: how many to look at, from the store's beginning.
        steps: of each.
        json: print JSON instead of a table.
    """
    loaded = None if export is None else load_export(export)
    samples = recorded(data, episodes, steps)
    policy = accelerate(
        load_vla(vla, checkpoint, vla_options, suite), loaded, risk, generator=generator, gate=gate, pruning=pruning
    )
    curve = None if loaded is None else loaded.calibration.get(generator or loaded.defaults["generator"])
    asked = float(loaded.defaults["risk"]) if risk is None and loaded is not None else risk
    report = examine(policy, samples, curve, asked)
    if json:
        print(dumps({**report.to_dict(), "parts": explain(policy).to_dict()["parts"]}, indent=1))
    else:
        print(report)
    report.require()
