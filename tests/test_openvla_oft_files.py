"""OpenVLA-OFT's files: component files are tensors or are refused, and what no file says has to be said."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spvla import InputError, Observation
from spvla.vlas import openvla
from spvla.vlas.openvla_oft import Recipe, from_pretrained, load, untrained
from spvla.vlas.openvla_oft.recipe import ProprioStatistics
from spvla.vlas.registry import load_vla
from tests.conftest import DATA
from tests.test_openvla_oft import FILM, REFERENCE, SMALL, scene, small_model

HEAD, PROPRIO = "action_head--150000_checkpoint.pt", "proprio_projector--150000_checkpoint.pt"


@pytest.fixture
def folder(tmp_path):
    """The reference's checkpoint with FiLM's file; large files are links inside the folder's own copy."""
    target = tmp_path / "checkpoint"
    shutil.copytree(REFERENCE, target, ignore=shutil.ignore_patterns("golden*", "film"))
    return target


def refused(code, folder, **options):
    with pytest.raises(InputError) as error:
        from_pretrained(folder, **{"recipe": "libero", **options})
    assert error.value.code == code, error.value
    return error.value


def edit(file, change):
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def actions(vla, state=True):
    vla.reset("open the drawer")
    images = {camera: np.full((224, 224, 3), 90 + i, np.uint8) for i, camera in enumerate(vla.cameras)}
    return vla.predict(Observation(images, np.full(8, 0.1) if state else None)).actions


# ------------------------------------------------------------------------------------------------------------ what is read


def test_safetensors_and_names_without_a_wrapper_read_the_same(folder):
    expected = actions(from_pretrained(folder, recipe="libero"))
    for name in (HEAD, PROPRIO):
        tensors = torch.load(folder / name, weights_only=True)
        assert all(key.startswith("module.") for key in tensors)
        plain = {key.removeprefix("module."): value for key, value in tensors.items()}
        torch.save(plain, folder / name)
    np.testing.assert_array_equal(actions(from_pretrained(folder, recipe="libero")), expected)
    for name in (HEAD, PROPRIO):
        save_file(torch.load(folder / name, weights_only=True), (folder / name).with_suffix(".safetensors"))
        (folder / name).write_bytes(b"a pickle beside safetensors is not opened")
    np.testing.assert_array_equal(actions(from_pretrained(folder, recipe="libero")), expected)


def test_files_decide_unless_the_recipe_does(folder):
    assert from_pretrained(folder, recipe={"proprio": False}).state_dim is None
    assert from_pretrained(folder, recipe="libero").state_dim == 8
    shutil.copy(REFERENCE / "film" / FILM, folder)
    assert from_pretrained(folder, recipe="libero").model.film is not None
    assert from_pretrained(folder, recipe={"film": False}).model.film is None
    (folder / PROPRIO).unlink()
    assert from_pretrained(folder, recipe="libero").state_dim is None
    assert refused("missing", folder, recipe={"proprio": True}).field == "proprio_projector"
    (folder / FILM).unlink()
    assert refused("missing", folder, recipe={"film": True}).field == "vision_backbone"


def test_of_several_training_steps_one_is_named(folder):
    shutil.copy(folder / HEAD, folder / "action_head--latest_checkpoint.pt")
    assert refused("several-steps", folder).field == "step"
    assert from_pretrained(folder, recipe="libero", step="latest").state_dim is None  # no projector of that step
    assert from_pretrained(folder, recipe="libero", step=150000).state_dim == 8
    refused("missing", folder, step=50000)


def test_a_suite_brings_recipe_conventions_and_statistics(folder):
    vla = load_vla("openvla_oft", str(folder), {"device": "cpu"}, "libero_spatial")
    assert tuple(vla.cameras) == ("image", "wrist_image") and vla.action_space.name == "libero_spatial_no_noops"
    assert vla.action_space.control_rate == 20 and set(np.unique(actions(vla)[:, 6])) <= {-1.0, 1.0}
    with pytest.raises(InputError) as error:
        load(str(folder), device="cpu")
    assert (error.value.code, error.value.field) == ("recipe-missing", "recipe")
    with pytest.raises(InputError, match="needs a checkpoint"):
        load()


