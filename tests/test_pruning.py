"""Token pruning: the score, the contours, the speed responses and the selection."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spvla import LIBERO, ActionSpace, InputError
from spvla.pruning import TokenSelector, make_pruner
from spvla.pruning.attention import attention_received
from spvla.pruning.contours import contour_patches
from spvla.pruning.pruner import with_current_names
from spvla.pruning.selector import select
from spvla.pruning.speed import Constant, FastFewer, SlowFewer, fast_fewer, require_translations, slow_fewer

RATIO = {"speed": "constant", "measure": "ratio", "keep": 0.5}


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
def test_fast_fewer_keeps_less_when_fast(z, expected):
    assert fast_fewer(z, 0.5, 0.9) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("xyz", "expected"), [((0, 0, 0), 0.1), ((0.3, 0.4, 0), 1.0), ((0.15, 0, 0.2), 0.55), ((2, 2, 2), 1.0)]
)
def test_slow_fewer_keeps_less_when_slow(xyz, expected):
    assert slow_fewer(xyz, 0.5, 0.9) == pytest.approx(expected)


def test_speed_responses_read_the_last_action():
    assert FastFewer()(None, LIBERO) == SlowFewer()(None, LIBERO) == 1.0
    assert FastFewer()(np.float32([0.9, 0, -1.0, 0, 0, 0, 1]), LIBERO) == pytest.approx(0.1)
    assert SlowFewer()(np.float32([0, 0, 0, 0, 0, 0, 1]), LIBERO) == pytest.approx(0.1)
    assert Constant(0.7)(np.zeros(7, np.float32), LIBERO) == Constant(0.7)(None, LIBERO) == 0.7


def test_a_speed_response_without_its_dimension_is_refused_by_name():
    with pytest.raises(InputError, match=r"'fast_fewer' needs a vertical translation \(translation\[2\]\).*'arm'") as refused:
        FastFewer()(np.zeros(3, np.float32), joints())
    assert (refused.value.code, refused.value.field) == ("no-translation", "speed")
    with pytest.raises(InputError, match="'slow_fewer' needs a translation"):
        require_translations(SlowFewer(), joints())
    assert Constant(0.5)(np.zeros(3, np.float32), joints()) == 0.5


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"speed": "fast"}, "speed"),
        ({"speed": "constant"}, "keep"),
        ({**RATIO, "keep": 0.0}, "keep"),
        ({"speed": "slow_fewer", "keep": 0.5}, "keep"),
        ({**RATIO, "z_min": 0.5}, "z_min"),
        ({"measure": "tokens"}, "pruning"),
        ({"positions": "own"}, "pruning"),
        ({"budget": 0}, "pruning"),
        ({"score": "beauty"}, "pruning score"),
        ({"z_min": 1.0}, "z_min"),
        ({"z_threshold": 1.0}, "z_threshold"),
        ({"contour_fraction": 1.0}, "contour_fraction"),
    ],
)
def test_bad_fields_are_refused(options, field):
    with pytest.raises(InputError) as refused:
        make_pruner(options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({**RATIO, "budget": 98}, "contours"),  # as it shipped once under the name of half
        ({"budget": 16}, "contours"),
        ({"contours": False, "contour_fraction": 0.5}, "contour_fraction"),
        ({"budget": 1, "contour_fraction": 0.1}, "score"),
        ({**RATIO, "keep": 1.0}, "keep"),
    ],
)
def test_settings_in_which_a_part_cannot_matter_are_refused(options, field):
    with pytest.raises(InputError) as refused:
        make_pruner(options)
    assert (refused.value.code, refused.value.field) == ("cannot-matter", field)


def test_a_budget_that_spares_no_token_is_refused():
    for budget in (16, 17):
        with pytest.raises(InputError) as refused:
            TokenSelector(contours=False, budget=budget).require(16)
        assert (refused.value.code, refused.value.field) == ("cannot-matter", "budget")
    TokenSelector(contours=False, budget=15).require(16)


def test_former_names_say_the_new_ones():
    for old, new in (("release", "fast_fewer"), ("readme", "slow_fewer")):
        for former in (old, {"speed": old}):
            with pytest.raises(InputError, match=new) as refused:
                make_pruner(former)
            assert refused.value.code == "renamed"
            assert make_pruner(with_current_names(former)) == make_pruner(new)


def random_case(seed: int, n: int = 196):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(n, rng.uniform(0.05, 2)))
    return scores, rng.random(n) < rng.random()


def test_contours_change_the_choice():
    """A setting's contours win places: half of the tokens stay, and which ones depends on the picture."""
    for fields in ({"contour_fraction": 0.25}, {"contour_fraction": 0.25, "budget": 98}):
        selector = make_pruner({**RATIO, **fields}).selector
        for seed in range(50):
            scores, contours = random_case(seed)
            kept = selector.choose(scores, contours, 0.5)
            attended = np.argsort(-scores, kind="stable")
            assert len(kept) == 98 and set(attended[:73]) <= set(kept), "three quarters go by attention"
            left_out = [t for t in attended[73:] if contours[t]][:25]
            assert set(left_out) <= set(kept), "a quarter goes to the best contours of the rest"
            others = set(kept) - set(attended[:73]) - set(left_out)
            assert others <= set(attended[:98]), "and what they do not need to attention again"
            assert set(kept) != set(selector.choose(scores, np.zeros(196, bool), 0.5)) or not set(left_out) - set(attended[:98])


@pytest.mark.parametrize("seed", range(20))
def test_the_former_half_was_half_attention(seed):
    for n in (16, 196, 256):
        scores, contours = random_case(seed, n)
        former = select(scores, contours, 0.5, budget=n // 2, measure="ratio")
        half_attention = make_pruner({**RATIO, "contours": False}).selector
        assert former.tolist() == half_attention.choose(scores, None, 0.5).tolist()


def least_scored(queries, keys, images):
    received = attention_received(queries, keys)
    return (received.max() - received) / (received.max() - received).sum(-1, keepdim=True)


def test_a_score_of_ones_own_needs_a_function_and_its_name():
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    own = TokenSelector(score=f"{__name__}:least_scored")
    torch.testing.assert_close(own.scores(q, k, []), least_scored(q, k, []))
    assert own.scores(q, k, []).argmin() == TokenSelector().scores(q, k, []).argmax()


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


def test_selector_selects_the_union_in_order():
    rng = np.random.default_rng(0)
    attention = rng.random(256)
    attention /= attention.sum()
    image = np.zeros((224, 224, 3), np.uint8)
    image[100:150, 100:150] = 255
    both = TokenSelector().select(attention, image, 0.3)
    semantic = TokenSelector(contours=False).select(attention, image, 0.3)
    assert set(both) == set(semantic) | set(np.flatnonzero(contour_patches(image, 16)))
    assert len(both) > len(semantic)
    assert TokenSelector().select(attention, image, 1.0).tolist() == list(range(256))
    ratio = TokenSelector(measure="ratio", contours=False).select(attention, image, 0.5)
    assert len(ratio) == 128
    with pytest.raises(InputError, match="square"):
        TokenSelector().select(np.full(5, 0.2), image, 0.5)
