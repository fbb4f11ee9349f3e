"""The model card of an export."""

from __future__ import annotations

import json
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spvla.export import Export


def model_card(export: Export) -> str:
    """The export's README.md."""
    risk = float(export.defaults.get("risk", 0.05))
    smallest = max((curve.smallest_risk for curve in export.calibration.values()), default=0.0)
    needed = f", risk={ceil(1000 * smallest) / 1000:g}" if risk < smallest else ""
    eyes = export.eyes
    kept = " or kept from an earlier plan" if any(gate.arms for gate in export.gates.values()) else ""
    lines = [
        "---",
        "library_name: spvla",
        "tags: [robotics, vision-language-action, sp-vla]",
        "license: mit",
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
        *(f"\nNote: {note}." for note in export.notes()),
        "",
        "Provenance:",
        "",
        "```json",
        json.dumps(dict(export.provenance), indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"
