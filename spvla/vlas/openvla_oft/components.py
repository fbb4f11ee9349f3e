"""The files beside the merged weights: ``action_head--N_checkpoint.pt`` and others, state dicts of one training step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spvla.errors import InputError
from spvla.files import inside
from spvla.vlas.checkpoint import COMPANION, PLAIN, require_finite, some, tensor_shapes
from spvla.vlas.openvla.model import VisionBackbone
from spvla.vlas.openvla.weights import save_pretrained as save_vla
from spvla.vlas.openvla_oft.model import OpenVLAOFTModel
from spvla.vlas.vision import VisionTransformer, unused_tensors

ACTION_HEAD, PROPRIO, VISION, DIFFUSION = "action_head", "proprio_projector", "vision_backbone", "noisy_action_projector"
NAME = re.compile(r"(\w+?)--(\w+)_checkpoint\.(pt|safetensors)", re.ASCII)
PARALLEL = "module."  # what a data-parallel wrapper puts before every name
LORA_ALPHA = 16  # at most: the published training's alpha is min(rank, 16), and no file says it


def find_components(folder: Path, step: str | int | None = None) -> dict[str, Path]:
    """A checkpoint's component files by what they hold, of one training step; safetensors where both kinds are there.

    Args:
        folder: the checkpoint's.
        step: N in their names, a number or ``latest``; None: the only one there is.

    Raises:
        InputError: files of several steps and none named (code ``several-steps``), or none of that step (``missing``); a part
            that is not read here, such as a diffusion head's (``unsupported-checkpoint``).
    """
    found: dict[str, dict[str, Path]] = {}  # step -> part -> file
    for path in sorted(folder.iterdir()):  # .pt before .safetensors
        name = NAME.fullmatch(path.name)
        if name is not None and name[1] in (ACTION_HEAD, PROPRIO, VISION):
            found.setdefault(name[2], {})[name[1]] = inside(folder, path.name)
        elif name is not None or COMPANION.fullmatch(path.name):
            diffusion = name is not None and name[1] == DIFFUSION
            what = "belongs to a diffusion head; only heads of L1 regression are" if diffusion else "is no part that is"
            raise InputError(
                f"{path}: {what} read here (the published names are {ACTION_HEAD}--N_checkpoint.pt, "
                f"{PROPRIO}--N_checkpoint.pt, {VISION}--N_checkpoint.pt)",
                code="unsupported-checkpoint",
                field=str(path),
            )
    if step is not None and str(step) not in found:
        raise InputError(
            f"{folder}: no component file of step {step}; there are: {', '.join(found) or 'none'}", code="missing", field="step"
        )
    if step is None and len(found) > 1:
        raise InputError(
            f"{folder}: component files of several training steps ({', '.join(found)}); say which with step",
            code="several-steps",
            field="step",
        )
    return found[str(step)] if step is not None else next(iter(found.values()), {})


def read_component(file: Path) -> dict[str, Tensor]:
    """A component's tensors by name, on the CPU, as they are stored; the name of a data-parallel wrapper is left out.

    Raises:
        InputError: the file holds anything but plain tensors by name (code ``not-tensors``; no code of a pickle is run), or
            numbers that are not finite.
    """
    tensors = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    for name, tensor in tensors.items():
        if tensor.dtype not in PLAIN or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise InputError(f"{file}: {name} is no plain tensor ({tensor.dtype})", code="not-tensors", field=str(file))
        require_finite(tensor, name, file)
    wrapped = all(name.startswith(PARALLEL) for name in tensors)
    return {name.removeprefix(PARALLEL): tensor for name, tensor in tensors.items()} if wrapped else tensors


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensor_shapes(file)
    return load_file(file)


def _pickled(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, ...: whatever a damaged or hostile file brings
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{file}: not read, since it holds more than tensors or is damaged ({reason})", code="not-tensors", field=str(file)
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise InputError(f"{file}: expected tensors by name, a state dict", code="not-tensors", field=str(file))
    return {name: tensor.detach() for name, tensor in content.items()}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], file: Path, unused: Iterable[str] = ()) -> None:
    """Give ``module`` a file's tensors, in the types and on the device of its own.

    Raises:
        InputError: missing or additional names (code ``component-tensors``), a diffusion head's (``unsupported-checkpoint``),
            other shapes (``component-shape``). ``unused`` names may be there and are not read.
    """
    own = dict(module.named_parameters())
    if any(name.startswith("noise_predictor.") for name in tensors):
        raise InputError(
            f"{file}: a diffusion head; only heads of L1 regression are read here",
            code="unsupported-checkpoint",
            field=str(file),
        )
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys() - set(unused))
    if missing or extra:
        raise InputError(
            f"{file}: tensors that are missing: {some(missing)}; tensors that do not belong there: {some(extra)}",
            code="component-tensors",
            field=str(file),
        )
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise InputError(
                f"{file}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}",
                code="component-shape",
                field=str(file),
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def fill_vision(backbone: VisionBackbone, film: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Give the encoders and their FiLM layers what a ``vision_backbone`` file holds, its LoRA added to the weights.

    The file's weights replace the main file's, which have LoRA in them already: added to those it would count twice.
    """
    plain, modulation = {}, {}
    for name, tensor in merged(tensors, file).items():
        name = name.removeprefix("vision_backbone.")
        if re.search(r"\.blocks\.\d+\.(scale|shift)\.", name):
            modulation[name] = tensor
        else:
            plain[re.sub(r"(\.blocks\.\d+\.)block\.", r"\1", name)] = tensor
    fill(film, modulation, file)
    unused = [
        f"{name}.{key}"
        for name, encoder in backbone.named_children()
        if isinstance(encoder, VisionTransformer)
        for key in unused_tensors(encoder.config)
    ]
    fill(backbone, plain, file, unused)


