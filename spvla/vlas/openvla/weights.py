"""A checkpoint's tensors: from its files to the network and back; LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spvla.errors import InputError
from spvla.vlas.checkpoint import read_tensor, require_finite, some, tensor_shapes
from spvla.vlas.openvla.model import OpenVLAModel
from spvla.vlas.vision import VisionTransformer, unused_tensors

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
FLOAT32 = ".patch_embed."  # stays float32: 8-bit pixels, once normalised, do not fit bfloat16; 3 M parameters


def unused_in_checkpoint(model: OpenVLAModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors that the published form holds but nothing reads; they are not loaded."""
    out = {}
    for name, encoder in model.vision_backbone.named_children():
        assert isinstance(encoder, VisionTransformer)
        for key, shape in unused_tensors(encoder.config).items():
            out[f"vision_backbone.{name}.{key}"] = shape
    return out


def load_tensors(model: OpenVLAModel, files: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
    """Replace the model's meta tensors by the files' tensors, one at a time."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    tied = bool(model.language_model.config.tie_word_embeddings)
    if tied:  # one tensor under two names; a file has the first, and the second only if its writer repeated it
        model.language_model.lm_head.weight = model.get_submodule(EMBEDDING.rpartition(".")[0]).weight
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    unused = unused_in_checkpoint(model)
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
                module = model.get_submodule(owner)
                as_type = torch.float32 if FLOAT32 in name else dtype
                tensor = nn.Parameter(read_tensor(file, name, device, as_type), getattr(module, leaf).requires_grad)
                setattr(module, leaf, tensor)
                missing.discard(name)
    if tied:
        embedding: Any = model.get_submodule(EMBEDDING.rpartition(".")[0]).weight
        model.language_model.lm_head.weight = embedding
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
        model.language_model.model.rotary_emb = LlamaRotaryEmbedding(model.language_model.config)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"not materialised: {left}"


def load_adapter(model: OpenVLAModel, folder: Path, merge: bool) -> None:
    """Put a PEFT LoRA adapter into the model's linear layers, or its product into their weights."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError:
        raise InputError("adapter: LoRA adapters need the package peft (pip install 'spvla[train]')") from None
    from safetensors import SafetensorError, safe_open

    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.exists():
            raise InputError(f"adapter {folder}: {file.name} is missing (adapters are read from safetensors only)")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.task_type = None  # a published adapter may say CAUSAL_LM, whose wrapper wants generate()
        config.inference_mode = True
        wrapped = PeftModel.from_pretrained(model, str(folder), config=config)
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


def save_pretrained(model: OpenVLAModel, folder: str | Path) -> None:
    """Write ``config.json``, ``preprocessor_config.json``, ``model.safetensors`` and ``tokenizer.json``.

    The statistics are in ``config.json``. SigLIP's pooling head, which nothing reads, is not written.
    """
    from safetensors.torch import save_file

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    config, preprocessor = model.config.to_dicts()
    config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save(str(out / "tokenizer.json"))
    tensors = {name: p.detach().to(model.dtype).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
