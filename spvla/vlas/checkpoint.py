"""Reading a model folder: JSON, tokenizer and safetensors, from disk or the Hugging Face hub. Never pickles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spvla.errors import InputError
from spvla.files import inside, read_json
from spvla.hub import hub_repository, resolve_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# Parts that decide actions beside the weights: OpenVLA-OFT's action head and its like.
COMPANION = re.compile(
    r"(\w+--\w+_checkpoint|(action_head|proprio_projector|noisy_action_projector)[\w.-]*)\.(pt|pth|bin|safetensors)"
)
QUANTISED = re.compile(
    r"\.(SCB|qweight|qzeros|scales|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|weight_scale(_inv)?|input_scale|"
    r"weight_format)$|\.quant_state\."
)
PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of a long list."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "") or "none"


def checkpoint_folder(path: str | Path) -> Path:
    """:func:`resolve_folder` of a checkpoint's whole model: raises :class:`InputError` as :func:`refuse_companions` does."""
    folder = resolve_folder(path)
    refuse_companions(path, folder)
    return folder


def refuse_companions(path: str | Path, folder: Path) -> None:
    """Raise :class:`InputError` (code ``unsupported-checkpoint``) if parts lie beside the weights that decide actions and are
    not read here: without its action head an OpenVLA-OFT folder would load and decode plausible nonsense.

    Args:
        path: what was asked for, a folder or hf://owner/name; of a hub repository the list of all files is looked at.
        folder: where it lies.
    """
    names = [p.name for p in folder.iterdir()]
    repository = hub_repository(path)
    if repository is not None:
        from huggingface_hub import list_repo_files

        try:
            names += list_repo_files(repository[0], revision=repository[1])
        except Exception:  # offline: only what was downloaded is known
            names += []
    companions = sorted({name for name in names if COMPANION.fullmatch(Path(name).name)})
    if companions:
        raise InputError(
            f"{path}: its actions come from {some(companions)}, which this VLA does not read; OpenVLA-OFT checkpoints are "
            "read as openvla_oft",
            code="unsupported-checkpoint",
            field=str(path),
        )


def refuse_quantised(config: Mapping[str, Any], where: Path) -> None:
    """Raise :class:`InputError` (code ``quantised-checkpoint``) if a ``config.json`` says that the weights are quantised."""
    for name, part in (("", config), ("text_config.", config.get("text_config") or {})):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
            raise _quantised(where, f"{name}quantization_config names the method {method!r}")


def _quantised(where: Path, how: str) -> InputError:
    return InputError(
        f"{where}: the weights are quantised ({how}); load the checkpoint in float32, float16 or bfloat16 and save it as it is",
        code="quantised-checkpoint",
        field=str(where),
    )


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Make an :class:`InputError` about ``what`` of whatever the tokenizers package raises: plain ``Exception``, and where its
    Rust code panics a ``BaseException`` of a class that cannot be imported."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what}: not a valid tokenizer ({error})", code="tokenizer", field=what) from None
        raise


def read_tokenizer(folder: Path) -> Tokenizer:
    """``tokenizer.json``, read as it is: nothing rebuilds its normaliser, nothing truncates a long prompt."""
    from tokenizers import Tokenizer

    file = inside(folder, "tokenizer.json")
    if not file.exists():
        raise InputError(f"{file}: missing (only the fast tokenizer format is read)")
    with tokenizer_errors(str(file)):
        tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or several shards.

    Raises:
        InputError: no such files; or a single file and an index of other files, which transformers settles silently (code
            ``two-weights``).
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise InputError(f"{index}: no weight_map of tensor names to file names")
        files = [inside(folder, name) for name in sorted(set(weight_map.values()))]
        if single.exists() and single not in files:
            raise InputError(
                f"{folder}: holds {single.name} and, by {index.name}, {some([f.name for f in files])}: which of them is the "
                "model? Transformers would read the first; delete what is out of date",
                code="two-weights",
                field=str(folder),
            )
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: missing, though {index.name} names it", code="missing", field=str(file))
        return files
    if single.exists():
        return [inside(folder, single.name)]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise InputError(
            f"{folder}: the weights are pickles ({some(pickles)}), which can run code when loaded; convert them to safetensors"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors. Raises :class:`InputError` if it is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file ({error})") from None
    if packed := [name for name in shapes if QUANTISED.search(name)]:
        raise _quantised(file, f"it holds {some(packed, 2)}")
    return shapes


def read_tensor(file: Path, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One tensor, on ``device`` and as ``dtype``. Raises :class:`InputError` for NaN, infinity and quantised values.

    The file is opened for this tensor alone and the tensor is a copy: nothing stays mapped, so the pages read for earlier
    tensors leave memory, and the file may be overwritten later.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt", device=str(device)) as handle:
        tensor: Tensor = handle.get_tensor(name)
        if tensor.dtype not in PLAIN:
            raise _quantised(file, f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}")
        return require_finite(tensor.to(dtype, copy=device.type == "cpu"), name, file)


def require_finite(tensor: Tensor, name: str, file: Path) -> Tensor:
    """``tensor`` itself. Raises :class:`InputError` for NaN or infinity in it, at no cost of memory."""
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        raise InputError(f"{file}: tensor {name!r} contains NaN or infinity")
    return tensor
