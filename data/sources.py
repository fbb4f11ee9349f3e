"""Data sets from elsewhere, as episodes: what Open-X RLDS and LeRobot folders have in common.

A source deals its episodes out in *parts*: a few consecutive episodes of one file, the unit of work that workers share
and that becomes one shard of a rollout store. Which parts there are depends on the data alone, never on who reads them.
What cannot be used is a :class:`Problem` that names file, record and field; whoever reads decides whether to stop there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from spvla.actions import ActionSpace
from spvla.episodes import Episode
from spvla.errors import InputError

SourceName = Literal["rlds", "lerobot"]


@dataclass(frozen=True)
class Problem:
    """Something in a data set that cannot be used.

    Args:
        file: where.
        reason: what is wrong.
        record: record or episode in the file, if it is about one.
        field: the feature, if it is about one.
    """

    file: str
    reason: str
    record: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        where = [self.file]
        where += [] if self.record is None else [f"record {self.record}"]
        where += [] if self.field is None else [f"field {self.field}"]
        return f"{', '.join(where)}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; ``Problem(**values)`` reads it back."""
        return asdict(self)


class DataError(InputError):
    """A :class:`Problem` that stops the one who meets it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class Part:
    """Consecutive episodes of one file.

    Args:
        id: names the part; the same for the same data.
        file: which file, for messages.
        first: first record (episode) in the file.
        count: how many.
        start: number of the first one in the whole data set.
        size: bytes of the file (or files) that it is read from: by it, a part is known to be the one that was read before.
    """

    id: str
    file: str
    first: int
    count: int
    start: int
    size: int


class Source(Protocol):
    """A data set that can be read part by part.

    Attributes:
        name: the data set's name.
        space: its action space; q01, q99 and bounds are placeholders until somebody has measured them.
        parts: all its parts.
        notes: what its metadata claims and its data contradicts, and what is done about it, one line each; looked up when
            asked for.
        camera: the camera that :meth:`episodes` gives images of when asked to, or None.
        image_shape: (H, W, 3) of its images as the metadata says, or None.
    """

    name: str
    space: ActionSpace
    parts: list[Part]
    camera: str | None
    image_shape: tuple[int, ...] | None

    @property
    def notes(self) -> list[str]: ...

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """The episodes of a part, in order, each as it is or as the problem that it has."""


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
        from data.rlds import RldsSource

        return RldsSource(Path(path), conventions, split, camera)
    from data.lerobot import LerobotSource

    return LerobotSource(Path(path), conventions, camera)


def deal(parts: Sequence[Part], rank: int, world: int) -> list[Part]:
    """The parts of worker ``rank`` of ``world``: every world-th, so that neighbouring files are spread."""
    return list(parts[rank::world])
