"""The policy type ``spvla``: another LeRobot policy, and what makes it faster."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig

from spvla.errors import InputError

READ = PreTrainedConfig.from_pretrained  # as LeRobot has it: the environment may wrap it


@PreTrainedConfig.register_subclass("spvla")
@dataclass
class SpvlaConfig(PreTrainedConfig):
    """A LeRobot policy that is asked only when it has to be.

    Args:
        base: the LeRobot policy: a checkpoint's folder or its hub id.
        export: generators and gates: a folder, hf://owner/name, or a packaged name.
        risk: allowed share of generated steps that deviate; the export's default if None.
        generator: one of the export's or a built-in one; the export's default if None; ``none``: every step is the base's.
        scheduler: the gate, such as ``learned``, ``live`` or ``release``; the export's default if None.
        max_generated_run: longest run of generated actions; the export's default if None.
        mode: ``wait`` for the base where it is asked, or ``off``: the base alone.
        base_overrides: options of the base's own configuration, as on the command line: ``["--n_action_steps=8"]``.
    """

    base: str | None = None
    export: str | None = None
    risk: float | None = None
    generator: str | None = None
    scheduler: str | None = None
    max_generated_run: int | None = None
    mode: str = "wait"
    base_overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.push_to_hub = False
        self.validate_features()

    def base_config(self) -> PreTrainedConfig:
        """The base's configuration on this one's device, with its path.

        Raises:
            InputError: there is no base (code ``no-base``), or it cannot be read (code ``unreadable-base``).
        """
        if not self.base:
            raise InputError("--policy.base: name the LeRobot policy to accelerate", code="no-base", field="base")
        try:
            config: PreTrainedConfig = READ(self.base, cli_overrides=list(self.base_overrides))
        except Exception as error:  # the hub, draccus and json raise types of their own
            told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"--policy.base {self.base!r}: not a LeRobot policy ({told})", code="unreadable-base", field="base"
            ) from None
        if isinstance(config, SpvlaConfig):
            raise InputError(f"--policy.base {self.base!r}: is accelerated already", code="unsupported-base", field="base")
        config.pretrained_path = Path(self.base)
        config.device = self.device
        return config

    def validate_features(self) -> None:
        """Take over what the base sees and does, where nothing is given. A base that cannot be read is refused when the policy
        is made."""
        own = self.__dict__
        if self.base and not own["input_features"]:
            try:
                config = self.base_config()
            except InputError:
                return
            own.update(input_features=config.input_features, output_features=config.output_features)

    @property
    def observation_delta_indices(self) -> None:
        """Only the current observation is used."""

    @property
    def action_delta_indices(self) -> None:
        """It is not trained."""

    @property
    def reward_delta_indices(self) -> None:
        """It is not trained."""

    def get_optimizer_preset(self) -> Any:
        """It is not trained: train the base."""
        raise InputError("policy 'spvla' cannot be trained: train the base", code="not-trainable", field="policy.type")

    def get_scheduler_preset(self) -> None:
        """It is not trained."""
