"""Recordings in which the instruction changes on the way: one episode per instruction, so that every frame keeps its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spvla.store import VECTOR_COLUMNS, Episode


@dataclass(frozen=True)
class Words:
    """The words of each step.

    Args:
        texts: all that occur.
        codes: which of them a step has, int (T,).
    """

    texts: Sequence[str]
    codes: NDArray[np.int64]

    @classmethod
    def of(cls, values: NDArray[Any], read: Callable[[Any], str]) -> Words:
        """From what a column holds, (T,), and the text that a value stands for."""
        if len(values) and (values == values[0]).all():
            return cls([read(values[0])], np.zeros(len(values), np.int64))
        different, codes = np.unique(values, return_inverse=True)
        return cls([read(value) for value in different.tolist()], codes)

    def __getitem__(self, steps: slice) -> Words:
        return Words(self.texts, self.codes[steps])

    def used(self) -> set[str]:
        """The texts that steps have."""
        return {self.texts[k] for k in np.unique(self.codes)}


def split_at_words(episode: Episode, words: Words) -> list[Episode]:
    """``episode`` cut where its words change.

    Each piece has its own instruction, times from its own start, and metadata ``part`` (0, 1, ...) beside those of the whole,
    so that ``number`` still names the recording. Whether one piece succeeded is not known. A step without words belongs to
    what was asked for before it.

    Args:
        episode: all of it.
        words: of its T steps.
    """
    numbers = {text: k for k, text in enumerate(dict.fromkeys(words.texts))}  # one number for equal texts
    codes = np.array([numbers[text] if text.strip() else -1 for text in words.texts])[words.codes]  # (T,), -1: no words
    last = np.maximum.accumulate(np.where(codes >= 0, np.arange(len(codes)), 0))  # the last step that has any
    codes = codes[last]
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    texts = [*numbers, ""]
    if len(edges) == 2:
        return [replace(episode, instruction=texts[codes[0]])]
    return [_piece(episode, slice(a, b), texts[codes[a]], k) for k, (a, b) in enumerate(pairwise(edges))]


def _piece(episode: Episode, steps: slice, instruction: str, part: int) -> Episode:
    columns = {name: getattr(episode, name) for name in (*VECTOR_COLUMNS, "sources", "vla_propensities")}
    ages = episode.vla_ages
    if ages is not None:  # what the VLA said of the piece before is not known in this one
        ages = np.where(ages[steps] <= np.arange(steps.stop - steps.start), ages[steps], 0)
    return replace(
        episode,
        **{name: value[steps] for name, value in columns.items() if value is not None},
        vla_ages=ages,
        instruction=instruction,
        timestamps=episode.timestamps[steps] - (episode.timestamps[steps.start] if part else 0),
        images={camera: frames[steps] for camera, frames in episode.images.items()},
        success=None,
        metadata={**episode.metadata, "part": part},
    )


def several_words_note(where: str, episodes: Sequence[Episode]) -> list[str]:
    """A note if recordings among these episodes were cut where their instruction changes; else nothing."""
    cut = sum(e.metadata.get("part") == 1 for e in episodes)
    told = f"{cut} of the first recordings have several instructions; each is cut into one episode per instruction"
    return [f"{where}: {told}"] if cut else []