def test_bounds_are_the_least_and_the_largest(folder):
    vla = from_pretrained(folder, recipe={"normalization": "bounds"})
    stats = json.loads((folder / "dataset_statistics.json").read_text())["libero_spatial_no_noops"]
    np.testing.assert_allclose(vla.action_space.q99[:6], stats["action"]["max"][:6])
    np.testing.assert_array_equal(vla.model.proprio_statistics.low, stats["proprio"]["min"])
    (folder / "dataset_statistics.json").write_text(
        json.dumps({"x": {"action": {k: v for k, v in stats["action"].items() if k != "max"}}})
    )
    with pytest.raises(InputError, match=r"norm_stats\['x'\]"):
        from_pretrained(folder, recipe={"normalization": "bounds"})


def test_states_are_normalised_and_clipped():
    statistics = ProprioStatistics([0.0, 1.0, 2.0], [1.0, 3.0, 2.0])
    np.testing.assert_allclose(statistics.normalize(np.array([0.25, 9.0, 2.0])), [-0.5, 1.0, -1.0])


def test_from_the_hub_component_files_come_too(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.update(k) or str(folder))
    from_pretrained("hf://owner/name", recipe="libero")
    assert "*--*_checkpoint.pt" in asked["allow_patterns"] and "*.pt" not in asked["allow_patterns"]


# -------------------------------------------------------------------------------------------------------- what is refused


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of a pickle was run",))


@pytest.mark.parametrize("name", [HEAD, PROPRIO, FILM])
def test_pickles_that_are_more_than_tensors_are_not_run(folder, name):
    contents = [pickle.dumps(Evil()), b"", b"PK\x03\x04", b"damaged" * 20]
    torch.save({"model.fc1.weight": torch.zeros(2), "x": Evil()}, folder / name)
    contents.append((folder / name).read_bytes())
    for content in (torch.zeros(2), {"a": 1}, {1: torch.zeros(2)}, {"a": {"b": torch.zeros(2)}}, {}):
        torch.save(content, folder / name)
        contents.append((folder / name).read_bytes())
    for content in contents:
        (folder / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            from_pretrained(folder, recipe="libero")
        assert error.value.code in ("not-tensors", "component-tensors") and name in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        (HEAD, lambda t: t.pop("module.model.fc2.bias"), "component-tensors"),
        (HEAD, lambda t: t.update({"module.model.fc3.bias": torch.zeros(2)}), "component-tensors"),
        (HEAD, lambda t: t.update({"module.model.fc2.bias": torch.zeros(6)}), "component-shape"),
        (HEAD, lambda t: t.update({"module.noise_predictor.fc.weight": torch.zeros(2)}), "unsupported-checkpoint"),
        (HEAD, lambda t: t["module.model.fc2.bias"].fill_(float("nan")), None),
        (HEAD, lambda t: t.update({"module.model.fc2.bias": torch.zeros(7, dtype=torch.int8)}), "not-tensors"),
        (HEAD, lambda t: t.update({"module.model.fc2.bias": torch.zeros(7).to_sparse()}), "not-tensors"),
        (HEAD, lambda t: t.update({"model.fc1.bias": torch.zeros(24)}), "component-tensors"),  # half of it wrapped
        (PROPRIO, lambda t: t.update({"module.fc1.weight": torch.zeros(24, 7)}), "component-shape"),
        (FILM, lambda t: t.pop("vision_backbone.featurizer.blocks.0.scale.bias"), "component-tensors"),
        (
            FILM,
            lambda t: t.pop("vision_backbone.featurizer.blocks.0.block.attn.qkv.lora_A.default.weight"),
            "component-tensors",
        ),
        (FILM, lambda t: t.pop("vision_backbone.fused_featurizer.pos_embed"), "component-tensors"),
        (
            FILM,
            lambda t: t.update({"vision_backbone.featurizer.patch_embed.proj.lora_B.default.weight": torch.zeros(28, 3, 1, 1)}),
            "component-shape",
        ),
        (
            FILM,
            lambda t: t.update({"vision_backbone.featurizer.blocks.0.shift.weight": torch.zeros(28, 23)}),
            "component-shape",
        ),
    ],
)
def test_components_of_another_shape_are_named(folder, name, change, code):
    shutil.copy(REFERENCE / "film" / FILM, folder)
    edit(folder / name, change)
    with pytest.raises(InputError, match=name) as error:
        from_pretrained(folder, recipe="libero")
    assert code is None or error.value.code == code


