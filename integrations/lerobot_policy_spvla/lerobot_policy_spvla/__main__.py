"""``python -m lerobot_policy_spvla make``: a folder for ``--policy.path``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lerobot_policy_spvla.configuration_spvla import SpvlaConfig
from lerobot_policy_spvla.processor_spvla import Units, base_processors
from spvla.cli import run
from spvla.errors import InputError
from spvla.export import check_risk, load_export
from spvla.hub import resolve_folder

PROCESSORS = ("policy_preprocessor*", "policy_postprocessor*")


def make(
    base: str,
    export: str,
    output: Path,
    risk: float | None = None,
    generator: str | None = None,
    scheduler: str | None = None,
    max_generated_run: int | None = None,
) -> None:
    """Write a folder for --policy.path: the accelerated policy, with copies of the base's two processors.

    Args:
        base: the LeRobot policy's folder or hf://owner/name.
        export: generators and gates.
        output: the new folder.
        risk: allowed share of generated steps that deviate; the export's default if left out.
        generator: the export's default if left out.
        scheduler: the gate; the export's default if left out.
        max_generated_run: longest run of generated actions; the export's default if left out.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: is not empty; nothing is written to it", code="not-empty", field="output")
    if risk is not None:
        check_risk(risk)
    load_export(export)
    folder = resolve_folder(base)
    where = Path(export)
    config = SpvlaConfig(
        base=str(folder.resolve()),
        export=str(where.resolve()) if where.is_dir() else export,
        risk=risk,
        generator=generator,
        scheduler=scheduler,
        max_generated_run=max_generated_run,
    )
    Units(base_processors(config.base_config()))  # what cannot be undone is refused here
    files = sorted(f for pattern in PROCESSORS for f in folder.glob(pattern))
    output.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy2(file, output / file.name)
    config._save_pretrained(output)
    print(f"written: {output}; use it as --policy.path={output}")


if __name__ == "__main__":
    sys.exit(run({"make": make}, "LeRobot policies made faster by SP-VLA."))
