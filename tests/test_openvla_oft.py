"""OpenVLA-OFT: the published implementation's numbers, readings that are wrong, pruning, batches and plans."""

import json
import shutil

import numpy as np
import pytest
import torch

from spvla import VLA, InputError, Observation, accelerate
from spvla.observation import MAIN, WRIST
from spvla.pruning import TokenSelector
from spvla.vlas.base import BatchedVLA, NamesCameras, PrunableVLA, ReadsState
from spvla.vlas.conventions import Conventions, center_crop
from spvla.vlas.openvla.images import pixel_values
from spvla.vlas.openvla_oft import from_pretrained, untrained
from spvla.vlas.openvla_oft.model import STOP_TOKEN
from tests.conftest import DATA

REFERENCE = DATA / "openvla_oft_tiny"
FILM = "vision_backbone--150000_checkpoint.pt"
CASES = json.loads((REFERENCE / "golden.json").read_text())["cases"]
RECIPES = {
    "two_images_proprio": {},
    "one_image": {"cameras": [MAIN], "proprio": False},
    "film_two_images_proprio": {"film": True},
}
SMALL = {
    "timm_model_ids": ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"],
    "image_sizes": [56, 56],
    "timm_model_kwargs": [
        {"embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 1.0},
        {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 14},
    ],
    "text_config": {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "append_space_token": False,
    "device": "cpu",
}


def small_model(selector=None, **recipe):
    """16 visual tokens an image; weights so large that each input matters."""
    vla = untrained(**SMALL, recipe=recipe)
    with torch.no_grad():
        for p in vla.model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return vla.with_pruner(selector)


def scene(seed, cameras=(MAIN, WRIST)):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (len(cameras), 7, 7, 3))
    images = np.kron(blocks, np.ones((1, 10, 10, 1))).astype(np.uint8)
    return Observation(dict(zip(cameras, images, strict=True)), rng.uniform(-1, 1, 8).astype(np.float32))


@pytest.fixture(scope="module")
def golden():
    return json.loads((REFERENCE / "golden.json").read_text()), np.load(REFERENCE / "golden.npz")


@pytest.fixture(scope="module")
def film_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oft") / "film"
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns("golden*", "film"))
    shutil.copy(REFERENCE / "film" / FILM, folder)
    return folder


@pytest.fixture(scope="module")
def policies(film_folder):
    conventions = Conventions(center_crop=0.9, signed_gripper=True)  # its images are upright and of 224 pixels already
    return {
        variant: from_pretrained(film_folder if recipe.get("film") else REFERENCE, recipe=recipe, conventions=conventions)
        for variant, recipe in RECIPES.items()
    }


def observation_of(case, arrays):
    names = {MAIN: case["full_image"], WRIST: case["wrist_image"]}
    images = {camera: arrays[f"image/{name}"] for camera, name in names.items() if name}
    return Observation(images, None if case["proprio"] is None else arrays[f"proprio/{case['proprio']}"])


def prepared(policy, case, arrays):
    """Projected visual tokens (n N, H) and normalised state (1, S) of a case."""
    observation = observation_of(case, arrays)
    config = policy.model.vla.config
    pixels = torch.stack([pixel_values(policy.view(observation.images[c]), config) for c in policy.cameras])[None]
    features, _ = policy.model.see(pixels, [policy.model.tokenize(case["instruction"])])
    return policy.model.vla.projector(features[0]), policy.states([observation])


# ------------------------------------------------------------------------------------- the published implementation's numbers


