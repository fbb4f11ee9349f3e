"""OpenVLA's forward pass, composed of Hugging Face's own DINOv2, SigLIP and Llama: nothing of it is shared with ``spvla``.

    python tests/data/openvla_reference.py            write ``openvla_tiny``: random weights and what they compute
    python tests/data/openvla_reference.py CHECKPOINT compare with a checkpoint that has the published code's golden files

The second was run on a random checkpoint of 5.2 M parameters with 16 outputs of openvla/openvla (transformers 4.40.1, timm
0.9.10) before these files were written: ids, tokens and actions were the same, patch features and scores within 3e-5.
It is written for the transformers of constraints.txt, whose names of tensors it knows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TARGET = Path(__file__).parent / "openvla_tiny"
ARRAYS = "golden.npz"
SIDE, DINO, SIGLIP, SIGLIP_HIDDEN, LLAMA, WORDS = 224, 32, 48, 179, 48, 384  # 128 words, then the 256 action tokens
INSTRUCTIONS = (
    "pick up the black bowl next to the plate and place it on the plate",
    "Open the Top Drawer and put the bowl inside",
    "put the spoon on the towel",
)
BLOCK = {"norm1.": "norm1.", "norm2.": "norm2.", "attn.proj.": "attention.o_proj.", "mlp.": "mlp."}
SIGLIP_BLOCK = {"norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attn.proj.": "self_attn.out_proj.", "mlp.": "mlp."}


def split_qkv(name: str, value: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    kind = name.rsplit(".", 1)[1]
    return {f"{n}.{kind}": part for n, part in zip(names, value.chunk(3), strict=True)}


def dinov2_state(timm: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """timm's names to Hugging Face's; the position embedding of the class token, which timm's lacks, is zero."""
    positions = timm["pos_embed"]
    out = {
        "embeddings.cls_token": timm["cls_token"],
        "embeddings.register_tokens": timm["reg_token"],
        "embeddings.position_embeddings": torch.cat([torch.zeros_like(positions[:, :1]), positions], 1),
        "embeddings.mask_token": torch.zeros(1, positions.shape[-1]),
        "embeddings.patch_embeddings.projection.weight": timm["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": timm["patch_embed.proj.bias"],
        "layernorm.weight": timm["norm.weight"],
        "layernorm.bias": timm["norm.bias"],
    }
    for name, value in timm.items():
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        layer = f"{prefix}.{number}."
        if rest.startswith("attn.qkv"):
            out |= split_qkv(rest, value, [f"{layer}attention.{n}" for n in ("q_proj", "k_proj", "v_proj")])
        elif rest.startswith("ls"):
            out[f"{layer}layer_scale{rest[2]}.lambda1"] = value
        else:
            start = next(k for k in BLOCK if rest.startswith(k))
            out[layer + BLOCK[start] + rest.removeprefix(start)] = value
    return out


def siglip_state(timm: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    root = prefix.removesuffix("encoder.layers")
    out = {
        f"{root}embeddings.patch_embedding.weight": timm["patch_embed.proj.weight"],
        f"{root}embeddings.patch_embedding.bias": timm["patch_embed.proj.bias"],
        f"{root}embeddings.position_embedding.weight": timm["pos_embed"][0],
        f"{root}post_layernorm.weight": timm["norm.weight"],
        f"{root}post_layernorm.bias": timm["norm.bias"],
    }
    for name, value in timm.items():
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        layer = f"{prefix}.{number}."
        if rest.startswith("attn.qkv"):
            out |= split_qkv(rest, value, [f"{layer}self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj")])
        else:
            start = next(k for k in SIGLIP_BLOCK if rest.startswith(k))
            out[layer + SIGLIP_BLOCK[start] + rest.removeprefix(start)] = value
    return out


def layers_of(model: torch.nn.Module, last: str) -> str:
    """Where this version of transformers keeps its blocks: ``encoder.layer``, ``vision_model.encoder.layers``."""
    (name,) = {n.rsplit(".0.", 1)[0] for n in model.state_dict() if n.endswith(f".0.{last}")}
    return name


class Reference:
    """A fused OpenVLA checkpoint as Hugging Face's models, float32."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.processor = json.loads((folder / "preprocessor_config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        sizes = [
            {
                "hidden_size": kwargs["embed_dim"],
                "num_hidden_layers": kwargs["depth"],
                "num_attention_heads": kwargs["num_heads"],
                "image_size": self.config["image_sizes"][0],
                "patch_size": 14,
                "layer_norm_eps": 1e-6,
                "hidden_act": "gelu",
                "attn_implementation": "eager",
            }
            for kwargs in self.config["timm_model_kwargs"]
        ]

        def part(prefix: str) -> dict[str, torch.Tensor]:
            names = [k for k in state if k.startswith(prefix)]
            return {k.removeprefix(prefix).replace("scale_factor", "gamma"): state[k] for k in names}

        dino, siglip = part("vision_backbone.featurizer."), part("vision_backbone.fused_featurizer.")
        registers = dino["reg_token"].shape[1]
        self.dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes[0])).eval()
        hidden = siglip["blocks.0.mlp.fc1.weight"].shape[0]
        self.siglip = SiglipVisionModel(SiglipVisionConfig(intermediate_size=hidden, vision_use_head=False, **sizes[1])).eval()
        for model, names, last in (
            (self.dino, dinov2_state, "norm1.weight"),
            (self.siglip, siglip_state, "layer_norm1.weight"),
        ):
            weights = names(dino if model is self.dino else siglip, layers_of(model, last))
            missing = [k for k in model.load_state_dict(weights, strict=False).missing_keys if ".head." not in k]
            assert not missing, missing
        text = {k: v for k, v in self.config["text_config"].items() if k not in ("torch_dtype", "model_type")}
        self.llama = LlamaForCausalLM(LlamaConfig(**text, attn_implementation="eager")).eval()
        self.llama.load_state_dict(part("language_model."))
        self.projector = part("projector.")

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        side = self.config["image_sizes"][0]
        resized = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
        x = torch.from_numpy(resized.astype(np.float32) / 255).permute(2, 0, 1)
        views = [
            (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
            for mean, std in zip(self.processor["means"], self.processor["stds"], strict=True)
        ]
        return torch.cat(views)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        dino = self.dino(pixels[None, :3], output_hidden_states=True).hidden_states[-2]
        siglip = self.siglip(pixels[None, 3:], output_hidden_states=True).hidden_states[-2]
        return torch.cat([dino[:, -siglip.shape[1] :], siglip], -1)

    def ids(self, instruction: str) -> list[int]:
        prompt = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
        ids = self.tokenizer.encode(prompt).ids
        ids = ids if ids[0] == 1 else [1, *ids]
        return ids if not self.config.get("append_space_token", True) or ids[-1] == 29871 else [*ids, 29871]

    @torch.inference_mode()
    def act(self, image: np.ndarray, instruction: str, key: str) -> dict:
        """Seven greedy tokens, each from the whole sequence anew, and the action they stand for."""
        p, pixels, ids = self.projector, self.pixels(image), self.ids(instruction)
        features = self.features(pixels)
        x = F.gelu(F.linear(features, p["fc1.weight"], p["fc1.bias"]))
        x = F.gelu(F.linear(x, p["fc2.weight"], p["fc2.bias"]))
        visual = F.linear(x, p["fc3.weight"], p["fc3.bias"])
        tokens, scores = [], []
        for _ in range(7):
            words = self.llama.get_input_embeddings()(torch.tensor([ids + tokens]))
            sequence = torch.cat([words[:, :1], visual, words[:, 1:]], 1)
            scores.append(self.llama(inputs_embeds=sequence).logits[0, -1])
            tokens.append(int(scores[-1].argmax()))
        words = self.config["text_config"]["vocab_size"] - self.config["pad_to_multiple_of"]
        edges = np.linspace(-1, 1, self.config["n_action_bins"])
        centres = (edges[1:] + edges[:-1]) / 2
        x = centres[np.clip(words - np.array(tokens) - 1, 0, len(centres) - 1)]
        entry = self.config["norm_stats"][key]["action"]
        low, high = np.array(entry["q01"]), np.array(entry["q99"])
        action = np.where(entry["mask"], 0.5 * (x + 1) * (high - low) + low, x)
        top = torch.stack(scores).topk(2).values
        return {
            "input_ids": ids,
            "tokens": tokens,
            "action": action.tolist(),
            "min_top2_margin": float((top[:, 0] - top[:, 1]).min()),
            "scores": torch.stack(scores)[:, words - self.config["n_action_bins"] : words].numpy(),
            "pixel_values": pixels.numpy(),
            "patch_features": features[0].numpy(),
        }


def compare(folder: Path) -> None:
    """Against the outputs of the published implementation."""
    reference, arrays = Reference(folder), np.load(folder / ARRAYS)
    worst = {"scores": 0.0, "pixel_values": 0.0, "patch_features": 0.0, "action": 0.0}
    cases = json.loads((folder / "golden.json").read_text())["cases"]
    for i, case in enumerate(cases):
        got = reference.act(arrays[f"image/{case['image']}"], case["instruction"], case["unnorm_key"])
        assert (got["input_ids"], got["tokens"]) == (case["input_ids"], case["tokens"]), i
        expected = {"scores": arrays[f"case{i}/scores_action_tokens"], "action": np.array(case["action"])}
        expected |= {k: arrays[f"case{i}/{k}"] for k in ("pixel_values", "patch_features") if f"case{i}/{k}" in arrays}
        for name, value in expected.items():
            worst[name] = max(worst[name], float(np.abs(np.asarray(got[name]) - value).max()))
    print(f"{len(cases)} cases: same ids and tokens; largest differences {worst}")


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint, small."""

    def block(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        out: dict[str, tuple[int, ...]] = {f"{n}.weight": shape for n, shape in linear.items()}
        out |= {f"{n}.bias": shape[:1] for n, shape in linear.items()}
        return out | {f"norm{k}.{kind}": (width,) for k in (1, 2) for kind in ("weight", "bias")}

    def encoder(width: int, hidden: int, more: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        out = {"pos_embed": (1, (SIDE // 14) ** 2, width), "norm.weight": (width,), "norm.bias": (width,)}
        out |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
        return out | {f"blocks.{k}.{n}": shape for k in range(3) for n, shape in (block(width, hidden) | more).items()}

    dino = encoder(DINO, 4 * DINO, {f"ls{k}.scale_factor": (DINO,) for k in (1, 2)})
    dino |= {"cls_token": (1, 1, DINO), "reg_token": (1, 4, DINO)}
    pool = {"q": (SIGLIP, SIGLIP), "kv": (2 * SIGLIP, SIGLIP), "proj": (SIGLIP, SIGLIP)}
    pool |= {"mlp.fc1": (SIGLIP_HIDDEN, SIGLIP), "mlp.fc2": (SIGLIP, SIGLIP_HIDDEN)}
    siglip = encoder(SIGLIP, SIGLIP_HIDDEN, {})
    siglip |= {"attn_pool.latent": (1, 1, SIGLIP)} | {f"attn_pool.norm.{n}": (SIGLIP,) for n in ("weight", "bias")}
    siglip |= {f"attn_pool.{n}.weight": shape for n, shape in pool.items()}
    siglip |= {f"attn_pool.{n}.bias": shape[:1] for n, shape in pool.items()}
    vision = DINO + SIGLIP
    projector = {"fc1": (4 * vision, vision), "fc2": (LLAMA, 4 * vision), "fc3": (LLAMA, LLAMA)}
    llama = {"lm_head.weight": (WORDS + 64, LLAMA), "model.embed_tokens.weight": (WORDS + 64, LLAMA)}
    llama["model.norm.weight"] = (LLAMA,)
    for k in range(2):
        layer = f"model.layers.{k}."
        llama |= {f"{layer}self_attn.{n}_proj.weight": (LLAMA, LLAMA) for n in "qkvo"}
        llama |= {f"{layer}mlp.{n}_proj.weight": (2 * LLAMA, LLAMA) for n in ("gate", "up")}
        llama |= {f"{layer}mlp.down_proj.weight": (LLAMA, 2 * LLAMA)}
        llama |= {f"{layer}{n}_layernorm.weight": (LLAMA,) for n in ("input", "post_attention")}
    parts = {"vision_backbone.featurizer.": dino, "vision_backbone.fused_featurizer.": siglip, "language_model.": llama}
    parts["projector."] = {f"{n}.weight": s for n, s in projector.items()} | {f"{n}.bias": s[:1] for n, s in projector.items()}
    return {prefix + name: shape for prefix, part in parts.items() for name, shape in part.items()}


def random_weights() -> dict[str, torch.Tensor]:
    """So scaled that neither image nor words are drowned: every case has tokens of its own."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in shapes().items():
        x = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            x = 1 + 0.1 * x
        elif name.endswith(("bias", "cls_token", "reg_token", "pos_embed", "scale_factor", "latent")):
            x = 0.3 * x
        elif "embed_tokens" not in name:
            x = 2 * x / np.sqrt(np.prod(shape[1:]))
        out[name] = x.to(torch.bfloat16)
    return out


def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:180, :240]
    gradient = np.stack([x, y, 255 - (x + y) // 2], -1) % 256
    blocks = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((32, 32, 1)))
    noise = rng.integers(0, 256, (64, 64, 3))
    return {k: v.astype(np.uint8) for k, v in (("gradient", gradient), ("blocks", blocks), ("noise", noise))}


def make(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_file(random_weights(), folder / "model.safetensors", {"format": "pt"})
    statistics = json.loads((Path(__file__).parent / "oxe_statistics" / "dataset_statistics.json").read_text())
    libero = Path(__file__).parent / "openvla_libero_norm_stats" / "openvla_libero_norm_stats.json"
    norm_stats = {"bridge_orig": {"action": statistics["bridge_orig"]["action"]}}
    norm_stats["libero_spatial_no_noops"] = {"action": json.loads(libero.read_text())["libero_spatial_no_noops"]["action"]}
    config = {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "append_space_token": False,
        "arch_specifier": "no-align+gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [SIDE, SIDE],
        "n_action_bins": 256,
        "norm_stats": norm_stats,
        "pad_to_multiple_of": 64,
        "text_config": {
            "model_type": "llama",
            "hidden_size": LLAMA,
            "intermediate_size": 2 * LLAMA,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "vocab_size": WORDS + 64,
        },
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_model_kwargs": [
            {"embed_dim": DINO, "depth": 3, "num_heads": 4},
            {"embed_dim": SIGLIP, "depth": 3, "num_heads": 4},
        ],
        "use_fused_vision_backbone": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    means, stds = [[0.484375, 0.455078125, 0.40625], [0.5] * 3], [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3]
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": [SIDE, SIDE]}
    processor = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, SIDE, SIDE]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": means,
        "stds": stds,
        "tvf_do_letterbox": False,
        "tvf_normalize_params": [{"mean": m, "std": s} for m, s in zip(means, stds, strict=True)],
        "tvf_resize_params": [resize] * 2,
        "use_fused_vision_backbone": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    text = " ".join(("in : what action should the robot take to ? out :", *INSTRUCTIONS)).lower()
    words = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *text.split()]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    reference, cases, arrays = Reference(folder), [], {}
    for name, image in pictures().items():
        arrays[f"image/{name}"] = image
        for key, instruction in [*(("libero_spatial_no_noops", i) for i in INSTRUCTIONS), ("bridge_orig", INSTRUCTIONS[0])]:
            result = reference.act(image, instruction, key)
            arrays[f"case{len(cases)}/scores_action_tokens"] = result.pop("scores")
            pixels, features = result.pop("pixel_values"), result.pop("patch_features")
            if key == "bridge_orig":  # every 16th row and patch
                arrays[f"case{len(cases)}/pixel_values_16"] = pixels[:, ::16]
                arrays[f"case{len(cases)}/patch_features_16"] = features[::16]
            cases.append({"image": name, "instruction": instruction, "unnorm_key": key, **result})
    np.savez_compressed(folder / ARRAYS, **arrays)
    (folder / "golden.json").write_text(json.dumps({"cases": cases}, indent=1))
    print(*((c["image"], c["tokens"], round(c["min_top2_margin"], 3)) for c in cases), sep="\n")


if __name__ == "__main__":
    compare(Path(sys.argv[1])) if sys.argv[1:] else make(TARGET)
