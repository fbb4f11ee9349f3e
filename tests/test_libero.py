"""LIBERO's real physics: protocol, determinism, privileged state, errors, rendering, and the scripted expert."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from data.collect import choose_instruction
from data.envs import load_tasks
from data.envs.base import Annotator, Instructable, Perturbable, Privileged
from data.envs.libero.env import LiberoEnv
from data.envs.libero.expert import Expert, expert_action, scene_instructions
from data.envs.libero.goals import Turn, parse_goal, parse_goals, predicates
from data.envs.libero.scene import LiberoObservation, PrivilegedState, project
from data.envs.libero.simulator import Libero
from data.envs.libero.tasks import LiberoTask
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.base import VLA

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

if importlib.util.find_spec("libero") is None:
    pytest.skip("LIBERO is not installed: pip install -e .[libero]", allow_module_level=True)


@pytest.fixture(scope="module")
def task() -> LiberoTask:
    return load_tasks("libero_object", [0])[0]


@pytest.fixture(scope="module")
def env(task: LiberoTask) -> Iterator[LiberoEnv]:
    with LiberoEnv(task) as env:
        yield env


def positions(env: LiberoEnv, init_state: int | None, actions: np.ndarray, seed: int = 0) -> np.ndarray:
    """End effector positions and every pose along an episode of given actions."""
    env.reset(init_state, seed)
    vectors = []
    for action in actions:
        env.step(action)
        vectors.append(np.concatenate([env.state(), env.privileged().to_vector()]))
    return np.array(vectors)


def rollout(env: LiberoEnv, instruction: str, init_state: int, judged_by: str | None = None) -> list[np.ndarray]:
    """The expert's actions for ``instruction`` until success or the step limit."""
    expert = Expert()
    expert.reset(instruction)
    env.reset(init_state, instruction=judged_by)
    actions: list[np.ndarray] = []
    while not env.success and env.steps < env.task.max_steps:
        actions.append(expert.predict(env.observe()).actions[0])
        env.step(actions[-1])
    return actions


def test_tasks_have_the_published_limits_and_instructions(task: LiberoTask) -> None:
    assert task.instruction == "pick up the alphabet soup and place it in the basket"
    assert task.max_steps == 280 and task.init_states == 50 and task.read_init_states().shape == (50, 110)
    assert [t.index for t in load_tasks("libero_object", ["7", task.name])] == [7, 0]
    limits = {"libero_spatial": 220, "libero_goal_swap": 300, "libero_10": 520, "libero_90": 400}
    assert {suite: load_tasks(suite, [0])[0].max_steps for suite in limits} == limits
    assert load_tasks("libero_object_lan", [task.name])[0].instruction == "grab alphabet soup and put it into basket"


def test_unknown_names_are_listed(task: LiberoTask, env: LiberoEnv) -> None:
    with pytest.raises(InputError, match=r"unknown LIBERO suite 'libero_objects'; known: .*libero_object,"):
        load_tasks("libero_objects")
    for unknown in (10, "pick_up_the_moon"):
        with pytest.raises(InputError, match=rf"unknown task '?{unknown}'? of suite libero_object; known: 0 pick_up"):
            load_tasks("libero_object", [unknown])
    with pytest.raises(InputError, match="initial states 0-49, got 50"):
        env.reset(50)
    with pytest.raises(InputError, match="7 finite action values"):
        env.step(np.full(7, np.nan))


