"""Eyes of a gate: a small encoder of what the camera shows now and of what it showed when the VLA last looked.

A gate without eyes knows what the robot did and felt, so it notices a moved object only when the VLA looks again. With eyes it
compares the scene with the one that the VLA's last answer was about. They are trained with the gate, and need the camera at
every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spvla.actions import FloatArray
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.history import Window
from spvla.observation import MAIN, Observation

OUTPUTS = 64  # values that the gate gets
CHANGE_GAIN = 4.0  # most pixels change little: bring their changes to order one
SHIFT = 3  # pixels by which training shifts both frames, at most
LIGHT = 0.15  # change of brightness and of contrast in training, at most


@dataclass(frozen=True)
class EyesConfig:
    """What a gate's eyes see, and the size of their encoder.

    Args:
        camera: its name in :class:`~spvla.observation.Observation`. In a store without cameras of these names,
            :data:`~spvla.observation.MAIN` is the main camera of the simulator, else the first.
        size: side of what is seen of its image (S), pixels; a multiple of 8.
        width: channels.
    """

    camera: str = MAIN
    size: int = 64
    width: int = 32

    def __post_init__(self) -> None:
        with naming("eyes"):
            check_fields(self, at_least={"size": 16, "width": 1}, at_most={"size": 64, "width": 64})
        if self.size % 8:
            raise InputError(f"eyes: size must be a multiple of 8, got {self.size}", field="size")

    def view(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What the eyes see of an image, uint8 (H, W, 3) to (S, S, 3): in training and on a robot."""
        import cv2  # a robot whose gate has no eyes does without

        return np.asarray(cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA), np.uint8)

    def look(self, observation: Observation) -> NDArray[np.uint8]:
        """What they see of an observation, uint8 (S, S, 3). Raises :class:`InputError` (code ``missing-camera``) if it has no
        image of the camera."""
        if observation.images.get(self.camera) is None:
            seen = ", ".join(observation.images) or "no images"
            raise InputError(
                f"observation.images: the export's gate has eyes and needs camera {self.camera!r} at every step; the "
                f"observation has {seen}",
                code="missing-camera",
                field=f"observation.images.{self.camera}",
            )
        return self.view(observation.require_image(self.camera))


def eyes_config(value: Any) -> EyesConfig | None:
    """``value`` as eyes: True or a map of fields; None and False mean none. Raises :class:`InputError` for anything else."""
    if value is None or isinstance(value, EyesConfig):
        return value
    if isinstance(value, bool):
        return EyesConfig() if value else None
    if isinstance(value, dict):
        known = EyesConfig.__dataclass_fields__
        for name in value:
            if name not in known:
                raise InputError(f"eyes: {name!r} is unknown; available: {', '.join(known)}", field="eyes")
        return EyesConfig(**value)
    raise InputError(f"eyes: expected true, false or a map of fields, got {value!r}", field="eyes")


class Eyes(nn.Module):
    """Two frames to :data:`OUTPUTS` values."""

    def __init__(self, config: EyesConfig) -> None:
        super().__init__()
        self.config = config
        w, side = config.width, config.size // 8
        self.net = nn.Sequential(
            nn.Conv2d(6, w, 4, stride=4),  # (B, w, S / 4, S / 4)
            nn.ReLU(),
            nn.Conv2d(w, w, 3, stride=2, padding=1),  # (B, w, S / 8, S / 8)
            nn.ReLU(),
            nn.Conv2d(w, w, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(w * side * side, OUTPUTS),
            nn.ReLU(),
        )

    def forward(self, window: Window) -> Tensor:
        """A window with frames to (B, OUTPUTS). Raises :class:`InputError` (code ``missing-camera``) if it has none."""
        if window.frame is None or window.vla_frame is None:
            raise InputError("gate: has eyes, but there are no frames in this window", code="missing-camera", field="images")
        now, then = torch.as_tensor(window.frame), torch.as_tensor(window.vla_frame)  # uint8 (B, S, S, 3)
        if now.shape[1:] != (self.config.size, self.config.size, 3):
            raise InputError(f"gate: its eyes see {self.config.size} pixels, the window's frames are {tuple(now.shape[1:3])}")
        if self.training:
            now, then = shifted(now, then)
        both = torch.stack([now, then], 1).permute(0, 1, 4, 2, 3) / 127.5 - 1.0  # (B, 2, 3, S, S)
        if self.training:
            both = relit(both)
        return self.net(torch.cat([both[:, 0], (both[:, 0] - both[:, 1]) * CHANGE_GAIN], 1))

    def rows(self, window: Window) -> FloatArray:
        """The same of a window of arrays, as an array."""
        with torch.inference_mode():
            return np.asarray(self(window).numpy(), np.float32)


def shifted(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """Both frames (B, S, S, 3) of each pair shifted alike, by up to :data:`SHIFT` pixels; edges are repeated."""
    rows, size = torch.arange(len(now))[:, None, None], now.shape[1]
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2, len(now), 1))
    y, x = ((torch.arange(size) + by).clamp(0, size - 1) for by in (down, right))
    return now[rows, y[:, :, None], x[:, None, :]], then[rows, y[:, :, None], x[:, None, :]]


def relit(both: Tensor) -> Tensor:
    """Pairs of frames (B, 2, 3, S, S) in another light, the same for both."""
    contrast, brightness = (torch.rand(2, len(both), 1, 1, 1, 1, device=both.device) * 2 - 1) * LIGHT
    return both * (1 + contrast) + brightness
