"""Making a Gymnasium environment and talking to it, whichever of Gym's interfaces it speaks."""

from __future__ import annotations

import importlib
import os
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.envs.gym.description import Description, Variant
from data.envs.gym.places import Moment
from spvla.errors import InputError
from spvla.fields import naming

SEEDINGS = ("reset", "seed", "inner", "global")
"""How a seed gets in: by ``reset``, by a method ``seed``, by the ``reset`` of the innermost environment where a wrapper takes
none, or into Python's and numpy's own generators."""


class Made:
    """An environment as it came, and the moment that it is in.

    Old ones are spoken to in their way: ``reset`` without seed and info, ``step`` with one ``done``, ``render(mode)``.

    Args:
        env: with Box actions.
        where: what it is, for errors.
    """

    def __init__(self, env: Any, where: str) -> None:
        self.env, self.where = env, where
        box: Any = getattr(env, "action_space", None)
        if not (hasattr(box, "low") and hasattr(box, "high")):
            told = f"{where}: its actions must be a Box, but are {box}; a wrapper can make them one"
            raise InputError(told, code="not-a-box", field="env")
        self.low, self.high = (np.asarray(b, np.float64).ravel() for b in (box.low, box.high))
        self._box, self._dtype = box, np.dtype(getattr(box, "dtype", None) or np.float32)
        self.moment = Moment(None)
        self.seeding = "reset"  # or another one of SEEDINGS

    def reset(self, seed: int, options: Mapping[str, Any]) -> None:
        """Start the episode that ``seed`` draws."""
        made = self._reset(seed, {"options": dict(options)} if options else {})
        new = isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)
        self.moment = Moment(made[0], made[1]) if new else Moment(made)

    def _reset(self, seed: int, options: dict[str, Any]) -> Any:
        if self.seeding == "reset":
            try:
                return self.env.reset(seed=seed, **options)
            except TypeError as error:
                if "unexpected keyword" not in str(error):
                    raise
                if options and "'options'" in str(error):
                    told = f"{self.where}: its reset takes no options"
                    raise InputError(told, code="unsupported", field="options") from None
                self.seeding = "seed"
        if self.seeding == "seed":
            try:
                self.env.seed(seed)
            except (TypeError, AttributeError, NotImplementedError):
                self.seeding = "global" if self.inner is self.env else "inner"
        if self.seeding == "inner":
            try:
                self.inner.reset(seed=seed)
            except TypeError:
                self.seeding = "global"
        if self.seeding == "global":
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
        return self.env.reset(**options)

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action (D,). Returns whether the environment says that the episode is over."""
        values = np.rint(action) if self._dtype.kind in "iu" else action
        shaped = values.reshape(np.shape(self._box.low)).astype(self._dtype)
        result = self.env.step(np.clip(shaped, self._box.low, self._box.high))  # float32 may lie just beyond a bound
        if len(result) == 5:
            obs, reward, terminated, truncated, info = result
        else:
            obs, reward, done, info = result
            truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
            terminated = bool(done) and not truncated
        over = bool(terminated) or bool(truncated)
        value = float(np.asarray(reward).sum())
        survived = bool(truncated) and not terminated
        self.moment = Moment(obs, info, value, self.moment.total + value, bool(terminated), survived)
        return over

    def render(self) -> Any:
        """What the environment draws."""
        try:
            picture = self.env.render()
        except TypeError:
            picture = None
        if picture is None or (isinstance(picture, list) and not picture):
            try:
                picture = self.env.render(mode="rgb_array")
            except TypeError:
                told = f"{self.where}: render() gives no picture; is render_mode: rgb_array among its kwargs?"
                raise InputError(told, code="not-an-image", field="image") from None
        return picture

    @property
    def inner(self) -> Any:
        """The environment without its wrappers."""
        return getattr(self.env, "unwrapped", self.env)

    def close(self) -> None:
        """Free it."""
        if callable(close := getattr(self.env, "close", None)):
            close()


def make(description: Description, task: Variant, where: str, *, draws: bool) -> Made:
    """The environment of a task.

    Args:
        description: what its file says.
        task: from :meth:`~data.envs.gym.description.Description.variant`.
        where: what it is, for errors.
        draws: its ``render`` will be asked for pictures.

    Raises:
        InputError: it cannot be made (the field is ``env``), or its actions are no Box (code ``not-a-box``).
    """
    if draws:
        os.environ.setdefault("MUJOCO_GL", "egl")
    assert task.env is not None, "a variant has everything"
    with naming(where, ImportError, *_gymnasium_errors()):
        for module in description.imports:
            _register(module)
        env = _construct(task.env, dict(task.kwargs), draws, task.max_steps)
        for name, options in description.wrappers.items():
            env = _attribute(name)(env, **options)
    return Made(env, where)


def _construct(name: str, kwargs: dict[str, Any], draws: bool, max_steps: int | None) -> Any:
    module, colon, attribute = name.partition(":")
    if colon and attribute.replace(".", "_").isidentifier():
        factory = _attribute(name)
        if draws and "render_mode" not in kwargs and _takes(factory, "render_mode"):
            kwargs["render_mode"] = "rgb_array"
        return factory(**kwargs)
    gymnasium = _gymnasium()
    if colon:
        _register(module)
        name = attribute
    modes = _render_modes(gymnasium.spec(name))
    if draws and "rgb_array" in modes:
        kwargs.setdefault("render_mode", "rgb_array")
    limit = {} if max_steps is None else {"max_episode_steps": max_steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions and of checks that this module makes itself
        return gymnasium.make(name, disable_env_checker=True, **limit, **kwargs)


def _render_modes(spec: Any) -> tuple[str, ...]:
    """What an id's environment can draw, where it says so before it is made."""
    entry = spec.entry_point
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _attribute(entry) if isinstance(entry, str) else entry
    return tuple((getattr(made, "metadata", None) or {"render_modes": ("rgb_array",)}).get("render_modes", ()))


def _register(module: str) -> None:
    importlib.import_module(module)


def _attribute(name: str) -> Callable[..., Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError(f"{name!r} is not of the form module:name")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    made: Callable[..., Any] = found
    return made


def _takes(factory: Callable[..., Any], name: str) -> bool:
    import inspect

    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == name for p in parameters)


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        told = f"Gymnasium is not installed ({error}): pip install gymnasium"
        raise InputError(told, code="not-installed", field="env") from None
    return gymnasium


def _gymnasium_errors() -> tuple[type[Exception], ...]:
    try:
        return (_gymnasium().error.Error,)
    except InputError:
        return ()
