"""Data sets from elsewhere, as episodes: what Open-X RLDS and LeRobot folders have in common, and which of them a path is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from data.cameras import Cameras
from data.parts import Part, Problem
from spvla.actions import ActionSpace
from spvla.store import Episode

SourceName = Literal["rlds", "lerobot"]


class Source(Protocol):
    """A data set that can be read part by part.

    Attributes:
        name: the data set's name.
        named: whether its publisher gave it that name (``dataset_info.json``, the hub); else it is the folder's.
        space: its action space; q01, q99 and bounds are placeholders until somebody has measured them.
        parts: all its parts.
        notes: what its metadata claims and its data contradicts, and what is done about it, one line each; looked up when
            asked for.
        cameras: its cameras; ``cameras.require()`` is the one that :meth:`episodes` gives images of.
        camera: that one, or None where it has to be named first.
        image_shape: (H, W, 3) of its images as the metadata says, or None.
    """

    name: str
    named: bool
    space: ActionSpace
    parts: list[Part]
    cameras: Cameras
    camera: str | None
    image_shape: tuple[int, ...] | None

    @property
    def notes(self) -> list[str]: ...

    @property
    def contents(self) -> Mapping[int, tuple[Any, ...]]:
        """What is compared to know a recording again, by its number: a hash of its data, and for an episode of a rollout store
        also which part of the recording it is."""

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """The episodes of a part, in order, each as it is or as the problem that it has; one per instruction where a recording
        has several (:func:`data.words.split_at_words`)."""


def open_source(
    source: SourceName,
    path: str | Path,
    conventions: str | Path | None = None,
    split: str = "train",
    camera: str | None = None,
) -> Source:
    """The data set at ``path``.

    Args:
        source: what it is.
        path: its folder.
        conventions: a name in ``configs/openx/datasets.yaml`` or a YAML file of the same form; None: by the data set's name.
        split: for RLDS, which split, or ``all``.
        camera: another camera than the conventions'.

    Raises:
        InputError: no such data set, or conventions that do not fit it.
    """
    if source == "rlds":
        from data.rlds.source import RldsSource

        return RldsSource(Path(path), conventions, split, camera)
    from data.lerobot import LerobotSource

    return LerobotSource(Path(path), conventions, camera)
