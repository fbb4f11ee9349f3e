"""inspect-robots policies, accelerated: the policy ``spvla`` around any registered one, and a controller around any policy."""

from inspect_robots_spvla.controller import SpvlaController
from inspect_robots_spvla.policy import SpvlaPolicy

__all__ = ["SpvlaController", "SpvlaPolicy"]
