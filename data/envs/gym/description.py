"""What a YAML file says of a Gymnasium environment: see ``docs/simulators.md`` and, for an example, ``examples/fetch.yaml``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.envs.gym.places import RENDER, Moment, Place
from spvla.actions import KINDS, ActionSpace
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.files import read_yaml
from spvla.observation import MAIN, WRIST

AUTO = "auto"  # look at the environment
T = TypeVar("T")


@dataclass(frozen=True)
class Action:
    """What the action's entries are, by the fields of :class:`~spvla.actions.ActionSpace`.

    Args:
        kind: what the entries are that are no gripper's, one of :data:`spvla.actions.KINDS`.
        translation, rotation, gripper: which entries have these roles; any may be empty.
        binary_gripper: grippers only ever take their two end values; None: yes.
        low, high: bounds; None: those of the environment's Box.
        q01, q99: the range of the teacher's actions; None: the bounds.
        motions: entries that are zero when the robot stands still; None: by the kind.
    """

    kind: str
    translation: tuple[int, ...] = ()
    rotation: tuple[int, ...] = ()
    gripper: tuple[int, ...] = ()
    binary_gripper: bool | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    q01: tuple[float, ...] | None = None
    q99: tuple[float, ...] | None = None
    motions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self, infinite=("low", "high"))
        if self.kind not in KINDS:
            raise InputError(
                f"kind {self.kind!r} is not one of {', '.join(KINDS)}. Efforts are none of them, since no effort is known to "
                "keep an arm where it is; in a simulator, joint_velocity does for them",
                code="unknown-kind",
                field="action.kind",
            )

    def space(self, name: str, rate: float, low: Sequence[float], high: Sequence[float]) -> ActionSpace:
        """The action space, with the environment's bounds where none are given."""
        low, high = self.low or tuple(low), self.high or tuple(high)
        return ActionSpace(
            name=name,
            kind=self.kind,
            control_rate=rate,
            q01=self.q01 or tuple(low),
            q99=self.q99 or tuple(high),
            low=tuple(low),
            high=tuple(high),
            translation=self.translation,
            rotation=self.rotation,
            gripper=self.gripper,
            binary_gripper=self.binary_gripper is not False,
            motions=self.motions,
        )


@dataclass(frozen=True)
class Success:
    """When an episode succeeds: where a value is true, or within bounds.

    Args:
        value: its place: ``info/KEY``, ``obs/KEY``, ``reward``, ``return`` (the sum of rewards), ``terminated``, or
            ``survived`` (the step limit was reached).
        at_least, at_most: bounds; None for both: it must be true.
    """

    value: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        Place.read(self.value, "success")

    def holds(self, moment: Moment) -> bool:
        """Whether ``moment`` is a success. Raises :class:`InputError`: the value is not there, or not one number."""
        numbers = Place.read(self.value, "success").numbers(moment, "success")
        if numbers.size != 1:
            told = f"success: {self.value!r} holds {numbers.size} numbers; choose one, such as {self.value}[0]"
            raise InputError(told, code="not-one-number", field="success")
        number = float(numbers[0])
        if self.at_least is None and self.at_most is None:
            return bool(number)
        return (self.at_least is None or number >= self.at_least) and (self.at_most is None or number <= self.at_most)


@dataclass(frozen=True)
class Variant:
    """One task: what differs from the file's own fields of the same names.

    Args:
        instruction, env, max_steps: in their place.
        kwargs, options: beside them.
    """

    instruction: str | None = None
    env: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, at_least={"max_steps": 1})


