"""Export checkpoints of ``python -m train fit``, and ONNX beside them: ``python -m train export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.windows import Windows, frames_of
from spvla.errors import InputError
from spvla.export import Export, save_export
from spvla.gates.classifier import ActionTypeClassifier
from spvla.generators.learned import LearnedGenerator
from spvla.history import Window
from train.calibrate import calibrated_export, print_evidence
from train.datamodules import RolloutData
from train.modules import ClassifierModule, GeneratorModule

ONNX_WINDOWS = 1000
ONNX_BATCHES = (1, 3)  # what a robot sends, and another size: the batch axis must be free
ONNX_TOLERANCE = 1e-5


def export(
    generator: str,
    gate: str,
    data: list[Path],
    output: Path,
    calibration_data: list[Path] = [],  # noqa: B006
    name: str | None = None,
    default_risk: float = 0.05,
    max_generated_run: int = 20,
    calibration_fraction: float = 0.2,
    onnx: bool = False,
    seed: int = 0,
) -> None:
    """Put a generator and its gate, both checkpoints of ``train fit``, into an export; calibrate the gate on the way.

    Args:
        generator: checkpoint of a generator.
        gate: checkpoint of its gate.
        data: rollout stores, for calibration.
        output: the export to write.
        calibration_data: more rollout stores; all their episodes calibrate.
        name: what the generator is called in the export; mlp or transformer if omitted.
        default_risk: the export's default risk.
        max_generated_run: the export's longest run of generated actions.
        calibration_fraction: share of calibration episodes where there are no official initial states.
        onnx: write ONNX of both too, checked against torch on 1,000 windows.
        seed: of the split; the one that training used.
    """
    module = GeneratorModule.from_checkpoint(Path(generator))
    classifier = ClassifierModule.read(Path(gate), module)
    features = module.network.config.features
    if classifier.config.features.action_dim != features.action_dim:
        raise InputError(
            f"{gate}: trained for {classifier.config.features.action_dim} action dimensions, not {features.action_dim}"
        )
    rollouts = RolloutData(
        data,
        max(features.history, classifier.config.features.history),
        vla_confidence=features.vla_confidence or classifier.config.features.vla_confidence,
        vla_features=bool(features.vla_features or classifier.config.features.vla_features),
        horizon=module.network.config.horizon,
        calibration_fraction=calibration_fraction,
        seed=seed,
        calibration_data=calibration_data,
        space=module.space.to_dict(),
        eyes=classifier.config.eyes,
        last_disagreement=classifier.config.last_disagreement,
    )
    name = name or module.network.config.kind
    defaults = {"generator": name, "gate": "learned", "risk": default_risk, "max_generated_run": max_generated_run}
    result = calibrated_export(rollouts, {name: module.network}, {name: classifier}, module.tolerance, defaults)
    save_export(result, output)
    print_evidence(result)
    if onnx:
        windows = rollouts.judged([result.generator(name, rollouts.space)], rollouts.split.calibration)
        export_onnx(result, windows, frames_of(rollouts.split.calibration), output)
    print(f"exported to {output}")


class _FlatGenerator(nn.Module):
    """A generator with a window's fields as positional inputs: what ONNX can express."""

    def __init__(self, network: LearnedGenerator, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *fields: Tensor) -> Tensor:
        return self.network.actions(_window(self.names, fields))


class _FlatGate(nn.Module):
    """A gate likewise; the proposal comes last. Returns the probability of deviating."""

    def __init__(self, network: ActionTypeClassifier, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *fields: Tensor) -> Tensor:
        return self.network.probability(_window(self.names, fields[:-1]), fields[-1])


def _window(names: Sequence[str], fields: Sequence[Tensor]) -> Window:
    optional = {"vla_confidence": None, "vla_features": None}
    return Window(**{**optional, **dict(zip(names, fields, strict=True))})  # type: ignore[arg-type]


def export_onnx(export: Export, windows: Windows, frames: np.ndarray, output: Path) -> None:
    """Write ``generators/<name>.onnx`` and ``gates/<name>.onnx`` for every learned generator and compare them to torch on
    ``windows`` as the gates see them.

    Inputs are a window's fields by name (batch size is free), the gate's also ``proposal`` (B, D), normalised.

    Raises:
        InputError: onnxruntime and torch differ by more than 1e-5 on 1,000 windows, or another batch size does not run; the
            file is removed.
    """
    rows = np.random.default_rng(0).choice(frames, ONNX_WINDOWS, replace=len(frames) < ONNX_WINDOWS)
    window = windows.batch(np.sort(rows)).window
    inputs = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in vars(window).items() if v is not None}
    for name, network in export.generators.items():
        with torch.inference_mode():
            proposals = network.actions(window)[:, 0]
        used = _used(inputs, network.config.features)
        _write_onnx(_FlatGenerator(network, list(used)), used, output / "generators" / f"{name}.onnx")
        gate = export.gates.get(name)
        if gate is None:
            continue
        used = _used(inputs, gate.config.features, gate.eyes is not None, gate.config.last_disagreement)
        _write_onnx(_FlatGate(gate, list(used)), {**used, "proposal": proposals.clone()}, output / "gates" / f"{name}.onnx")


def _used(inputs: dict[str, Tensor], features: Any, eyes: bool = False, errors: bool = False) -> dict[str, Tensor]:
    """The window fields that a model reads (ONNX drops the others)."""
    skip = set() if features.vla_output else {"vla_state", "vla_age"}
    skip |= set() if features.vla_confidence else {"vla_confidence"}
    skip |= set() if features.vla_features else {"vla_features"}
    skip |= set() if eyes else {"frame", "vla_frame"}
    skip |= set() if errors else {"vla_error"}
    return {k: v for k, v in inputs.items() if k not in skip}


def _write_onnx(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    import onnxruntime

    module.eval()
    batch = torch.export.Dim("batch")
    with torch.inference_mode():
        expected = module(*inputs.values()).numpy()
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        str(path),
        input_names=list(inputs),
        output_names=["output"],
        dynamic_shapes=(tuple({0: batch} for _ in inputs),),
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    difference = 0.0
    for count in (*ONNX_BATCHES, len(expected)):
        try:
            found = session.run(None, {k: v[:count].numpy() for k, v in inputs.items() if k in wanted})[0]
        except Exception as error:  # onnxruntime's own, which derive from Exception alone
            path.unlink()
            told = " ".join(str(error).split())
            raise InputError(f"{path}: a batch of {count} does not run ({told})", code="onnx-batch", field=str(path)) from None
        difference = max(difference, float(np.abs(found - expected[:count]).max()))
    if not difference <= ONNX_TOLERANCE:
        path.unlink()
        raise InputError(
            f"{path}: onnxruntime differs from torch by {difference:.2e} on {len(expected)} windows",
            code="onnx-difference",
            field=str(path),
        )
    print(f"{path}: largest difference to torch {difference:.1e} on {len(expected)} windows, and in batches of 1 and 3")
