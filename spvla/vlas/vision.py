"""Vision Transformers whose tensors are named as timm's, so that OpenVLA's encoders load without timm.

DINOv2 with registers (arXiv 2304.07193, 2309.16588) and SigLIP (arXiv 2303.15343). OpenVLA reads patch features from the
second-to-last block, without the final norm. The last block and the norm are part of the format and are loaded, but no
forward pass runs them: of the last block only the first norm, q and k serve, for the pruning score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvla.errors import InputError
from spvla.fields import check_fields, naming

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # name -> F.gelu's approximation
LAYER_NORM_EPS = 1e-6

Modulation = tuple[Tensor, Tensor]  # scale and shift, 2 x (B, C): x (1 + scale) + shift (FiLM, arXiv 1709.07871)
MAX_DEPTH = 1000  # blocks: what a damaged or hostile file could ask for is refused before anything is built


@dataclass(frozen=True)
class ViTConfig:
    """One encoder's architecture. Field names are timm's, so ``timm_model_kwargs`` override them one to one.

    Args:
        patch_size: side of a patch in pixels.
        img_size: side of the square input in pixels, a multiple of ``patch_size``.
        embed_dim: width of a token.
        depth: number of blocks, at least 2; patch features leave after block ``depth - 2``.
        num_heads: attention heads; divides ``embed_dim``.
        mlp_ratio: hidden width of a block's MLP in multiples of ``embed_dim``, rounded down.
        class_token: whether a class token precedes the patches.
        reg_tokens: number of register tokens between class token and patches.
        no_embed_class: position embeddings cover the patches alone; else also the class and register tokens.
        init_values: initial LayerScale factor; None: no LayerScale.
        act_layer: ``gelu`` (exact, all published encoders) or ``gelu_tanh``.
        global_pool: ``map`` if the format has attention-pooling tensors (SigLIP), which OpenVLA never uses.
        stem: ``patch`` (one convolution of the patch's size) or ``conv`` (3 x 3 convolutions of stride 2, which learn
            faster from little data, arXiv 2106.14881); ours, for small models.
        score_block: the block whose attention scores tokens for pruning: -1 (published) or -2; ours, for models trained
            from scratch, where no gradient ever reaches the last block.
        mean, std: normalisation of the RGB channels in 0..1.
    """

    patch_size: int
    img_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    init_values: float | None = None
    act_layer: str = "gelu"
    global_pool: str = "token"
    stem: str = "patch"
    score_block: int = -1
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        sizes = ("patch_size", "img_size", "embed_dim", "num_heads")
        with naming("vision encoder"):
            least = {**dict.fromkeys(sizes, 1), "mlp_ratio": 0, "reg_tokens": 0}
            check_fields(self, at_least=least, at_most={"depth": MAX_DEPTH})
        problem = None
        if self.img_size % self.patch_size:
            problem = f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}"
        elif self.embed_dim % self.num_heads:
            problem = f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
        elif self.depth < 2:
            problem = f"depth must be at least 2 (features are taken before the last block), got {self.depth}"
        elif self.act_layer not in ACTIVATIONS:
            problem = f"act_layer {self.act_layer!r} is not one of {', '.join(ACTIVATIONS)}"
        elif self.stem not in ("patch", "conv"):
            problem = f"stem {self.stem!r} is not one of patch, conv"
        elif self.stem == "conv" and self.patch_size % 2:
            problem = f"stem 'conv' needs an even patch_size, got {self.patch_size}"
        elif self.score_block not in (-1, -2):
            problem = f"score_block must be -1 or -2, got {self.score_block}"
        if problem:
            raise InputError(f"vision encoder: {problem}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image; N = grid x grid."""
        return self.img_size // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        return int(self.class_token) + self.reg_tokens


def _dinov2(embed_dim: int, depth: int, num_heads: int, reg_tokens: int) -> ViTConfig:
    return ViTConfig(
        14, 518, embed_dim, depth, num_heads, reg_tokens=reg_tokens, no_embed_class=reg_tokens > 0, init_values=1e-5
    )


