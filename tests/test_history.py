"""What a history refuses to remember."""

import numpy as np
import pytest

from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.history import ActionHistory, Source
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.recording import Recorder
from tests.conftest import ScriptedVLA

BAD = [(np.full(7, np.nan), "NaN or infinity"), (np.zeros(6), r"shape \(7,\), got \(6,\)"), (np.zeros((1, 7)), "shape")]


@pytest.mark.parametrize(("action", "told"), BAD)
def test_executed_actions_must_be_whole(action, told):
    history = ActionHistory(LIBERO, 4)
    history.observe(np.zeros(3))
    with pytest.raises(InputError, match=told):
        history.act(action, Source.VLA)
    assert history.steps == 0
    history.act(np.full(7, 0.5), Source.VLA)
    with pytest.raises(InputError, match=told):
        history.amend(action)
    np.testing.assert_array_equal(history.last_action, np.full(7, 0.5, np.float32))


@pytest.mark.parametrize(("action", "told"), BAD)
def test_a_refused_report_leaves_the_recording_as_it_was(tmp_path, action, told):
    policy = Recorder(SPVLAPolicy(ScriptedVLA(np.full((5, 7), 0.25))), tmp_path)
    policy.reset("go")
    policy.select_action(Observation(state=np.zeros(3, np.float32)))
    for call in (policy.executed, lambda a: policy.waited(a, np.zeros(3, np.float32))):
        with pytest.raises(InputError, match=told):
            call(action)
    assert len(policy.steps) == 1 and policy.history.steps == 1
    policy.close()
