"""OpenVLA (arXiv 2406.09246), native on transformers 5: reads the published checkpoint form without remote code.

An image goes through two vision encoders (DINOv2, SigLIP); their patch features are joined on the channels, projected and
inserted after the first token of the prompt; a Llama then writes one token per action dimension, greedily. Each token is
one of 255 bins of a normalised action; a data set's statistics (q01, q99) give it its unit.

With a :class:`~spvla.pruning.TokenPruner`, only the tokens it selects are projected and read by the Llama.

File order: configuration, image preprocessing, the model, prediction, reading and writing checkpoints.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from spvla.actions import ActionSpace, ActionTokenizer
from spvla.errors import InputError
from spvla.fields import check_fields, check_values, naming
from spvla.files import read_json
from spvla.hub import resolve_folder
from spvla.observation import Observation
from spvla.pruning.attention import attention_received
from spvla.pruning.pruner import POSITIONS, TokenPruner
from spvla.vlas.adapter import own_statistics, require_same_inputs, with_adapter_statistics
from spvla.vlas.base import VLAOutput
from spvla.vlas.checkpoint import (
    read_tensor,
    read_tokenizer,
    refuse_companions,
    refuse_quantised,
    require_finite,
    some,
    tensor_shapes,
    weight_files,
)
from spvla.vlas.conventions import CONVENTIONS, Conventions, UInt8Array, conventions_by_name
from spvla.vlas.vision import VisionTransformer, ViTConfig, unused_tensors, vit_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
PRUNING_STAGES = ("queries_keys", "score", "contours", "selection")  # in ``timings`` where tokens are pruned
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
SPACE_TOKEN = 29871  # Llama's lone space; the published models were trained with it between prompt and action
FLOAT32 = ".patch_embed."  # stays float32: 8-bit pixels, once normalised, do not fit bfloat16; 3 M parameters
RESIZE = "resize-naive"  # resize to a square, ignoring the aspect ratio
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_NOOPS = "_no_noops"  # OpenVLA's LIBERO data without its no-op steps; published statistics carry it in their names
NUMBERS = tuple[tuple[float, float, float], ...]
PREPROCESSOR = {"means": NUMBERS, "stds": NUMBERS, "interpolations": tuple[str, ...]}  # what is read of the file
DEFAULT_CONTROL_RATE = 5.0  # Hz; most of OpenVLA's training data (BridgeData V2)


# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class OpenVLAConfig:
    """A checkpoint's ``config.json``, with what ``preprocessor_config.json`` says of the image normalisation.

    Args:
        timm_model_ids: the vision encoders, two if fused.
        image_sizes: input side in pixels per encoder.
        text_config: a transformers ``LlamaConfig`` as a dict; what it leaves out is Llama-2 7B's.
        norm_stats: {data set: {"action": {"q01", "q99", "mask"}}}, environment units (D,).
        use_fused_vision_backbone: two encoders, features joined on the channels; else one.
        timm_model_kwargs: ours: one dict per encoder that overrides its architecture, see
            :class:`~spvla.vlas.vision.ViTConfig`; lets small models use this class.
        timm_override_act_layers: activation per encoder, or null.
        image_resize_strategy: ``resize-naive`` is the one in use.
        n_action_bins: edges of the action bins; there is one bin less.
        pad_to_multiple_of: padding ids at the vocabulary's end; action tokens count down from before them.
        llm_max_length: longest sequence, visual tokens included.
        append_space_token: ours: end the prompt with Llama's token 29871, as published; off for other tokenizers.
        image_means, image_stds: RGB normalisation per encoder; empty: the architecture's own.
        interpolations: resize filter per encoder; empty: bicubic.
    """

    timm_model_ids: tuple[str, ...]
    image_sizes: tuple[int, ...]
    text_config: dict[str, Any]
    norm_stats: dict[str, Any] = field(default_factory=dict)
    use_fused_vision_backbone: bool = True
    timm_model_kwargs: tuple[dict[str, Any] | None, ...] = ()
    timm_override_act_layers: tuple[str | None, ...] = ()
    image_resize_strategy: str = RESIZE
    n_action_bins: int = 256
    pad_to_multiple_of: int = 64
    llm_max_length: int = 2048
    append_space_token: bool = True
    image_means: tuple[tuple[float, float, float], ...] = ()
    image_stds: tuple[tuple[float, float, float], ...] = ()
    interpolations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with naming("config.json"):
            positive = ("image_sizes", "llm_max_length")
            check_fields(self, at_least={**dict.fromkeys(positive, 1), "n_action_bins": 2, "pad_to_multiple_of": 0})
        expected = 2 if self.use_fused_vision_backbone else 1
        if len(self.timm_model_ids) != expected:
            raise InputError(f"config.json: timm_model_ids has {len(self.timm_model_ids)} encoders, expected {expected}")
        optional = ("timm_model_kwargs", "timm_override_act_layers", "image_means", "image_stds", "interpolations")
        for name in ("image_sizes", *optional):
            count = len(getattr(self, name))
            if count != expected and (count or name == "image_sizes"):
                raise InputError(f"config.json: {name} has {count} entries for {expected} encoders")
        if self.image_resize_strategy != RESIZE:
            raise InputError(
                f"config.json: image_resize_strategy {self.image_resize_strategy!r} is not supported, only {RESIZE!r}"
            )
        for name in self.interpolations:
            if name not in INTERPOLATIONS:
                raise InputError(f"preprocessor_config.json: interpolation {name!r} not in {', '.join(INTERPOLATIONS)}")
        if any(std <= 0 for stds in self.image_stds for std in stds):
            raise InputError(f"preprocessor_config.json: stds must be positive, got {self.image_stds}")
        if not isinstance(self.text_config.get("vocab_size", 32000), int):
            raise InputError("config.json: text_config.vocab_size must be an integer")
        if self.n_action_bins > self.vocab:
            raise InputError(
                f"config.json: n_action_bins {self.n_action_bins} do not fit the vocabulary of {self.vocab} ids "
                f"(vocab_size less pad_to_multiple_of {self.pad_to_multiple_of})"
            )
        grids = {vit.grid for vit in self.encoders}
        if len(grids) > 1:
            raise InputError(f"config.json: the encoders cut the image into different grids, {sorted(grids)}")
        if self.append_space_token and self.vocab <= SPACE_TOKEN:
            raise InputError(
                f"config.json: append_space_token needs Llama's vocabulary, this one has {self.vocab} ids; "
                "set append_space_token to false"
            )

    @property
    def encoders(self) -> tuple[ViTConfig, ...]:
        """Architecture of each vision encoder."""
        kwargs = self.timm_model_kwargs or (None,) * len(self.timm_model_ids)
        acts = self.timm_override_act_layers or (None,) * len(self.timm_model_ids)
        return tuple(
            vit_config(model_id, size, kw, act)
            for model_id, size, kw, act in zip(self.timm_model_ids, self.image_sizes, kwargs, acts, strict=True)
        )

    @property
    def grid(self) -> int:
        """Patches along one side; grid x grid visual tokens."""
        return self.encoders[0].grid

    @property
    def vocab(self) -> int:
        """Token ids in use, without padding; action tokens are the last ones below."""
        return int(self.text_config.get("vocab_size", 32000)) - self.pad_to_multiple_of

    @classmethod
    def read(cls, folder: Path) -> OpenVLAConfig:
        """A checkpoint's configuration; ``dataset_statistics.json``, if there is one, replaces its statistics."""
        values = dict(read_json(folder / "config.json"))
        refuse_quantised(values, folder / "config.json")
        statistics = folder / "dataset_statistics.json"
        if statistics.exists():
            values["norm_stats"] = read_json(statistics)
        preprocessor = folder / "preprocessor_config.json"
        with naming(folder):
            return cls.from_dicts(values, read_json(preprocessor) if preprocessor.exists() else None)

    @classmethod
    def from_dicts(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> OpenVLAConfig:
        """Read ``config.json``'s and ``preprocessor_config.json``'s content. Keys not listed above are ignored.

        Raises:
            InputError: another model type, a missing key, or a value that does not fit; the message names it.
        """
        if config.get("model_type") != "openvla":
            raise InputError(f"config.json: model_type is {config.get('model_type')!r}, expected 'openvla'")
        values = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        preprocessor = preprocessor or {}
        with naming("preprocessor_config.json"):
            check_values(preprocessor, PREPROCESSOR)
        for name, key in (("image_means", "means"), ("image_stds", "stds"), ("interpolations", "interpolations")):
            if key in preprocessor:
                values[name] = preprocessor[key]
        if missing := {"timm_model_ids", "image_sizes", "text_config"} - values.keys():
            raise InputError(f"config.json: field {min(missing)!r} is missing")
        return cls(**values)

    def to_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """``config.json``'s and ``preprocessor_config.json``'s content; :meth:`from_dicts` reads them back."""
        config = {"model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"], **asdict(self)}
        del config["image_means"], config["image_stds"], config["interpolations"]
        encoders = self.encoders
        preprocessor = {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": self.image_resize_strategy,
            "input_sizes": [[3, size, size] for size in self.image_sizes],
            "interpolations": self.interpolations or ("bicubic",) * len(encoders),
            "means": self.image_means or [vit.mean for vit in encoders],
            "stds": self.image_stds or [vit.std for vit in encoders],
            "use_fused_vision_backbone": self.use_fused_vision_backbone,
        }
        return config, preprocessor


