"""What comes in a LoRA adapter's folder beside its weights and holds for the data that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spvla.errors import InputError
from spvla.files import read_json
from spvla.vlas.checkpoint import read_tokenizer


def own_statistics(adapter: Path) -> dict[str, Any]:
    """The action statistics that a fine-tuning run left in its adapter folder, by data set; none if there are none."""
    config = adapter / "config.json"
    found = dict(read_json(config).get("norm_stats") or {}) if config.exists() else {}
    file = adapter / "dataset_statistics.json"
    return {**found, **(read_json(file) if file.exists() else {})}


def with_adapter_statistics(base: Mapping[str, Any], folder: Path, adapter: Path, unnorm_key: str | None) -> dict[str, Any]:
    """The statistics of a checkpoint and those of the adapter for it, which hold for the data that the adapter was trained on.

    Raises:
        InputError: both have some and no ``unnorm_key`` says which hold, or both have other numbers under one name (code
            ``statistics-ambiguous``).
    """
    own = own_statistics(adapter)
    places = f"{', '.join(base) or 'none'} in {folder}; {', '.join(own)} in {adapter}"
    if own and base and unnorm_key is None:
        raise InputError(
            f"unnorm_key: the checkpoint and its adapter both have action statistics; name the data set: {places}",
            code="statistics-ambiguous",
            field="unnorm_key",
        )
    for key in own.keys() & base.keys():
        if own[key].get("action") != base[key].get("action"):
            raise InputError(
                f"{adapter}: statistics of {key!r} differ from those in {folder}; rename or remove one of them ({places})",
                code="statistics-ambiguous",
                field=key,
            )
    return {**base, **own}


def require_same_inputs(folder: Path, adapter: Path) -> None:
    """Raise :class:`InputError` (code ``adapter-mismatch``) if an adapter comes with another tokenizer or image normalisation
    than its checkpoint: it was trained on other inputs."""
    if (adapter / "tokenizer.json").exists():
        mine, theirs = (read_tokenizer(f).get_vocab() for f in (folder, adapter))
        if mine != theirs:
            odd = sorted(mine.items() ^ theirs.items())
            raise InputError(
                f"{adapter / 'tokenizer.json'}: vocabulary differs from the checkpoint's, for example in {odd[0][0]!r}",
                code="adapter-mismatch",
                field="tokenizer.json",
            )
    files = [f / "preprocessor_config.json" for f in (folder, adapter)]
    if all(file.exists() for file in files):
        mine, theirs = map(read_json, files)
        for name in ("means", "stds", "interpolations"):
            if name in theirs and mine.get(name) != theirs[name]:
                raise InputError(
                    f"{files[1]}: {name} differ from the checkpoint's",
                    code="adapter-mismatch",
                    field=f"preprocessor.{name}",
                )
