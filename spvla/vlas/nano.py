"""The small VLAs that come with the package, trained on LIBERO (``configs/train/nano_vla.yaml``, ``nano_oft.yaml``).

``nano_vla`` is of OpenVLA's class: one action a call. ``nano_oft`` is of OpenVLA-OFT's and continues it: 16 actions a call.
"""

from __future__ import annotations

from typing import Any

from spvla.errors import InputError
from spvla.hub import PRETRAINED
from spvla.observation import MAIN
from spvla.vlas.base import VLA
from spvla.vlas.registry import load_vla

RECIPE = {"cameras": [MAIN], "chunk": 16, "proprio": True, "film": False}


def load(checkpoint: str | None = None, *, suite: str | None = None, **options: Any) -> VLA:
    """The policy ``nano_vla``.

    Args:
        checkpoint: a folder with other weights, such as a training run's; None: the packaged ones.
        suite: not needed: one set of statistics serves every suite.
        options: as for :func:`spvla.vlas.openvla.load`; LIBERO's conventions unless others are given.

    Raises:
        InputError: as that function; the packaged weights are absent.
    """
    return load_vla("openvla", checkpoint or _packaged("nano_vla"), {"conventions": "libero", **options})


def load_oft(checkpoint: str | None = None, *, suite: str | None = None, **options: Any) -> VLA:
    """The policy ``nano_oft``: as :func:`load`, with the options of :func:`spvla.vlas.openvla_oft.load`.

    It reads the main camera and the robot's state; the recipe is the packaged weights' unless another is given.
    """
    named = {"conventions": "libero", "recipe": RECIPE, **options}
    return load_vla("openvla_oft", checkpoint or _packaged("nano_oft"), named)


def _packaged(name: str) -> str:
    folder = PRETRAINED / name
    if not (folder / "config.json").exists():
        raise InputError(
            f"policy {name!r}: this installation has no packaged weights ({folder}); name a checkpoint, or train one "
            f"with `python -m train fit --config configs/train/{name}.yaml`"
        )
    return str(folder)