@pytest.mark.parametrize(
    "name",
    ["noisy_action_projector--150000_checkpoint.pt", "language_model--1_checkpoint.pt", "action_head.pt", "action_head.bin"],
)
def test_parts_of_other_heads_are_refused_by_name(folder, name):
    (folder / name).write_bytes(b"x")
    assert name in str(refused("unsupported-checkpoint", folder))


def test_without_a_head_there_are_no_actions(folder):
    (folder / HEAD).unlink()
    assert refused("missing", folder).field == "action_head"
    refused("missing", DATA / "openvla_tiny")


def test_the_one_step_loader_says_who_reads_it(folder):
    with pytest.raises(InputError, match="openvla_oft") as error:
        openvla.from_pretrained(folder)
    assert error.value.code == "unsupported-checkpoint"


@pytest.mark.parametrize("change", ["missing", "short", "nan"])
def test_statistics_of_proprioception_are_needed_where_it_is_read(folder, change):
    file = folder / "dataset_statistics.json"
    stats = json.loads(file.read_text())
    proprio = stats["libero_spatial_no_noops"]["proprio"]
    if change == "missing":
        del proprio["q01"]
    else:
        proprio["q99"] = proprio["q99"][:-1] if change == "short" else [*proprio["q99"][:-1], float("nan")]
    file.write_text(json.dumps(stats))
    assert refused("statistics", folder).field == "norm_stats.libero_spatial_no_noops"
    from_pretrained(folder, recipe={"proprio": False})


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ("aloha?", "recipe"),
        ({"camera": ["image"]}, "recipe.camera"),
        ({"cameras": []}, "recipe.cameras"),
        ({"cameras": ["a", "b", "c", "d"]}, "recipe.cameras"),
        ({"cameras": ["image", "image"]}, "recipe.cameras"),
        ({"cameras": "image"}, "recipe"),
        ({"chunk": 0}, "recipe"),
        ({"normalization": "q99"}, "recipe"),
        (3, "recipe"),
    ],
)
def test_bad_recipes_are_named(recipe, field):
    with pytest.raises(InputError, match="recipe") as error:
        untrained(**SMALL, recipe=recipe)
    assert error.value.field == field


@pytest.mark.parametrize(
    "state", [None, np.zeros(7, np.float32), np.zeros((1, 8), np.float32), np.full(8, np.nan, np.float32), [0.0] * 8]
)
def test_bad_states_are_refused(state):
    vla = small_model()
    vla.reset("pick up the mug")
    with pytest.raises(InputError) as error:
        vla.predict(Observation(scene(0).images, state))
    assert error.value.field == "observation.state"


def test_bad_images_and_instructions_are_refused():
    vla = small_model()
    with pytest.raises(InputError, match="reset"):
        vla.predict(scene(0))
    with pytest.raises(InputError, match="empty"):
        vla.reset(" ")
    with pytest.raises(InputError, match=r"leaves room for 1958 beside 32 visual and 58 action tokens"):
        vla.reset("mug " * 2000)
    vla.reset("pick up the mug")
    with pytest.raises(InputError) as error:
        vla.predict(Observation(scene(0).image, scene(0).state))
    assert (error.value.code, error.value.field) == ("missing-camera", "observation.images.wrist_image")
    with pytest.raises(InputError, match="1 observations for 2"):
        vla.predict_batch([scene(0)], ["pick", "up"])
    with torch.no_grad():
        vla.model.action_head.model.fc2.bias[0] = float("nan")
    with pytest.raises(InputError, match="actions contain NaN"):
        vla.predict(scene(0))


def test_a_recipe_is_a_value():
    assert Recipe() == Recipe(cameras=("image", "wrist_image"), chunk=8, normalization="quantiles")
