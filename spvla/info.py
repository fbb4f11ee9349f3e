"""What an export holds, as a table or as JSON: read before it goes to a robot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from typing import Any

from spvla.export import Export, load_export
from spvla.hub import PRETRAINED


def packaged_exports() -> list[str]:
    """Names of the exports that come with the package."""
    return sorted(p.parent.name for p in PRETRAINED.glob("*/config.json") if (p.parent / "gates").is_dir())


def describe(export: Export) -> dict[str, Any]:
    """The export's space, state, generators with gates and calibration, defaults and provenance, as JSON-ready values."""
    space, risk = export.space, float(export.defaults["risk"])
    generators = {}
    for name in sorted({*export.generators, *export.gates}):
        gate, curve = export.gates.get(name), export.calibration.get(name)
        learned = export.generators.get(name)
        generators[name] = {
            "kind": "built-in" if learned is None else learned.config.kind,
            "parameters": 0 if learned is None else sum(p.numel() for p in learned.parameters()),
            "gate": gate is not None,
            "calibration_episodes": None if curve is None else curve.episodes,
            "smallest_risk": None if curve is None else curve.smallest_risk,
            "coverage_at_default_risk": None if curve is None else curve.coverage_at(risk),
            "calibration_error": export.provenance.get("calibration_error", {}).get(name),
        }
    inputs = [g.config.features for g in export.generators.values()] + [g.config.features for g in export.gates.values()]
    return {
        "action_space": space.to_dict(),
        "state_size": max((f.state_size for f in inputs if f.state_size is not None), default=None),
        "state_entries": sorted({i for f in inputs for i in f.state_dims}),
        "tolerance": export.tolerance,
        "eyes": None if export.eyes is None else asdict(export.eyes),
        "last_disagreement": export.reads_error,
        "defaults": dict(export.defaults),
        "generators": generators,
        "notes": export.notes(),
        "source": export.source,
        "provenance": dict(export.provenance),
    }


def print_info(export: str, json: bool = False) -> None:
    """Say what an export holds.

    Args:
        export: a folder, hf://owner/name, or the name of an export that comes with the package, such as generator_nano.
        json: print JSON instead of a table.
    """
    loaded = load_export(export)
    found = describe(loaded)
    if json:
        print(dumps(found, indent=1))
        return
    space = loaded.space
    print(f"{export}: {space.name}, {space.dim} action dimensions at {space.control_rate:g} Hz")
    used = found["state_entries"]
    size = "" if found["state_size"] is None else f" of {found['state_size']}"
    print(f"state         {'entries ' + ', '.join(map(str, used)) + size if used else 'not used'}")
    print(f"tolerance     {loaded.tolerance:g} (normalised units)")
    if (eyes := loaded.eyes) is not None:
        print(f"eyes          camera {eyes.camera}, {eyes.size} x {eyes.size} pixels, needed at every step")
    if loaded.reads_error:
        print("gates         read the generator's error at the VLA's last call, too")
    print(f"defaults      {', '.join(f'{k} {v}' for k, v in loaded.defaults.items())}")
    if loaded.source is not None:
        print(f"source        {loaded.source}")
    for key, value in loaded.provenance.items():
        print(f"{key:13s} {value if isinstance(value, str | int | float) else dumps(value)}")
    rows = [("generator", "kind", "parameters", "gate", "calibration episodes", "smallest risk", "coverage at default risk")]
    for name, part in found["generators"].items():
        rows.append(
            (
                name,
                part["kind"],
                f"{part['parameters']:,}",
                "yes" if part["gate"] else "no",
                _number(part["calibration_episodes"], "d"),
                _number(part["smallest_risk"], ".4f"),
                _number(part["coverage_at_default_risk"], ".1%"),
            )
        )
    print()
    for row in _columns(rows):
        print(row)
    for note in found["notes"]:
        print(f"note: {note}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