@dataclass(frozen=True)
class ActionStatistics:
    """One data set's action scale: ``q01``, ``q99`` float64 (D,) and ``mask`` bool (D,), False: not normalised."""

    key: str
    q01: NDArray[np.float64]
    q99: NDArray[np.float64]
    mask: NDArray[np.bool_]

    @classmethod
    def find(cls, norm_stats: Mapping[str, Any], key: str | None) -> ActionStatistics:
        """The statistics called ``key`` or ``key + "_no_noops"``; for None the only ones there are.

        Raises:
            InputError: none of that name, or several and none asked for (the message lists them); bad shapes.
        """
        available = ", ".join(norm_stats) or "none"
        if key is None:
            if len(norm_stats) != 1:
                raise InputError(f"unnorm_key: name the data set whose action statistics apply; there are: {available}")
            key = next(iter(norm_stats))
        elif key not in norm_stats and f"{key}{NO_NOOPS}" in norm_stats:
            key = f"{key}{NO_NOOPS}"
        if key not in norm_stats:
            raise InputError(f"unnorm_key: no statistics for {key!r}; there are: {available}")
        try:
            stats = norm_stats[key]["action"]
            q01, q99 = np.array(stats["q01"], np.float64), np.array(stats["q99"], np.float64)
            mask = np.array(stats.get("mask", np.ones(len(q01), bool)), bool)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"norm_stats[{key!r}]: no usable action q01, q99 and mask ({error!r})") from None
        if not (np.isfinite(q01).all() and np.isfinite(q99).all()):
            bad = [d for d in range(q01.size) if not np.isfinite([q01.flat[d], q99.flat[d]]).all()]
            raise InputError(
                f"norm_stats[{key!r}]: q01 or q99 is NaN or infinite in dimension {some(list(map(str, bad)))}; was a column of "
                "the training data empty?",
                code="statistics",
                field=f"norm_stats.{key}",
            )
        if q01.ndim != 1 or not q01.size or q01.shape != q99.shape or q01.shape != mask.shape:
            raise InputError(f"norm_stats[{key!r}]: q01, q99, mask have shapes {q01.shape}, {q99.shape}, {mask.shape}")
        return cls(key, q01, q99, mask)

    def denormalize(self, normalized: NDArray[np.floating]) -> NDArray[np.float32]:
        """Normalised actions (..., D) to the data's units."""
        x = np.asarray(normalized, np.float64)
        scaled = 0.5 * (x + 1) * (self.q99 - self.q01) + self.q01
        return np.where(self.mask, scaled, x).astype(np.float32)

    def normalize(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        """Actions (..., D) in the data's units to normalised ones, not clipped."""
        x = np.asarray(actions, np.float64)
        width = np.where(self.q99 > self.q01, self.q99 - self.q01, 1.0)
        return np.where(self.mask, 2 * (x - self.q01) / width - 1, x)

    def action_space(self, conventions: Conventions, control_rate: float) -> ActionSpace:
        """The environment's action space. 7 dimensions: OpenVLA's layout; else unmasked ones are plain continuous."""
        d = self.q01.size
        standard = d == 7
        gripper = (6,) if standard else tuple(np.flatnonzero(~self.mask).tolist())
        q01, q99 = self.q01.copy(), self.q99.copy()
        unscaled = list(np.flatnonzero(~self.mask))
        q01[unscaled], q99[unscaled] = 0.0, 1.0
        if conventions.signed_gripper:
            q01[list(gripper)], q99[list(gripper)] = -1.0, 1.0
        bound = conventions.bound
        low, high = (q01, q99) if bound is None else (np.full(d, -bound), np.full(d, bound))
        return ActionSpace(
            name=self.key,
            kind="eef_delta" if standard else "joint_position",
            control_rate=control_rate,
            q01=tuple(q01.tolist()),
            q99=tuple(q99.tolist()),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            translation=(0, 1, 2) if standard else (),
            rotation=(3, 4, 5) if standard else (),
            gripper=gripper,
        )


# ---------------------------------------------------------------------------------------------- image preprocessing


def pixel_values(image: UInt8Array, config: OpenVLAConfig) -> Tensor:
    """An image, uint8 (H, W, 3) RGB, resized and normalised for each encoder: float32 (3 x encoders, S, S)."""
    return standardized(resized(image, config), config)


def resized(image: UInt8Array, config: OpenVLAConfig) -> list[UInt8Array]:
    """What each encoder sees of ``image`` (H, W, 3): uint8 (S, S, 3). Encoders of one size and filter share it."""
    filters = config.interpolations or ["bicubic"] * len(config.image_sizes)
    which = list(zip(config.image_sizes, filters, strict=True))
    made = {(s, f): np.array(Image.fromarray(image).resize((s, s), INTERPOLATIONS[f])) for s, f in dict.fromkeys(which)}
    return [made[key] for key in which]


def standardized(views: Sequence[UInt8Array], config: OpenVLAConfig) -> Tensor:
    """Each encoder's view with its own mean and spread: float32 (3 x encoders, S, S)."""
    out = []
    for i, (vit, view) in enumerate(zip(config.encoders, views, strict=True)):
        mean = config.image_means[i] if config.image_means else vit.mean
        std = config.image_stds[i] if config.image_stds else vit.std
        x = torch.from_numpy(view).permute(2, 0, 1).float() / 255  # (3, S, S)
        out.append((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    return torch.cat(out)  # (3 x encoders, S, S)


# -------------------------------------------------------------------------------------------------------- the model


class VisionBackbone(nn.Module):
    """One encoder, or two with their patch features joined on the channels."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        encoders = config.encoders
        self.featurizer = VisionTransformer(encoders[0])
        if config.use_fused_vision_backbone:
            self.fused_featurizer = VisionTransformer(encoders[1])
        self.encoders: list[VisionTransformer] = list(self.children())  # type: ignore[arg-type]
        self.width = sum(vit.embed_dim for vit in encoders)

    def forward(self, pixels: Tensor, patches: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3 x encoders, S, S) to patch features (B, N, C) and the scoring block's input (B, N, C_last).

        ``patches`` (B, M): the encoders see these alone, and N is M.
        """
        features = []
        for encoder, images in zip(self.encoders, pixels.split(3, dim=1), strict=True):
            out, score_input = encoder(images, patches)
            features.append(out)
        return torch.cat(features, dim=-1), score_input

    def queries_keys(self, score_input: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, nh, N, hs) of the last encoder's (SigLIP's) scoring block, for pruning."""
        return self.encoders[-1].queries_keys(score_input)

    def attention(self, score_input: Tensor) -> Tensor:
        """Attention received per patch in that block: float32 (B, N), rows sum to 1."""
        return attention_received(*self.queries_keys(score_input))


class Projector(nn.Module):
    """Patch features to the language model's width: three layers for fused encoders, two for one."""

    def __init__(self, vision: int, llm: int, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision if fused else llm
        self.fc1 = nn.Linear(vision, hidden)
        self.fc2 = nn.Linear(hidden, llm)
        self.fc3 = nn.Linear(llm, llm) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


class Stopwatch:
    """Milliseconds between laps, by name; waits for a GPU's queue so that each stage is charged its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name] = (now - self.last) * 1e3
        self.last = now


class OpenVLA(nn.Module):
    """The whole model, and the policy (:class:`~spvla.vlas.base.VLA`) it makes.

    Module names are the checkpoint's tensor names, so PEFT adapters published for it fit.

    Args:
        config: sizes and conventions; weights are random until :meth:`from_pretrained` or training sets them.
        tokenizer: the prompt's tokenizer; prediction needs one, :meth:`forward` does not.
        unnorm_key: data set whose statistics give actions their unit; see :meth:`use_statistics`.
        conventions: a name (``libero``), :class:`~spvla.vlas.conventions.Conventions`, or None for none.
        pruner: selects visual tokens where ``keep_mass`` < 1.
        control_rate: control steps per second (Hz); None: the conventions' own, or 5.
    """

    def __init__(
        self,
        config: OpenVLAConfig,
        *,
        tokenizer: Tokenizer | None = None,
        unnorm_key: str | None = None,
        conventions: Conventions | str | None = None,
        pruner: TokenPruner | None = None,
        control_rate: float | None = None,
    ) -> None:
        super().__init__()
        from transformers import LlamaForCausalLM

        self.config = config
        self.tokenizer = tokenizer
        self.conventions = conventions_by_name(conventions)
        self.pruner = pruner
        known = self.conventions.control_rate or DEFAULT_CONTROL_RATE
        self.control_rate = known if control_rate is None else control_rate
        self.action_tokenizer = ActionTokenizer(config.vocab, config.n_action_bins)
        text = llama_config(config)
        self.bos = text.bos_token_id
        self.context = min(config.llm_max_length, text.max_position_embeddings)
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(self.vision_backbone.width, text.hidden_size, config.use_fused_vision_backbone)
        with naming("config.json: text_config"):
            self.language_model = LlamaForCausalLM(text)
        self.statistics: ActionStatistics | None = None
        self._space: ActionSpace | None = None
        if unnorm_key is not None or len(config.norm_stats) == 1:
            self.use_statistics(unnorm_key)
        self._prompt: list[int] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projector.fc1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type; the patch embeddings alone may be float32 beside it."""
        return self.vision_backbone.featurizer.pos_embed.dtype

    @property
    def action_space(self) -> ActionSpace:
        """Layout, scale and bounds of predicted actions. Raises :class:`InputError` before statistics are chosen."""
        if self._space is None:
            ActionStatistics.find(self.config.norm_stats, None)
        assert self._space is not None
        return self._space

    def use_statistics(self, unnorm_key: str | None) -> None:
        """Choose the data set whose statistics give actions their unit and number of dimensions.

        Raises:
            InputError: there are none of that name; the message lists the available ones.
        """
        statistics = ActionStatistics.find(self.config.norm_stats, unnorm_key)
        self._space = statistics.action_space(self.conventions, self.control_rate)
        self.statistics = statistics

    def forward(self, pixels: Tensor, input_ids: Tensor, keep: Tensor | None = None, positions: str = "packed") -> Tensor:
        """Scores of the next token after each text token, for training (teacher forcing).

        Args:
            pixels: (B, 3 x encoders, S, S), from :func:`pixel_values`.
            input_ids: prompt and action tokens, (B, T), beginning with ``<s>``. Shorter ones are padded at the end:
                no token looks ahead, so padding changes nothing before it.
            keep: visual tokens to keep, (B, K), strictly ascending in each row; None: all.
            positions: ``packed`` or ``original`` position ids of the kept tokens.

        Returns:
            (B, T, V): entry t scores ``input_ids[:, t + 1]``. Visual tokens stand between entries 0 and 1's inputs.
        """
        if positions not in POSITIONS:
            raise InputError(f"positions {positions!r} is not one of {', '.join(POSITIONS)}")
        features, _ = self.vision_backbone(pixels)  # (B, N, C)
        b, n, c = features.shape
        if keep is None:
            keep = torch.arange(n, device=features.device).expand(b, n)
        kept = features.gather(1, keep[..., None].expand(-1, -1, c))  # (B, K, C)
        visual = self.projector(kept)  # (B, K, H)
        text = self.language_model.get_input_embeddings()(input_ids)  # (B, T, H)
        embeds = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)  # (B, K + T, H)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)  # none given: read as packed batch
        ids = self._position_ids(keep, n, input_ids.shape[1], positions)  # (B, K + T)
        hidden = self.language_model.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=False
        ).last_hidden_state
        logits: Tensor = self.language_model.lm_head(hidden[:, -input_ids.shape[1] :])  # (B, T, V)
        return logits

    @staticmethod
    def _position_ids(keep: Tensor, total: int, text: int, positions: str) -> Tensor:
        """Position ids (B, K + T) of ``<s>``, the kept of ``total`` visual tokens (B, K), and the rest of the text."""
        b, k = keep.shape
        if positions == "packed":
            return torch.arange(k + text, device=keep.device).expand(b, -1)
        rest = torch.arange(total + 1, total + text, device=keep.device).expand(b, -1)
        return torch.cat([keep.new_zeros(b, 1), keep + 1, rest], dim=1)

    # ------------------------------------------------------------------------------------------------- prediction

    def tokenize(self, instruction: str) -> list[int]:
        """Token ids of the prompt for ``instruction``.

        Raises:
            InputError: it is empty, or leaves no room for visual and action tokens in the context.
        """
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: pass OpenVLA(config, tokenizer=...)")
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError("instruction: expected a sentence, got an empty one")
        ids: list[int] = self.tokenizer.encode(PROMPT.format(instruction=instruction.lower())).ids
        if not ids or ids[0] != self.bos:
            ids = [self.bos, *ids]
        if self.config.append_space_token and ids[-1] != SPACE_TOKEN:
            ids.append(SPACE_TOKEN)
        room = self.context - self.config.grid**2 - self.action_space.dim
        if len(ids) > room:
            raise InputError(
                f"instruction: its prompt has {len(ids)} tokens, the context of {self.context} leaves room for {room} "
                f"beside {self.config.grid**2} visual and {self.action_space.dim} action tokens"
            )
        return ids

    def action_tokens(self, actions: NDArray[np.float32]) -> NDArray[np.int64]:
        """Tokens (..., D) that stand for actions (..., D) in environment units: what training wants to be predicted."""
        space, statistics = self.action_space, self.statistics
        assert statistics is not None
        return self.action_tokenizer.encode(statistics.normalize(self.conventions.from_environment(actions, space.gripper)))

    def reset(self, instruction: str) -> None:
        """Start an episode with ``instruction``. Raises :class:`InputError` as :meth:`tokenize` does."""
        self._prompt = self.tokenize(instruction)

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """The action for one observation under :meth:`reset`'s instruction; fields as :meth:`predict_batch` says."""
        if self._prompt is None:
            raise InputError("predict: call reset(instruction) first")
        return self._predict([observation], [self._prompt], keep_mass)[0]

    def predict_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], keep_mass: float = 1.0
    ) -> list[VLAOutput]:
        """One action for each of B independent observations; the episode's instruction stays as it is.

        Args:
            observations: images are uint8 (H, W, 3) RGB of any size.
            instructions: one for each observation; they may differ in length.
            keep_mass: in (0, 1]; what the pruner keeps. 1: all tokens, the unpruned model's very computation.

        Returns:
            for each: ``actions`` (1, D) in environment units; ``tokens`` (1, D); ``confidence`` (D,), the softmax
            probability of each chosen token over the whole vocabulary; ``features`` (H,), the mean over the D last
            hidden states that the tokens were read from; ``visual_tokens``; ``timings`` in ms of the stages
            preprocess, vision, projector, prefill and decode, and where tokens are pruned ``PRUNING_STAGES``, this
            batch's divided by B.

        Raises:
            InputError: bad images or instructions, counts differ, ``keep_mass`` < 1 without a pruner.
        """
        if len(observations) != len(instructions) or not observations:
            raise InputError(f"predict_batch: {len(observations)} observations for {len(instructions)} instructions")
        return self._predict(observations, [self.tokenize(i) for i in instructions], keep_mass)

    def with_pruner(self, pruner: TokenPruner | None) -> OpenVLA:
        """This model with another pruner and an episode of its own; the weights are shared, nothing is copied."""
        twin = copy.copy(self)
        twin.pruner = pruner
        twin._prompt = None
        return twin

    def view(self, image: UInt8Array) -> UInt8Array:
        """What the encoders see of the environment's ``image``, uint8 (S, S, 3): tokens are its patches, row by row."""
        return self.conventions.apply_image(image, self.config.image_sizes[-1])

    @property
    def backend(self) -> dict[str, str]:
        """``device``, ``dtype`` and ``attention`` (kernels that torch may choose from), for reports of timing."""
        device = self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        kernels = "CPU"
        if device.type == "cuda":
            allowed = {
                "flash": torch.backends.cuda.flash_sdp_enabled(),
                "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
                "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
                "math": torch.backends.cuda.math_sdp_enabled(),
            }
            kernels = ", ".join(kernel for kernel, on in allowed.items() if on)
        llama = self.language_model.config._attn_implementation
        attention = f"encoders: torch sdpa ({kernels}); language model: transformers {llama} ({kernels})"
        return {"device": name, "dtype": str(self.dtype).removeprefix("torch."), "attention": attention}

    @torch.inference_mode()
    def _predict(self, observations: Sequence[Observation], prompts: Sequence[list[int]], keep_mass: float) -> list[VLAOutput]:
        from transformers import DynamicCache

        if not 0 < keep_mass <= 1:
            raise InputError(f"keep_mass must lie in (0, 1], got {keep_mass}")
        if keep_mass < 1 and self.pruner is None:
            raise InputError(f"keep_mass is {keep_mass}, but this model was given no pruner")
        space, statistics, pruner = self.action_space, self.statistics, self.pruner
        assert statistics is not None
        clock = Stopwatch(self.device)
        images = [resized(self.view(o.require_image()), self.config) for o in observations]  # B x encoders
        pixels = torch.stack([standardized(views, self.config) for views in images])  # (B, 3 x encoders, S, S)
        pixels = pixels.to(self.device)
        clock.lap("preprocess")
        features, score_input = self.vision_backbone(pixels)  # (B, N, C)
        clock.lap("vision")
        total = features.shape[1]
        everything = torch.arange(total, device=self.device)
        keep = [everything] * len(images)
        if keep_mass < 1 and pruner is not None:
            keep = self._select(pruner, score_input, [views[-1] for views in images], keep_mass, clock)
            features = torch.cat([f[k] for f, k in zip(features, keep, strict=True)])  # (sum of K, C)
            clock.lap("selection")
        visual = self.projector(features.flatten(0, -2)).split([len(k) for k in keep])  # B x (K, H)
        clock.lap("projector")

        # Prefill: sequences of different lengths are padded on the left, so that all continue at the same place.
        embeds, mask, ids = self.sequences(visual, prompts, keep, total)
        cache = DynamicCache(config=self.language_model.config)
        hidden = self._decoder(embeds, mask, ids, cache)
        seen = [len(k) + len(p) for k, p in zip(keep, prompts, strict=True)]
        assert cache.get_seq_length() == max(seen), f"{cache.get_seq_length()} tokens reached the decoder, not {seen}"
        clock.lap("prefill")

        tokens, scores, states = self._decode(hidden, mask, ids, cache)
        token_array = tokens.cpu().numpy()
        normalized = self.action_tokenizer.decode(token_array)
        actions = self.conventions.to_environment(statistics.denormalize(normalized), space.gripper)
        confidence = scores.softmax(-1).amax(-1).cpu().numpy()  # (B, D)
        if not np.isfinite(confidence).all():
            raise InputError(
                f"{type(self).__name__}: the scores of the action tokens contain NaN or infinity, though weights are finite "
                f"when loaded: dtype {str(self.dtype).removeprefix('torch.')} may be too narrow for them"
            )
        pooled = states.float().mean(1).cpu().numpy()  # (B, H)
        clock.lap("decode")
        kept = [k.cpu().numpy() for k in keep]
        timings = {name: ms / len(images) for name, ms in clock.laps.items()}
        return [
            VLAOutput(
                actions=actions[i : i + 1],
                tokens=token_array[i : i + 1],
                confidence=confidence[i],
                features=pooled[i],
                visual_tokens=(len(keep[i]), total),
                kept_tokens=kept[i],
                timings=dict(timings),
            )
            for i in range(len(images))
        ]

    def _select(
        self, pruner: TokenPruner, score_input: Tensor, images: Sequence[UInt8Array], keep_mass: float, clock: Stopwatch
    ) -> list[Tensor]:
        """The pruner's choice for each image, as the last encoder sees it: B x (K,), ascending."""
        q, k = self.vision_backbone.queries_keys(score_input)  # (B, nh, N, hs)
        clock.lap("queries_keys")
        attention = attention_received(q, k).cpu().numpy()  # (B, N)
        clock.lap("score")
        contours = [pruner.contour_mask(image, attention.shape[1]) for image in images]  # B x (N,)
        clock.lap("contours")
        keep = [pruner.choose(a, c, keep_mass) for a, c in zip(attention, contours, strict=True)]
        assert all((np.diff(k) > 0).all() for k in keep), "visual tokens out of order"
        return [torch.from_numpy(k).to(self.device) for k in keep]

    def sequences(
        self, visual: Sequence[Tensor], prompts: Sequence[list[int]], keep: Sequence[Tensor], total: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the language model reads: embeddings (B, L, H), mask (B, L) or None if nothing is padded, position ids (B, L).

        Args:
            visual: each image's visual tokens, B x (K, H).
            prompts: each instruction's tokens.
            keep: which of ``total`` the visual tokens are, B x (K,).
        """
        positions = self.pruner.positions if self.pruner else "packed"
        embed = self.language_model.get_input_embeddings()
        rows, ids = [], []
        for tokens, prompt, kept in zip(visual, prompts, keep, strict=True):
            text = embed(torch.tensor(prompt, device=self.device))  # (T, H)
            assert len(tokens) == len(kept), f"{len(tokens)} visual tokens for {len(kept)} positions"
            rows.append(torch.cat([text[:1], tokens, text[1:]]))  # (K + T, H)
            ids.append(self._position_ids(kept[None], total, len(prompt), positions)[0])  # (K + T,)
        length = max(map(len, rows))
        pads = [length - len(row) for row in rows]
        mask = None
        if any(pads):
            mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long().to(self.device)  # (B, L)
        embeds = torch.stack([F.pad(row, (0, 0, pad, 0)) for row, pad in zip(rows, pads, strict=True)])
        return embeds, mask, torch.stack([F.pad(row, (pad, 0)) for row, pad in zip(ids, pads, strict=True)])

    def _decoder(self, embeds: Tensor, mask: Tensor | None, ids: Tensor, cache: Any) -> Tensor:
        """The last hidden state (B, H) after reading ``embeds`` (B, L, H) beyond ``cache``."""
        out = self.language_model.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=ids, past_key_values=cache, use_cache=True
        )
        last: Tensor = out.last_hidden_state[:, -1]
        return last

    def _decode(self, hidden: Tensor, mask: Tensor | None, ids: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy action tokens (B, D), the scores (B, D, V) and the hidden states (B, D, H) that they were read from, after
        the prompt's last hidden state (B, H), mask and position ids. The last token is only read, never fed back."""
        tokens, scores, states = [], [], [hidden]
        while True:
            scores.append(self.language_model.lm_head(states[-1]).float())  # (B, V)
            tokens.append(scores[-1].argmax(-1))  # (B,)
            if len(tokens) == self.action_space.dim:
                return torch.stack(tokens, 1), torch.stack(scores, 1), torch.stack(states, 1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)  # (B, L + 1)
            ids = ids[:, -1:] + 1  # (B, 1)
            embed = self.language_model.get_input_embeddings()(tokens[-1][:, None])  # (B, 1, H)
            states.append(self._decoder(embed, mask, ids, cache))

    def answer(self, embeds: Tensor, mask: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Greedy action tokens (B, D) and the scores (B, D, V) that they were read from, after :meth:`sequences`."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.language_model.config)
        return self._decode(self._decoder(embeds, mask, ids, cache), mask, ids, cache)[:2]

    # ------------------------------------------------------------------------------- reading and writing checkpoints

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        unnorm_key: str | None = None,
        conventions: Conventions | str | None = None,
        adapter: str | Path | None = None,
        merge_adapter: bool = False,
        pruner: TokenPruner | None = None,
        control_rate: float | None = None,
    ) -> OpenVLA:
        """Load a checkpoint in the published form.

        Each tensor goes from the file straight to its place on the device: the peak is the model itself.

        Args:
            path: a folder, or a Hugging Face hub id.
            device, dtype: where the weights go, and as what.
            unnorm_key: data set whose statistics give actions their unit (``libero_object`` also finds
                ``libero_object_no_noops``); may be left out if there is only one.
            conventions, pruner, control_rate: see the class.
            adapter: a PEFT LoRA folder or hub id for this model.
            merge_adapter: add the adapter into the weights (faster) instead of computing it beside them.

        Raises:
            InputError: anything missing, unknown, extra or of the wrong shape; the message names it and its file.
        """
        folder = resolve_folder(path)
        refuse_companions(path, folder)
        config = OpenVLAConfig.read(folder)
        extra = None if adapter is None else resolve_folder(adapter)
        if extra is not None:
            config = replace(config, norm_stats=with_adapter_statistics(config.norm_stats, folder, extra, unnorm_key))
            require_same_inputs(folder, extra)
        ActionStatistics.find(config.norm_stats, unnorm_key)
        files = weight_files(folder)
        tokenizer = read_tokenizer(folder)
        with naming(folder), torch.device("meta"):
            model = cls(
                config,
                tokenizer=tokenizer,
                unnorm_key=unnorm_key,
                conventions=conventions,
                pruner=pruner,
                control_rate=control_rate,
            )
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest >= (rows := model.language_model.config.vocab_size):
            raise InputError(f"{folder / 'tokenizer.json'}: has token id {largest}, config.json's vocabulary has {rows}")
        model._load_tensors(files, torch.device(device), dtype)
        if extra is not None:
            model._load_adapter(extra, merge_adapter)
        return model.eval()

    def unused_tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of tensors that the published form holds but nothing reads; they are not loaded."""
        out = {}
        for name, encoder in self.vision_backbone.named_children():
            assert isinstance(encoder, VisionTransformer)
            for key, shape in unused_tensors(encoder.config).items():
                out[f"vision_backbone.{name}.{key}"] = shape
        return out

    def _load_tensors(self, files: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
        """Replace this model's meta tensors by the files' tensors, one at a time."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        tied = bool(self.language_model.config.tie_word_embeddings)
        if tied:  # one tensor under two names; a file has the first, and the second only if its writer repeated it
            self.language_model.lm_head.weight = self.get_submodule(EMBEDDING.rpartition(".")[0]).weight
        expected = {name: tuple(p.shape) for name, p in self.named_parameters()}
        unused = self.unused_tensors()
        missing, extra, ignored = set(expected), [], set()
        repeated: Path | None = None
        for file in files:
            for name, shape in tensor_shapes(file).items():
                if tied and name == HEAD:
                    repeated = file
                    continue
                wanted = expected.get(name) or unused.get(name)
                if wanted is None:
                    extra.append(f"{name} ({file.name})")
                elif shape != wanted:
                    raise InputError(f"{file}: tensor {name} has shape {shape}, config.json asks for {wanted}")
                elif name in unused:
                    ignored.add(name)
                else:
                    owner, _, leaf = name.rpartition(".")
                    module = self.get_submodule(owner)
                    as_type = torch.float32 if FLOAT32 in name else dtype
                    tensor = nn.Parameter(read_tensor(file, name, device, as_type), getattr(module, leaf).requires_grad)
                    setattr(module, leaf, tensor)
                    missing.discard(name)
        if tied:
            embedding: Any = self.get_submodule(EMBEDDING.rpartition(".")[0]).weight
            self.language_model.lm_head.weight = embedding
            if repeated is not None and not missing:
                head = read_tensor(repeated, HEAD, embedding.device, embedding.dtype)
                if head.shape != embedding.shape or not torch.equal(head, embedding):
                    raise InputError(
                        f"{repeated}: config.json ties lm_head to the embedding (tie_word_embeddings), but {HEAD} differs from "
                        f"{EMBEDDING}",
                        code="tied-weights",
                        field=HEAD,
                    )
        if ignored:
            missing |= unused.keys() - ignored  # a head that is there must be there as a whole
        where = files[0].parent
        if missing:
            raise InputError(f"{where}: {len(missing)} tensors are missing from the weights: {some(sorted(missing))}")
        if extra:
            raise InputError(f"{where}: {len(extra)} tensors do not belong to this model: {some(extra)}")
        # Not in the checkpoint: computed from the config, in float32 whatever the weights' type.
        with device:
            self.language_model.model.rotary_emb = LlamaRotaryEmbedding(self.language_model.config)
        left = [name for name, tensor in (*self.named_parameters(), *self.named_buffers()) if tensor.is_meta]
        assert not left, f"not materialised: {left}"

    def _load_adapter(self, folder: Path, merge: bool) -> None:
        """Put a PEFT LoRA adapter into this model's linear layers, or its product into their weights."""
        try:
            from peft import PeftConfig, PeftModel, get_peft_model_state_dict
        except ImportError:
            raise InputError("adapter: LoRA adapters need the package peft (pip install 'spvla[train]')") from None
        from safetensors import SafetensorError, safe_open

        weights = folder / "adapter_model.safetensors"
        for file in (folder / "adapter_config.json", weights):
            if not file.exists():
                raise InputError(f"adapter {folder}: {file.name} is missing (adapters are read as safetensors, no pickles)")
        try:
            config = PeftConfig.from_pretrained(str(folder))
            config.task_type = None  # a published adapter may say CAUSAL_LM, whose wrapper wants generate()
            config.inference_mode = True
            wrapped = PeftModel.from_pretrained(self, str(folder), config=config)
            with safe_open(weights, framework="pt") as handle:
                stored = set(handle.keys())
                for name in stored:
                    require_finite(handle.get_tensor(name), name, weights)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"adapter {folder}: does not fit this model: {str(error).splitlines()[0]}") from None
        loaded = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        extra = {name for name in stored - loaded if ".attn_pool." not in name}
        if extra or loaded - stored:
            raise InputError(
                f"{weights}: adapter tensors without a place in the model: {some(sorted(extra))}; "
                f"layers without adapter tensors: {some(sorted(loaded - stored))}"
            )
        if merge:
            wrapped.merge_and_unload()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``preprocessor_config.json``, ``model.safetensors`` and ``tokenizer.json``.

        The statistics are in ``config.json``. SigLIP's pooling head, which nothing reads, is not written.
        """
        from safetensors.torch import save_file

        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        config, preprocessor = self.config.to_dicts()
        config["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save(str(out / "tokenizer.json"))
        tensors = {name: p.detach().to(self.dtype).contiguous() for name, p in self.named_parameters()}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def llama_config(config: OpenVLAConfig) -> Any:
    """transformers' ``LlamaConfig`` for ``text_config``; raises :class:`InputError` for values it refuses."""
    from transformers import LlamaConfig

    values = {k: v for k, v in config.text_config.items() if k not in ("model_type", "torch_dtype", "dtype")}
    try:
        text = LlamaConfig(**{**values, "attn_implementation": "sdpa"})
    except Exception as error:  # transformers' strict dataclasses raise types of their own
        raise InputError(f"config.json: text_config: {' '.join(str(error).split())}") from None
    if not isinstance(text.bos_token_id, int) or not 0 <= text.bos_token_id < text.vocab_size:
        raise InputError(f"config.json: text_config: bos_token_id {text.bos_token_id} is not one of {text.vocab_size} ids")
    return text


