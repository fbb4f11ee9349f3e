"""LeRobot policies made faster by SP-VLA. LeRobot imports this package by its name before it parses a command."""

from lerobot_policy_spvla.configuration_spvla import SpvlaConfig
from lerobot_policy_spvla.environment import accelerate_by_environment

accelerate_by_environment()

__all__ = ["SpvlaConfig"]
