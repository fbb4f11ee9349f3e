"""Policies written elsewhere, as VLAs by composition: nothing of theirs is changed or copied.

* :class:`ForeignVLA`: any object with ``select_action(observation)`` and ``reset()``.
* :class:`LeRobotVLA`: a LeRobot ``PreTrainedPolicy`` that plans chunks from one observation (SmolVLA, pi0, pi0.5, ACT, ...).

A chunk's actions are executed as planned; when they are used up the gate decides whether the generator continues the
motion or the policy plans again. ``spvla.accelerate`` wraps by itself what it recognises (:func:`as_vla`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spvla.actions import ActionSpace, read_space
from spvla.errors import InputError
from spvla.hub import resolve_folder
from spvla.observation import Observation
from spvla.vlas.base import VLA, VLAOutput
from spvla.vlas.cameras import match_cameras
from spvla.vlas.conventions import Conventions, conventions_by_name


def as_vla(policy: Any, space: ActionSpace | None = None) -> VLA:
    """``policy`` itself if it is a VLA, else the adapter that fits, acting in ``space``.

    Raises:
        InputError: no adapter fits, or the action space is not known.
    """
    if isinstance(policy, VLA):
        return policy
    chunked = hasattr(policy, "predict_action_chunk") and hasattr(policy, "config")
    if not chunked and not (hasattr(policy, "select_action") and hasattr(policy, "reset")):
        raise InputError(
            f"policy {type(policy).__name__}: expected a VLA (reset, predict, action_space), a LeRobot policy, or an object "
            "with select_action(observation) and reset()"
        )
    if space is None:
        raise InputError(
            f"policy {type(policy).__name__}: its action space is unknown; pass an export, or ForeignVLA(policy, space)"
        )
    return LeRobotVLA(policy, space) if chunked else ForeignVLA(policy, space)


class ForeignVLA:
    """Any object with ``select_action(observation)`` and ``reset()``, as a VLA.

    Args:
        policy: what acts. ``reset`` is given the instruction if it takes an argument. ``select_action`` returns an action (D,)
            or a chunk (T, D), as an array or tensor, in environment units; see :func:`_actions` for what else is read.
        space: the space of its actions.
        convert: makes the policy's input from an :class:`~spvla.Observation` and the instruction; None: the observation itself.
        forgetful: ``reset`` it before each call. Needed by one that queues a chunk inside ``select_action``: while the
            generator acts that queue grows old. Better have such a policy return its chunks.
    """

    def __init__(
        self,
        policy: Any,
        space: ActionSpace,
        convert: Callable[[Observation, str], Any] | None = None,
        *,
        forgetful: bool = False,
    ) -> None:
        self.policy, self.action_space, self.convert, self.forgetful = policy, space, convert, forgetful
        self.instruction = ""
        takes = inspect.signature(policy.reset).parameters.values()
        self._told = any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in takes)

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.instruction = instruction
        self._reset()

    def _reset(self) -> None:
        if self._told:
            self.policy.reset(self.instruction)
        else:
            self.policy.reset()

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """Ask the policy. Raises :class:`InputError` if what it returns is neither an action nor a chunk."""
        if self.forgetful:
            self._reset()
        given = observation if self.convert is None else self.convert(observation, self.instruction)
        return VLAOutput(_actions(self.policy.select_action(given), type(self.policy).__name__))


def _actions(value: Any, who: str) -> Any:
    """What a policy returned as float32 (T, D).

    Read are an action (D,) and a chunk (T, D), as array, tensor or list of such, and a dict that holds one of these as
    ``action`` or ``actions``. Everything else may mean several things and is refused.
    """
    expected = "expected an action (D,) or a chunk (T, D) in environment units"
    if isinstance(value, Mapping):
        keys = [key for key in ("action", "actions") if key in value]
        if len(keys) != 1:
            raise _unreadable(f"{who}: returned a dict with {', '.join(map(str, value))}; {expected}, or a dict with action")
        value = value[keys[0]]
    if isinstance(value, tuple) and any(np.ndim(_array(part)) for part in value):
        raise _unreadable(f"{who}: returned a tuple of {len(value)} arrays, of which only you know the action; {expected}")
    try:
        actions = np.asarray(_array(value), np.float32)
    except (TypeError, ValueError, RuntimeError):
        raise _unreadable(f"{who}: returned {type(value).__name__}, {expected}") from None
    if actions.ndim not in (1, 2) or value is None:
        raise _unreadable(f"{who}: returned {'None' if value is None else f'an array of shape {actions.shape}'}, {expected}")
    return np.atleast_2d(actions)


def _array(value: Any) -> Any:
    """``value`` with every tensor in it as an array."""
    if hasattr(value, "detach"):
        return value.detach().cpu().float().numpy()
    return type(value)(map(_array, value)) if type(value) in (list, tuple) else value


def _unreadable(message: str) -> InputError:
    return InputError(message, code="unreadable-action", field="select_action")


class LeRobotVLA:
    """A LeRobot ``PreTrainedPolicy`` as a chunked VLA: ``n_action_steps`` of each planned chunk are executed.

    Args:
        policy: one that plans from a single observation; its own action queue stays unused.
        space: the space of its actions.
        processors: LeRobot's pre- and post-processor; None: those at the config's ``pretrained_path``, if it has one.
        cameras: which of the robot's cameras each of its image features is, ``{"observation.images.top": "image"}``; None: by
            the features' names (:func:`match_cameras`).
        conventions: image steps before LeRobot's own, for example ``{rotate_180: true}`` in LIBERO.

    Raises:
        InputError: a policy that needs every observation (``n_obs_steps`` > 1, temporal ensembling): not supported; image
            features that cannot be matched.
    """

    def __init__(
        self,
        policy: Any,
        space: ActionSpace,
        processors: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None,
        *,
        cameras: Mapping[str, str] | None = None,
        conventions: Conventions | Mapping[str, Any] | str | None = None,
    ) -> None:
        config, name = policy.config, type(policy).__name__
        if getattr(config, "n_obs_steps", 1) != 1:
            raise InputError(
                f"{name}: needs {config.n_obs_steps} observations in a row, but skipped steps record none: not supported"
            )
        if getattr(config, "temporal_ensemble_coeff", None) is not None:
            raise InputError(
                f"{name}: temporal ensembling calls the policy at every step: not supported; set n_action_steps instead"
            )
        features = dict(config.image_features or {})
        self.image_features = match_cameras(features, name, cameras)
        outputs = config.action_feature
        if outputs is not None and outputs.shape[0] != space.dim:
            raise InputError(
                f"{name}: its actions have {outputs.shape[0]} dimensions, but the action space {space.name!r} has {space.dim}"
            )
        if processors is None:
            from lerobot.policies.factory import make_pre_post_processors

            if config.pretrained_path is None:
                raise InputError(
                    f"{name}: does not say where its processors are; use LeRobotVLA(policy, space, (pre, post)) or "
                    "spvla.vlas.foreign.load_lerobot(checkpoint)"
                )
            device = {"device_processor": {"device": str(config.device)}}
            processors = make_pre_post_processors(config, str(config.pretrained_path), preprocessor_overrides=device)
        self.policy, self.action_space = policy.eval(), space
        self.cameras = tuple(self.image_features.values())
        self.needs_images = bool(self.cameras)
        self.before: Callable[[Any], Any] = processors[0]
        self.after: Callable[[Any], Any] = processors[1]
        self.conventions = conventions_by_name(conventions)
        self.instruction = ""
        # These fit images themselves; the others take what they were trained on.
        fits = getattr(config, "resize_imgs_with_padding", None) or getattr(config, "image_resolution", None)
        self.sizes = {} if fits else {key: tuple(features[key].shape[-2:]) for key in self.image_features}

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.instruction = instruction
        self.policy.reset()

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """Plan a chunk (T, D). Raises :class:`InputError` if an image or the state is missing or has another size."""
        import torch
        from lerobot.policies.utils import prepare_observation_for_inference

        config = self.policy.config
        given: dict[str, Any] = {}
        for key, ours in self.image_features.items():
            image = observation.require_image(ours)
            image = self.conventions.apply_image(image, max(image.shape[:2]))
            if key in self.sizes and image.shape[:2] != self.sizes[key]:
                raise InputError(f"observation.images.{ours}: is {image.shape[:2]}; {key} of the policy is {self.sizes[key]}")
            given[key] = np.ascontiguousarray(image)
        if config.robot_state_feature is not None:
            size = config.robot_state_feature.shape[0]
            if observation.state is None or observation.state.shape != (size,):
                shape = None if observation.state is None else observation.state.shape
                raise InputError(f"observation.state: the policy needs shape ({size},), got {shape}")
            given["observation.state"] = np.array(observation.state, np.float32)
        with torch.inference_mode():
            batch = self.before(prepare_observation_for_inference(given, torch.device(config.device), self.instruction))
            chunk = self.after(self.policy.predict_action_chunk(batch))  # (1, T, D)
        return VLAOutput(_actions(chunk[0, : config.n_action_steps], type(self.policy).__name__))


def load_lerobot(
    checkpoint: str | None = None,
    *,
    action_space: Mapping[str, Any] | str = "libero",
    device: str | None = None,
    n_action_steps: int | None = None,
    cameras: dict[str, str] | None = None,
    conventions: Mapping[str, Any] | str | None = None,
) -> LeRobotVLA:
    """The policy ``lerobot``: a checkpoint in LeRobot's form, by path or hf://owner/name.

    Args:
        checkpoint: folder or hf://owner/name.
        action_space: see :func:`~spvla.actions.read_space`.
        device: as torch names it; None: the checkpoint's own.
        n_action_steps: actions of a chunk to execute; None: the checkpoint's own.
        cameras, conventions: see :class:`LeRobotVLA`.

    Raises:
        InputError: LeRobot is not installed, no checkpoint, or one that is not supported.
    """
    if checkpoint is None:
        raise InputError("policy 'lerobot' needs a checkpoint: a folder or hf://owner/name")
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class
    except ImportError as error:
        raise InputError(f"policy 'lerobot' needs LeRobot in this environment (pip install lerobot): {error}") from None
    checkpoint = str(resolve_folder(checkpoint))
    try:
        config = PreTrainedConfig.from_pretrained(checkpoint)
    except Exception as error:  # the hub, draccus and json raise types of their own
        told = f"checkpoint {checkpoint!r}: not a LeRobot policy ({str(error).splitlines()[0]})"
        raise InputError(told, code="not-a-policy", field="checkpoint") from None
    config.pretrained_path = checkpoint
    if device is not None:
        config.device = device
    if n_action_steps is not None:
        config.n_action_steps = n_action_steps
    policy = get_policy_class(config.type).from_pretrained(checkpoint, config=config)
    return LeRobotVLA(policy, read_space(action_space), cameras=cameras, conventions=conventions)
