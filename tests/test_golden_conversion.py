"""Converting real episodes gives the numbers it has always given; ``tests/data/golden_conversion.py`` wrote them."""

import numpy as np
import pytest

from tests.conftest import DATA
from tests.data.golden_conversion import ARRAYS, SETS, converted, sampled


@pytest.mark.parametrize("name", SETS)
def test_real_episodes_convert_to_the_recorded_numbers(name, tmp_path):
    found = converted(DATA, name, tmp_path / "store")
    with np.load(ARRAYS) as golden:
        expected = {key.split(":")[1]: golden[key] for key in golden.files if key.startswith(f"{name}:")}
    assert found.keys() == expected.keys() and len(expected["actions"]) > 0
    for key, value in expected.items():
        np.testing.assert_array_equal(sampled(key, found[key]), value, err_msg=key)
