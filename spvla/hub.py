"""Where a checkpoint or an export is: a folder here, one that comes with the package, or a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from spvla.errors import InputError

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB = "hf://"
ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
PRETRAINED = Path(__file__).parent / "pretrained"


def packaged(path: str | Path) -> Path:
    """``path``, or the folder of that name in the package where there is none here."""
    inside = PRETRAINED / path
    return inside if not Path(path).is_dir() and len(Path(path).parts) == 1 and inside.is_dir() else Path(path)


def hub_repository(path: str | Path) -> tuple[str, str | None] | None:
    """Name and revision of ``hf://owner/name[@revision]``; None for anything that does not begin with ``hf://``.

    Raises:
        InputError: it begins so and goes on otherwise (code ``hub-address``).
    """
    if not str(path).startswith(HUB):
        return None
    found = ADDRESS.fullmatch(str(path))
    if found is None:
        raise InputError(f"{path}: expected hf://owner/name or hf://owner/name@revision", code="hub-address", field=str(path))
    return found[1], found[2]


def resolve_folder(path: str | Path, *more: str) -> Path:
    """A folder here, one in the package by its name, or the downloaded copy of ``hf://owner/name[@revision]`` (no pickles).

    ``more``: patterns of further files to download, which whoever opens them must treat as hostile.

    Only ``hf://`` downloads: a folder's name with a mistake in it must not bring somebody else's files.

    Raises:
        InputError: there is none (code ``no-such-folder``), or see :func:`hub_repository`.
    """
    repository = hub_repository(path)
    if repository is None:
        folder = packaged(path)
        if folder.is_dir():
            return folder
        told = f"a repository on the Hugging Face hub is {HUB}owner/name"
        missing = "is not a folder; " if folder.exists() else "no such folder; "
        raise InputError(f"{path}: {missing}{told}", code="no-such-folder", field=str(path))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        name, revision = repository
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md", *more]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # LocalEntryNotFoundError is an OSError
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not found on the hub ({reason})", code="no-such-folder", field=str(path)) from None


def pinned(path: str | Path, folder: Path) -> str | None:
    """``hf://owner/name@commit`` of a ``folder`` that :func:`resolve_folder` found for ``path``: what will always be the same
    files, whatever a branch becomes. None if they do not come from the hub."""
    repository = hub_repository(path)
    return None if repository is None else f"{HUB}{repository[0]}@{folder.name}"  # the library's snapshots/<commit>


def upload_folder(folder: Path, name: str, *, private: bool, message: str, token: str | None = None) -> str:
    """Upload ``folder`` as one commit to the repository ``owner/name``, made if there is none; files of an earlier version that
    are not in it any more are deleted.

    Returns:
        the commit's address, ``hf://owner/name@commit``.

    Raises:
        InputError: ``name`` is not one (code ``hub-address``), or the hub refuses (code ``hub-refused``).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if hub_repository(f"{HUB}{name}") != (name, None):
        raise InputError(f"{name}: expected owner/name", code="hub-address", field=name)
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        old = ["generators/*", "gates/*"]
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=old)
    except (HfHubHTTPError, HFValidationError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{name}: the hub did not take the upload ({reason})", code="hub-refused", field=name) from None
    return f"{HUB}{name}@{done.oid}"
