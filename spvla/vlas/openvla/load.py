"""OpenVLA policies by name: a checkpoint in the published form, read without remote code, or random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spvla.errors import InputError
from spvla.fields import naming
from spvla.hub import resolve_folder
from spvla.pruning.selector import TokenSelector
from spvla.vlas.adapter import own_statistics, require_same_inputs, with_adapter_statistics
from spvla.vlas.checkpoint import checkpoint_folder, read_tokenizer, weight_files
from spvla.vlas.conventions import CONVENTIONS, Conventions, conventions_by_name
from spvla.vlas.openvla.config import OpenVLAConfig
from spvla.vlas.openvla.model import OpenVLAModel
from spvla.vlas.openvla.policy import OpenVLA
from spvla.vlas.openvla.statistics import ActionStatistics, statistics_of_suite
from spvla.vlas.openvla.weights import FLOAT32, load_adapter, load_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def from_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unnorm_key: str | None = None,
    suite: str | None = None,
    conventions: Conventions | str | None = None,
    adapter: str | Path | None = None,
    merge_adapter: bool = False,
    selector: TokenSelector | None = None,
    control_rate: float | None = None,
) -> OpenVLA:
    """Load a checkpoint in the published form.

    Each tensor goes from the file straight to its place on the device: the peak is the model itself.

    Args:
        path: a folder, or hf://owner/name[@revision].
        device, dtype: where the weights go, and as what.
        unnorm_key: data set whose statistics give actions their unit (``libero_object`` also finds
            ``libero_object_no_noops``); may be left out if there is only one.
        suite: LIBERO suite whose statistics are meant where ``unnorm_key`` is None.
        conventions, control_rate: see :class:`OpenVLAModel`.
        selector: see :class:`OpenVLA`.
        adapter: a PEFT LoRA folder or hf://owner/name for this model.
        merge_adapter: add the adapter into the weights (faster) instead of computing it beside them.

    Raises:
        InputError: anything missing, unknown, extra or of the wrong shape; the message names it and its file.
    """
    folder = checkpoint_folder(path)
    config = OpenVLAConfig.read(folder)
    extra = None if adapter is None else resolve_folder(adapter)
    if unnorm_key is None and suite is not None:
        own = {} if extra is None else own_statistics(extra)
        unnorm_key = statistics_of_suite(own, suite) or statistics_of_suite(config.norm_stats, suite)
    if extra is not None:
        config = replace(config, norm_stats=with_adapter_statistics(config.norm_stats, folder, extra, unnorm_key))
        require_same_inputs(folder, extra)
    model = load_model(folder, config, torch.device(device), dtype, unnorm_key, conventions, control_rate)
    if extra is not None:
        load_adapter(model, extra, merge_adapter)
    return OpenVLA(model.eval(), selector)


def load_model(
    folder: Path,
    config: OpenVLAConfig,
    device: torch.device,
    dtype: torch.dtype,
    unnorm_key: str | None,
    conventions: Conventions | str | None,
    control_rate: float | None,
) -> OpenVLAModel:
    """The network of a checkpoint's folder with its tokenizer and weights; arguments, errors as :func:`from_pretrained`'s."""
    with naming(folder):
        ActionStatistics.find(config.norm_stats, unnorm_key)
    files = weight_files(folder)
    tokenizer = read_tokenizer(folder)
    with naming(folder), torch.device("meta"):
        model = OpenVLAModel(
            config, tokenizer=tokenizer, unnorm_key=unnorm_key, conventions=conventions, control_rate=control_rate
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= (rows := model.language_model.config.vocab_size):
        raise InputError(f"{folder / 'tokenizer.json'}: has token id {largest}, but config.json's vocabulary has {rows} ids")
    load_tensors(model, files, device, dtype)
    return model


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
    eager: bool = False,
) -> OpenVLA:
    """The policy ``openvla``: :func:`from_pretrained` with options as a configuration file writes them.

    Args:
        checkpoint: folder or hf://owner/name.
        suite: LIBERO suite that it will act in: brings the conventions ``libero`` and the suite's statistics.
        unnorm_key: data set whose statistics give actions their unit; None: the suite's, or the only ones.
        conventions: a name, or changes such as ``{center_crop: 1.0}`` to LIBERO's (without a suite: to none).
        device: as torch names it; None: a GPU if there is one.
        dtype: float32, bfloat16 or float16; None: bfloat16 on a GPU, else float32.
        adapter: PEFT LoRA folder or hf://owner/name.
        merge_adapter: add the adapter into the weights.
        control_rate: control steps per second (Hz); None: the conventions' own, or 5.
        eager: let transformers' own forward pass of the language model read: the reference, which is slower.

    Raises:
        InputError: as :func:`from_pretrained`; no checkpoint; an unknown device, type or convention.
    """
    if checkpoint is None:
        raise InputError("policy 'openvla' needs a checkpoint: a folder or hf://owner/name")
    place, as_type = placement(device, dtype)
    policy = from_pretrained(
        checkpoint,
        device=place,
        dtype=as_type,
        unnorm_key=unnorm_key,
        suite=suite,
        conventions=conventions_of_suite(conventions, suite),
        adapter=adapter,
        merge_adapter=merge_adapter,
        control_rate=control_rate,
    )
    policy.model.eager = eager
    return policy


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
        raise InputError(f"dtype {dtype!r} is unknown; available: {', '.join(DTYPES)}")
    return place, DTYPES[dtype]


def conventions_of_suite(conventions: Mapping[str, Any] | str | None, suite: str | None) -> Conventions:
    """LIBERO's conventions for a suite, none without one; by ``conventions`` others, or these with changes."""
    return conventions_by_name(conventions, CONVENTIONS["libero"] if suite is not None else Conventions())


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
        raise InputError(f"untrained: {unknown[0]!r} is unknown; available: {', '.join(OpenVLAConfig.__dataclass_fields__)}")
    place, as_type = placement(device, dtype)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    parsed = OpenVLAConfig.from_dicts(values)
    torch.manual_seed(seed)
    model = OpenVLAModel(parsed, tokenizer=tokenizer, conventions=conventions_of_suite(conventions, suite)).to(place)
    for name, parameter in model.named_parameters():
        if FLOAT32 not in name:
            parameter.data = parameter.data.to(as_type)
    return OpenVLA(model.eval())
