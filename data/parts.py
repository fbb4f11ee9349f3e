"""What readers of data sets deal out, and what they say of what cannot be used.

A *part* is a few consecutive episodes of one file, the unit of work that workers share and that becomes one shard of a
rollout store. Which parts there are depends on the data alone, never on who reads them. What cannot be used is a
:class:`Problem` that names file, record and field; whoever reads decides whether to stop there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spvla.errors import InputError


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
    """A :class:`Problem` raised as an error."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem), code="unusable-episode", field=problem.file)
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
        size: bytes of the file (or files) that it is read from.
        content: a hash of what it holds: by both, a part is known to be the one that was read before.
    """

    id: str
    file: str
    first: int
    count: int
    start: int
    size: int
    content: str


def deal(parts: Sequence[Part], rank: int, world: int) -> list[Part]:
    """The parts of worker ``rank`` of ``world``: every world-th, so that neighbouring files are spread."""
    return list(parts[rank::world])
