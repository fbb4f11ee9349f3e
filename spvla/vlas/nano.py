"""The small VLA that comes with the package: OpenVLA's class, trained on LIBERO (``configs/train/nano_vla.yaml``)."""

from __future__ import annotations

from typing import Any

from spvla.errors import InputError
from spvla.hub import PRETRAINED
from spvla.vlas.base import VLA
from spvla.vlas.registry import load_vla

FOLDER = PRETRAINED / "nano_vla"


def load(checkpoint: str | None = None, *, suite: str | None = None, **options: Any) -> VLA:
    """The policy ``nano_vla``.

    Args:
        checkpoint: a folder with other weights, such as a training run's; None: the packaged ones.
        suite: not needed: one set of statistics serves every suite.
        options: as for :func:`spvla.vlas.openvla.load`; LIBERO's conventions unless others are given.

    Raises:
        InputError: as that function; the packaged weights are absent.
    """
    if checkpoint is None:
        if not (FOLDER / "config.json").exists():
            raise InputError(
                f"policy 'nano_vla': this installation has no packaged weights ({FOLDER}); name a checkpoint, or train one "
                "with `python -m train fit --config configs/train/nano_vla.yaml`"
            )
        checkpoint = str(FOLDER)
    return load_vla("openvla", checkpoint, {"conventions": "libero", **options})
