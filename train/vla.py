"""Train a VLA of OpenVLA's class from scratch, at a size that two CPU cores can train (``configs/train/nano_vla.yaml``).

The loss is OpenVLA's own, cross-entropy on the action tokens, with the target spread over neighbouring bins. Two things
that exist during training alone make it work from little data: heat maps over the patches (where the hand, the place and,
by a pointer that the prompt's last token sends out, the asked object are), and random dropping of visual tokens, so that
pruning later meets a model that has seen it. The averaged weights are written as a checkpoint in OpenVLA's published form.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from spvla.errors import InputError
from spvla.vlas.openvla.config import OpenVLAConfig
from spvla.vlas.openvla.model import PROMPT, OpenVLAModel, joined
from spvla.vlas.openvla.policy import OpenVLA
from spvla.vlas.openvla.weights import save_pretrained
from spvla.vlas.registry import load_vla
from train.frames import POINTS, FrameBatch


def word_tokenizer(words: list[str]) -> Tokenizer:
    """A tokenizer that knows OpenVLA's prompt and these words; every other word is unknown to it."""
    known = ["<unk>", "<s>", "</s>", *PROMPT.format(instruction="").lower().replace(":", " :").replace("?", " ?").split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*known, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def take_weights(model: OpenVLAModel, earlier: OpenVLAModel, where: str) -> None:
    """Give ``model`` the weights of ``earlier``, a model of the same shape that was read from ``where``.

    Raises:
        InputError: another shape, or words that have other token ids here (codes ``shape-mismatch``, ``vocabulary-mismatch``).
    """
    assert model.tokenizer is not None
    mine, theirs = (m.tokenizer.get_vocab() if m.tokenizer is not None else {} for m in (model, earlier))
    moved = sorted(word for word, i in theirs.items() if mine.get(word) != i)
    if moved:
        raise InputError(
            f"{where}: the word {moved[0]!r} has token {theirs[moved[0]]} there and {mine.get(moved[0])} here; list the "
            "checkpoint's words first and in their order",
            code="vocabulary-mismatch",
            field="vocabulary",
        )
    try:
        model.load_state_dict(earlier.state_dict())
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise InputError(f"{where}: does not fit the architecture ({told})", code="shape-mismatch", field=where) from None


@dataclass(frozen=True)
class Questions:
    """Prompts about B images, Q for each, and the beginning of their answers.

    Args:
        common: token ids that all prompts begin with, (P,), ``<s>`` among them.
        own: the rest of each prompt, and its action tokens but the last, which no token follows; padded at the end,
            (B, Q, T): no token looks ahead, so padding changes nothing before it.
        lengths: how many of ``own`` are the prompt's, (B, Q), at least 1.
    """

    common: Tensor
    own: Tensor
    lengths: Tensor

    def layout(self, first: int) -> tuple[Tensor, Tensor]:
        """By place in a sequence whose own tokens begin at ``first``, (L,): which question it is of, 0 all; position ids."""
        _, q, t = self.own.shape
        part = torch.cat([torch.zeros(first, dtype=torch.long), torch.arange(1, q + 1).repeat_interleave(t)])
        positions = torch.cat([torch.arange(first), (first + torch.arange(t)).repeat(q)])
        return part.to(self.own.device), positions.to(self.own.device)

    @classmethod
    def of(cls, prompts: list[list[int]], actions: Tensor) -> Questions:
        """From prompts, B x Q, and action tokens (B, Q, D)."""
        b, q, _ = actions.shape
        shortest = min(map(len, prompts)) - 1
        shared = next((i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), shortest)
        shared = max(1, min(shared, shortest))
        rows = [
            torch.cat([torch.tensor(prompt[shared:]), answer[:-1].cpu()])
            for prompt, answer in zip(prompts, actions.flatten(0, 1), strict=True)
        ]
        own = nn.utils.rnn.pad_sequence(rows, batch_first=True).view(b, q, -1)
        lengths = torch.tensor([len(prompt) - shared for prompt in prompts]).view(b, q)
        device = actions.device
        return cls(torch.tensor(prompts[0][:shared], device=device), own.to(device), lengths.to(device))


class TrainedVLA(nn.Module):
    """The model with the heads that only training needs.

    Args:
        model: the VLA.
        pointer_layer: decoder layer whose hidden states the pointer reads.
        pointer_width: width of the pointer's query and keys.
    """

    def __init__(self, model: OpenVLAModel, pointer_layer: int, pointer_width: int = 64) -> None:
        super().__init__()
        self.model = model
        self.pointer_layer = pointer_layer
        hidden = model.language_model.config.hidden_size
        self.heat = nn.Sequential(
            nn.LayerNorm(model.vision_backbone.width), nn.Linear(model.vision_backbone.width, len(POINTS) - 1)
        )
        self.query = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, pointer_width))
        self.key = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, pointer_width))
        self.reach = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 6))
        self.name = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, pointer_width))
        self.look = nn.Sequential(
            nn.LayerNorm(model.vision_backbone.width), nn.Linear(model.vision_backbone.width, pointer_width)
        )

    def forward(
        self, pixels: Tensor, asked: Questions, keep: Tensor, patches: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scores of action tokens and heat maps.

        The visual tokens come before the text and see nothing of it: one pass through the model answers all questions
        about an image, each of which sees itself, what all have in common, and the image.

        Args:
            pixels: (B, 3 x encoders, S, S).
            asked: Q questions about each image.
            keep: visual tokens that reach the decoder, (B, K), among the patches.
            patches: the ones that the encoders see, (B, N); None: all.

        Returns:
            scores (B, Q, D, V) of each action token; heat (B, 2, N) of hand and place over the patches; pointer (B, Q, K) to
            the asked object over the kept ones, from the decoder; names (B, Q, N), the same over all, from the encoders'
            features and the bare words: the shortest way for them to learn what things are called; all these are logits.
            reach (B, Q, 2, 3): from the hand to the asked object and to the place, in decimetres, read from the decoder.
        """
        model = self.model
        features, _ = model.vision_backbone(pixels, patches)  # (B, N, C)
        kept = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))  # (B, K, C)
        b, q, t = asked.own.shape
        text = model.language_model.get_input_embeddings()(torch.cat([asked.common.expand(b, -1), asked.own.flatten(1)], 1))
        embeds = joined(text, model.projector(kept))  # (B, L, H)
        first = keep.shape[1] + len(asked.common)  # where the questions' own tokens begin
        part, positions = asked.layout(first)  # (L,), (L,)
        sees = (part == part[:, None]) | (part == 0)  # (L, L)
        mask = (sees & (torch.arange(len(part)) <= torch.arange(len(part))[:, None]).to(sees.device))[None, None]
        states = model.language_model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions[None].to(embeds.device),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        dims = model.action_space.dim
        starts = first + t * torch.arange(q, device=embeds.device)  # (Q,)
        ends = starts + asked.lengths - 1  # (B, Q): the prompts' last tokens; token t scores token t + 1
        at = ends[..., None] + torch.arange(dims, device=embeds.device)  # (B, Q, D)
        scores = model.language_model.lm_head(_at(states[-1], at))  # (B, Q, D, V)
        middle = states[self.pointer_layer]
        query = self.query(_at(middle, ends))  # (B, Q, W)
        keys = self.key(middle[:, 1 : keep.shape[1] + 1])  # (B, K, W)
        pointer = query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])  # (B, Q, K)
        first_words, words = text[:, : len(asked.common)], text[:, len(asked.common) :].unflatten(1, (q, t))  # (B, Q, T, H)
        prompt = torch.arange(t, device=words.device) < asked.lengths[..., None]  # (B, Q, T)
        total = first_words.sum(1, keepdim=True) + (words * prompt[..., None]).sum(2)  # (B, Q, H)
        name = self.name(total / (len(asked.common) + asked.lengths[..., None]))  # (B, Q, W)
        names = name @ self.look(features).transpose(1, 2) / math.sqrt(name.shape[-1])  # (B, Q, N)
        reach = self.reach(_at(middle, ends)).unflatten(-1, (2, 3))  # (B, Q, 2, 3)
        return scores, self.heat(features).transpose(1, 2), pointer, names, reach


class PlainAttention(TorchFunctionMode):
    """Inside, attention is two matrix products and a softmax: on a CPU a fifth less time per training step than torch's own.

    The backward pass of torch's fused kernel is slow there, and its plain one spends its time on rows that see nothing, of
    which there are none here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return plain_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` for what the model asks of it: queries, keys and values of one number of heads."""
    assert not (dropout_p or is_causal or enable_gqa), "not needed here"
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)  # (B, nh, L, L)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, -1e4)
        scores = scores + attn_mask
    return scores.softmax(-1).to(v.dtype) @ v


def _at(states: Tensor, places: Tensor) -> Tensor:
    """The states (B, L, H) at places (B, ...): (B, ..., H)."""
    index = places.flatten(1)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, index).view(*places.shape, -1)


def soft_targets(points: Tensor, grid: int, patch: float) -> tuple[Tensor, Tensor]:
    """Points (B, P, 2), pixels, as weights over the four nearest patches: (B, P, N), and whether known and seen (B, P)."""
    at = (points + 0.5) / patch - 0.5  # (B, P, 2) column and row, patch centres at integers
    seen = ((at > -0.5) & (at < grid - 0.5)).all(-1)
    at = torch.where(seen[..., None], at, torch.zeros_like(at)).clamp(0, grid - 1)
    lines = torch.arange(grid, device=points.device)
    weights = (1 - (at[..., None] - lines).abs()).clamp(min=0)  # (B, P, 2, grid)
    return (weights[:, :, 1, :, None] * weights[:, :, 0, None, :]).flatten(2), seen


def expected_points(heat: Tensor, grid: int, patch: float) -> Tensor:
    """Where heat maps (B, P, N), logits, are on average: pixels (B, P, 2)."""
    p = heat.softmax(-1)
    centres = (torch.arange(grid, device=heat.device) + 0.5) * patch - 0.5
    rows, columns = centres.repeat_interleave(grid), centres.repeat(grid)
    return torch.stack([p @ columns, p @ rows], -1)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


class VLAModule(L.LightningModule):
    """Trains an OpenVLA.

    Args:
        architecture: fields of :class:`spvla.vlas.openvla.config.OpenVLAConfig`.
        vocabulary: words that instructions are made of.
        output: folder that the averaged model is written to, in OpenVLA's checkpoint form.
        start: checkpoint of the same shape whose weights training begins with, a folder or ``nano_vla`` for the packaged one.
            What exists in training alone, such as the heat maps, begins anew. Further words may follow those that it knows.
        save_every: optimiser steps between two writings.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: optimiser steps of linear warm-up; afterwards the rate stays, until ...
        cooldown: ... over the last share of the trainer's ``max_steps`` it falls to zero.
        averaging: decay of the exponential average of the weights.
        look: least and largest share of the image's patches that the encoders see in training, drawn for each batch: the
            fewer, the cheaper the step. Patches with much in them are chosen more often, as a pruner chooses them.
        look_all: share of the batches whose encoders see everything.
        keep: least and largest share of those that reach the decoder, drawn for each batch, chosen likewise.
        smoothing: standard deviation, in bins, of a continuous dimension's target.
        mean_weight: loss weight of the distance between the mean of a continuous token's distribution and the teacher's action,
            in units of its full range.
        rotation_weight: loss weight of rotation tokens; the other dimensions count 1.
        rotation_slack: labels' rotations are taught as so much less, environment units, and none below it: from a teacher that
            always levels the hand a little a student gets errors that add up, until its hand tilts.
        heat_weight: loss weight of the heat maps and the pointer.
        reach_weight: loss weight of the way from the hand to the object and to the place, decimetres.
        pointer_layer: decoder layer whose hidden states the pointer reads; by default the middle one.
        bf16: compute in bfloat16 where autocast allows; weights stay float32.
    """

    weights: Tensor
    continuous: Tensor

    def __init__(
        self,
        architecture: dict[str, Any],
        vocabulary: list[str],
        output: Path,
        start: str | None = None,
        save_every: int = 200,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 200,
        cooldown: float = 0.2,
        averaging: float = 0.998,
        look: tuple[float, float] = (1.0, 1.0),
        look_all: float = 0.0,
        keep: tuple[float, float] = (0.25, 1.0),
        smoothing: float = 2.0,
        mean_weight: float = 0.0,
        rotation_weight: float = 0.1,
        rotation_slack: float = 0.0,
        heat_weight: float = 0.3,
        reach_weight: float = 1.0,
        pointer_layer: int | None = None,
        bf16: bool = True,
    ) -> None:
        super().__init__()
        config = OpenVLAConfig.from_dicts({"model_type": "openvla", **architecture})
        model = OpenVLAModel(config, tokenizer=word_tokenizer(vocabulary), conventions="libero")
        if start is not None:
            earlier = load_vla("nano_vla", None if start == "nano_vla" else start)
            assert isinstance(earlier, OpenVLA)
            take_weights(model, earlier.model, start)
        layers = model.language_model.config.num_hidden_layers
        self.network = TrainedVLA(model, layers // 2 if pointer_layer is None else pointer_layer)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(averaging))
        self.average.requires_grad_(False)
        self.output, self.save_every = Path(output), save_every
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.cooldown = warmup_steps, cooldown
        self.look, self.look_all = look, look_all
        self.keep, self.smoothing, self.heat_weight, self.bf16 = keep, smoothing, heat_weight, bf16
        self.mean_weight = mean_weight
        self.rotation_slack, self.reach_weight = rotation_slack, reach_weight
        self.patch = config.image_sizes[0] / config.grid
        self.first_bin = config.vocab - config.n_action_bins + 1  # ids from here on stand for one bin each
        space = model.action_space
        weights = torch.ones(space.dim)
        weights[list(space.rotation)] = rotation_weight
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("continuous", torch.tensor([d in space.continuous for d in range(space.dim)]), persistent=False)

    # ---------------------------------------------------------------------------------------------------- inputs

    def pixels(self, images: Tensor) -> Tensor:
        """Images uint8 (B, S, S, 3), normalised for each encoder: (B, 3 x encoders, S, S)."""
        config = self.network.model.config
        x = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, S, S)
        means = config.image_means or [vit.mean for vit in config.encoders]
        stds = config.image_stds or [vit.std for vit in config.encoders]
        return torch.cat(
            [(x - x.new_tensor(m).view(3, 1, 1)) / x.new_tensor(s).view(3, 1, 1) for m, s in zip(means, stds, strict=True)], 1
        )

    def tokens(self, batch: FrameBatch) -> tuple[Questions, Tensor]:
        """Prompts and answers of a batch, and the action tokens (B, Q, D); where none is to be learnt, some."""
        model = self.network.model
        labels = batch.labels.nan_to_num().cpu().numpy()
        turns = labels[..., model.action_space.rotation]
        labels[..., model.action_space.rotation] = np.sign(turns) * np.maximum(np.abs(turns) - self.rotation_slack, 0)
        actions = torch.from_numpy(model.action_tokens(labels)).to(batch.images.device)  # (B, Q, D)
        actions = actions.clamp(min=self.first_bin)  # +1 itself has an id of its own, which means the last bin as well
        return Questions.of([model.tokenize(text) for text in batch.instructions], actions), actions

    def contents(self, images: Tensor) -> Tensor:
        """How much there is in each patch of images (B, S, S, 3): (B, N), positive. The spread of its green, half of it."""
        grid, side = self.network.model.config.grid, round(self.patch)
        green = images[..., 1].view(-1, grid, side, grid, side)[:, :, ::2, :, ::2]  # (B, row, y, column, x)
        return green.transpose(2, 3).flatten(3).float().std(3).flatten(1) + 4

    @staticmethod
    def draw(weights: Tensor, share: float) -> Tensor:
        """A share of the N places, ascending, (B, K), without replacement (Gumbel's trick), likelier by weight (B, N)."""
        chance = weights.log() - torch.empty_like(weights).exponential_().log()
        return chance.topk(max(1, round(share * weights.shape[1])), dim=1).indices.sort(1).values

    # ------------------------------------------------------------------------------------------------------ loss

    def action_loss(self, scores: Tensor, actions: Tensor) -> Tensor:
        """Cross-entropy of scores (R, D, V) with targets spread over the bins around the action tokens (R, D).

        Beside it the distance of the distribution's mean: bins are just names to cross-entropy, neighbours or not.
        """
        vocab = self.network.model.action_tokenizer.vocab
        ids = torch.arange(self.first_bin, vocab, device=scores.device)
        distance = (ids - actions[..., None]).float()  # (R, D, bins)
        spread = torch.where(self.continuous[:, None], self.smoothing, 1e-3)
        target = (-0.5 * (distance / spread) ** 2).softmax(-1)
        log_p = scores.float().log_softmax(-1)[..., self.first_bin : vocab]
        mean = (log_p.exp() * (ids - self.first_bin)).sum(-1) / (vocab - self.first_bin)  # (R, D), 0 to 1
        wanted = (actions - self.first_bin) / (vocab - self.first_bin)
        off = F.smooth_l1_loss(mean, wanted, beta=0.02, reduction="none") * self.continuous
        per_dim = (self.mean_weight * off - (target * log_p).sum(-1)).mean(0)  # (D,)
        return (per_dim * self.weights).sum() / self.weights.sum()

    def losses(
        self, network: nn.Module, batch: FrameBatch, look: float = 1.0, share: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms, and what metrics need: scores, heat, pointer, targets.

        Args:
            network: the model in training, or the average.
            batch: frames.
            look: share of the patches that the encoders see.
            share: share of those that reach the decoder.
        """
        asked, actions = self.tokens(batch)
        contents = self.contents(batch.images)  # (B, N)
        patches = None if look >= 1 else self.draw(contents, look)
        keep = self.draw(contents if patches is None else contents.gather(1, patches), share)
        plain = PlainAttention() if self.device.type == "cpu" else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), plain:
            scores, heat, pointer, names, reach = network(self.pixels(batch.images), asked, keep, patches)
        target, seen = soft_targets(batch.points, self.network.model.config.grid, self.patch)  # (B, 2 + Q, N), (B, 2 + Q)
        if patches is not None:
            target = target.gather(2, patches[:, None].expand(-1, target.shape[1], -1))
        heat_loss = -(target[:, :2] * heat.float().log_softmax(-1)).sum(-1)  # (B, 2)
        # Where the patches around a point were dropped there is less to point at.
        left = target[:, 2:].gather(2, keep[:, None].expand(-1, pointer.shape[1], -1))  # (B, Q, K)
        pointer_loss = -(left * pointer.float().log_softmax(-1)).sum(-1)  # (B, Q)
        names_loss = -(target[:, 2:] * names.float().log_softmax(-1)).sum(-1)  # (B, Q)
        hand, place, items = batch.positions[:, :1], batch.positions[:, 1:2], batch.positions[:, 2:]
        vectors = torch.stack([items - hand, (place - hand).expand_as(items)], 2)  # (B, Q, 2, 3)
        known = vectors.isfinite().all(-1)
        off = F.smooth_l1_loss(reach.float(), 10 * vectors.nan_to_num(), beta=0.1, reduction="none").mean(-1)  # (B, Q, 2)
        taught = batch.labels.isfinite().all(-1)  # (B, Q)
        terms = {
            "action": self.action_loss(scores[taught], actions[taught]),
            "reach": _mean(off, known),
            "heat": 2 * _mean(heat_loss, seen[:, :2]) + _mean(pointer_loss + names_loss, seen[:, 2:]),
        }
        return terms, {"scores": scores.detach(), "heat": heat.detach(), "pointer": pointer.detach(), "actions": actions}

    # -------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:
        chance, look, share = torch.rand(3).tolist()
        look = 1.0 if chance < self.look_all else self.look[0] + (self.look[1] - self.look[0]) * look
        share = self.keep[0] + (self.keep[1] - self.keep[0]) * share
        terms, _ = self.losses(self.network, batch, look, share)
        loss = terms["action"] + self.heat_weight * terms["heat"] + self.reach_weight * terms["reach"]
        self.log_dict({f"train/{k}": v for k, v in terms.items()}, prog_bar=True, batch_size=len(batch.images))
        return loss

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
        """Write the averaged model to ``output``; the weights come last and at once, so that readers may watch them."""
        model = self.average.module.model
        assert isinstance(model, OpenVLAModel)
        self.output.mkdir(parents=True, exist_ok=True)
        building = self.output / ".building"
        save_pretrained(model, building)
        for file in sorted(building.iterdir(), key=lambda f: f.suffix == ".safetensors"):
            file.replace(self.output / file.name)
        building.rmdir()

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        terms, seen = self.losses(self.average.module, batch)
        space = self.network.model.action_space
        off = (seen["scores"].argmax(-1) - seen["actions"]).abs()  # (B, Q, D) bins
        values = {f"val/{k}": v for k, v in terms.items()}
        for name, dims in {"translation": space.translation, "gripper": space.gripper}.items():
            if dims:
                own = off[:, 0, list(dims)].float()  # of the frame's own instruction
                values[f"val/{name}_right"] = (own <= 4).float().mean()  # within 0.03 of the teacher's
                values[f"val/{name}_error"] = own.mean() * 2 / self.network.model.config.n_action_bins
        grid = self.network.model.config.grid
        heat = torch.cat([seen["heat"], seen["pointer"]], 1).float()  # (B, 2 + Q, N)
        error = (expected_points(heat, grid, self.patch) - batch.points).norm(dim=-1)  # (B, 2 + Q)
        for k, name in enumerate(POINTS):
            values[f"val/{name}_pixels"] = error[:, k].nanmedian()
        best = heat.argmax(-1)[..., None]  # (B, 2 + Q, 1)
        best = torch.cat([best % grid, best // grid], -1) * self.patch + (self.patch - 1) / 2  # column and row, pixels
        found = ((best - batch.points).abs().amax(-1) < 1.5 * self.patch)[:, 2:]  # (B, Q): that patch or one beside it
        known = batch.points[:, 2:].isfinite().all(-1)
        values["val/item_found"] = _mean(found[:, :1], known[:, :1])
        if known[:, 1:].any():  # what else could have been asked for
            taught = batch.labels[:, 1:].isfinite().all(-1)
            others = off[:, 1:, list(space.translation)].float().mean(-1)
            self.log("val/other_found", _mean(found[:, 1:], known[:, 1:]), batch_size=int(known[:, 1:].sum()))
            if taught.any():
                error = _mean(others, taught) * 2 / self.network.model.config.n_action_bins
                self.log("val/other_translation_error", error, batch_size=int(taught.sum()))
        self.log_dict(values, batch_size=len(batch.images))

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