# ------------------------------------------------------------------------------------------ the policies by their name


def load(
    checkpoint: str | None = None,
    *,
    suite: str | None = None,
    unnorm_key: str | None = None,
    conventions: Mapping[str, Any] | str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | None = None,
    merge_adapter: bool = False,
    control_rate: float | None = None,
) -> OpenVLA:
    """The policy ``openvla``: :meth:`OpenVLA.from_pretrained` with options as a configuration file writes them.

    Args:
        checkpoint: folder or hub id.
        suite: LIBERO suite that it will act in: brings the conventions ``libero`` and the suite's statistics.
        unnorm_key: data set whose statistics give actions their unit; None: the suite's, or the only ones.
        conventions: a name, or changes such as ``{center_crop: 1.0}`` to LIBERO's (without a suite: to none).
        device: as torch names it; None: a GPU if there is one.
        dtype: float32, bfloat16 or float16; None: bfloat16 on a GPU, else float32.
        adapter: PEFT LoRA folder or hub id.
        merge_adapter: add the adapter into the weights.
        control_rate: control steps per second (Hz); None: the conventions' own, or 5.

    Raises:
        InputError: as :meth:`OpenVLA.from_pretrained`; no checkpoint; an unknown device, type or convention.
    """
    if checkpoint is None:
        raise InputError("policy 'openvla' needs a checkpoint: a folder or a hub id")
    place, as_type = placement(device, dtype)
    folder = resolve_folder(checkpoint)
    refuse_companions(checkpoint, folder)
    if unnorm_key is None and suite is not None:
        unnorm_key = statistics_of_suite(OpenVLAConfig.read(folder).norm_stats, suite)
        if adapter is not None:
            unnorm_key = statistics_of_suite(own_statistics(resolve_folder(adapter)), suite) or unnorm_key
    return OpenVLA.from_pretrained(
        folder,
        device=place,
        dtype=as_type,
        unnorm_key=unnorm_key,
        conventions=conventions_of_suite(conventions, suite),
        adapter=adapter,
        merge_adapter=merge_adapter,
        control_rate=control_rate,
    )


