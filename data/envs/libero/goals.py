"""What LIBERO's pick-and-place instructions mean in a scene."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data.envs.libero.scene import Scene
from spvla.errors import InputError


@dataclass(frozen=True)
class Goal:
    """What to do: bring ``item`` into or onto ``place``, a region's or a body's name; ``inside`` tells which."""

    item: str
    place: str
    inside: bool


def parse_goal(instruction: str, scene: Scene) -> Goal:
    """The goal that an instruction means in a scene.

    The task's own instruction means the task's own goal; any other must name an object and a place of the scene, as
    in "pick up the milk and place it in the basket".

    Raises:
        InputError: if the expert cannot do it: another kind of task, or names that are not in the scene.
    """
    text = " ".join(instruction.lower().split())
    if text == " ".join(scene.instruction.lower().split()):
        if len(scene.goal) == 1 and len(scene.goal[0]) == 3:
            predicate, item, place = scene.goal[0]
            # Not into drawers (they would have to be opened) and not onto the bare table (that is pushing).
            supports = scene.movable if predicate == "in" else scene.names
            if predicate in ("in", "on") and item in scene.movable and scene.body_of(place) in supports:
                return Goal(item, place, predicate == "in")
        raise InputError(f"the expert cannot do {instruction!r}: its goal {scene.goal} is not a single pick-and-place")
    match = re.fullmatch(r"(?:pick up|pick|grab) (?:the )?(.+?) and (?:place|put) it (in|on|into|onto) (?:the )?(.+)", text)
    if match is None:
        raise InputError(f"the expert cannot do {instruction!r}: it only understands 'pick up the X and place it in the Y'")
    item, preposition, place = match[1], match[2], match[3]
    found = Goal(_named(item, scene, instruction), _named(place, scene, instruction), preposition.startswith("in"))
    insides = [name for name, region in scene.regions.items() if region.parent == found.place and "contain" in name]
    return Goal(found.item, insides[0], True) if found.inside and insides else found


def predicates(goal: Goal) -> tuple[tuple[str, ...], ...]:
    """``goal`` in the form of :attr:`data.envs.libero.scene.Scene.goal`, for :meth:`data.envs.libero.env.LiberoEnv.reset`."""
    return (("in" if goal.inside else "on", goal.item, goal.place),)


def object_words(name: str) -> str:
    """What an object is called: ``alphabet_soup_1`` is "alphabet soup"."""
    return re.sub(r"_\d+$", "", name).replace("_", " ")


def _named(words: str, scene: Scene, instruction: str) -> str:
    """The one movable object called ``words`` (``alphabet_soup_1`` is "alphabet soup")."""
    names = [name for name in scene.movable if object_words(name) == words]
    if len(names) != 1:
        known = ", ".join(scene.movable)
        raise InputError(f"the expert cannot do {instruction!r}: {words!r} is not one of the scene's objects ({known})")
    return names[0]
