"""Teach a VLA to answer with pruned visual tokens as it does with all of them (``configs/train/recover_pruned.yaml``).

Self-distillation into a LoRA adapter (arXiv 2106.09685): the teacher is the same checkpoint with the adapter switched off,
reading every token; the student reads the tokens that the pruner leaves. No labels are needed, only images and
instructions, so any OpenVLA checkpoint can be adapted to its own camera's frames. With adapted encoders, which see the
whole image, what a dropped token knew can move to those that stay; without, each image is encoded once for both. What is
written is a PEFT adapter's folder, for ``from_pretrained(checkpoint, adapter=folder)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from spvla.errors import InputError
from spvla.pruning.selector import TokenSelector
from spvla.vlas.openvla.decoding import greedy
from spvla.vlas.openvla.images import pixel_values
from spvla.vlas.openvla.load import DTYPES, from_pretrained
from spvla.vlas.openvla.model import OpenVLAModel
from train.vla.frames import FrameBatch

TARGETS = r"(projector\.fc\d|language_model\.model\.layers\.\d+\..*_proj|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d))"


class RecoverModule(L.LightningModule):
    """Trains the adapter.

    Validation tells ``val/agreement_K`` for each share K of the tokens, the share of action tokens, decoded greedily, that
    are those of the unpruned model; ``val/before_K`` without the adapter; and ``val/regained_K``, how much of what pruning
    lost is won back. ``val/bins_off_K`` and ``val/bins_off_before_K`` are the mean distance from the unpruned model's
    tokens, in bins: where its distributions are wide, rounding alone changes which of two neighbouring bins is the likelier.

    Args:
        checkpoint: folder or hf://owner/name of the VLA.
        output: folder that the adapter is written to after each validation and at the end.
        keep: shares of the visual tokens, in (0, 1); each batch draws one.
        pruning: other fields of :class:`spvla.pruning.TokenSelector`; by default the most attended tokens stay.
        rank, alpha, dropout: LoRA's.
        temperature: of both distributions in the loss: below 1 the likeliest tokens count most, above 1 all scores do.
        targets: regular expression for the ends of the names of the layers that are adapted.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: optimiser steps of linear warm-up; afterwards the rate falls linearly to zero at ``max_steps``.
        unnorm_key: see :func:`spvla.vlas.openvla.from_pretrained`.
        dtype: type of the frozen weights; the adapter's are float32.
    """

    def __init__(
        self,
        checkpoint: str,
        output: Path,
        keep: Sequence[float] = (0.25,),
        pruning: dict[str, Any] = {},  # noqa: B006
        rank: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        temperature: float = 1.0,
        targets: str = TARGETS,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 20,
        unnorm_key: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise InputError("recover: LoRA adapters need the package peft (pip install 'spvla[train]')") from None

        if not keep or not all(0 < share < 1 for share in keep):
            raise InputError(f"recover: keep must hold fractions of the tokens between 0 and 1, got {list(keep)}")
        if dtype not in DTYPES:
            raise InputError(f"recover: dtype {dtype!r} is unknown; available: {', '.join(DTYPES)}")
        if not temperature > 0:
            raise InputError(f"recover: temperature must be above 0, got {temperature}")
        self.keep, self.temperature = tuple(keep), temperature
        self.selector = TokenSelector(**{"measure": "ratio", "contours": False, **pruning})
        model = from_pretrained(checkpoint, dtype=DTYPES[dtype], unnorm_key=unnorm_key).model
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=f".*{targets}")
        try:
            self.adapted = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"recover: targets {targets!r}: {str(error).splitlines()[0]}") from None
        self.adapted.peft_config["default"].base_model_name_or_path = str(checkpoint).removeprefix("hf://")
        self.sees_anew = any("vision_backbone." in name for name, p in self.named_parameters() if p.requires_grad)
        self.output = Path(output)
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.strict_loading = False  # a training's checkpoint holds the adapter alone

    @property
    def model(self) -> OpenVLAModel:
        """The VLA, adapter included."""
        model = self.adapted.base_model.model
        assert isinstance(model, OpenVLAModel)
        return model

    # ---------------------------------------------------------------------------------------------------- answers

    def prepare(self, batch: FrameBatch) -> tuple[Tensor, list[list[int]]]:
        """Pixels as the encoders want them, (B, 3 x encoders, S, S), and the prompts."""
        pixels = torch.stack([pixel_values(image, self.model.config) for image in batch.images.cpu().numpy()])
        return pixels.to(self.device), [self.model.tokenize(text) for text in self.texts(batch)]

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features (B, N, C) and the attention that patches receive (B, N)."""
        backbone = self.model.vision_backbone
        features, score_input = backbone(pixels)
        return features, backbone.attention(score_input)

    @staticmethod
    def texts(batch: FrameBatch) -> list[str]:
        """Each image's own instruction."""
        return batch.instructions[:: len(batch.instructions) // len(batch.images)]

    def choose(self, attention: Tensor, images: Tensor, share: float) -> list[Tensor]:
        """The selector's choice for each image: B x (K,), ascending."""
        pairs = zip(attention.detach().float().cpu().numpy(), images.cpu().numpy(), strict=True)
        return [torch.from_numpy(self.selector.select(a, image, share)).to(self.device) for a, image in pairs]

    def answer(
        self, features: Tensor, prompts: list[list[int]], keep: list[Tensor], given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Action tokens (B, D) and the scores (B, D, V) that they were read from.

        Args:
            features: of all patches, (B, N, C).
            prompts: B.
            keep: which patches the language model reads, B x (K,).
            given: action tokens (B, D): score these, all at once; None: decode greedily, one by one.
        """
        model = self.model
        counts = [len(k) for k in keep]
        kept = torch.cat([f[k] for f, k in zip(features, keep, strict=True)])  # (sum of K, C)
        texts = prompts if given is None else [[*p, *g] for p, g in zip(prompts, given[:, :-1].tolist(), strict=True)]
        visual = model.projector(kept).split(counts)
        embeds, mask, ids = model.sequences(visual, texts, keep, features.shape[1], self.selector.positions)
        if given is None:
            decoded = greedy(model, embeds, mask, ids)
            return decoded.tokens, decoded.scores
        llm, dims = model.language_model, model.action_space.dim
        hidden = llm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=False).last_hidden_state
        return given, llm.lm_head(hidden[:, -dims:]).float()

    def teach(self, pixels: Tensor, prompts: list[list[int]]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The unpruned model's tokens (B, D) and scores (B, D, V), without the adapter, and what :meth:`see` gave it."""
        with torch.no_grad(), self.adapted.disable_adapter():
            features, attention = self.see(pixels)
            everything = [torch.arange(features.shape[1], device=self.device)] * len(features)
            return *self.answer(features, prompts, everything), (features, attention)

    # --------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:
        pixels, prompts = self.prepare(batch)
        tokens, wanted, seen = self.teach(pixels, prompts)
        features, attention = self.see(pixels) if self.sees_anew else seen
        share = self.keep[int(torch.randint(len(self.keep), ()))]
        _, scores = self.answer(features, prompts, self.choose(attention, batch.images, share), tokens)
        given, wanted = ((x / self.temperature).log_softmax(-1) for x in (scores, wanted))
        loss = F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1).mean()
        self.log("train/divergence", loss, prog_bar=True, batch_size=len(batch.images))
        return loss

    @torch.no_grad()
    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        pixels, prompts = self.prepare(batch)
        tokens, _, before = self.teach(pixels, prompts)
        after = self.see(pixels) if self.sees_anew else before
        for share in self.keep:
            for name, (features, attention) in (("before", before), ("agreement", after)):
                keep = self.choose(attention, batch.images, share)
                with self.adapted.disable_adapter() if name == "before" else nullcontext():
                    found, _ = self.answer(features, prompts, keep)
                off = "bins_off" if name == "agreement" else "bins_off_before"
                self.log(f"val/{name}_{share:g}", (found == tokens).float().mean(), batch_size=len(batch.images))
                self.log(f"val/{off}_{share:g}", (found - tokens).abs().float().mean(), batch_size=len(batch.images))

    def on_validation_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        for share in self.keep:
            before, after = (float(metrics[f"val/{name}_{share:g}"]) for name in ("before", "agreement"))
            self.log(f"val/regained_{share:g}", (after - before) / max(1 - before, 1e-9))
        if not self.trainer.sanity_checking:
            self._save()

    def on_train_end(self) -> None:
        self._save()

    def _save(self) -> None:
        if self.trainer.is_global_zero:
            self.adapted.save_pretrained(str(self.output))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)

        def rate(step: int) -> float:
            last = self.trainer.max_steps
            left = 1.0 if last < 0 else (last - step) / max(1, last - self.warmup_steps)
            return max(0.0, min((step + 1) / max(1, self.warmup_steps), left))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: FrameBatch, device: torch.device, dataloader_idx: int) -> FrameBatch:
        return batch.to(device)
