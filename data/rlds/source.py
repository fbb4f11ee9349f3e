"""An RLDS data set, its episodes in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.identity import digest
from data.images import ImageCheck
from data.openx import Conventions, Steps, as_text, find_conventions, first_action_note, standardize
from data.parts import Part, Problem
from data.rlds.features import RldsFolder, RldsReader
from data.rlds.tfrecord import Index, missing, read_records, scan
from data.words import Words, several_words_note, split_at_words
from spvla.errors import InputError
from spvla.fields import naming
from spvla.store import Episode

EPISODES_PER_PART = 16
FLAGS = ("is_last", "is_terminal")


class RldsSource:
    """An RLDS data set as :class:`~data.sources.Source`.

    Args:
        path: see :class:`RldsFolder`.
        conventions: name or file; by the data set's name if None.
        split: which split, or ``all``.
        camera: image feature to read in place of the conventions' one.

    Records that repeat an earlier one byte for byte (a validation split that repeats the training split) are left out.

    Raises:
        InputError: an unknown split or camera; none of the shards is there; conventions that name features which are not.
    """

    def __init__(self, path: Path, conventions: str | Path | None, split: str, camera: str | None) -> None:
        self.folder = RldsFolder(path)
        self.name, self.named = self.folder.name, True
        with naming(self.folder.path):
            self.conventions: Conventions = find_conventions(conventions, self.name)
        self.space = self.conventions.space(self.name)
        if camera is not None:
            self.folder.leaf(camera)
        self.cameras = self.folder.find_cameras(camera or self.conventions.camera)
        self.camera = self.cameras.chosen
        splits = self.folder.splits
        if split != "all" and split not in splits:
            raise InputError(f"{self.folder.path}: no split {split!r}; available: {', '.join(splits)}, or all")
        self.split = split
        self.chosen = list(splits) if split == "all" else [split]
        self.parts: list[Part] = []
        self.indexes: dict[str, Index] = {}
        self.repeats: dict[str, set[int]] = {}
        self.repeated: Counter[tuple[str, str]] = Counter()
        self.contents: dict[int, tuple[Any, ...]] = {}
        seen: dict[tuple[int, int], str] = {}
        start = 0
        for name in self.chosen:
            for number, (file, _) in enumerate(splits[name]):
                index = self.indexes[str(file)] = scan(file) if file.is_file() else missing(file)
                repeats = self.repeats.setdefault(str(file), set())
                for i, key in enumerate(index.identities()):
                    if key in seen:
                        repeats.add(i)
                        self.repeated[name, seen[key]] += 1
                    else:
                        seen[key] = name
                records = len(index) + (index.problem is not None)
                size = file.stat().st_size if file.is_file() else 0
                for first in range(0, records, EPISODES_PER_PART):
                    part = f"{self.name}-{name}-{number:05d}-{first:06d}"
                    count = min(EPISODES_PER_PART, records - first)
                    content = digest(index.contents()[first : first + count])
                    self.parts.append(Part(part, str(file), first, count, start + first, size, content))
                self.contents |= {start + i: (content,) for i, content in enumerate(index.contents())}
                start += records
        if not any(Path(file).is_file() for file in self.indexes):
            raise InputError(
                f"{next(iter(self.indexes), self.folder.path)}: the shard is not there, nor any other of split {split!r} that "
                f"{self.folder.path / 'dataset_info.json'} names"
            )
        self.reader = self.folder.reader(self.conventions.keys)
        self.image_shape = None if self.camera is None else self.folder.image_shape(self.camera)
        self._with_images: RldsReader | None = None

    @cached_property
    def notes(self) -> list[str]:
        """See :class:`~data.sources.Source`; flags, images and first actions are those of the first part's episodes."""
        out: list[str] = []
        where, splits = self.folder.path, self.folder.splits
        for name in self.chosen:
            for file, claimed in splits[name]:
                index = self.indexes[str(file)]
                if len(index) != claimed and index.problem is None:
                    out.append(f"{file}: holds {len(index)} records, dataset_info.json claims {claimed}")
        for (name, other), count in self.repeated.items():
            out.append(f"{where}: {count} records of split {name} repeat records of {other}; left out")
        mine = {key for index in self.indexes.values() for key in index.identities()}
        for name in splits:
            if name not in self.chosen:
                found = [key for file, _ in splits[name] if file.is_file() for key in scan(file).identities()]
                if repeats := sum(key in mine for key in found):
                    told = f"{repeats} of {len(found)} records of split {name} are also in {self.split}"
                    out.append(f"{where}: {told}; neither can be held out from the other")
        if (left := self.conventions.left_out) is not None:
            out.append(f"{where}: by its conventions, {left}")
        first = self.parts[0] if self.parts else None
        return out if first is None else [*out, *self._look_at(first)]

    def _look_at(self, part: Part) -> list[str]:
        """What flags, images and first actions of a part's records say that the metadata or the conventions do not."""
        out, where = [], self.folder.path
        flags = [name for name in FLAGS if name in self.folder.steps]
        reader = self.folder.reader([*flags, *([self.camera] if self.camera else [])])
        ended: Counter[str] = Counter()
        shown, has_image, read = False, [], 0
        for i, record in read_records(self.indexes[part.file], part.first, part.count):
            steps = record if isinstance(record, Problem) else reader.parse(record, part.file, i)
            if isinstance(record, Problem) or isinstance(steps, Problem):
                continue
            read += 1
            ended.update(name for name in flags if steps[name].any())
            if self.camera is not None:
                frames = steps[self.camera]
                check = ImageCheck(None)
                for t in {0, len(frames) // 2, len(frames) - 1}:
                    check.add(frames[t])
                shown = shown or check.coloured
                flag = reader.message.FromString(record).features.feature
                name = f"episode_metadata/has_{self.camera.rpartition('/')[2]}"
                if name in flag:
                    has_image.append(any(flag[name].int64_list.value))
        if flags and read and not ended:
            out.append(f"{where}: no step has {' or '.join(flags)} set; an episode ends where its record ends")
        if read and self.camera is not None:
            name = f"has_{self.camera.rpartition('/')[2]}"
            if not shown:
                out.append(f"{where}: the images of {self.camera} have one colour only: the camera was not connected")
            elif has_image and not any(has_image):
                out.append(f"{where}: episode_metadata/{name} is false, yet {self.camera} shows something; its images count")
        episodes = [e for e in self.episodes(part) if isinstance(e, Episode)]
        out += [*self.cameras.note, *several_words_note(str(where), episodes)]
        return [*out, *first_action_note(str(where), [e for e in episodes if not e.metadata.get("part")], self.space)]

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """See :class:`~data.sources.Source`. Images are encoded, as the shard holds them."""
        reader = self.reader
        if images:
            camera = self.cameras.require()
            self._with_images = self._with_images or self.folder.reader([*self.conventions.keys, camera])
            reader = self._with_images
        index, repeats = self.indexes[part.file], self.repeats[part.file]
        for i, record in read_records(index, part.first, part.count):
            if i in repeats:
                continue
            steps = record if isinstance(record, Problem) else reader.parse(record, part.file, i)
            if isinstance(steps, Problem):
                yield steps
            else:
                number = part.start + i - part.first
                facts = {"dataset": self.name, "named": True, "file": Path(part.file).name, "record": i, "number": number}
                facts["content"] = self.contents[number][0]
                cameras = {self.camera.rpartition("/")[2]: self.camera} if images and self.camera else {}
                found = standardize(steps, self.conventions, part.file, i, facts, cameras)
                yield from [found] if isinstance(found, Problem) else split_at_words(found, self._words(steps, found))
        if index.problem is not None and part.first <= len(index) < part.first + part.count:
            yield index.problem

    def _words(self, steps: Steps, episode: Episode) -> Words:
        """The words of each step that ``episode`` keeps."""
        if self.conventions.instruction is None:
            return Words([episode.instruction], np.zeros(len(episode), np.int64))
        values = steps[self.conventions.instruction]
        return Words.of(values[self.conventions.kept(len(values))], as_text)
