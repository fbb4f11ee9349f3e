"""A scripted expert for LIBERO's tasks, playing the VLA's part: a stateless function of every pose. It brings things to places,
pushes plates and turns knobs; it opens no drawers or doors.

Because it keeps no memory it can label any state that some policy visited, after recorded or noisy actions, and it
recovers from drops, slips and pushes. Labels are made to be learnt: velocities taper over several centimetres,
heights follow continuous funnels, and each gripper decision has slack (sudden switches taught a distilled policy to hop
between modes). Shapes come from the simulator's collision geometry, the goal from the instruction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.envs.libero.goals import PUSHED, Goal, Turn, object_words, parse_goal, parse_goals
from data.envs.libero.grasping import WIDEST, approach, firmness, plan_grasp
from data.envs.libero.motion import CLEARANCE, FINGERTIP_BELOW, VERTICAL_TAPER, command, extent, speed
from data.envs.libero.placing import Place, carry, plan_place
from data.envs.libero.pushing import push
from data.envs.libero.scene import LiberoObservation, PrivilegedState
from data.envs.libero.turning import turn_on
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput

Float64Array = NDArray[np.float64]

ON = 0.55  # radians; LIBERO counts a stove's knob as turned on from 0.5
RETREAT = 0.10  # height above the place after release
LET_GO = (0.055, 0.075)  # finger gap between which the retreat starts: not with the object still in hand


def scene_instructions(state: PrivilegedState) -> list[str]:
    """What one may ask for in a scene: the task's own instruction, then the same for each other thing that fits the hand.

    Raises:
        InputError: the task is not of the form "pick up the X and place it in the Y".
    """
    own = parse_goal(state.scene.instruction, state.scene)
    words = object_words(own.item)
    if words not in state.scene.instruction:
        raise InputError(f"{state.scene.instruction!r} does not mention {words!r}, so no other object can be asked for")
    place = state.scene.body_of(own.place)
    out = [state.scene.instruction]
    for name in state.scene.movable:
        alike = [other for other in state.scene.movable if object_words(other) == object_words(name)]
        if name in (own.item, place) or len(alike) > 1:
            continue
        goal = Goal(name, own.place, own.inside)
        if plan_grasp(state, goal, plan_place(state, goal, extent(state, name))).width <= WIDEST:
            out.append(state.scene.instruction.replace(words, object_words(name)))
    return out


class Expert:
    """The scripted expert as a :class:`spvla.vlas.base.VLA`. It reads poses, so it needs a :class:`LiberoObservation`."""

    action_space = LIBERO
    needs_images = False

    def __init__(self) -> None:
        self._instruction = ""

    def reset(self, instruction: str) -> None:
        """Start an episode with ``instruction``."""
        self._instruction = instruction

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """One action (1, 7). Raises :class:`InputError` without poses or for an instruction it cannot do."""
        if not isinstance(observation, LiberoObservation):
            raise InputError("the expert reads object poses: it needs a LiberoObservation, which LIBERO's environment gives")
        state = observation.privileged
        action = expert_action(state, *parse_goals(self._instruction, state.scene))
        return VLAOutput(actions=action[None].astype(np.float32))


def expert_action(state: PrivilegedState, *goals: Goal | Turn) -> Float64Array:
    """The expert's action (7,) in LIBERO's units for any state: for what is in the hand, else for the first of the goals that
    does not hold yet, knobs before all others."""
    knobs = [goal.part for goal in goals if isinstance(goal, Turn) and state.opened(goal.part) < ON]
    asked = [goal for goal in goals if isinstance(goal, Goal)]
    if not asked:
        return turn_on(state, knobs[0]) if knobs else command(state, np.zeros(3), 0.0, close=False)
    items = [extent(state, goal.item) for goal in asked]
    places = [plan_place(state, goal, item) for goal, item in zip(asked, items, strict=True)]
    grips = [firmness(state, goal.item, item) for goal, item in zip(asked, items, strict=True)]
    left = [k for k, place in enumerate(places) if not place.done]
    in_hand = [k for k, grip in enumerate(grips) if grip is not None]
    if knobs and not in_hand:
        return turn_on(state, knobs[0])
    if not left:
        return _let_go(state, places[-1], items[-1])
    if finished := [k for k in in_hand if k not in left]:
        return _let_go(state, places[finished[0]], items[finished[0]])
    k = next((k for k in left if k in in_hand), left[0])
    goal, item, place, grip = asked[k], items[k], places[k], grips[k]
    if object_words(goal.item) in PUSHED:
        return command(state, push(state, goal.item, item, place), 0.0, close=True)
    if grip is not None:
        velocity, release = carry(state, goal, item, place)
        if release:
            return command(state, velocity, 0.0, close=False)
        if grip > 0:
            return command(state, grip * velocity, 0.0, close=True)
    grasp = plan_grasp(state, goal, place)
    velocity, close = approach(state, goal, grasp, item, surrounded=grip is not None)
    return command(state, velocity, grasp.yaw, close)


def _let_go(state: PrivilegedState, place: Place, item: Float64Array) -> Float64Array:
    """Open the fingers, then rise over the place, and off a tall ``item``, bounds (2, 3)."""
    height = max(place.surface + RETREAT, item[1, 2] + FINGERTIP_BELOW + CLEARANCE)
    up = speed(max(height - state.eef_position[2], 0.0), VERTICAL_TAPER)
    free = float(np.clip((state.finger_gap - LET_GO[0]) / (LET_GO[1] - LET_GO[0]), 0.0, 1.0))
    return command(state, np.array([0.0, 0.0, free * up]), 0.0, close=False)
