"""What trainings of a VLA have in common: AdamW, averaged weights, and a checkpoint that is written while they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spvla.files import building
from spvla.vlas.openvla.model import OpenVLAModel
from train.vla.frames import FrameBatch


class AveragedModule(L.LightningModule):
    """Trains a network and writes the average of its weights.

    Args:
        network: what is trained; parameters that need no gradient stay as they are.
        output: folder that :meth:`write` writes to.
        save_every: optimiser steps between two writings.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: optimiser steps of linear warm-up; afterwards the rate stays, until ...
        cooldown: ... over the last share of the trainer's ``max_steps`` it falls to zero.
        averaging: decay of the exponential average of the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        output: Path,
        save_every: int,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        cooldown: float,
        averaging: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(averaging))
        self.average.requires_grad_(False)
        self.output, self.save_every = Path(output), save_every
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.cooldown = warmup_steps, cooldown

    def write(self, folder: Path) -> None:
        """Write the averaged network to an empty folder, in a form that :func:`~spvla.vlas.registry.load_vla` reads."""
        raise NotImplementedError

    def on_train_batch_end(self, outputs: Any, batch: FrameBatch, batch_idx: int) -> None:
        """Average the weights, and now and then write them."""
        if self.global_step <= self.warmup_steps:
            self.average.n_averaged.zero_()  # early weights are not worth averaging: start over from the current ones
        self.average.update_parameters(self.network)
        if self.global_step % self.save_every == 0 and self.trainer.is_global_zero:
            self.save()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.save()

    def save(self) -> None:
        """Write the averaged model to ``output``; its main weights come last and at once, so that readers may watch them."""
        with building(self.output / "model") as folder:
            self.write(folder)
            for file in sorted(folder.iterdir(), key=lambda f: (f.suffix == ".safetensors", f.stem == "model")):
                file.replace(self.output / file.name)

    def configure_optimizers(self) -> Any:
        trained = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for _, p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for _, p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))

        def rate(step: int) -> float:
            last = self.trainer.max_steps
            end = 1.0 if last < 0 else (last - step) / max(1.0, self.cooldown * last)
            return max(0.0, min(1.0, (step + 1) / max(1, self.warmup_steps), end))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: FrameBatch, device: torch.device, dataloader_idx: int) -> FrameBatch:
        return batch.to(device)


def pixels(model: OpenVLAModel, images: Tensor) -> Tensor:
    """Images uint8 (B, S, S, 3), normalised for each encoder of ``model``: (B, 3 x encoders, S, S)."""
    config = model.config
    x = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, S, S)
    means = config.image_means or [vit.mean for vit in config.encoders]
    stds = config.image_stds or [vit.std for vit in config.encoders]
    return torch.cat(
        [(x - x.new_tensor(m).view(3, 1, 1)) / x.new_tensor(s).view(3, 1, 1) for m, s in zip(means, stds, strict=True)], 1
    )
