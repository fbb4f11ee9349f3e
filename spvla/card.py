"""The model card of an export, with metrics in the Hugging Face hub's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from spvla.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from spvla.export import Export

MEASURED = {  # column of a closed-loop summary -> what the card calls it
    "success_rate": "Success rate",
    "skipped": "Steps without the VLA",
    "deviation_rate": "Steps generated and deviating",
}


def calibrated(export: Export) -> list[EvalResult]:
    """What the calibration says of each generator under its gate: the share of steps without the VLA at the default risk."""
    from huggingface_hub import EvalResult

    risk = float(export.defaults.get("risk", 0.05))
    return [
        EvalResult(
            task_type="robotics",
            dataset_type="rollouts",
            dataset_name=f"{curve.episodes} calibration episodes of {export.provenance.get('teacher', 'the teacher')}",
            metric_type="coverage",
            metric_name="Steps without the VLA",
            metric_value=round(float(curve.coverage_at(risk)), 4),
            metric_args={"generator": name, "gate": "learned", "risk": risk},
        )
        for name, curve in export.calibration.items()
    ]


def measured(summary: Mapping[str, Any]) -> list[EvalResult]:
    """What a closed-loop evaluation (its ``summary.json``) says of the cells that use an export's gate.

    Raises:
        InputError: it is no closed-loop summary.
    """
    from huggingface_hub import EvalResult

    if summary.get("kind") != "closed_loop":
        raise InputError(f"results: expected the summary of a closed loop, got one of kind {summary.get('kind')!r}")
    suite, states = str(summary["suite"]), summary.get("init_states")
    return [
        EvalResult(
            task_type="robotics",
            dataset_type=suite,
            dataset_name=suite if not states else f"{suite}, initial states {states}",
            metric_type=column,
            metric_name=name,
            metric_value=round(float(row[column]), 4),
            metric_args={"generator": row["generator"], "gate": row["gate"], "risk": row["risk"], "episodes": row["episodes"]},
        )
        for row in summary["rows"]
        if row.get("risk") is not None
        for column, name in MEASURED.items()
        if row.get(column) is not None
    ]


def model_card(export: Export, results: Sequence[EvalResult] = ()) -> str:
    """The export's README.md; ``results`` are listed with what its calibration says."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="spvla",
        tags=["robotics", "vision-language-action", "sp-vla"],
        license="mit",
        pipeline_tag="robotics",
        model_name=f"SP-VLA for {export.space.name}",
        eval_results=[*calibrated(export), *results],
    )
    risk = float(export.defaults.get("risk", 0.05))
    smallest = max((curve.smallest_risk for curve in export.calibration.values()), default=0.0)
    needed = f", risk={ceil(1000 * smallest) / 1000:g}" if risk < smallest else ""
    eyes = export.eyes
    kept = " or kept from an earlier plan" if any(gate.arms for gate in export.gates.values()) else ""
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# SP-VLA generator and gates for {export.space.name}",
        "",
        f"Action generators distilled from the teacher **{export.provenance.get('teacher', 'unknown')}** and one calibrated "
        "action-type classifier per generator. Use with the same VLA, in the same action space:",
        "",
        "```python",
        f'policy = spvla.accelerate(vla, "this/folder"{needed})',
        "```",
        "",
        "| generator | gate | calibration episodes | smallest risk | coverage at the default risk |",
        "|---|---|---|---|---|",
    ]
    for name, curve in export.calibration.items():
        lines.append(f"| {name} | learned | {curve.episodes} | {curve.smallest_risk:.4f} | {curve.coverage_at(risk):.1%} |")
    lines += [
        "",
        f"Defaults: `{json.dumps(dict(export.defaults))}`. A step deviates if the largest error over the continuous "
        f"dimensions exceeds {export.tolerance} (normalised units) or a gripper is wrong. Risk is the expected fraction of an "
        f"episode's steps that are generated{kept} and deviate; the bound holds for trajectories like those of the calibration "
        "set. Steps in unfamiliar states, and those whose proposal is refused (out of bounds, or a larger jump than any in "
        "training), are the VLA's.",
        *([f"\nThe gates have eyes: they need the camera `{eyes.camera}` at every step."] if eyes is not None else []),
        *(["\nThe gates read the generator's error at the VLA's last call, too."] if export.reads_error else []),
        *(f"\nNote: {note}." for note in export.notes()),
        "",
        "Provenance:",
        "",
        "```json",
        json.dumps(dict(export.provenance), indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"
