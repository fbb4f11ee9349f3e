"""OpenVLA-OFT policies by name: a checkpoint in the published form, read without remote code, or random weights."""

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
from spvla.vlas.conventions import Conventions
from spvla.vlas.openvla.config import OpenVLAConfig
from spvla.vlas.openvla.load import conventions_of_suite, load_model, placement
from spvla.vlas.openvla.load import untrained as untrained_openvla
from spvla.vlas.openvla.statistics import statistics_of_suite
from spvla.vlas.openvla_oft.components import (
    ACTION_HEAD,
    PROPRIO,
    VISION,
    fill,
    fill_vision,
    find_components,
    read_component,
)
from spvla.vlas.openvla_oft.model import OpenVLAOFTModel
from spvla.vlas.openvla_oft.policy import OpenVLAOFT
from spvla.vlas.openvla_oft.recipe import ProprioStatistics, Recipe, make_recipe, with_bounds

COMPONENTS = "*--*_checkpoint.pt"  # downloaded beside what every checkpoint has


def from_pretrained(
    path: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unnorm_key: str | None = None,
    suite: str | None = None,
    conventions: Conventions | str | None = None,
    step: str | int | None = None,
    selector: TokenSelector | None = None,
    control_rate: float | None = None,
) -> OpenVLAOFT:
    """Load a checkpoint in the published form.

    Args:
        path: a folder, or hf://owner/name[@revision].
        recipe: how it was fine-tuned: ``libero``, a :class:`Recipe`, or a map of changes to LIBERO's.
        device, dtype: where the weights go, and as what.
        unnorm_key, suite, conventions, control_rate: as for :func:`spvla.vlas.openvla.from_pretrained`.
        step: N of ``action_head--N_checkpoint.pt`` if there are several.
        selector: see :class:`OpenVLAOFT`.

    Raises:
        InputError: anything missing, unknown, extra or of the wrong shape; the message names it and its file.
    """
    recipe = make_recipe(recipe)
    folder = resolve_folder(path, COMPONENTS)
    files, recipe = used_components(folder, recipe, step)
    tensors = {part: read_component(file) for part, file in files.items()}  # before gigabytes are
    config = OpenVLAConfig.read(folder)
    config = replace(config, norm_stats=with_bounds(config.norm_stats, recipe.normalization))
    if unnorm_key is None and suite is not None:
        unnorm_key = statistics_of_suite(config.norm_stats, suite)
    vla = load_model(folder, config, torch.device(device), dtype, unnorm_key, conventions, control_rate)
    assert vla.statistics is not None
    with naming(folder):
        proprio = None
        if recipe.proprio:
            proprio = ProprioStatistics.find(config.norm_stats, vla.statistics.key, recipe.normalization)
    with torch.device(device):
        model = OpenVLAOFTModel(vla, recipe, proprio)
    for part, module in ((ACTION_HEAD, model.action_head), (PROPRIO, model.proprio_projector)):
        if module is not None:
            fill(module.to(dtype), tensors[part], files[part])
    if model.film is not None:
        fill_vision(vla.vision_backbone, model.film.to(dtype), tensors[VISION], files[VISION])
    return OpenVLAOFT(model.eval(), selector)


def used_components(folder: Path, recipe: Recipe, step: str | int | None) -> tuple[dict[str, Path], Recipe]:
    """The component files that are read, and the recipe with ``proprio`` and ``film`` decided.

    Raises:
        InputError: as :func:`find_components`; one that is needed is not there (code ``missing``).
    """
    found = find_components(folder, step)
    if ACTION_HEAD not in found:
        raise InputError(
            f"{folder}: no {ACTION_HEAD}--N_checkpoint.pt; chunks of action tokens are not read here, and a checkpoint that "
            "decodes one action is read as openvla",
            code="missing",
            field=ACTION_HEAD,
        )
    for part, wanted in ((PROPRIO, recipe.proprio), (VISION, recipe.film)):
        if wanted and part not in found:
            raise InputError(f"{folder}: no {part}--N_checkpoint.pt, though the recipe asks for it", code="missing", field=part)
        if wanted is False:
            found.pop(part, None)
    return found, replace(recipe, proprio=PROPRIO in found, film=VISION in found)


def load(
    checkpoint: str | None = None,
    *,
    suite: str | None = None,
    recipe: Mapping[str, Any] | str | None = None,
    unnorm_key: str | None = None,
    conventions: Mapping[str, Any] | str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    step: str | int | None = None,
    control_rate: float | None = None,
) -> OpenVLAOFT:
    """The policy ``openvla_oft``: :func:`from_pretrained` with options as a configuration file writes them.

    Args:
        checkpoint: folder or hf://owner/name.
        suite: LIBERO suite that it will act in: brings the recipe and the conventions ``libero`` and the suite's statistics.
        recipe: a name, or changes such as ``{cameras: [image], chunk: 5}`` to LIBERO's; needed without a suite.
        unnorm_key, conventions, device, dtype, control_rate: as for :func:`spvla.vlas.openvla.load`.
        step: N of ``action_head--N_checkpoint.pt`` if there are several.

    Raises:
        InputError: as :func:`from_pretrained`; no checkpoint or recipe; an unknown device, type or convention.
    """
    if checkpoint is None:
        raise InputError("policy 'openvla_oft' needs a checkpoint: a folder or hf://owner/name")
    place, as_type = placement(device, dtype)
    return from_pretrained(
        checkpoint,
        recipe=make_recipe(recipe, suite),
        device=place,
        dtype=as_type,
        unnorm_key=unnorm_key,
        suite=suite,
        conventions=conventions_of_suite(conventions, suite),
        step=step,
        control_rate=control_rate,
    )


def untrained(
    checkpoint: str | None = None,
    *,
    suite: str | None = None,
    recipe: Mapping[str, Any] | str | None = None,
    state_dim: int = 8,
    seed: int = 0,
    **options: Any,
) -> OpenVLAOFT:
    """A model of any size with random weights, to time and to try commands with: ``spvla.vlas.openvla_oft:untrained``.

    Args:
        checkpoint: None; there is nothing to load.
        suite, recipe: as for :func:`load`; None of either: LIBERO's recipe. It reads proprioception unless told otherwise.
        state_dim: S, values of the state, which lie in [-1, 1].
        seed: of the weights.
        options: as for :func:`spvla.vlas.openvla.untrained`.
    """
    made = make_recipe(recipe or "libero")
    made = replace(made, proprio=made.proprio is not False, film=bool(made.film))
    vla = untrained_openvla(checkpoint, suite=suite, seed=seed, **options).model
    proprio = ProprioStatistics([-1.0] * state_dim, [1.0] * state_dim) if made.proprio else None
    model = OpenVLAOFTModel(vla, made, proprio)
    for part in (model.action_head, model.proprio_projector, model.film):
        if part is not None:
            part.to(vla.device, vla.dtype)
    return OpenVLAOFT(model.eval())
