"""Where a checkpoint or an export is: a folder here, one that comes with the package, or a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from spvla.errors import InputError

PRETRAINED = Path(__file__).parent / "pretrained"


def packaged(path: str | Path) -> Path:
    """``path``, or the folder of that name in the package where there is none here."""
    inside = PRETRAINED / path
    return inside if not Path(path).is_dir() and len(Path(path).parts) == 1 and inside.is_dir() else Path(path)


def resolve_folder(path: str | Path) -> Path:
    """A folder here, one in the package by its name, or the downloaded copy of a hub repository (no pickles).

    Raises:
        InputError: there is none (code ``no-such-folder``).
    """
    folder, hub_id = packaged(path), str(path)
    if folder.is_dir():
        return folder
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise InputError(f"{hub_id}: no such folder", code="no-such-folder", field=hub_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # LocalEntryNotFoundError is an OSError
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{hub_id}: no such folder, and not found on the hub ({reason})", code="no-such-folder", field=hub_id
        ) from None