def placement(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where the weights go, and as what: a GPU if there is one, and bfloat16 there, unless told otherwise.

    Raises:
        InputError: an unknown name, or a device that is not there.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if place.type == "meta":
        raise InputError(f"device {device!r}: holds no values, so nothing can run on it")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: torch finds {torch.cuda.device_count()} GPUs here")
    dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; there are: {', '.join(DTYPES)}")
    return place, DTYPES[dtype]


def conventions_of_suite(conventions: Mapping[str, Any] | str | None, suite: str | None) -> Conventions:
    """LIBERO's conventions for a suite, none without one; by ``conventions`` others, or these with changes."""
    return conventions_by_name(conventions, CONVENTIONS["libero"] if suite is not None else Conventions())


def statistics_of_suite(norm_stats: Mapping[str, Any], suite: str) -> str | None:
    """The statistics' key that belongs to a suite, or to the one it varies (``libero_object_swap``); None: none does."""
    keys = {key: key.removesuffix(NO_NOOPS) for key in norm_stats}
    return max((k for k, base in keys.items() if f"{suite}_".startswith(f"{base}_")), key=lambda k: len(keys[k]), default=None)


def untrained(
    checkpoint: str | None = None,
    *,
    suite: str | None = None,
    conventions: Mapping[str, Any] | str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **config: Any,
) -> OpenVLA:
    """A model of any size with random weights, to time and to try commands with: ``spvla.vlas.openvla:untrained``.

    Args:
        checkpoint: None; there is nothing to load.
        suite, conventions, device, dtype: as for :func:`load`.
        seed: of the weights.
        config: fields of :class:`OpenVLAConfig`. Without ``norm_stats`` there is one data set, ``untrained``, 7 dimensions in
            [-1, 1].
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    if checkpoint is not None:
        raise InputError(f"policy 'spvla.vlas.openvla:untrained' takes no checkpoint, got {checkpoint!r}")
    bounds = {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    values = {"model_type": "openvla", "norm_stats": {"untrained": {"action": bounds}}, **config}
    unknown = sorted(values.keys() - OpenVLAConfig.__dataclass_fields__.keys() - {"model_type"})
    if unknown:
        raise InputError(f"untrained: {unknown[0]!r} is unknown; known are: {', '.join(OpenVLAConfig.__dataclass_fields__)}")
    place, as_type = placement(device, dtype)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    parsed = OpenVLAConfig.from_dicts(values)
    torch.manual_seed(seed)
    model = OpenVLA(parsed, tokenizer=tokenizer, conventions=conventions_of_suite(conventions, suite)).to(place)
    for name, parameter in model.named_parameters():
        if FLOAT32 not in name:
            parameter.data = parameter.data.to(as_type)
    return model.eval()