def _siglip(patch_size: int, img_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> ViTConfig:
    return ViTConfig(
        patch_size,
        img_size,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio=mlp_ratio,
        class_token=False,
        global_pool="map",
        mean=HALF,
        std=HALF,
    )


ENCODERS: Mapping[str, ViTConfig] = {
    "vit_small_patch14_dinov2": _dinov2(384, 12, 6, 0),
    "vit_base_patch14_dinov2": _dinov2(768, 12, 12, 0),
    "vit_large_patch14_dinov2": _dinov2(1024, 24, 16, 0),
    "vit_small_patch14_reg4_dinov2": _dinov2(384, 12, 6, 4),
    "vit_base_patch14_reg4_dinov2": _dinov2(768, 12, 12, 4),
    "vit_large_patch14_reg4_dinov2": _dinov2(1024, 24, 16, 4),
    "vit_base_patch16_siglip_224": _siglip(16, 224, 768, 12, 12),
    "vit_base_patch16_siglip_256": _siglip(16, 256, 768, 12, 12),
    "vit_base_patch16_siglip_384": _siglip(16, 384, 768, 12, 12),
    "vit_large_patch16_siglip_256": _siglip(16, 256, 1024, 24, 16),
    "vit_large_patch16_siglip_384": _siglip(16, 384, 1024, 24, 16),
    "vit_so400m_patch14_siglip_224": _siglip(14, 224, 1152, 27, 16, 3.7362),
    "vit_so400m_patch14_siglip_378": _siglip(14, 378, 1152, 27, 16, 3.7362),
}
"""Known architectures by timm name, without the tag of pretrained weights (``.lvd142m``)."""


def vit_config(
    model_id: str,
    img_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    act_layer: str | None = None,
) -> ViTConfig:
    """The architecture behind a timm id, with a checkpoint's own image size, overrides and activation.

    Raises:
        InputError: the id, an override or the activation is unknown; the message lists the known ones.
    """
    config = ENCODERS.get(model_id.split(".")[0])
    if config is None:
        raise InputError(f"timm_model_ids: encoder {model_id!r} is unknown; available: {', '.join(ENCODERS)}")
    changes = dict(overrides or {})
    known = [f.name for f in fields(ViTConfig)]
    for name in changes:
        if name not in known:
            raise InputError(f"timm_model_kwargs: {name!r} is unknown for {model_id}; available: {', '.join(known)}")
    if img_size is not None:
        changes.setdefault("img_size", img_size)
    if act_layer is not None:
        changes["act_layer"] = act_layer
    try:
        return replace(config, **changes)
    except TypeError as error:
        raise InputError(f"timm_model_kwargs for {model_id}: {error}") from None


def unused_tensors(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint may hold but OpenVLA never reads: SigLIP's pooling head."""
    if config.global_pool != "map":
        return {}
    c = config.embed_dim
    hidden = int(c * config.mlp_ratio)
    linears = {"q": (c, c), "kv": (2 * c, c), "proj": (c, c), "mlp.fc1": (hidden, c), "mlp.fc2": (c, hidden)}
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, c), "norm.weight": (c,), "norm.bias": (c,)}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return {f"attn_pool.{name}": shape for name, shape in shapes.items()}


