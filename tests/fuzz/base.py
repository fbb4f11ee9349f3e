"""What a kind of input is, and what reading one comes to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """What came of reading a folder: a digest of what it means, and the problems that were named."""

    meaning: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Args:
        make: writes whole folders below a path, and returns them.
        read: reads one.
        share: of the files that are damaged; 0: messages, which are shared out evenly.
        summed: whether check sums cover a file, so that it must not mean something else once its bytes are damaged.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Outcome]
    share: float = 0.0
    summed: Callable[[Path], bool] = lambda file: False


def digest(*values: Any) -> str:
    out = hashlib.sha256()
    for value in values:
        array = isinstance(value, np.ndarray)
        out.update(value.dtype.str.encode() + value.tobytes() if array else repr(value).encode("utf-8", "surrogatepass"))
    return out.hexdigest()[:16]
