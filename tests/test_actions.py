"""Action spaces and tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spvla.actions import LIBERO, ActionSpace, ActionTokenizer
from spvla.errors import InputError

JOINTS = ActionSpace(
    name="arm",
    kind="joint_velocity",
    control_rate=10,
    q01=(-2, 0, 0, 0.5),
    q99=(2, 1, 0, 1.5),
    low=(-3, -1, -1, 0),
    high=(3, 2, 1, 2),
    gripper=(1,),
)
rows = hnp.arrays(np.float32, (5, 4), elements=st.floats(-10, 10, width=32))


@given(rows)
def test_normalisation_inverts_and_maps_quantiles_to_unit(x):
    np.testing.assert_allclose(JOINTS.denormalize(JOINTS.normalize(x)), x, atol=1e-4)
    np.testing.assert_allclose(JOINTS.normalize(JOINTS.q01)[[0, 1, 3]], -1)
    np.testing.assert_allclose(JOINTS.normalize(JOINTS.q99)[[0, 1, 3]], 1)
    assert np.isfinite(JOINTS.normalize(x)).all()  # the third dimension never moves: no division by zero


@given(rows, rows, st.floats(0.01, 1))
def test_deviation_is_what_it_says(a, b, tolerance):
    expected = []
    for x, y in zip(a, b, strict=True):
        off = max(abs(np.float32(x[i]) - np.float32(y[i])) for i in (0, 2, 3)) > tolerance
        expected.append(off or (x[1] >= 0) != (y[1] >= 0))
    assert JOINTS.deviation(a, b, tolerance).tolist() == expected


def test_admissible_refuses_nan_bounds_and_jumps():
    space = LIBERO.with_max_jump(np.full(7, 0.3))
    zero = np.zeros(7, np.float32)
    assert space.admissible(zero, zero)
    assert not space.admissible(np.full(7, np.nan, np.float32), zero)
    assert not space.admissible(np.full(7, 1.01, np.float32), None)
    far = zero.copy()
    far[1] = 0.4
    assert not space.admissible(far, zero)
    assert space.admissible(far, None)
    closing = zero.copy()
    closing[6] = 1.0  # a gripper may flip: its jump is never limited
    assert space.admissible(closing, -closing)


def test_round_trip_and_errors_name_the_field():
    assert ActionSpace.from_dict(JOINTS.to_dict()) == JOINTS
    values = LIBERO.to_dict()
    with pytest.raises(InputError, match="low has 6 entries"):
        ActionSpace.from_dict({**values, "low": values["low"][:6]})
    with pytest.raises(InputError, match="colour"):
        ActionSpace.from_dict({**values, "colour": 1})
    with pytest.raises(InputError, match="kind 'sideways'"):
        ActionSpace.from_dict({**values, "kind": "sideways"})
    with pytest.raises(InputError, match="dim = 4"):
        LIBERO.require_compatible(JOINTS, "export")


@given(hnp.arrays(np.float64, 7, elements=st.floats(-1, 1)))
def test_tokens_are_openvlas_bins(x):
    tokenizer = ActionTokenizer(vocab=32000)
    tokens = tokenizer.encode(x)
    assert ((tokens >= 31744) & (tokens < 32000)).all()
    assert np.abs(tokenizer.decode(tokens) - x).max() <= 2 / 255 + 1e-6
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(tokens)), np.clip(tokens, 31745, None))