class PatchEmbed(nn.Module):
    """Cut an image (B, 3, S, S) into patch tokens (B, N, C), row by row."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels, rest = 3, config.patch_size
        if config.stem == "conv":
            halvings = (rest & -rest).bit_length() - 1  # how often 2 divides the patch size
            layers: list[nn.Module] = []
            for i in reversed(range(halvings)):  # widths double up to embed_dim as the resolution halves
                width = max(config.embed_dim >> i, 8)
                layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.GELU()]
                channels, rest = width, rest // 2
            self.stem: nn.Module = nn.Sequential(*layers)
        else:
            self.stem = nn.Identity()
        self.proj = nn.Conv2d(channels, config.embed_dim, rest, stride=rest)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(self.stem(images.to(self.proj.weight.dtype)))  # (B, C, grid, grid)
        return x.flatten(2).transpose(1, 2)  # (B, N, C)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values (3, B, nh, N, hs) of tokens (B, N, C)."""
        b, n, c = x.shape
        qkv: Tensor = self.qkv(x)  # (B, N, 3 C)
        return qkv.view(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)  # (3, B, nh, N, hs)

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, nh, N, hs) of tokens (B, N, C), without computing the values if nothing wraps ``qkv``."""
        if type(self.qkv) is not nn.Linear:  # a LoRA layer: its change belongs to q and k as well
            q, k, _ = self.heads(x)
            return q, k
        b, n, c = x.shape
        qk = F.linear(x, self.qkv.weight[: 2 * c], self.qkv.bias[: 2 * c])  # (B, N, 2 C)
        q, k = qk.view(b, n, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)  # 2 x (B, nh, N, hs)
        return q, k

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, nh, N, hs)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))  # (B, N, C)
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.act = nn.GELU(ACTIVATIONS[config.act_layer])
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A learned factor per channel; OpenVLA's format calls it ``scale_factor`` (timm: ``gamma``)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c, init = config.embed_dim, config.init_values
        self.norm1 = nn.LayerNorm(c, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if init is None else LayerScale(c, init)
        self.norm2 = nn.LayerNorm(c, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(config)
        self.ls2 = nn.Identity() if init is None else LayerScale(c, init)

    def forward(self, x: Tensor, film: Modulation | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if film is not None:
            scale, shift = film  # 2 x (B, C)
            x = x * (1 + scale[:, None]) + shift[:, None]
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class VisionTransformer(nn.Module):
    """Patch features of one encoder, and the queries and keys by which its patches are scored."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        c, n = config.embed_dim, config.grid**2
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        if config.reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, config.reg_tokens, c))
        embedded = n if config.no_embed_class else n + config.prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, embedded, c))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(c, eps=LAYER_NORM_EPS)
        self.apply(self._init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # Never part of a forward pass, so never trained: distributed training must not wait for their gradients.
        self.blocks[-1].requires_grad_(False)
        self.norm.requires_grad_(False)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), normalised, to the first block's input (B, prefix + N, C)."""
        x = self.patch_embed(images).to(self.pos_embed.dtype)  # (B, N, C)
        prefix = [self.cls_token] if self.config.class_token else []
        prefix += [self.reg_token] if self.config.reg_tokens else []
        tokens = [p.expand(len(x), -1, -1) for p in prefix]
        if self.config.no_embed_class:
            return torch.cat([*tokens, x + self.pos_embed], dim=1)
        return torch.cat([*tokens, x], dim=1) + self.pos_embed

    def forward(
        self, images: Tensor, patches: Tensor | None = None, film: Sequence[Modulation] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S), normalised, to (patch features (B, N, C), input (B, N, C) of the scoring block).

        Both hold patches only, row by row. With ``score_block`` -1 the scoring block's input is the features.

        ``patches`` (B, M), ascending: the encoder sees these patches alone (arXiv 2208.07220, 2212.00794), which makes
        training cheaper; N is M then. ``film``: scale and shift of all tokens in each block, between attention and MLP.
        """
        x = before = self.embed(images)
        if patches is not None:
            prefix = self.config.prefix_tokens
            chosen = patches[..., None].expand(-1, -1, x.shape[-1]) + prefix
            x = before = torch.cat([x[:, :prefix], x.gather(1, chosen)], dim=1)
        for i, block in enumerate(self.blocks[:-1]):
            before, x = x, block(x, None if film is None else film[i])
        score_input = x if self.config.score_block == -1 else before
        skip = self.config.prefix_tokens
        return x[:, skip:], score_input[:, skip:]

    def queries_keys(self, score_input: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, nh, N, hs) of the scoring block for its input (B, N, C); nothing else of it runs."""
        block = self.blocks[self.config.score_block]
        assert isinstance(block, Block)
        return block.attn.queries_keys(block.norm1(score_input))
