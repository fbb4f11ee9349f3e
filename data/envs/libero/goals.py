"""What LIBERO's instructions mean in a scene, as far as the scripted expert can do it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data.envs.libero.scene import Scene
from spvla.errors import InputError

PUSHED = ("plate",)  # what is moved over the table, since no hand gets hold of it


@dataclass(frozen=True)
class Goal:
    """What to do: bring ``item`` into or onto ``place``, a region's or a body's name; ``inside`` tells which."""

    item: str
    place: str
    inside: bool


@dataclass(frozen=True)
class Turn:
    """Turn a knob on: ``part`` is its name in :attr:`data.envs.libero.scene.Scene.parts`."""

    part: str


def parse_goal(instruction: str, scene: Scene) -> Goal:
    """The one object that an instruction asks for in a scene, see :func:`parse_goals`.

    Raises:
        InputError: as :func:`parse_goals`, and for several goals or a knob.
    """
    goals = parse_goals(instruction, scene)
    if len(goals) > 1 or not isinstance(goals[0], Goal):
        raise InputError(f"{instruction!r} asks for {len(goals)} things, not for a single object")
    return goals[0]


def parse_goals(instruction: str, scene: Scene) -> tuple[Goal | Turn, ...]:
    """The goals that an instruction means in a scene, all of which are to hold.

    The task's own instruction means the task's own goals; any other must name an object and a place of the scene, as
    in "pick up the milk and place it in the basket".

    Raises:
        InputError: if the expert cannot do it: another kind of task, or names that are not in the scene.
    """
    text = " ".join(instruction.lower().split())
    if text == " ".join(scene.instruction.lower().split()):
        return tuple(_own_goal(predicate, instruction, scene) for predicate in scene.goal)
    match = re.fullmatch(r"(?:pick up|pick|grab) (?:the )?(.+?) and (?:place|put) it (in|on|into|onto) (?:the )?(.+)", text)
    if match is None:
        raise InputError(f"the expert cannot do {instruction!r}: it only understands 'pick up the X and place it in the Y'")
    item, preposition, place = match[1], match[2], match[3]
    found = Goal(_named(item, scene, instruction), _named(place, scene, instruction), preposition.startswith("in"))
    insides = [name for name, region in scene.regions.items() if region.parent == found.place and "contain" in name]
    return (Goal(found.item, insides[0], True) if found.inside and insides else found,)


def _own_goal(predicate: tuple[str, ...], instruction: str, scene: Scene) -> Goal | Turn:
    """One of the task's own goals: no drawers or doors, nothing into a fixture, nor several things on one spot."""
    if predicate[0] == "turnon":
        knobs = [name for name, part in scene.parts.items() if part.parent == predicate[1] and not part.slides]
        if len(knobs) == 1:
            return Turn(knobs[0])
    relation, item, place = predicate if len(predicate) == 3 else (predicate[0], "", "")
    body = scene.body_of(place) if place else None
    into = relation == "in" and body in scene.movable
    onto = relation == "on" and (body is None or object_words(item) not in PUSHED)
    alone = relation == "in" or [other[-1] for other in scene.goal].count(place) == 1
    if item in scene.movable and alone and (into or onto):
        return Goal(item, place, into)
    raise InputError(
        f"the expert cannot do {instruction!r}: its goal {scene.goal} needs more than bringing, pushing and turning on"
    )


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
