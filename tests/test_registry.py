"""Policies by name, and their options."""

import pytest
import torch

from spvla import InputError
from spvla.vlas.openvla.statistics import statistics_of_suite
from spvla.vlas.openvla.weights import save_pretrained
from spvla.vlas.registry import VLASource, load_vla, weights_stamp
from tests.conftest import PrunableVLA, ScriptedVLA

HERE = "tests.test_registry"


def scripted(checkpoint, length=3):
    return ScriptedVLA([[0.0] * 7] * length)


def handing_on(checkpoint, **options):
    return scripted(checkpoint, **options)


def prunable(checkpoint, *, suite=None, **options):
    vla = PrunableVLA([[0.0] * 7])
    vla.suite, vla.options = suite, options
    return vla


def test_options_are_keyword_arguments_of_the_factory():
    assert len(load_vla(f"{HERE}:scripted", None, {"length": 5}).actions) == 5
    assert load_vla(f"{HERE}:prunable", None, {"anything": 1}, "libero_10").suite == "libero_10"
    assert load_vla(f"{HERE}:prunable", None, {"suite": "mine"}, "libero_10").suite == "mine"
    assert load_vla(f"{HERE}:prunable", None, {"anything": 1}).options == {"anything": 1}
    with pytest.raises(InputError, match=r"VLA '.*:scripted' takes no option 'lenght'; it takes: length"):
        load_vla(f"{HERE}:scripted", None, {"lenght": 5})
    with pytest.raises(InputError, match=r"VLA 'expert' takes no option 'unnorm_key'; it takes: suite"):
        load_vla("expert", None, {"unnorm_key": "x"})
    with pytest.raises(InputError, match=r"VLA 'tests.test_registry:handing_on': .* 'lenght'"):
        load_vla(f"{HERE}:handing_on", None, {"lenght": 5})
    with pytest.raises(InputError, match=r"'nobody' is unknown; available: openvla, .*expert"):
        load_vla("nobody")
    with pytest.raises(InputError, match=r"cannot import spvla\.nowhere:load"):
        load_vla("spvla.nowhere:load")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":", "cannot import : "),
        ("./x:y", "cannot import ./x:y"),
        ("os:sep", "os:sep is of type str, not a factory"),
        ("json:loads", r"json:loads\(checkpoint, ...\): the JSON object must be"),
    ],
)
def test_what_makes_no_vla_is_refused(name, message):
    with pytest.raises(InputError, match=f"VLA '{name}': {message}"):
        load_vla(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conventions": 5}, "conventions must be .*, got 5"),
        ({"conventions": {"bound": "x"}}, "conventions: bound must be a finite number or null, got 'x'"),
        ({"conventions": {"control_rate": -1}}, "conventions: control_rate must be positive, got -1"),
        ({"control_rate": "fast"}, "control_rate must be a finite number or null, got 'fast'"),
        ({"control_rate": 0}, "control_rate must be positive, got 0"),
        ({"adapter": 5}, "adapter must be a text or null, got 5"),
        ({"device": "meta"}, "device 'meta': holds no values"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        load_vla("nano_vla", None, options)


def test_a_second_episode_shares_the_weights_where_it_can():
    source = VLASource(f"{HERE}:prunable")
    assert source.second(source.load()).pruner is None
    source = VLASource(f"{HERE}:scripted", None, {"length": 4})
    assert source.second(other := source.load()) is not other


def test_statistics_of_a_suite():
    published = {f"libero_{s}_no_noops": {} for s in ("spatial", "object", "goal", "10")}
    assert statistics_of_suite(published, "libero_10") == "libero_10_no_noops"
    assert statistics_of_suite(published, "libero_object_swap") == "libero_object_no_noops"
    assert statistics_of_suite({"libero_object": {}, "libero_object_swap": {}}, "libero_object_swap") == "libero_object_swap"
    assert statistics_of_suite({"bridge_orig": {}, "libero_1": {}}, "libero_10") is None


def test_the_stamp_tells_weights_apart_and_nothing_else(tmp_path):
    vla = load_vla("nano_vla")
    save_pretrained(vla.model, tmp_path / "copy")
    copy = load_vla("nano_vla", str(tmp_path / "copy"))
    assert weights_stamp(vla) == weights_stamp(copy) and weights_stamp(scripted(None)) is None
    with torch.no_grad():
        copy.model.language_model.lm_head.weight += 1e-3
    assert weights_stamp(vla) != weights_stamp(copy)