@dataclass(frozen=True)
class Description:
    """An environment. Places of values are written as :class:`~data.envs.gym.places.Place` reads them.

    Args:
        env: Gymnasium's id, or ``module:factory`` of an environment.
        action: what its actions mean.
        name: the suite's name, after ``gym_``; empty: the file's.
        imports: modules that register ids.
        kwargs: of the environment's constructor.
        wrappers: ``module:Class`` with keyword arguments, the innermost first.
        options: of its ``reset``.
        state: places of the proprioception, joined in order; none for a robot without.
        image: place of the main camera's picture, or ``render``; None: no picture.
        wrist_image: likewise of the camera in the hand.
        cameras: likewise of further cameras, by name.
        turn: what makes pictures upright: ``none``, ``flip`` (rows in reverse order) or ``rotate_180``.
        success: when an episode succeeds, a place or the fields of :class:`Success`; None: never.
        end_on_success: the first success ends an episode.
        instruction: what a policy is asked to do; None: the task's name.
        tasks: the suite's tasks by name, by the fields of :class:`Variant`; empty: one, named like the suite.
        max_steps: step limit of an episode; None: the environment's own.
        control_rate: control steps per second (Hz); None: as the environment says.
        hand_position: which entries of the state are the hand's position in metres, for path and jerk in results.
        teacher: the policy ``expert``: a VLA's name, or ``module:factory``.
        teacher_options: of its factory.
    """

    env: str
    action: Action
    name: str = ""
    imports: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] | str = AUTO
    image: str | None = AUTO
    wrist_image: str | None = None
    cameras: dict[str, str] = field(default_factory=dict)
    turn: Literal["none", "flip", "rotate_180"] = "none"
    success: Success | str | None = AUTO
    end_on_success: bool = True
    instruction: str | None = None
    tasks: dict[str, Variant] = field(default_factory=dict)
    max_steps: int | None = None
    control_rate: float | None = None
    hand_position: tuple[int, ...] = ()
    teacher: str | None = None
    teacher_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, at_least={"max_steps": 1, "hand_position": 0})
        if not re.fullmatch(r"[\w.-]+", self.name):
            told = f"name {self.name!r} is part of file names; it may hold letters, digits, dots, _ and -"
            raise InputError(told, field="name")
        if isinstance(self.state, str) and self.state != AUTO:
            object.__setattr__(self, "state", (self.state,))
        if isinstance(self.success, str) and self.success != AUTO:
            object.__setattr__(self, "success", Success(self.success))
        for place in () if self.state == AUTO else self.state:
            Place.read(place, "state")
        for camera, place in self.pictures.items():
            if place not in (AUTO, RENDER):
                Place.read(place, camera)
        if not self.tasks:
            object.__setattr__(self, "tasks", {self.name: Variant()})

    @property
    def suite(self) -> str:
        """What recordings and results call it."""
        return f"gym_{self.name}"

    @property
    def pictures(self) -> dict[str, str]:
        """Places of pictures by camera."""
        keys = {MAIN: self.image, WRIST: self.wrist_image, **self.cameras}
        return {camera: place for camera, place in keys.items() if place is not None}

    @property
    def stamp(self) -> str:
        """A short hash of everything here: results of different descriptions are not mixed."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def variant(self, task: str) -> Variant:
        """A task with everything that the file says for all."""
        own = self.tasks[task]
        return replace(
            own,
            env=own.env or self.env,
            instruction=self.instruction if own.instruction is None else own.instruction,
            kwargs={**self.kwargs, **own.kwargs},
            options={**self.options, **own.options},
            max_steps=own.max_steps or self.max_steps,
        )

    @classmethod
    def read(cls, path: Path) -> Description:
        """From a YAML file. Raises :class:`InputError` that names the file and the field."""
        values = read_yaml(path)
        with naming(path):
            _require_fields(cls, values)
            out = {"name": path.stem, **values}
            out["action"] = _built(Action, values.get("action"), "action")
            if isinstance(values.get("success"), Mapping):
                out["success"] = _built(Success, values["success"], "success")
            if isinstance(wrappers := values.get("wrappers"), Mapping):
                out["wrappers"] = {name: options or {} for name, options in wrappers.items()}
            tasks = values.get("tasks") or {}
            if not isinstance(tasks, Mapping):
                raise InputError("tasks: expected a mapping of tasks by name", field="tasks")
            out["tasks"] = {str(name): _built(Variant, task or {}, f"tasks.{name}") for name, task in tasks.items()}
            return cls(**out)


def _require_fields(cls: Any, values: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            raise InputError(f"field {name!r} is unknown; available: {', '.join(known)}", code="unknown-field", field=str(name))
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise InputError(f"field {f.name!r} is missing", code="missing-field", field=f.name)


def _built(cls: Callable[..., T], values: Any, where: str) -> T:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping of fields, got {values!r}", field=where)
    with naming(where):
        _require_fields(cls, values)
        return cls(**values)