def merged(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Weights with their LoRA added, float32: base + min(r, 16) / r B A, for linear layers and patch embeddings.

    Raises:
        InputError: half of a pair, or shapes that do not fit (code ``component-shape``).
    """
    out = {}
    rest = dict(tensors)
    for name in [n for n in tensors if n.endswith(".base_layer.weight")]:
        layer = name.removesuffix("base_layer.weight")
        base = rest.pop(name).float()
        a, b = (rest.pop(f"{layer}lora_{which}.default.weight", None) for which in "AB")
        if a is None or b is None:
            raise InputError(
                f"{file}: {layer[:-1]} lacks a part of its LoRA pair", code="component-tensors", field=f"{layer}lora"
            )
        rows, rank = base.shape[0], a.shape[0]
        fits = a.ndim == b.ndim == base.ndim and rank and a.shape[1:] == base.shape[1:]
        if not fits or tuple(b.shape) != (rows, rank, *[1] * (base.ndim - 2)):
            shapes = f"{tuple(b.shape)} and {tuple(a.shape)}"
            raise InputError(
                f"{file}: LoRA of {layer[:-1]} has shapes {shapes}, which do not fit its weight {tuple(base.shape)}",
                code="component-shape",
                field=str(file),
            )
        change = b.float().flatten(1) @ a.float().flatten(1)  # (rows, columns)
        out[f"{layer}weight"] = base + (min(rank, LORA_ALPHA) / rank) * change.view(base.shape)
        if (bias := rest.pop(f"{layer}base_layer.bias", None)) is not None:
            out[f"{layer}bias"] = bias
    return {**rest, **out}


def save_pretrained(model: OpenVLAOFTModel, folder: str | Path, step: str | int = "latest") -> None:
    """Write a checkpoint in the published form, its components as safetensors.

    The recipe is not in it: no file of the published form says how many images are read or how long chunks are. Networks with
    FiLM are not written.

    Args:
        model: what to write.
        folder: where to.
        step: N in the components' names, a number or ``latest``.
    """
    from safetensors.torch import save_file

    assert model.film is None, "FiLM is not written"
    save_vla(model.vla, folder)
    for part, module in ((ACTION_HEAD, model.action_head), (PROPRIO, model.proprio_projector)):
        if module is not None:
            tensors = {name: p.detach().to(model.vla.dtype).contiguous() for name, p in module.named_parameters()}
            save_file(tensors, Path(folder) / f"{part}--{step}_checkpoint.safetensors", metadata={"format": "pt"})