@pytest.mark.parametrize("number", range(len(CASES)))
@torch.inference_mode()
def test_golden_float32(policies, golden, number):
    _, arrays = golden
    case = CASES[number]
    policy = policies[case["variant"]]
    model = policy.model

    def same(value, name):
        np.testing.assert_allclose(value, arrays[f"case{number}/{name}"], rtol=0, atol=1e-4)

    prompt = model.tokenize(case["instruction"])
    assert prompt == arrays[f"case{number}/input_ids"].tolist()
    visual, states = prepared(policy, case, arrays)
    same(visual[::16], "patches_16")
    if states is not None:
        same(states[0], "normalized_proprio")
    if model.film is not None:
        same(model.language([prompt])[0], "average_language_embedding")
    embeds, mask, ids = model.sequences([visual], [prompt], [torch.arange(len(visual))], states)
    assert embeds.shape[1] == case["layout"]["length"] and mask is None
    first, last = case["layout"]["action_slots"]
    assert not embeds[0, first:last].any() and embeds[0, [first - 1, last]].any(-1).all()
    hidden = model.read(embeds, mask, ids)
    same(hidden[0], "action_hidden_states")
    normalized = model.action_head(hidden)[0].numpy()
    same(normalized, "normalized_actions")
    same(model.vla.statistics.denormalize(normalized), "actions")
    policy.reset(case["instruction"])
    output = policy.predict(observation_of(case, arrays))
    same(output.actions, "env_actions")
    assert output.actions.dtype == np.float32 and output.visual_tokens == (len(visual), len(visual))
    np.testing.assert_allclose(output.features, arrays[f"case{number}/action_hidden_states"].mean(0), atol=1e-4)


@torch.inference_mode()
def wrongly(model, how, visual, states, prompt):
    """Normalised actions (T, D) of a wrong reading."""
    n, slots = model.vla.config.grid**2, model.slots
    if how == "images swapped":
        visual = torch.cat([visual[n:], visual[:n]])
    if how == "token 29871 missing":
        prompt = prompt[:-1]
    embeds, _, ids = model.sequences([visual], [prompt], [torch.arange(len(visual))], states)
    length, embed = embeds.shape[1], model.vla.language_model.get_input_embeddings()
    mask = torch.ones(length, length, dtype=torch.bool)
    shift = 1
    if how == "causal mask":
        mask = mask.tril()
    elif how == "bidirectional among the action slots only":
        mask = mask.tril()
        mask[-slots - 1 : -1, -slots - 1 : -1] = True
    elif how == "hidden states read at the slots themselves (not one before)":
        shift = 0
    elif how == "no stop token":
        embeds, ids, mask, shift = embeds[:, :-1], ids[:, :-1], mask[1:, 1:], 0
    elif how == "stop token's embedding zeroed":
        embeds[:, -1] = 0
    elif how == "placeholders keep their embedding":
        embeds[:, -slots - 1 : -1] = embed(torch.tensor(1))
    elif how == "proprio before the patches":
        embeds[0, 1 : len(visual) + 2] = embeds[0, 1 : len(visual) + 2].roll(1, dims=0)
    hidden = model.vla.language_model.model(
        inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=ids, use_cache=False
    ).last_hidden_state
    end = hidden.shape[1] - shift - 1
    return model.action_head(hidden[:, end - slots : end])[0].numpy()


@pytest.mark.parametrize("number", [0, 7, 14])
@pytest.mark.parametrize(
    "how",
    [
        "causal mask",
        "bidirectional among the action slots only",
        "hidden states read at the slots themselves (not one before)",
        "no stop token",
        "stop token's embedding zeroed",
        "placeholders keep their embedding",
        "proprio before the patches",
        "images swapped",
        "token 29871 missing",
    ],
)
def test_a_wrong_reading_is_off_by_what_the_published_implementation_says(policies, golden, number, how):
    facts, arrays = golden
    case = CASES[number]
    policy = policies[case["variant"]]
    with torch.inference_mode():
        visual, states = prepared(policy, case, arrays)
    right = arrays[f"case{number}/normalized_actions"]
    off = np.abs(wrongly(policy.model, how, visual, states, policy.model.tokenize(case["instruction"])) - right).max()
    assert off > 0.04
    expected = facts["largest_difference_of_normalized_actions_if_done_wrongly"][f"case{number}"][how]
    np.testing.assert_allclose(off, expected, rtol=1e-3)


def test_unclipped_proprioception_is_off_by_what_the_published_implementation_says(policies, golden):
    facts, arrays = golden
    model, case = policies["two_images_proprio"].model, CASES[2]
    statistics = model.proprio_statistics
    raw = arrays[f"proprio/{case['proprio']}"]
    unclipped = 2 * (raw - statistics.low) / (statistics.high - statistics.low + 1e-8) - 1
    assert np.abs(unclipped).max() > 1
    with torch.inference_mode():
        visual, _ = prepared(policies["two_images_proprio"], case, arrays)
    states = torch.from_numpy(unclipped[None]).float()
    actions = wrongly(model, "proprio not clipped", visual, states, model.tokenize(case["instruction"]))
    off = np.abs(actions - arrays["case2/normalized_actions"]).max()
    expected = facts["largest_difference_of_normalized_actions_if_done_wrongly"]["case2"]["proprio not clipped"]
    np.testing.assert_allclose(off, expected, rtol=1e-3)


