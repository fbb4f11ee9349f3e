"""The policy type ``spvla`` in LeRobot's terms."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_spvla.configuration_spvla import SpvlaConfig
from lerobot_policy_spvla.environment import switched_off
from lerobot_policy_spvla.lanes import Lanes
from lerobot_policy_spvla.processor_spvla import Units, base_processors
from spvla.errors import InputError

logger = logging.getLogger("spvla")


class SpvlaPolicy(PreTrainedPolicy):
    """A LeRobot policy that is asked only when it has to be.

    Args:
        config: names the base and what accelerates it.

    Raises:
        SystemExit: with code 2, after one line with the reason, if these cannot be used.
    """

    config_class = SpvlaConfig
    name = "spvla"

    def __init__(self, config: SpvlaConfig, *_: Any, **__: Any) -> None:
        super().__init__(config)
        try:
            base = config.base_config()
            self.base = get_policy_class(base.type).from_pretrained(str(config.base), config=base).eval()
            off = switched_off() or config.mode == "off"
            self.lanes = None if off else Lanes(self.base, config, Units(base_processors(base)))
        except InputError as error:
            logger.error("spvla: error: %s", error)
            raise SystemExit(2) from None
        if self.lanes is None:
            logger.info("spvla: off: every action is the base's")

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, config: SpvlaConfig | None = None, **options: Any) -> Any:
        """The policy of a folder, which holds no weights: they are the base's."""
        if config is None:
            config = SpvlaConfig.from_pretrained(pretrained_name_or_path)
        return cls(config)

    def _save_pretrained(self, save_directory: Path, state_dict: Any = None) -> None:
        self.config._save_pretrained(save_directory)

    def reset(self) -> None:
        """All lanes start an episode."""
        if self.lanes is None:
            self.base.reset()
        else:
            self.lanes.reset()

    def select_action(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """The actions (B, D), in the base's scale."""
        if self.lanes is None:
            return self.base.select_action(batch, **options)
        return self.lanes.act(batch)

    def predict_action_chunk(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """The base's plan: whoever executes plans by himself is not accelerated."""
        return self.base.predict_action_chunk(batch, **options)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        """It is not trained."""
        raise InputError("policy 'spvla' cannot be trained: train the base", code="not-trainable", field="policy.type")

    def get_optim_params(self) -> dict[str, Any]:
        """It is not trained."""
        return {}
