"""What a fine-tuning run was told and no file of its checkpoint says: cameras, chunk length, how statistics are meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.observation import MAIN, WRIST

MAX_CAMERAS = 3
BOUNDS = {"quantiles": ("q01", "q99"), "bounds": ("min", "max")}  # normalisation -> what in the statistics becomes -1 and 1


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint was fine-tuned. The defaults are the published LIBERO checkpoints'.

    Args:
        cameras: whose images it reads, one to three, in the order of training.
        chunk: T, time steps of one prediction (LIBERO 8, ALOHA 25, Bridge 5).
        proprio: whether it reads the robot's state; None: if a file ``proprio_projector`` is there.
        film: whether the instruction modulates the encoders; None: if a file ``vision_backbone`` is there.
        normalization: ``quantiles`` (q01, q99: LIBERO, Bridge) or ``bounds`` (min, max: ALOHA), of actions and state.
    """

    cameras: tuple[str, ...] = (MAIN, WRIST)
    chunk: int = 8
    proprio: bool | None = None
    film: bool | None = None
    normalization: Literal["quantiles", "bounds"] = "quantiles"

    def __post_init__(self) -> None:
        with naming("recipe"):
            check_fields(self, at_least={"chunk": 1}, at_most={"chunk": 1000})
        if not 1 <= len(self.cameras) <= MAX_CAMERAS or len(set(self.cameras)) < len(self.cameras):
            raise InputError(
                f"recipe: cameras must name one to {MAX_CAMERAS} different cameras, got {list(self.cameras)}",
                code="cameras",
                field="recipe.cameras",
            )


RECIPES = {"libero": Recipe()}
"""Recipes by name. ``libero``: the published checkpoints, from two cameras and proprioception eight steps at a time."""


def make_recipe(recipe: Recipe | Mapping[str, Any] | str | None, suite: str | None = None) -> Recipe:
    """``recipe`` itself, the one of that name, LIBERO's with the changes that a mapping names; for None LIBERO's if there is a
    ``suite``.

    Raises:
        InputError: an unknown name or field; neither a recipe nor a suite (code ``recipe-missing``).
    """
    known = [f.name for f in fields(Recipe)]
    if recipe is None:
        if suite is None:
            raise InputError(
                "recipe: no file of an OpenVLA-OFT checkpoint says how many images it reads or how long its chunks are; name a "
                f"recipe ({', '.join(RECIPES)}), a map of {', '.join(known)}, or a LIBERO suite",
                code="recipe-missing",
                field="recipe",
            )
        return RECIPES["libero"]
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise InputError(
                f"recipe {recipe!r} is unknown; available: {', '.join(RECIPES)}", code="recipe-unknown", field="recipe"
            )
        return RECIPES[recipe]
    if not isinstance(recipe, Mapping):
        raise InputError(f"recipe must be a name or a map of changes, got {recipe!r}", code="recipe-unknown", field="recipe")
    for name in recipe:
        if name not in known:
            raise InputError(
                f"recipe: {name!r} is unknown; available: {', '.join(known)}", code="recipe-unknown", field=f"recipe.{name}"
            )
    return replace(RECIPES["libero"], **recipe)


def with_bounds(norm_stats: Mapping[str, Any], normalization: str) -> dict[str, Any]:
    """Action statistics whose q01 and q99 are what :attr:`Recipe.normalization` names."""
    low, high = BOUNDS[normalization]
    out = {}
    for key, stats in norm_stats.items():
        action = stats.get("action") if isinstance(stats, Mapping) else None
        if isinstance(action, Mapping) and low in action and high in action:
            stats = {**stats, "action": {**action, "q01": action[low], "q99": action[high]}}
        elif normalization != "quantiles":
            stats = {}  # refused by name where it is chosen
        out[key] = stats
    return out


class ProprioStatistics:
    """The range of a data set's states, by which the network's are normalised.

    Args:
        low, high: what becomes -1 and 1, float64 (S,).
    """

    def __init__(self, low: ArrayLike, high: ArrayLike) -> None:
        self.low, self.high = np.array(low, np.float64), np.array(high, np.float64)

    @classmethod
    def find(cls, norm_stats: Mapping[str, Any], key: str, normalization: str) -> ProprioStatistics:
        """The data set's. Raises :class:`InputError` (code ``statistics``) if it has none that are finite and fit together."""
        names = BOUNDS[normalization]
        try:
            found = cls(*(norm_stats[key]["proprio"][name] for name in names))
        except (KeyError, TypeError, ValueError) as error:
            raise _unusable(key, f"no usable proprio {' and '.join(names)} ({error!r})") from None
        if found.low.ndim != 1 or not found.low.size or found.low.shape != found.high.shape:
            raise _unusable(key, f"proprio {' and '.join(names)} have shapes {found.low.shape}, {found.high.shape}")
        if not (np.isfinite(found.low).all() and np.isfinite(found.high).all()):
            raise _unusable(key, f"proprio {' or '.join(names)} is NaN or infinite")
        return found

    def normalize(self, state: NDArray[np.floating]) -> NDArray[np.float64]:
        """States (..., S) in the robot's units to the network's, clipped to [-1, 1]."""
        width = self.high - self.low + 1e-8  # as published: a value that never changed divides by no zero
        return np.clip(2 * (np.asarray(state, np.float64) - self.low) / width - 1, -1, 1)


def _unusable(key: str, why: str) -> InputError:
    return InputError(f"norm_stats[{key!r}]: {why}", code="statistics", field=f"norm_stats.{key}")
