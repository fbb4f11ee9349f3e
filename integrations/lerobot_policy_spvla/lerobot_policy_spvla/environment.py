"""``SPVLA_EXPORT=DIR SPVLA_RISK=0.05 lerobot-... --policy.path=BASE``: the same without a flag.

LeRobot's commands read ``--policy.path`` by ``PreTrainedConfig.from_pretrained(path, cli_overrides=...)``, after they have
imported this package. That one class method is wrapped: where a command asks it for a policy, it is given the configuration of
``spvla`` with that policy as its base. LeRobot offers plugins no hook for it. Loading policies from Python is left alone.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig

from lerobot_policy_spvla.configuration_spvla import SpvlaConfig
from spvla.errors import InputError
from spvla.export import check_risk, load_export

EXPORT, RISK, SCHEDULER = "SPVLA_EXPORT", "SPVLA_RISK", "SPVLA_SCHEDULER"
SWITCH = "SPVLA"  # whose value "off" leaves the base alone
logger = logging.getLogger("spvla")


def switched_off() -> bool:
    """Whether the environment says so."""
    return os.environ.get(SWITCH, "").lower() == "off"


def accelerate_by_environment() -> None:
    """Let commands accelerate the policy that they load, if the environment names an export."""
    if not os.environ.get(EXPORT) or switched_off():
        return
    own = PreTrainedConfig.from_pretrained.__func__
    if getattr(own, "accelerated", False):
        return

    @functools.wraps(own)
    def from_pretrained(cls: Any, pretrained_name_or_path: str | Path, **options: Any) -> Any:
        config = own(cls, pretrained_name_or_path, **options)
        if "cli_overrides" not in options or isinstance(config, SpvlaConfig):
            return config
        return accelerated(config, str(pretrained_name_or_path), list(options["cli_overrides"] or []))

    from_pretrained.accelerated = True  # type: ignore[attr-defined]
    PreTrainedConfig.from_pretrained = classmethod(from_pretrained)


def accelerated(config: PreTrainedConfig, path: str, overrides: list[str]) -> PreTrainedConfig:
    """The configuration of ``spvla`` around the policy at ``path``; ``config`` itself, after one line, if that cannot be."""
    try:
        risk = os.environ.get(RISK)
        try:
            allowed = None if risk is None else float(risk)
        except ValueError:
            raise InputError(f"{RISK}: {risk!r} is not a number", field=RISK) from None
        if allowed is not None:
            check_risk(allowed)
        load_export(os.environ[EXPORT])
    except InputError as error:
        logger.error("spvla: off, the policy is left alone: %s", error)
        return config
    return SpvlaConfig(
        base=path,
        base_overrides=overrides,
        export=os.environ[EXPORT],
        risk=allowed,
        scheduler=os.environ.get(SCHEDULER),
        device=config.device,
        use_amp=config.use_amp,
        input_features=config.input_features,
        output_features=config.output_features,
    )