def test_state_layout(env: LiberoEnv) -> None:
    env.reset(0)
    observation = env.observe()
    state, privileged = observation.state, observation.privileged
    assert state is not None and state.shape == (8,) and state.dtype == np.float32 and observation.image is None
    np.testing.assert_allclose(state[:3], privileged.eef_position, atol=1e-6)
    assert 3.0 < np.linalg.norm(state[3:6]) < 3.3, "the hand points down: half a turn from the base's frame"
    assert state[6] - state[7] == pytest.approx(privileged.finger_gap, abs=1e-6) and privileged.finger_gap > 0.07
    vector = privileged.to_vector()
    assert vector.shape == (len(env.scene.fields),) and env.scene.fields[8] == f"{env.scene.names[0]}.x"
    again = PrivilegedState.from_vector(vector, env.scene)
    np.testing.assert_allclose(again.position("milk_1"), privileged.position("milk_1"), atol=1e-6)
    with pytest.raises(InputError, match="values for this scene"):
        PrivilegedState.from_vector(vector[:-1], env.scene)
    low, high = privileged.bounds("alphabet_soup_1")[:, 0].min(0), privileged.bounds("alphabet_soup_1")[:, 1].max(0)
    np.testing.assert_allclose(high - low, [0.063, 0.063, 0.076], atol=2e-3)
    np.testing.assert_allclose(low[2], 0.0, atol=1e-3)


