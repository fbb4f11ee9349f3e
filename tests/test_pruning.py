"""Token pruning: the score, the contours, the speed responses and the selection."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spvla import LIBERO, ActionSpace, InputError
from spvla.history import ActionHistory, Source
from spvla.pruning import (
    TokenPruner,
    attention_received,
    contour_patches,
    readme_keep_mass,
    release_keep_mass,
    select,
)


def history_with(action: list[float], space: ActionSpace = LIBERO) -> ActionHistory:
    history = ActionHistory(space, 6)
    history.observe(None)
    history.act(np.float32(action), Source.VLA)
    return history


def joints() -> ActionSpace:
    return ActionSpace("arm", "joint_position", 10.0, (-1.0,) * 3, (1.0,) * 3, (-1.0,) * 3, (1.0,) * 3)


def test_attention_received_is_the_plain_formula():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    plain = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), -1).mean(1).mean(1)
    got = attention_received(q, k)
    assert got.shape == (2, 9)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(got.sum(-1), torch.ones(2))
    torch.testing.assert_close(attention_received(q[0], k[0]), plain[0])
    assert attention_received(q.bfloat16(), k.bfloat16()).dtype == torch.float32


def test_attention_received_names_the_token_everyone_looks_at():
    q = torch.ones(1, 5, 4)
    k = torch.zeros(1, 5, 4)
    k[0, 3] = 10
    assert attention_received(q, k).argmax() == 3


def test_contours_mark_the_patches_on_an_edge():
    image = np.zeros((224, 224, 3), np.uint8)
    assert not contour_patches(image, 16).any()
    image[:, 119:] = 255  # an edge inside the ninth column of 14-pixel patches
    marked = contour_patches(image, 16).reshape(16, 16)
    assert marked[:, 8].all()
    assert marked.sum() == 16


def test_contours_split_by_any_grid():
    image = np.zeros((100, 90, 3), np.uint8)
    image[45:55, 40:50] = 255
    assert contour_patches(image, 1).tolist() == [True]
    assert contour_patches(image, 7).shape == (49,)
    with pytest.raises(InputError, match="cannot be split"):
        contour_patches(image, 91)
    with pytest.raises(InputError, match="uint8"):
        contour_patches(image.astype(np.float32), 4)


@pytest.mark.parametrize(("z", "expected"), [(0.0, 1.0), (0.49, 1.0), (0.5, 1.0), (-0.75, 0.55), (1.0, 0.1), (3.0, 0.1)])
def test_release_keeps_less_when_fast(z, expected):
    assert release_keep_mass(z, 0.5, 0.9) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("xyz", "expected"), [((0, 0, 0), 0.1), ((0.3, 0.4, 0), 1.0), ((0.15, 0, 0.2), 0.55), ((2, 2, 2), 1.0)]
)
def test_readme_keeps_less_when_slow(xyz, expected):
    assert readme_keep_mass(xyz, 0.5, 0.9) == pytest.approx(expected)


def test_pruner_reads_the_last_action():
    pruner = TokenPruner(speed="release")
    assert pruner.keep_mass(ActionHistory(LIBERO, 6)) == 1.0
    assert pruner.keep_mass(history_with([0.9, 0, -1.0, 0, 0, 0, 1])) == pytest.approx(0.1)
    assert TokenPruner(speed="readme").keep_mass(history_with([0, 0, 0, 0, 0, 0, 1])) == pytest.approx(0.1)
    assert TokenPruner(speed="constant", keep=0.7).keep_mass(history_with([0] * 7)) == 0.7


def test_a_speed_response_without_its_dimension_is_refused_by_name():
    history = history_with([0, 0, 0], joints())
    with pytest.raises(InputError, match=r"'release' needs a vertical translation \(translation\[2\]\).*'arm'"):
        TokenPruner(speed="release").keep_mass(history)
    with pytest.raises(InputError, match="'readme' needs a translation"):
        TokenPruner(speed="readme").require(joints())
    assert TokenPruner(speed="constant", keep=0.5).keep_mass(history) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": "fast"}, "speed 'fast' is not one of"),
        ({"measure": "tokens"}, "measure"),
        ({"positions": "own"}, "positions"),
        ({"keep": 0.0}, "keep must lie"),
        ({"budget": 0}, "budget"),
        ({"z_min": 1.0}, "z_min"),
        ({"z_threshold": 1.0}, "z_threshold"),
    ],
)
def test_pruner_refuses_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        TokenPruner(**options)


def test_selection_on_a_worked_example():
    attention = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    assert select(attention, None, 0.7).tolist() == [1, 3]  # cumulative .4 .7: one below .7, plus one
    assert select(attention, None, 0.71).tolist() == [1, 3, 4]
    contours = np.array([False, False, True, False, False])
    assert select(attention, contours, 0.7).tolist() == [1, 2, 3]
    assert select(attention, contours, 0.7, budget=2).tolist() == [1, 3]
    assert select(attention, ~contours, 0.01, budget=3).tolist() == [1, 3, 4]  # clutter cannot switch pruning off
    assert select(attention, None, 0.5, measure="ratio").tolist() == [1, 3, 4]
    assert select(attention, contours, 1.0, budget=1).tolist() == [0, 1, 2, 3, 4]


def test_selection_refuses_what_is_no_distribution():
    with pytest.raises(InputError, match="sum to 1"):
        select(np.array([0.5, np.nan]), None, 0.5)
    with pytest.raises(InputError, match="sum to 1"):
        select(np.array([0.5, 0.1]), None, 0.5)
    with pytest.raises(InputError, match="contours have shape"):
        select(np.array([0.5, 0.5]), np.ones(3, bool), 0.5)
    with pytest.raises(InputError, match="positive"):
        select(np.array([0.5, 0.5]), None, 0.0)
    with pytest.raises(InputError, match="shape"):
        select(np.ones((2, 2)) / 4, None, 0.5)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=80).filter(lambda w: sum(w) > 1e-3),
    keep=st.floats(0.01, 1.2),
    budget=st.none() | st.integers(1, 90),
    seed=st.integers(0, 9),
    measure=st.sampled_from(["mass", "ratio"]),
)
def test_selection_properties(weights, keep, budget, seed, measure):
    attention = np.array(weights) / np.sum(weights)
    n = len(attention)
    contours = np.random.default_rng(seed).random(n) < seed / 9
    kept = select(attention, contours, keep, budget, measure)
    assert (np.diff(kept) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < n
    if keep >= 1:
        assert len(kept) == n
        return
    order = np.argsort(-attention, kind="stable")
    cumulative = np.cumsum(attention[order])
    k = math.ceil(keep * n) if measure == "ratio" else min(int((cumulative < keep).sum()) + 1, n)
    union = set(order[:k]) | set(np.flatnonzero(contours))
    assert set(kept) <= union
    assert len(kept) == min(len(union), budget or n)
    dropped = union - set(kept)
    if dropped:  # the budget left out the least attended
        assert max(attention[list(dropped)]) <= min(attention[kept])


def test_pruner_selects_the_union_in_order():
    rng = np.random.default_rng(0)
    attention = rng.random(256)
    attention /= attention.sum()
    image = np.zeros((224, 224, 3), np.uint8)
    image[100:150, 100:150] = 255
    both = TokenPruner().select(attention, image, 0.3)
    semantic = TokenPruner(contours=False).select(attention, image, 0.3)
    assert set(both) == set(semantic) | set(np.flatnonzero(contour_patches(image, 16)))
    assert len(both) > len(semantic)
    assert TokenPruner().select(attention, image, 1.0).tolist() == list(range(256))
    ratio = TokenPruner(measure="ratio", contours=False).select(attention, image, 0.5)
    assert len(ratio) == 128
    with pytest.raises(InputError, match="square"):
        TokenPruner().select(np.full(5, 0.2), image, 0.5)
