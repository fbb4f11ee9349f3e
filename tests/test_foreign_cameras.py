"""Which image a foreign policy is given, and which forms of actions are read: names decide, never an order."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spvla import InputError, Observation
from spvla.actions import LIBERO
from spvla.vlas.cameras import match_cameras
from spvla.vlas.foreign import ForeignVLA, LeRobotVLA

ACTION = np.float32([0.25, -0.5, 0.125, 0, 0, 0, 1])
PAIRS = [  # main, wrist, as public data sets and checkpoints name them
    ("observation.images.image", "observation.images.wrist_image"),
    ("observation.images.image", "observation.images.image2"),
    ("observation.images.base_0_rgb", "observation.images.left_wrist_0_rgb"),
    ("observation.images.front", "observation.images.gripper"),
    ("observation.images.agentview_rgb", "observation.images.eye_in_hand_rgb"),
    ("observation.images.thirdPersonView", "observation.images.handCamera"),
]


def policy(features: dict[str, tuple[int, ...]]) -> SimpleNamespace:
    config = SimpleNamespace(
        n_obs_steps=1,
        temporal_ensemble_coeff=None,
        action_feature=SimpleNamespace(shape=(7,)),
        device="cpu",
        n_action_steps=1,
        image_features={name: SimpleNamespace(shape=shape) for name, shape in features.items()},
        robot_state_feature=None,
    )
    return SimpleNamespace(config=config, eval=lambda: None, reset=lambda: None)


def cameras(features: dict[str, tuple[int, ...]], **options) -> dict[str, str]:
    return LeRobotVLA(policy(features), LIBERO, (lambda x: x, lambda x: x), **options).image_features


@pytest.mark.parametrize("pair", PAIRS)
def test_the_order_of_a_policys_images_means_nothing(pair):
    for names in permutations(pair):
        assert cameras(dict.fromkeys(names, (3, 32, 32))) == {pair[0]: "image", pair[1]: "wrist_image"}


@pytest.mark.parametrize(
    "features",
    [
        {"observation.images.a": (3, 8, 8), "observation.images.b": (3, 8, 8)},
        {"observation.images.top": (3, 8, 8), "observation.images.front": (3, 8, 8)},  # both would be the main image
        {"observation.images.left_wrist": (3, 8, 8), "observation.images.right_wrist": (3, 8, 8)},
        {"observation.images.top": (3, 8, 8), "observation.images.top_depth": (3, 8, 8)},
        {"observation.images.top": (3, 8, 8), "observation.images.wrist": (1, 8, 8)},  # one channel
        {"observation.images.depth": (3, 8, 8)},
        {"observation.images.top": (3, 8, 8), "observation.images.wristwatch": (3, 8, 8)},  # part of a word
    ],
)
def test_images_that_names_do_not_tell_apart_are_for_the_user_to_say(features):
    with pytest.raises(InputError) as error:
        cameras(features)
    assert (error.value.code, error.value.field) == ("camera-ambiguous", "cameras")
    assert all(name in str(error.value) for name in (*features, "image", "wrist_image"))
    chosen = dict(zip(features, ("wrist_image", "image"), strict=False))
    if all(shape[0] == 3 for shape in features.values()):
        assert cameras(features, cameras=chosen) == chosen
    else:  # a colour image is not what this one takes
        with pytest.raises(InputError, match="three channels"):
            cameras(features, cameras=chosen)


def test_a_single_image_is_the_main_one_unless_it_is_called_otherwise():
    assert cameras({"observation.images.laptop": (3, 8, 8)}) == {"observation.images.laptop": "image"}
    assert cameras({"observation.images.wrist": (3, 8, 8)}) == {"observation.images.wrist": "wrist_image"}
    assert match_cameras({}, "policy") == {}


def returned(value) -> np.ndarray:
    made = SimpleNamespace(reset=lambda: None, select_action=lambda observation: value)
    return ForeignVLA(made, LIBERO).predict(Observation(state=np.zeros(3))).actions


@given(st.integers(1, 5), st.sampled_from(["array", "tensor", "list", "tensors", "dict"]), st.booleans())
def test_every_form_of_a_chunk_is_the_same_chunk(steps, form, graph):
    chunk = np.tile(ACTION, (steps, 1)) * np.arange(1, steps + 1)[:, None]
    forms = {
        "array": chunk.astype(np.float64),
        "tensor": torch.tensor(chunk, dtype=torch.bfloat16, requires_grad=graph),
        "list": chunk.tolist(),
        "tensors": [torch.tensor(row, dtype=torch.bfloat16, requires_grad=graph) for row in chunk],
        "dict": {"actions": torch.tensor(chunk, requires_grad=graph), "state": None},
    }
    np.testing.assert_allclose(returned(forms[form]), chunk, rtol=0.01)
    np.testing.assert_array_equal(returned(tuple(ACTION.tolist()))[0], ACTION)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "left",
        (ACTION * 2, ACTION),
        (torch.tensor(ACTION), {"attention": 1}),
        {"world_vector": ACTION[:3], "gripper": ACTION[6:]},
        {"action": ACTION, "actions": ACTION},
        {"action": None},
        [ACTION, ACTION[:3]],
        np.zeros((1, 1, 8, 7)),
    ],
)
def test_what_may_mean_several_things_is_refused(value):
    with pytest.raises(InputError) as error:
        returned(value)
    assert error.value.code == "unreadable-action"