def test_an_episode_depends_on_nothing_before_it(task: LiberoTask, env: LiberoEnv) -> None:
    rng = np.random.default_rng(0)
    first, other = rng.uniform(-1, 1, (2, 25, 7))
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    reference = positions(env, 3, first)
    positions(env, 8, other)
    np.testing.assert_array_equal(positions(env, 3, first), reference)
    with LiberoEnv(task) as fresh:
        np.testing.assert_array_equal(positions(fresh, 3, first), reference)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_a_seed_places_the_objects(env: LiberoEnv) -> None:
    def placed(seed: int) -> np.ndarray:
        env.reset(None, seed)
        return env.privileged().positions

    first, again, other = (placed(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("init_state", [30, 41])
def test_expert_succeeds(env: LiberoEnv, init_state: int) -> None:
    actions = np.array(rollout(env, env.task.instruction, init_state))
    assert env.success and len(actions) < 110
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1.0
    assert np.abs(np.diff(actions[:, :3], axis=0)).mean() < 0.07, "labels change slowly"


def test_expert_follows_the_instruction(env: LiberoEnv) -> None:
    actions = rollout(env, "pick up the milk and place it in the basket", 30)
    milk, soup = (env.privileged().position(name) for name in ("milk_1", "alphabet_soup_1"))
    centre, half = env.privileged().region("basket_1_contain_region")
    assert len(actions) == env.task.max_steps and not env.success, "the task itself asks for the soup"
    assert (np.abs(milk - centre) < half).all() and not (np.abs(soup - centre) < half).all()


def test_success_is_judged_for_what_was_asked(env: LiberoEnv) -> None:
    asked = "pick up the butter and place it in the basket"
    goal = predicates(parse_goal(asked, env.scene))
    assert goal == (("in", "butter_1", "basket_1_contain_region"),)
    actions = rollout(env, asked, 32, judged_by=asked)
    assert env.success and len(actions) < 120
    env.reset(32)
    for action in actions:
        env.step(action)
    assert not env.success, "the next episode's goal is the task's own again"


def test_objects_trade_places(env: LiberoEnv) -> None:
    names = [name for name in env.scene.movable if name != "basket_1"]

    def places(**options) -> np.ndarray:
        env.reset(30, **options)
        state = env.privileged()
        return np.array([state.position(name)[:2] for name in (*names, "basket_1")])

    before, after = places(), places(seed=3, shuffle=True)
    np.testing.assert_array_equal(after, places(seed=3, shuffle=True))
    np.testing.assert_allclose(after[-1], before[-1], atol=1e-3)
    nearest = np.linalg.norm(after[:-1, None] - before[None, :-1], axis=-1)
    assert (nearest.min(1) < 0.02).all() and sorted(nearest.argmin(1)) == list(range(len(names)))
    assert (nearest.argmin(1) != np.arange(len(names))).sum() >= 3


def test_a_scene_knows_what_can_be_asked_for(env: LiberoEnv) -> None:
    env.reset(30)
    options = env.instructions()
    assert options == scene_instructions(env.privileged())
    assert options[0] == env.task.instruction and len(options) == len(set(options)) == 6
    assert {parse_goal(text, env.scene).item for text in options} == set(env.scene.movable) - {"basket_1"}
    chosen = [choose_instruction(options, seed) for seed in range(200)]
    assert chosen == [choose_instruction(options, seed) for seed in range(200)] and set(chosen) == set(options)
    assert 70 < chosen.count(options[0]) < 130, "half of the episodes ask for the task's own object"


def test_camera_matrix_is_mujocos_camera(env: LiberoEnv) -> None:
    """By the angles under which the camera sees a point; the images show up above and left on the right."""
    env.reset(30)
    state, data = env.privileged(), env._env.sim.data
    right, up, back = data.get_camera_xmat("agentview").T
    half = np.tan(np.deg2rad(env._env.sim.model.cam_fovy[env._env.sim.model.camera_name2id("agentview")]) / 2)
    for point in (*state.positions, state.eef_position):
        column, row = project(env.camera_matrix(), point)
        ray = point - data.get_camera_xpos("agentview")
        assert (column + 0.5) / 128 - 1 == pytest.approx(-ray @ right / -(ray @ back) / half)
        assert (row + 0.5) / 128 - 1 == pytest.approx(-ray @ up / -(ray @ back) / half)


def test_projected_objects_are_where_the_image_shows_them(task: LiberoTask) -> None:
    """Moving one object away changes the image around its projected centre."""
    with LiberoEnv(task, render="full") as env:
        env.reset(0)
        before = env.observe()
        index = env.scene.names.index("milk_1")
        centre = before.privileged.rotation("milk_1") @ env.scene.centres()[index] + before.privileged.position("milk_1")
        joint = int(env._model.body_jntadr[env._bodies[index]])
        env._data.qpos[env._model.jnt_qposadr[joint]] += 10.0
        env._env.sim.forward()
        changed = np.abs(env.observe().require_image().astype(int) - before.require_image()).max(-1) > 30
        rows, columns = np.nonzero(changed)
        middle = [(columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2]
        np.testing.assert_allclose(project(env.camera_matrix(), centre), middle, atol=4)


def test_expert_recovers_from_a_drop(env: LiberoEnv) -> None:
    expert = Expert()
    expert.reset(env.task.instruction)
    env.reset(31)
    dropped = 0
    while not env.success and env.steps < env.task.max_steps:
        action = expert.predict(env.observe()).actions[0].copy()
        if env.lifted()["alphabet_soup_1"] > 0.05 and dropped < 12:
            action[6], dropped = -1.0, dropped + 1
        env.step(action)
    assert dropped == 12 and env.success


def test_the_expert_does_one_thing_after_the_other() -> None:
    """Two things into the basket: whichever lies in it already is left there."""
    task = load_tasks("libero_10", [0])[0]
    with LiberoEnv(task) as env:
        goals = parse_goals(task.instruction, env.scene)
        assert [(g.item, g.inside) for g in goals] == [("alphabet_soup_1", True), ("tomato_sauce_1", True)]
        with pytest.raises(InputError):
            parse_goal(task.instruction, env.scene)
        actions = rollout(env, task.instruction, 0)
        assert env.success and len(actions) < 250
        env.reset(0)
        state = env.privileged()
        np.testing.assert_array_equal(expert_action(state, *goals), expert_action(state, goals[0]))
        basket, _ = state.region(goals[0].place)
        done = replace(
            state, positions=np.where(np.array(state.scene.names)[:, None] == goals[0].item, basket, state.positions)
        )
        np.testing.assert_array_equal(expert_action(done, *goals), expert_action(done, goals[1]))


@pytest.mark.parametrize(
    "suite, task",
    [("libero_goal", 5), ("libero_goal", 7), ("libero_10", 2), ("libero_10", 4), ("libero_10", 6)],
    ids=["push the plate", "turn on the stove", "stove and moka pot", "two mugs on plates", "mug and box"],
)
def test_the_expert_pushes_turns_and_takes_mugs_by_the_wall(suite: str, task: int) -> None:
    with LiberoEnv(load_tasks(suite, [task])[0]) as env:
        rollout(env, env.task.instruction, 1)
        assert env.success


def test_parts_of_fixtures_say_how_far_they_are_open() -> None:
    """As MuJoCo's own joint positions do."""
    import mujoco

    with LiberoEnv(load_tasks("libero_10", [3])[0]) as env:
        env.reset(0)
        parts, data, model = env.scene.parts, env._data, env._model
        assert {name for name, part in parts.items() if part.slides} == set(parts) and len(parts) == 3
        for name, level in {"top": 0.05, "middle": 0.1, "bottom": 0.15}.items():
            data.qpos[model.joint(f"white_cabinet_1_{name}_level").qposadr[0]] = -level
        mujoco.mj_forward(model, data)
        state = env.privileged()
        for name, level in {"top": 0.05, "middle": 0.1, "bottom": 0.15}.items():
            assert state.opened(f"white_cabinet_1_cabinet_{name}") == pytest.approx(level, abs=1e-6)
    with LiberoEnv(load_tasks("libero_goal", [7])[0]) as env:
        env.reset(0)
        (knob,) = (name for name, part in env.scene.parts.items() if not part.slides)
        assert parse_goals(env.task.instruction, env.scene) == (Turn(knob),)
        env._data.qpos[env._model.joint(knob).qposadr[0]] = 1.3
        mujoco.mj_forward(env._model, env._data)
        assert env.privileged().opened(knob) == pytest.approx(1.3, abs=1e-6)
        with pytest.raises(InputError):
            parse_goal(env.task.instruction, env.scene)


def test_expert_is_a_vla_and_says_what_it_cannot_do(env: LiberoEnv) -> None:
    expert = Expert()
    assert isinstance(expert, VLA) and isinstance(env.observe(), LiberoObservation)
    with pytest.raises(InputError, match="LiberoObservation"):
        expert.predict(Observation())
    for instruction in ("open the drawer", "pick up the ketchup and place it in the basket"):
        with pytest.raises(InputError, match="the expert cannot do"):
            parse_goal(instruction, env.scene)


def test_rendering_is_robosuites_and_fast_rendering_nearly_so(task: LiberoTask) -> None:
    from libero.libero.envs.env_wrapper import ControlEnv

    with LiberoEnv(task, render="full", image_size=128, cameras=("image", "wrist_image", "frontview")) as full:
        full.reset(0)
        observation = full.observe()
        image = observation.require_image()
        assert image.shape == (128, 128, 3) and 20 < image.std() < 70 and observation.images["wrist_image"].shape == image.shape
    # A second environment after closing the first: robosuite's own renders noise here.
    with LiberoEnv(task, render="fast", image_size=128) as fast:
        fast.reset(0)
        assert (np.abs(fast.observe().require_image().astype(int) - image).max(-1) > 8).mean() < 0.02
    control = ControlEnv(bddl_file_name=str(task.bddl_file), camera_heights=128, camera_widths=128)
    control.seed(0)
    control.reset()
    control.set_init_state(task.read_init_states()[0])
    for _ in range(10):
        control.step([0.0] * 6 + [-1.0])
    reference = control.sim.render(camera_name="agentview", width=128, height=128)
    np.testing.assert_allclose(reference[::-1, ::-1].astype(int), image, atol=1)
    control.close()


def test_libero_is_one_simulator_among_others(env: LiberoEnv) -> None:
    assert isinstance(Libero(), Annotator)
    assert all(isinstance(env, ability) for ability in (Perturbable, Instructable, Privileged))
    with pytest.raises(InputError) as error:
        load_tasks("no_such_suite")
    assert (error.value.code, error.value.field) == ("unknown-suite", "suite")
