"""SP-VLA: make a frozen vision-language-action model faster.

policy = spvla.accelerate(vla, "path/or/hub-id-of-export", risk=0.05)
policy.reset("pick up the milk and place it in the basket")
action = policy.select_action(observation)
"""

from importlib.metadata import PackageNotFoundError, version

from spvla.actions import LIBERO, ActionSpace
from spvla.assemble import accelerate
from spvla.errors import InputError
from spvla.explanation import Explanation, explain
from spvla.export import Export, load_export, save_export
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.realtime import BridgePolicy
from spvla.recording import Recorder
from spvla.steps import StepInfo
from spvla.vlas.base import VLA, VLAOutput, VLAUnavailable

try:
    __version__ = version("spvla")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "LIBERO",
    "VLA",
    "ActionSpace",
    "BridgePolicy",
    "Explanation",
    "Export",
    "InputError",
    "Observation",
    "Recorder",
    "SPVLAPolicy",
    "StepInfo",
    "VLAOutput",
    "VLAUnavailable",
    "__version__",
    "accelerate",
    "explain",
    "load_export",
    "save_export",
]
