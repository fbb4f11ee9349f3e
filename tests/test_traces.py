"""The packaged exports and the small VLA act as they did when :mod:`tests.record_traces` recorded them."""

import cv2
import numpy as np
import pytest

import spvla
from spvla.actions import LIBERO
from spvla.vlas.base import VLAOutput
from spvla.vlas.registry import load_vla
from tests.record_traces import EXPERT_CELLS, NANO_CELLS, TRACES

INSTRUCTION = "pick up the alphabet soup and place it in the basket"
BIN = 2 / 255  # of an action token; where two bins are nearly as likely, another processor's rounding may choose the other


@pytest.fixture(scope="module")
def traces():
    with np.load(TRACES) as archive:
        return dict(archive)


class Recorded:
    """Answers at each step what the teacher answered there."""

    action_space, needs_images = LIBERO, False

    def __init__(self, labels):
        self.labels, self.step = labels, 0

    def reset(self, instruction):
        pass

    def predict(self, observation, keep_mass=1.0):
        return VLAOutput(self.labels[self.step][None])


def compare(policy, trace):
    assert [s.source for s in policy.steps] == trace["sources"].tolist()
    reasons = [reason.replace("share", "fraction") for reason in trace["reasons"].tolist()]  # a word of the time
    assert [s.reason for s in policy.steps] == reasons
    probability = [np.nan if s.probability is None else s.probability for s in policy.steps]
    np.testing.assert_allclose(probability, trace["probability"], atol=1e-4)


def part(traces, name):
    return {k.removeprefix(f"{name}/"): v for k, v in traces.items() if k.startswith(f"{name}/")}


@pytest.mark.parametrize("index", range(len(EXPERT_CELLS)))
def test_every_scheduler_decides_and_acts_as_recorded(traces, index):
    trace = part(traces, f"expert{index}")
    export, options = EXPERT_CELLS[index]
    vla = Recorded(trace["labels"])
    policy = spvla.accelerate(vla, export, **options)
    policy.reset(INSTRUCTION)
    for vla.step, state in enumerate(trace["states"]):
        action = policy.select_action(spvla.Observation(None, state))
        np.testing.assert_allclose(action, trace["actions"][vla.step], atol=1e-5)  # float32 sums differ between processors
    compare(policy, trace)
    assert 0 < np.mean(trace["sources"] == 1) < 1


@pytest.mark.parametrize("index", range(len(NANO_CELLS)))
def test_the_small_vla_sees_and_acts_as_recorded(traces, index):
    trace = part(traces, f"nano{index}")
    export, options, _ = NANO_CELLS[index]
    ends = np.cumsum(trace["image_sizes"])
    images = iter([cv2.imdecode(data, cv2.IMREAD_COLOR) for data in np.split(trace["images"], ends[:-1])])
    policy = spvla.accelerate(load_vla("nano_vla"), export, **options)
    policy.reset(INSTRUCTION)
    for state, action in zip(trace["states"], trace["actions"], strict=True):
        acted = policy.select_action(lambda state=state: spvla.Observation(next(images), state), state=state)
        np.testing.assert_allclose(acted, action, atol=BIN * 1.01)
        policy.executed(action)
    compare(policy, trace)
    assert next(images, None) is None, "the VLA is asked as often as it was"
