"""Images as the vision encoders want them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spvla.actions import FloatArray
from spvla.vlas.conventions import UInt8Array
from spvla.vlas.openvla.config import OpenVLAConfig


def pixel_values(image: UInt8Array, config: OpenVLAConfig) -> Tensor:
    """An image, uint8 (H, W, 3) RGB, resized and normalised for each encoder: float32 (3 x encoders, S, S)."""
    return standardized(resized(image, config), config)


def resized(image: UInt8Array, config: OpenVLAConfig) -> list[UInt8Array]:
    """What each encoder sees of ``image`` (H, W, 3): uint8 (S, S, 3). Encoders of one size and filter share it."""
    filters = config.interpolations or ["bicubic"] * len(config.image_sizes)
    which = list(zip(config.image_sizes, filters, strict=True))
    made = {
        (s, f): np.array(Image.fromarray(image).resize((s, s), Image.Resampling[f.upper()])) for s, f in dict.fromkeys(which)
    }
    return [made[key] for key in which]


def standardized(views: Sequence[UInt8Array], config: OpenVLAConfig) -> Tensor:
    """Each encoder's view with its own mean and spread: float32 (3 x encoders, S, S)."""
    out = []
    for i, (vit, view) in enumerate(zip(config.encoders, views, strict=True)):
        mean = config.image_means[i] if config.image_means else vit.mean
        std = config.image_stds[i] if config.image_stds else vit.std
        levels = _levels(tuple(mean), tuple(std))
        out.append(np.stack([np.take(levels[c], view[..., c]) for c in range(3)]))
    return torch.from_numpy(np.concatenate(out))  # (3 x encoders, S, S)


@lru_cache
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> FloatArray:
    """What each of the 256 levels of each channel becomes, (3, 256)."""
    x = torch.arange(256).float() / 255
    levels: FloatArray = ((x - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).numpy()
    return levels
