"""The processors of the policy type ``spvla`` are the base's own, and how they are undone.

Inside LeRobot's loop a policy sees observations after its preprocessor and returns actions for its postprocessor. Generators
and gates work on the robot's own units, so :class:`Units` leads there and back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import (
    DeviceProcessorStep,
    NormalizerProcessorStep,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.utils.constants import OBS_STATE

from lerobot_policy_spvla.configuration_spvla import SpvlaConfig
from spvla.actions import FloatArray
from spvla.errors import InputError

REVERSIBLE = (UnnormalizerProcessorStep, DeviceProcessorStep, RenameObservationsProcessorStep)


def make_spvla_pre_post_processors(config: SpvlaConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """The base's pre- and postprocessor, for LeRobot. Statistics of a data set are ignored: the base has its own."""
    return base_processors(config.base_config())


def base_processors(config: PreTrainedConfig) -> tuple[Any, Any]:
    """Pre- and postprocessor beside a checkpoint, on its configuration's device.

    Raises:
        InputError: there are none (code ``no-processors``).
    """
    device = {"device_processor": {"device": str(config.device)}}
    try:
        return make_pre_post_processors(config, str(config.pretrained_path), preprocessor_overrides=device)
    except (OSError, ValueError, KeyError) as error:
        told = str(error).strip().splitlines()[0]
        raise InputError(
            f"{config.pretrained_path}: has no processors; LeRobot's migration script adds them to older checkpoints ({told})",
            code="no-processors",
            field="base",
        ) from None


class Units:
    """Between a policy's own scale and the robot's units.

    Args:
        processors: the base's pre- and postprocessor.

    Raises:
        InputError: a postprocessor that does more than scale actions (code ``unsupported-base``).
    """

    def __init__(self, processors: tuple[Any, Any]) -> None:
        before, self.after = processors
        odd = [type(s).__name__ for s in self.after.steps if not isinstance(s, REVERSIBLE)]
        if odd:
            raise InputError(
                f"base: its postprocessor has the step {odd[0]}, which cannot be undone: not supported",
                code="unsupported-base",
                field="base",
            )
        self._state = next((s for s in before.steps if isinstance(s, NormalizerProcessorStep)), None)
        self._action = next((s for s in self.after.steps if isinstance(s, UnnormalizerProcessorStep)), None)

    def states(self, batch: dict[str, Any]) -> FloatArray | None:
        """Proprioception of every lane, (B, S), in the robot's units; None for a policy without."""
        if OBS_STATE not in batch:
            return None
        state = batch[OBS_STATE]
        if self._state is not None:
            state = self._state._normalize_observation({OBS_STATE: state}, inverse=True)[OBS_STATE]
        out: FloatArray = state.detach().cpu().float().numpy()
        return out

    def to_robot(self, chunk: torch.Tensor) -> FloatArray:
        """A policy's actions (B, T, D) in the robot's units."""
        out: FloatArray = self.after(chunk).detach().cpu().float().numpy()
        return out

    def from_robot(self, action: FloatArray, like: torch.Tensor) -> torch.Tensor:
        """An action (D,) in the robot's units as the policy would have said it, with the device and type of ``like``."""
        out = torch.from_numpy(np.array(action, np.float32)).to(like.device)
        if self._action is not None:
            out = self._action._normalize_action(out[None], inverse=False)[0]
        return out.to(like.dtype)
