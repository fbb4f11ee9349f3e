"""The role a VLA plays here: any policy that maps an observation to one action or a chunk of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import MAIN, Observation

if TYPE_CHECKING:
    from spvla.pruning.selector import TokenSelector


@dataclass(frozen=True)
class VLAOutput:
    """What one VLA call returns; fields a policy lacks are None.

    Args:
        actions: float32 (T, D), environment units; T = 1 for OpenVLA, more for chunked policies.
        tokens: action tokens, int64 (T, D).
        confidence: probability of the chosen action per dimension, float32 (D,), first action of the chunk.
        features: pooled hidden state, float32 (F,).
        visual_tokens: (kept, total) visual tokens that reached the language model.
        kept_tokens: which ones, ascending, int64 (K,).
        accepted: where a proposal was verified: its leading dimensions that the VLA agreed with.
        timings: milliseconds by stage.
    """

    actions: FloatArray
    tokens: NDArray[np.int64] | None = None
    confidence: FloatArray | None = None
    features: FloatArray | None = None
    visual_tokens: tuple[int, int] | None = None
    kept_tokens: NDArray[np.int64] | None = None
    accepted: int | None = None
    timings: dict[str, float] = field(default_factory=dict)


def checked(output: Any, dim: int, vla: object) -> VLAOutput:
    """What ``vla`` answered, with finite float32 actions (T, ``dim``), or an :class:`InputError`."""
    actions = output.actions if isinstance(output, VLAOutput) else None
    if not isinstance(output, VLAOutput) or not isinstance(actions, np.ndarray):
        found = type(output if actions is None else actions).__name__
        raise InputError(f"VLA {type(vla).__name__}: predict() must return a VLAOutput with an array of actions, got {found}")
    if actions.ndim != 2 or actions.shape[1] != dim or not len(actions):
        raise InputError(f"VLA: returned actions of shape {actions.shape}, expected (T, {dim})")
    if not np.isfinite(actions).all():
        raise InputError("VLA: returned an action with NaN or infinity")
    return output if actions.dtype == np.float32 else replace(output, actions=actions.astype(np.float32))


class VLAUnavailable(RuntimeError):
    """The VLA cannot be asked now: its machine does not answer. A later call may succeed."""


@runtime_checkable
class VLA(Protocol):
    """A frozen policy. The instruction lives in :meth:`reset`; :meth:`predict` is called when the VLA must act."""

    @property
    def action_space(self) -> ActionSpace:
        """Layout and scale of the actions that :meth:`predict` returns."""

    def reset(self, instruction: str) -> None:
        """Start an episode with ``instruction``."""

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """Act on ``observation``; ``keep_mass`` in (0, 1] is what pruning keeps (1: no pruning).

        Raises:
            VLAUnavailable: it cannot be asked now; the joint policy may act safely in its place.
        """


@runtime_checkable
class PrunableVLA(VLA, Protocol):
    """A VLA whose language model can run on fewer visual tokens."""

    def with_pruner(self, selector: TokenSelector | None) -> VLA:
        """This policy with another selector (None: without one): the weights are shared, the episode is its own."""


@runtime_checkable
class VerifyingVLA(VLA, Protocol):
    """A VLA that answers sooner where it is shown a proposal that is right."""

    def verify(
        self, observation: Observation, proposal: FloatArray, tolerance: float | None = None, keep_mass: float = 1.0
    ) -> VLAOutput:
        """Act on ``observation``, given what a generator proposes.

        Args:
            observation, keep_mass: as for :meth:`predict`.
            proposal: (D,), environment units.
            tolerance: None: the output is :meth:`predict`'s. Else a proposed dimension is accepted if the VLA's own value
                deviates by no more than this, normalised units.

        Returns:
            the VLA's action, with ``accepted``.
        """


def verifying(vla: VLA, proposals: bool) -> VerifyingVLA:
    """``vla`` as one that verifies. Raises :class:`InputError` (code ``cannot-verify``) if it cannot, or if there are no
    ``proposals``."""
    why = None
    if not isinstance(vla, VerifyingVLA):
        why = f"{type(vla).__name__} cannot verify proposals (it has no verify())"
    elif not proposals:
        why = "there is no generator whose proposals could be verified"
    if why is not None:
        raise InputError(f"verify: {why}", code="cannot-verify", field="verify")
    return cast(VerifyingVLA, vla)


@runtime_checkable
class BatchedVLA(VLA, Protocol):
    """A VLA that answers about many independent observations at once."""

    def predict_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], keep_mass: float = 1.0
    ) -> Sequence[VLAOutput]:
        """One output for each observation, under its own instruction; the episode goes on as it was."""


@runtime_checkable
class Viewing(Protocol):
    """A VLA that says what its encoders see."""

    def view(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What they see of the environment's ``image`` (H, W, 3): uint8 (S, S, 3)."""


@runtime_checkable
class Timed(Protocol):
    """A VLA that names what it runs on, for reports of timing."""

    @property
    def backend(self) -> dict[str, str]:
        """``device``, ``dtype`` and ``attention``, the kernels."""


@runtime_checkable
class Weighted(Protocol):
    """A VLA whose weights can be seen."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors by name."""


@runtime_checkable
class SaysIfImages(Protocol):
    """A VLA that says whether it looks at images; False: it runs without rendering."""

    @property
    def needs_images(self) -> bool: ...


@runtime_checkable
class NamesCameras(Protocol):
    """A VLA that says which cameras it looks through."""

    @property
    def cameras(self) -> Sequence[str]:
        """Their names in :class:`~spvla.observation.Observation`'s images."""


@runtime_checkable
class ReadsState(Protocol):
    """A VLA that says how much of the robot's state it reads."""

    @property
    def state_dim(self) -> int | None:
        """Values of ``observation.state`` that it needs; None: it reads none."""


def needs_images(vla: VLA) -> bool:
    """Whether a VLA looks at images. One that declares ``needs_images = False`` runs without rendering."""
    return vla.needs_images if isinstance(vla, SaysIfImages) else True


def cameras_of(vla: VLA) -> tuple[str, ...]:
    """The cameras that a VLA looks through: those it declares as ``cameras``, else the main one; none if it sees nothing."""
    if not needs_images(vla):
        return ()
    return tuple(vla.cameras) if isinstance(vla, NamesCameras) else (MAIN,)
