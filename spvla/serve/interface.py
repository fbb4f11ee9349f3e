"""A benchmark's conventions as data: where images and state are, what is turned or converted, how it is declared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError, needs_extra
from spvla.fields import check_fields, naming
from spvla.observation import MAIN, WRIST, Observation, check_image
from spvla.wire import shorten

MAX_STATE = 4096  # values
MAX_PIXELS = 2**22  # of one image; those of 1080p are half as many


@dataclass(frozen=True)
class Interface:
    """What a benchmark sends and expects, where it differs from the policy's own environment. Specs are vla-eval's.

    Args:
        image: key of the main camera in an observation's ``images``.
        wrist_image: key of the camera in the hand, or None.
        cameras: keys of further cameras, by the names that the policy knows them by.
        state: key of the proprioception in an observation, or None where none is used.
        image_size: height and width that images must have, or None for any.
        rotate_180: turn images upside down, for a benchmark whose images the policy knows the other way up.
        euler_to_axis_angle: the policy's rotations are extrinsic xyz Euler angles, the benchmark reads rotation vectors.
        gripper_from, gripper_to: the policy's and the benchmark's values for closed and open; None: the same.
        action_spec: names of constants in ``vla_eval.specs`` by component, declared to the benchmark.
        observation_spec: likewise.
        benchmark: parameters that vla-eval hands to the benchmark's constructor, for example ``{send_state: true}``.
    """

    image: str = "agentview"
    wrist_image: str | None = None
    cameras: dict[str, str] = field(default_factory=dict)
    state: str | None = None
    image_size: tuple[int, int] | None = None
    rotate_180: bool = False
    euler_to_axis_angle: bool = False
    gripper_from: tuple[float, float] | None = None
    gripper_to: tuple[float, float] | None = None
    action_spec: dict[str, str] = field(default_factory=dict)
    observation_spec: dict[str, str] = field(default_factory=dict)
    benchmark: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with naming("interface"):
            check_fields(self, at_least={"image_size": 1})
        if named := (*self.action_spec.values(), *self.observation_spec.values()):
            _require_specs(named)
        if (self.gripper_from is None) != (self.gripper_to is None):
            raise InputError("interface: give both gripper_from and gripper_to, or neither")
        if self.gripper_from is not None and self.gripper_from[0] == self.gripper_from[1]:
            raise InputError("interface: gripper_from has the same value for closed and open")

    def observation(self, payload: Mapping[str, Any]) -> Observation:
        """A benchmark's observation as the policy takes it. Raises :class:`InputError` that names the field."""
        images = payload.get("images")
        if not isinstance(images, dict):
            raise InputError(f"images: expected a dict of arrays by camera, got {type(images).__name__}")
        state = None
        if self.state is not None:
            try:
                state = np.asarray(payload[self.state], np.float32)
            except KeyError:
                has = shorten(", ".join(map(str, payload)))
                raise InputError(f"{self.state}: missing; the observation has: {has}") from None
            except (TypeError, ValueError):
                raise InputError(f"{self.state}: expected numbers, got {type(payload[self.state]).__name__}") from None
            if state.size > MAX_STATE:
                raise InputError(f"{self.state}: {state.size} values are more than {MAX_STATE}")
        keys = {MAIN: self.image, WRIST: self.wrist_image, **self.cameras}
        return Observation({name: self._image(images, key) for name, key in keys.items() if key is not None}, state)

    def _image(self, images: Mapping[Any, Any], key: str) -> NDArray[np.uint8]:
        if key not in images:
            has = shorten(", ".join(map(str, images)))
            raise InputError(f"images[{key!r}]: missing; the observation has: {has or 'none'}")
        image = check_image(images[key], f"images[{key!r}]")
        if image.shape[0] * image.shape[1] > MAX_PIXELS:
            raise InputError(f"images[{key!r}]: {image.shape[0]} x {image.shape[1]} pixels exceed the limit of {MAX_PIXELS}")
        if self.image_size is not None and image.shape[:2] != tuple(self.image_size):
            raise InputError(f"images[{key!r}]: is {image.shape[:2]}, but this server was set up for {tuple(self.image_size)}")
        return np.ascontiguousarray(image[::-1, ::-1]) if self.rotate_180 else image

    def action(self, action: FloatArray, space: ActionSpace) -> FloatArray:
        """An action (..., D) of the policy as the benchmark takes it."""
        out = np.array(action, np.float32)
        if self.euler_to_axis_angle and space.rotation:
            dims = list(space.rotation)
            out[..., dims] = euler_to_axis_angle(out[..., dims])
        if self.gripper_from is not None and self.gripper_to is not None:
            (closed, opened), (to_closed, to_opened) = self.gripper_from, self.gripper_to
            g = list(space.gripper)
            out[..., g] = to_closed + (out[..., g] - closed) / (opened - closed) * (to_opened - to_closed)
        return out


def _require_specs(names: Iterable[str]) -> None:
    with needs_extra("serve"):
        from vla_eval import specs
    known = [name for name, value in vars(specs).items() if isinstance(value, specs.DimSpec)]
    for name in names:
        if name not in known:
            raise InputError(f"interface: vla-eval has no spec {name!r}; it has: {', '.join(known)}")


def euler_to_axis_angle(euler: FloatArray) -> FloatArray:
    """Extrinsic xyz Euler angles (..., 3) as rotation vectors (..., 3), angles up to pi."""
    half = np.asarray(euler, np.float64) / 2
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(half), -1, 0), np.moveaxis(np.sin(half), -1, 0)
    w = cx * cy * cz + sx * sy * sz
    xyz = [sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz]
    vector = np.stack(xyz, -1) * np.where(w < 0, -1.0, 1.0)[..., None]
    sine = np.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, np.abs(w)[..., None])
    return (vector * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2.0)).astype(np.float32)
