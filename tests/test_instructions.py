"""Whether the instruction counts: what is asked for, and what was lifted first."""

import numpy as np
import pytest

from data.envs import load_tasks, make_env
from eval.instructions import first_lifted, named, questions, summarise
from spvla import InputError
from spvla.vlas.registry import load_vla
from tests.conftest import ScriptedVLA

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

MILK = "pick up the milk and place it in the basket"


def test_what_is_asked_for():
    asked = questions(MILK, "milk", [MILK.replace("milk", "butter")], ["ketchup", "tomato sauce"], 3)
    assert asked == [
        ("own", MILK),
        ("other", "pick up the butter and place it in the basket"),
        ("nothing", "pick up the and place it in the basket"),
        ("absent", "pick up the tomato sauce and place it in the basket"),
    ]
    assert named("pick up the black bowl and place it on the plate") == "black bowl"
    with pytest.raises(InputError, match="open the drawer"):
        named("open the drawer")


def test_rates():
    def trial(asked, wanted, lifted, task=0):
        return {"asked": asked, "object": wanted, "own_object": "milk_1", "lifted": lifted, "task": task}

    own, other, nothing = summarise(
        [
            *(trial("own", "milk_1", x) for x in ("milk_1", "milk_1", None)),
            *(trial("other", "butter_1", x, task) for task, x in enumerate(("butter_1", "milk_1", "soup_1", "butter_1"))),
            trial("nothing", None, "soup_1"),
        ]
    )
    assert (own["lifted_asked"], own["rate"], own["lifted_nothing"]) == (2, pytest.approx(2 / 3), 1)
    assert (other["lifted_asked"], other["lifted_own"], other["lifted_another"]) == (2, 1, 1)
    assert other["scenes"] == 4 and other["ci95"][0] < 0.5 < other["ci95"][1]
    assert "rate" not in nothing and nothing["lifted_another"] == 1


def test_what_a_policy_lifts_first():
    with make_env(load_tasks("libero_object", [0], 120)[0]) as env:
        env.reset(30)
        other = env.instructions()[1]
        wanted = env.asked_object(other)
        lifted, steps = first_lifted(env, load_vla("expert", suite="libero_object"), other, 30, 0)
        assert lifted == wanted != env.asked_object(env.task.instruction) and steps < 120
        assert first_lifted(env, ScriptedVLA(np.zeros((120, 7))), other, 30, 0) == (None, 120)
