"""Folders that look like a checkpoint of ours and are not quite: what belongs to them is read, or they are refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spvla
from spvla.errors import InputError
from spvla.export import load_export
from spvla.vlas import checkpoint as checkpoints
from spvla.vlas.openvla import from_pretrained, load
from spvla.vlas.openvla.weights import EMBEDDING, HEAD, save_pretrained
from tests.conftest import ScriptedVLA
from tests.test_openvla import STATS, picture, tiny_config, tiny_model

NARROW = {"action": {**STATS, "q01": [-0.05] * 6 + [0.0], "q99": [0.05] * 6 + [1.0]}}


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_model().model, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(from_pretrained(folder).model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(code, path, **options) -> InputError:
    with pytest.raises(InputError) as error:
        from_pretrained(path, **options)
    assert error.value.code == code, error.value
    return error.value


# ------------------------------------------------------------------------------------------------ statistics of adapters


@pytest.mark.parametrize("file", ["dataset_statistics.json", "config.json"])
def test_an_adapters_own_statistics_give_its_actions_their_size(folder, adapter, file):
    content = {"pen": NARROW} if file == "dataset_statistics.json" else {"norm_stats": {"pen": NARROW}}
    (adapter / file).write_text(json.dumps(content))
    wide = from_pretrained(folder, adapter=adapter, unnorm_key="toy")
    narrow = from_pretrained(folder, adapter=adapter, unnorm_key="pen")
    outputs = []
    for model in (wide, narrow):
        model.reset("pick up a red mug")
        outputs.append(model.predict(picture(0)).actions[0, :6])
    np.testing.assert_allclose(outputs[1], outputs[0] / 10, rtol=1e-5)


def test_nobody_guesses_which_statistics_hold(folder, adapter):
    (adapter / "dataset_statistics.json").write_text(json.dumps({"pen": NARROW}))
    error = refused("statistics-ambiguous", folder, adapter=adapter)
    assert error.field == "unnorm_key" and "toy" in str(error) and "pen" in str(error)
    (adapter / "dataset_statistics.json").write_text(json.dumps({"toy": NARROW}))
    assert refused("statistics-ambiguous", folder, adapter=adapter, unnorm_key="toy").field == "toy"
    (adapter / "dataset_statistics.json").write_text(json.dumps({"toy": {"action": STATS}}))
    assert from_pretrained(folder, adapter=adapter, unnorm_key="toy").model.statistics.q99[0] == 0.5


def test_a_suite_finds_its_statistics_in_the_adapter(folder, adapter):
    (adapter / "dataset_statistics.json").write_text(json.dumps({"libero_goal_no_noops": NARROW}))
    model = load(str(folder), suite="libero_goal", adapter=str(adapter), device="cpu")
    assert model.model.statistics.key == "libero_goal_no_noops"


def test_an_adapter_for_other_words_or_images_is_refused(folder, adapter):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["cup"] = tokenizer["model"]["vocab"].pop("mug")
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert refused("adapter-mismatch", folder, adapter=adapter, unnorm_key="toy").field == "tokenizer.json"
    shutil.copy(folder / "tokenizer.json", adapter)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor["means"] = [[0.1, 0.1, 0.1]] * 2
    (adapter / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert refused("adapter-mismatch", folder, adapter=adapter, unnorm_key="toy").field == "preprocessor.means"


@pytest.mark.parametrize("bound", ["q01", "q99"])
def test_statistics_of_an_empty_column_are_named(folder, bound):
    change(folder, norm_stats={"toy": {"action": {**STATS, bound: [0.1, float("nan"), *STATS[bound][2:]]}}})
    assert refused("statistics", folder).field == "norm_stats.toy"


# ------------------------------------------------------------------------------------------------------------- relatives


@pytest.mark.parametrize(
    "name",
    [
        "action_head--50000_checkpoint.pt",
        "proprio_projector--latest_checkpoint.pt",
        "noisy_action_projector--7_checkpoint.pt",
        "vision_backbone--300000_checkpoint.pt",
        "action_head.safetensors",
    ],
)
def test_a_relative_whose_actions_come_from_elsewhere_is_refused(folder, name):
    (folder / name).write_bytes(b"x")
    refused("unsupported-checkpoint", folder)
    (folder / name).unlink()
    (folder / "training_log.pt").write_bytes(b"x")
    from_pretrained(folder)


def test_on_the_hub_too_where_such_files_are_never_downloaded(folder, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.list_repo_files", lambda path, revision=None: ["config.json", "action_head--1_checkpoint.pt"]
    )
    with pytest.raises(InputError) as error:
        checkpoints.refuse_companions("hf://owner/name", folder)
    assert error.value.code == "unsupported-checkpoint"

    def offline(path, revision=None):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    checkpoints.refuse_companions("hf://owner/name", folder)


# --------------------------------------------------------------------------------------------------------------- weights


def shard(folder, name, **tensors):
    save_file(tensors, folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_two_sets_of_weights_are_never_settled_silently(folder):
    weights = load_file(folder / "model.safetensors")
    shard(folder, "model-00001-of-00001.safetensors", **weights)
    refused("two-weights", folder)
    (folder / "model.safetensors").unlink()
    from_pretrained(folder)
    shard(folder, "model.safetensors", **weights)  # an index that names the single file leaves no question
    from_pretrained(folder)


def test_tied_embeddings_are_one_tensor(tmp_path):
    config = tiny_config()
    tied = {**config.text_config, "tie_word_embeddings": True}
    save_pretrained(tiny_model(text_config=tied).model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert HEAD not in weights
    model = from_pretrained(tmp_path)
    assert model.model.language_model.lm_head.weight is model.model.language_model.get_input_embeddings().weight
    torch.testing.assert_close(model.model.language_model.lm_head.weight, weights[EMBEDDING])
    outputs = []
    for again in (False, True):
        if again:  # as other exporters write it
            save_file({**weights, HEAD: weights[EMBEDDING].clone()}, tmp_path / "model.safetensors")
        model = from_pretrained(tmp_path)
        model.reset("pick up a red mug")
        outputs.append(model.predict(picture(1)).actions)
    np.testing.assert_array_equal(*outputs)
    save_file({**weights, HEAD: weights[EMBEDDING] + 0.1}, tmp_path / "model.safetensors")
    assert refused("tied-weights", tmp_path).field == HEAD


def test_quantised_weights_are_called_so(folder):
    weights = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused("quantised-checkpoint", folder)
    change(folder, quantization_config=None)
    for extra in ({name.replace("weight", "qweight"): torch.zeros(2, 2)}, {name: weights[name].to(torch.int8)}):
        save_file({**weights, **extra}, folder / "model.safetensors")
        refused("quantised-checkpoint", folder)
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    refused("quantised-checkpoint", folder)


# ----------------------------------------------------------------------------------------------------- the robot's state


@pytest.mark.parametrize("name", ["generator_libero_expert", "generator_libero_real_time", "generator_nano"])
@pytest.mark.parametrize("size", [7, 9, 14])
def test_a_state_of_another_layout_is_refused_at_the_first_step(name, size):
    features = next(iter(load_export(name).generators.values())).config.features
    assert features.state_size == 8
    vla = ScriptedVLA(np.zeros((4, 7)))
    vla.predict = lambda observation, keep_mass=1.0: spvla.VLAOutput(
        np.zeros((1, 7), np.float32), features=np.zeros(192, np.float32)
    )
    policy = spvla.accelerate(vla, name)
    policy.reset("go")
    with pytest.raises(InputError) as error:
        policy.select_action(spvla.Observation(None, np.zeros(size, np.float32)))
    assert (error.value.code, error.value.field) == ("state-mismatch", "observation.state")
    policy.reset("go")
    policy.select_action(spvla.Observation(None, np.zeros(8, np.float32)))


@pytest.mark.parametrize("part", ["timm_model_kwargs", "text_config"])
def test_a_depth_beyond_all_sense_is_refused_before_anything_is_built(folder, part):
    config = json.loads((folder / "config.json").read_text())
    name = "depth" if part == "timm_model_kwargs" else "num_hidden_layers"
    (config[part][1] if part == "timm_model_kwargs" else config[part])[name] = 2**31
    (folder / "config.json").write_text(json.dumps(config))
    assert refused("too-large", folder).field == name