def test_every_position_depends_on_the_last_one(policies):
    model = policies["one_image"].model
    visual = torch.zeros(256, 24)
    embeds, mask, ids = model.sequences([visual], [model.tokenize("open the drawer")], [torch.arange(256)], None)
    embeds = embeds.detach().requires_grad_()
    model.read(embeds, mask, ids)[0, 0].sum().backward()
    assert embeds.grad[0].abs().sum(-1).gt(0).all()


def test_film_hears_the_whole_prompt_and_its_lora_counts_once(policies, golden, film_folder, tmp_path):
    facts, arrays = golden
    facts = facts["largest_difference_of_film_patch_embeddings"]
    case, policy = CASES[14], policies["film_two_images_proprio"]
    right = arrays["case14/patches_16"]
    prompt = policy.model.tokenize(case["instruction"])
    embed = policy.model.vla.language_model.get_input_embeddings()
    for ids, at_least in (
        (prompt, 0.1),  # without the stop token
        ([*prompt[1:], STOP_TOKEN], 0.1),  # without the start token
    ):
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy.model, "language", lambda prompts, ids=ids: embed(torch.tensor([ids])).mean(1))
            visual, _ = prepared(policy, case, arrays)
        assert np.abs(visual[::16] - right).max() > at_least
    tensors = torch.load(film_folder / FILM, weights_only=True)
    for factor, name in ((0, "LoRA of the vision_backbone file left out"), (2, "LoRA added twice")):
        folder = tmp_path / str(factor)
        shutil.copytree(film_folder, folder)
        changed = {k: v * factor if ".lora_B." in k else v for k, v in tensors.items()}
        torch.save(changed, folder / FILM)
        other = from_pretrained(folder, recipe={"film": True}, conventions=policy.model.vla.conventions)
        with torch.inference_mode():
            visual, _ = prepared(other, case, arrays)
        assert np.abs(visual[::16] - right).max() > 0.5, name
        assert facts[name] > 0.5


@pytest.mark.parametrize("name", ["full_a", "wrist_a", "full_b", "wrist_b"])
def test_the_centre_crop_is_the_published_one_to_the_bit(golden, name):
    _, arrays = golden
    np.testing.assert_array_equal(center_crop(arrays[f"image/{name}"], 0.9), arrays[f"cropped_image/{name}"])


# ------------------------------------------------------------------------------------------------------------- the policy


def test_is_a_vla_with_documented_outputs():
    vla = small_model()
    for role in (VLA, PrunableVLA, BatchedVLA, NamesCameras, ReadsState):
        assert isinstance(vla, role)
    assert tuple(vla.cameras) == (MAIN, WRIST) and vla.state_dim == 8
    vla.reset("pick up the red mug")
    output = vla.predict(scene(0))
    assert output.actions.shape == (8, 7) and output.actions.dtype == np.float32
    assert output.features.shape == (64,) and output.tokens is None and output.confidence is None
    assert list(output.timings) == ["preprocess", "vision", "projector", "prefill", "decode"]
    for other in (
        Observation({**scene(0).images, MAIN: scene(1).image}, scene(0).state),
        Observation({**scene(0).images, WRIST: scene(1).image}, scene(0).state),
        Observation(scene(0).images, scene(1).state),
    ):
        assert np.abs(vla.predict(other).actions - output.actions).max() > 1e-3


@pytest.mark.parametrize("cameras", [[MAIN], [MAIN, WRIST], [MAIN, WRIST, "left"]])
@pytest.mark.parametrize("proprio", [True, False])
def test_one_to_three_images_and_chunks_of_any_length(cameras, proprio):
    vla = small_model(cameras=cameras, proprio=proprio, chunk=5, film=True)
    vla.reset("pick up the red mug")
    observation = scene(0, cameras)
    output = vla.predict(observation if proprio else Observation(observation.images))
    assert output.actions.shape == (5, 7) and output.visual_tokens == (16 * len(cameras),) * 2
    assert vla.state_dim == (8 if proprio else None)


