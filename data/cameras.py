"""Which camera of a data set is read: the one that is named, or the only one that there is; never a depth map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spvla.errors import InputError

DEPTH_FLAGS = ("is_depth_map", "video.is_depth_map")


@dataclass(frozen=True)
class Cameras:
    """The cameras of a data set.

    Args:
        where: the data set, for messages.
        colour: cameras of three channels that have files.
        depth: depth maps.
        others: cameras without files, or of another number of channels.
        named: the user's or the conventions' choice, or None.

    Raises:
        InputError: the choice is not there, or a depth map.
    """

    where: str
    colour: Sequence[str]
    depth: Sequence[str] = ()
    others: Sequence[str] = ()
    named: str | None = None

    def __post_init__(self) -> None:
        if self.named is None:
            return
        if self.named in self.depth:
            raise self._refused(f"{self.named!r} is a depth map, not a colour image", "camera-is-depth")
        if self.named not in (*self.colour, *self.others):
            raise self._refused(f"no camera {self.named!r}", "unknown-camera")

    @property
    def chosen(self) -> str | None:
        """The camera that is named, else the only one of colour; None if neither decides."""
        return self.named or (self.colour[0] if len(self.colour) == 1 else None)

    @property
    def note(self) -> list[str]:
        """Which camera was chosen by default, or that the user has to choose one."""
        if self.named is not None or not (self.colour or self.depth or self.others):
            return []
        told = f"images are those of {self.chosen}, the only colour camera" if self.chosen else f"{self._reason}; {_HOW}"
        return [f"{self.where}: {told}"]

    def require(self) -> str:
        """The camera to read. Raises :class:`InputError` unless one is named or there is only one."""
        if self.chosen is None:
            raise self._refused(self._reason, "camera-ambiguous" if len(self.colour) > 1 else "no-camera", f"; {_HOW}")
        return self.chosen

    @property
    def _reason(self) -> str:
        if self.colour:
            return f"there are {len(self.colour)} colour cameras and none was chosen"
        return "has no images of a colour camera" if self.depth or self.others else "has no images"

    def _refused(self, what: str, code: str, more: str = "") -> InputError:
        kinds = (("", self.colour), (" (a depth map)", self.depth), (" (no files, or not three channels)", self.others))
        there = ", ".join(f"{name}{kind}" for kind, names in kinds for name in names) or "none"
        return InputError(f"{self.where}: {what}; available: {there}{more}", code=code, field="camera")


_HOW = "choose one with --camera, or in the conventions, where images are needed"


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a LeRobot feature says that it is a depth map."""
    info = feature.get("info") or {}
    flagged = any(bool(values.get(flag)) for values in (feature, info) for flag in DEPTH_FLAGS)
    return flagged or str(info.get("video.pix_fmt", "")).startswith(("gray1", "gray9"))  # more than 8 bits of grey
