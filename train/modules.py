"""Lightning modules: distil an action generator, train its action-type classifier.

Both learn from :class:`data.windows.Batch` streams. Inputs are what was executed, targets are the teacher's.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.disagreement import propose
from data.windows import Batch
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.gates.calibration import calibrate
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.gates.eyes import EyesConfig, eyes_config
from spvla.generators import make_network
from spvla.generators.base import ActionGenerator
from spvla.generators.features import FeatureConfig, to_device
from spvla.generators.learned import GeneratorConfig

RISKS = (0.02, 0.05, 0.1, 0.2, 0.3)


class _Module(L.LightningModule):
    """Optimiser and device handling that both modules share: AdamW with warm-up and cosine decay to zero."""

    learning_rate: float
    weight_decay: float

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        steps = max(int(self.trainer.estimated_stepping_batches), 4)
        warmup = max(0.05, 2 / steps)  # OneCycleLR divides by zero for a warm-up of one step
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        frames, b = batch
        targets, valid = (torch.from_numpy(x).to(device) for x in (b.targets, b.valid))
        return frames, Batch(to_device(b.window, device), targets, valid, b.changed)  # type: ignore[arg-type]


class GeneratorModule(_Module):
    """Distils an action generator.

    Args:
        features: the generator's inputs (linked from the data).
        space: the action space (linked from the data).
        kind, width, depth, heads, horizon, dropout: see :class:`spvla.generators.learned.GeneratorConfig`.
        learning_rate, weight_decay: of AdamW.
        later_weight: loss weight of the horizon steps after the first, which alone is executed.
        tolerance: error beyond which a step deviates, normalised units (for the metric).
        residual: see :class:`spvla.generators.learned.GeneratorConfig` (linked from the data).
        more: fields that the network's own configuration has beyond these.
    """

    def __init__(
        self,
        features: FeatureConfig,
        space: ActionSpace,
        kind: str = "mlp",
        width: int = 256,
        depth: int = 3,
        heads: int = 4,
        horizon: int = 4,
        dropout: float = 0.0,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-2,
        later_weight: float = 0.2,
        tolerance: float = 0.2,
        residual: tuple[float, ...] = (),
        more: dict[str, Any] = {},  # noqa: B006
    ) -> None:
        super().__init__()
        gripper = space.gripper if space.binary_gripper else ()
        size = {"width": width, "depth": depth, "heads": heads, "horizon": horizon, "dropout": dropout}
        fixed = {"features": features, "gripper": gripper, "residual": tuple(residual)}
        self.network = make_network({"kind": kind, **size, **more, **fixed})
        self.space = space
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.later_weight, self.tolerance = later_weight, tolerance

    def options(self) -> dict[str, Any]:
        """The arguments, beside features and space, that make a module like this one."""
        c = self.network.config
        common = {f.name for f in fields(GeneratorConfig)}
        more = {f.name: getattr(c, f.name) for f in fields(c) if f.name not in common}
        own = ("learning_rate", "weight_decay", "later_weight", "tolerance")
        return (
            {k: getattr(c, k) for k in ("kind", "width", "depth", "heads", "horizon", "dropout")}
            | {k: getattr(self, k) for k in own}
            | {"more": more}
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put everything that :meth:`from_checkpoint` needs into the checkpoint, as plain values."""
        checkpoint["spvla"] = {
            "features": asdict(self.network.config.features),
            "space": self.space.to_dict(),
            "residual": self.network.config.residual,
            "options": self.options(),
        }

    @classmethod
    def from_checkpoint(cls, path: Path) -> GeneratorModule:
        """Read a checkpoint of ``python -m train fit``; an :class:`InputError` names a damaged or foreign file."""
        values, state = read_checkpoint(path)
        if "options" not in values:
            raise InputError(f"{path}: not a checkpoint of a generator")
        features, space = FeatureConfig(**values["features"]), ActionSpace.from_dict(values["space"])
        module = cls(features, space, residual=values.get("residual", ()), **values["options"])
        module.load_state_dict(state)
        return module.eval()

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Huber on the continuous dimensions, a predicted change in units of its spread; cross-entropy on binary grippers.
        Steps before the first action do not count: the VLA makes that. Scalar."""
        targets, valid = torch.as_tensor(batch.targets), torch.as_tensor(batch.valid)
        g = list(self.network.config.gripper)
        c = [d for d in range(out.shape[-1]) if d not in g]
        scale = self.network.scale[c]
        per_step = F.smooth_l1_loss(out[..., c] / scale, targets[..., c] / scale, beta=0.1, reduction="none").sum(-1)  # (B, H)
        if g:
            closed = (targets[..., g] >= 0).float()
            per_step = per_step + 0.2 * F.binary_cross_entropy_with_logits(out[..., g], closed, reduction="none").sum(-1)
        weight = valid * torch.as_tensor(batch.window.mask)[:, -1:]
        weight[:, 1:] *= self.later_weight
        return (per_step * weight).sum() / weight.sum().clamp(min=1e-6)

    def training_step(self, batch: tuple[np.ndarray, Batch], batch_idx: int) -> Tensor:
        loss = self.loss(self.network(batch[1].window), batch[1])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[np.ndarray, Batch], batch_idx: int) -> None:
        b, size = batch[1], len(batch[0])
        self.log("val/loss", self.loss(self.network(b.window), b), batch_size=size)
        out, targets = self.network.actions(b.window).cpu().numpy(), torch.as_tensor(b.targets).cpu().numpy()
        error = np.abs(out - targets)[..., list(self.space.continuous)].max(-1)  # (B, H)
        valid = torch.as_tensor(b.valid).cpu().numpy() > 0
        for h in range(error.shape[1]):
            if valid[:, h].any():
                self.log(f"val/error_{h + 1}", float(error[valid[:, h], h].mean()), batch_size=size)
        if valid[:, 0].any():
            deviates = self.space.deviation(out[valid[:, 0], 0], targets[valid[:, 0], 0], self.tolerance)
            self.log("val/deviating", float(deviates.mean()), prog_bar=True, batch_size=size)


class ClassifierModule(_Module):
    """Trains the action-type classifier of one generator.

    With eyes it also learns to call the VLA where the scene has changed since the VLA was last asked, whatever the proposal:
    what the generator goes by is then about another scene. Calibration counts deviations alone.

    Args:
        features: the classifier's view of the history (linked from the data).
        judges: per fold, the generator that is judged on that fold's frames; none was trained on them (linked).
        fold: fold of every global frame, (frames,) (linked).
        space: the action space (linked).
        width, depth, dropout: see :class:`spvla.gates.classifier.ClassifierConfig`.
        learning_rate, weight_decay: of AdamW.
        tolerance: error beyond which a step deviates, normalised units.
        eyes: true or fields of :class:`spvla.gates.eyes.EyesConfig`: the gate sees the scene; None: it does not.
        last_disagreement: the gate reads the generator's error at the VLA's last call.
    """

    def __init__(
        self,
        features: FeatureConfig,
        judges: list[ActionGenerator],
        fold: np.ndarray,
        space: ActionSpace,
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.1,
        learning_rate: float = 2e-3,
        weight_decay: float = 3e-2,
        tolerance: float = 0.2,
        eyes: bool | dict[str, Any] | EyesConfig | None = None,
        last_disagreement: bool = False,
    ) -> None:
        super().__init__()
        config = ClassifierConfig(features, width, depth, dropout, eyes_config(eyes), last_disagreement)
        self.network = ActionTypeClassifier(config)
        self.space, self.tolerance = space, tolerance
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.judges, self.fold = judges, fold
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the classifier's config, and the scale and tolerance of its labels, into the checkpoint, as plain values."""
        labels = {"space": self.space.to_dict(), "tolerance": self.tolerance}
        checkpoint["spvla"] = {"classifier": asdict(self.network.config), **labels}

    @staticmethod
    def read(path: Path, generator: GeneratorModule) -> ActionTypeClassifier:
        """The classifier of a checkpoint of ``python -m train fit``, as the gate of ``generator``.

        Raises:
            InputError: a damaged file, or a gate that was trained for another action space, scale or tolerance (codes
                ``space-mismatch``, ``scale-mismatch``, ``tolerance-mismatch``).
        """
        values, state = read_checkpoint(path)
        if "classifier" not in values:
            raise InputError(f"{path}: not a checkpoint of a gate")
        if "space" in values:
            space = ActionSpace.from_dict(values["space"], str(path))
            generator.space.require_compatible(space, str(path))
            if space.rescaling(generator.space) is not None:
                raise InputError(
                    f"{path}: the gate was trained at a scale (q01, q99) that is not its generator's; train it with "
                    "--data.generator naming the generator's checkpoint",
                    code="scale-mismatch",
                    field=str(path),
                )
            if values["tolerance"] != generator.tolerance:
                raise InputError(
                    f"{path}: was trained for tolerance {values['tolerance']}, but its generator for {generator.tolerance}",
                    code="tolerance-mismatch",
                    field=str(path),
                )
        classifier = ActionTypeClassifier(ClassifierConfig(**values["classifier"]))
        classifier.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
        return classifier.eval()

    def label(self, frames: np.ndarray, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals (B, D), whether they deviate, and whether that is known, in the shape of the classifier's answer: (B,), or
        with arms (2, B), the second row about what the VLA's plans have next."""
        window = to_numpy(replace(batch.window, frame=None, vla_frame=None))
        proposals = propose(self.judges, self.fold[frames], window)
        targets = torch.as_tensor(batch.targets)[:, 0].cpu().numpy()
        deviates = self.space.deviation(proposals, targets, self.tolerance)
        known = torch.as_tensor(batch.valid)[:, 0]
        if self.network.arms:
            kept = self.space.deviation(window.plan[:, 0], targets, self.tolerance)
            left = torch.as_tensor(batch.window.plan_left)
            deviates, known = np.stack([deviates, kept]), torch.stack([known, known * (left > 0)])
        if batch.changed is not None:
            deviates, known = deviates | batch.changed, known.maximum(torch.from_numpy(batch.changed).to(known))
        return torch.from_numpy(proposals).to(self.device), torch.from_numpy(deviates).to(self.device), known

    def training_step(self, batch: tuple[np.ndarray, Batch], batch_idx: int) -> Tensor:
        frames, b = batch
        proposals, deviates, known = self.label(frames, b)
        logits = self.network(b.window, proposals)
        loss = F.binary_cross_entropy_with_logits(logits, deviates.float(), reduction="none")
        loss = (loss * known).sum() / known.sum().clamp(min=1)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(frames))
        return loss

    def validation_step(self, batch: tuple[np.ndarray, Batch], batch_idx: int) -> None:
        frames, b = batch
        proposals, deviates, known = self.label(frames, b)
        logits = self.network(b.window, proposals)
        loss = F.binary_cross_entropy_with_logits(logits, deviates.float(), reduction="none")
        self.log("val/loss", (loss * known).sum() / known.sum().clamp(min=1), batch_size=len(frames))
        keep = known.cpu().numpy() > 0
        p = torch.sigmoid(logits).cpu().numpy()
        self.seen.append((p[keep], deviates.cpu().numpy()[keep]))  # a validation batch is one episode

    def on_validation_epoch_end(self) -> None:
        """Log the risk curve: coverage at each allowed risk, conformal over the validation episodes."""
        if not self.seen or self.trainer.sanity_checking:
            self.seen.clear()
            return
        curve = calibrate([p for p, _ in self.seen], [deviates for _, deviates in self.seen])
        self.seen.clear()
        for risk in RISKS:
            self.log(f"risk_curve/coverage_at_{risk:g}", curve.coverage_at(risk), prog_bar=risk == RISKS[1])


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our own values and the state dict of a Lightning checkpoint, read without unpickling code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint["spvla"], checkpoint["state_dict"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (KeyError, RuntimeError, EOFError, UnpicklingError) as error:
        raise InputError(f"{path}: not a checkpoint of `python -m train fit` ({type(error).__name__})") from None


def to_numpy(window: Any) -> Any:
    """A window of tensors as arrays."""
    return type(window)(**{k: None if v is None else torch.as_tensor(v).cpu().numpy() for k, v in vars(window).items()})