def test_a_batch_equals_single_calls_whatever_is_padded():
    vla = small_model(TokenSelector(contours=False), film=True)
    observations = [scene(i) for i in range(3)]
    instructions = ["pick up the red mug", "take the mug", "pick up a mug and put it down"]
    for keep in (1.0, 0.4):
        batch = vla.predict_batch(observations, instructions, keep)
        assert keep == 1 or len({o.visual_tokens for o in batch}) > 1, "rows of one length test no padding"
        for observation, instruction, output in zip(observations, instructions, batch, strict=True):
            vla.reset(instruction)
            single = vla.predict(observation, keep)
            np.testing.assert_array_equal(single.kept_tokens, output.kept_tokens)
            np.testing.assert_allclose(single.actions, output.actions, atol=1e-4)
            np.testing.assert_allclose(single.features, output.features, atol=1e-4)


def test_liberos_gripper_is_binarised_with_its_sign():
    vla = untrained(**SMALL, suite="libero_object")
    vla.reset("pick up the red mug")
    actions = vla.predict(scene(0)).actions
    assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0} and vla.action_space.control_rate == 20


def test_the_accelerated_policy_executes_the_chunk_before_it_asks_again():
    vla = small_model()
    vla.reset("pick up the red mug")
    plans = [vla.predict(scene(i)).actions for i in (0, 8)]
    policy = accelerate(vla, generator="none")
    policy.reset("pick up the red mug")
    acted = [policy.select_action(scene(i)) for i in range(9)]
    np.testing.assert_allclose(acted, [*plans[0], plans[1][0]], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("positions", ["packed", "original"])
def test_exactly_k_tokens_reach_the_decoder_in_order(positions):
    vla = small_model(TokenSelector(measure="ratio", contours=False, positions=positions))
    vla.reset("pick up the red mug")
    calls = []
    vla.model.vla.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((kwargs["inputs_embeds"], kwargs["position_ids"][0])), with_kwargs=True
    )
    others = len(vla.model.tokenize("pick up the red mug")) + 1 + 56 + 1  # proprioception, slots, stop token
    vla.predict(scene(2))
    whole = calls[0][0][0]
    for ratio, k in ((0.25, 8), (0.5, 16), (0.9, 30), (1.0, 32)):
        calls.clear()
        output = vla.predict(scene(2), ratio)
        assert output.visual_tokens == (k, 32)
        assert [int((output.kept_tokens // 16 == i).sum()) for i in (0, 1)] == [k // 2, k // 2]  # neither image goes blind
        (embeds, ids), *more = calls
        assert not more and embeds.shape[1] == others + k
        torch.testing.assert_close(embeds[0, 1 : k + 1], whole[torch.from_numpy(output.kept_tokens) + 1])
        torch.testing.assert_close(embeds[0, k + 1 :], whole[33:])
        expected = torch.arange(others + 32)
        if positions == "original":
            expected = torch.cat([expected[:1], torch.from_numpy(output.kept_tokens) + 1, expected[33:]])
        assert ids.tolist() == expected[: others + k].tolist()


def test_pruning_off_is_bit_identical_and_never_silently_inactive():
    plain = small_model()
    pruned = plain.with_pruner(TokenSelector(contours=False))
    assert all(a is b for a, b in zip(plain.model.parameters(), pruned.model.parameters(), strict=True))
    for vla in (plain, pruned):
        vla.reset("pick up the red mug")
    np.testing.assert_array_equal(plain.predict(scene(1)).actions, pruned.predict(scene(1)).actions)
    assert (pruned.predict(scene(1), 0.3).actions != plain.predict(scene(1)).actions).any()
    stages = ["preprocess", "vision", "queries_keys", "score", "contours", "selection", "projector", "prefill", "decode"]
    assert list(pruned.predict(scene(1), 0.5).timings) == stages
    for keep in (0.5, 0.0, 1.1):
        with pytest.raises(InputError, match="keep_mass"):
            plain.predict(scene(1), keep)
