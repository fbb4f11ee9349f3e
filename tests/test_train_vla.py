"""Training a VLA: it overfits, continues where it was, and what it writes is a checkpoint like any other."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.openvla import from_pretrained
from spvla.vlas.openvla.config import OpenVLAConfig
from spvla.vlas.openvla.images import pixel_values
from spvla.vlas.openvla.model import OpenVLAModel
from spvla.vlas.registry import load_vla
from tests.conftest import DATA
from tests.test_frames import pictured_episode, write
from train.vla.averaged import pixels
from train.vla.frames import Augmentation, FrameBatch, FrameData
from train.vla.module import VLAModule, word_tokenizer
from train.vla.network import PlainAttention
from train.vla.targets import contents, draw, expected_points, soft_targets

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

ROOT = Path(__file__).parents[1]
STATS = {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
ARCHITECTURE = {
    "timm_model_ids": ["vit_small_patch14_dinov2", "vit_base_patch16_siglip_224"],
    "image_sizes": [32, 32],
    "timm_model_kwargs": [
        {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "no_embed_class": True}
        | {"init_values": 0.1, "stem": "conv"},
        {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "score_block": -2},
    ],
    "text_config": {
        "vocab_size": 40 + 64 + 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
    "n_action_bins": 64,
    "append_space_token": False,
    "norm_stats": {"libero": {"action": STATS}},
}
WORDS = ["pick", "up", "the", "milk", "soup", "and", "place", "it", "in", "basket"]


def module(output, **options) -> VLAModule:
    torch.manual_seed(0)
    return VLAModule(ARCHITECTURE, WORDS, output, **{"warmup_steps": 5, "bf16": False, "averaging": 0.8, **options})


def batch() -> FrameBatch:
    """Eight frames of two instructions with labels of their own; the asked object is where the instruction says."""
    g = np.random.default_rng(0)
    images = np.kron(g.integers(0, 256, (8, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    labels = g.uniform(-1, 1, (8, 7)).astype(np.float32)
    labels[:, 6] = np.sign(labels[:, 6])
    points = g.uniform(4, 27, (8, 3, 2)).astype(np.float32)
    texts = ["pick up the milk", "pick up the soup and place it in the basket"] * 4
    positions = torch.from_numpy(g.uniform(-0.3, 0.3, (8, 3, 3)).astype(np.float32))
    states = torch.from_numpy(g.uniform(-1, 1, (8, 3)).astype(np.float32))
    label = torch.from_numpy(labels[:, None])
    return FrameBatch(torch.from_numpy(images), texts, label, torch.from_numpy(points), positions, label, states)


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_it_overfits_a_batch_and_its_checkpoint_says_the_same(tmp_path):
    options = {"learning_rate": 5e-3, "cooldown": 0.5, "smoothing": 0.5, "rotation_weight": 1.0, "weight_decay": 0.0}
    m, b = module(tmp_path / "model", keep=(1.0, 1.0), **options), batch()
    loader = torch.utils.data.DataLoader([b] * 150, batch_size=None)
    L.Trainer(**QUIET, max_steps=150, enable_checkpointing=False).fit(m, loader)
    terms, seen = m.eval().losses(m.average.module, b)
    predicted = seen["scores"].argmax(-1)  # (B, 1, D)
    assert bool((predicted == seen["actions"]).all()) and float(terms["action"].detach()) < 1.5
    assert torch.isfinite(terms["heat"])

    model = from_pretrained(tmp_path / "model")
    config = model.model.config
    assert model.action_space.gripper == (6,) and config.vocab == 104
    for i, text in enumerate(b.instructions):
        image = b.images[i].numpy()
        torch.testing.assert_close(pixel_values(image, config), pixels(m.network.model, b.images)[i])
        model.reset(text)
        output = model.predict(Observation(image))
        assert output.tokens[0].tolist() == predicted[i, 0].tolist()
    assert load_vla("nano_vla", str(tmp_path / "model")).model.conventions.jpeg, "LIBERO's conventions by default"


def test_tokens_are_the_labels_in_the_models_units(tmp_path):
    m, b = module(tmp_path / "model"), batch()
    asked, actions = m.tokens(b)
    model = m.network.model
    assert actions.shape == (8, 1, 7)
    for i, text in enumerate(b.instructions):
        prompt = model.tokenize(text)
        own, length = asked.own[i, 0].tolist(), int(asked.lengths[i, 0])
        assert asked.common.tolist() + own[:length] == prompt and length >= 1
        assert own[length : length + 6] == actions[i, 0, :6].tolist() and not any(own[length + 6 :])
        assert 0 not in prompt, "every word of the instruction is known"
    decoded = model.statistics.denormalize(model.action_tokenizer.decode(actions.numpy()))
    back = model.conventions.to_environment(decoded, (6,))
    np.testing.assert_allclose(back[..., :6], b.labels[..., :6], atol=1 / 63)
    np.testing.assert_array_equal(back[..., 6], b.labels[..., 6])
    slack = module(tmp_path / "model", rotation_slack=0.3).tokens(b)[1].numpy()
    turned = model.statistics.denormalize(model.action_tokenizer.decode(slack))[..., 3:6]
    wanted = b.labels[..., 3:6].numpy()
    np.testing.assert_allclose(turned, np.sign(wanted) * np.maximum(np.abs(wanted) - 0.3, 0), atol=1 / 63)
    np.testing.assert_array_equal(np.delete(slack, [3, 4, 5], -1), np.delete(actions.numpy(), [3, 4, 5], -1))
    assert word_tokenizer(WORDS).encode("pick up the blue milk").ids.count(0) == 1


def test_the_packaged_model_is_small_and_knows_liberos_words():
    options = yaml.safe_load((ROOT / "configs" / "train" / "nano_vla.yaml").read_text())["model"]["init_args"]
    config = OpenVLAConfig.from_dicts({"model_type": "openvla", **options["architecture"]})
    tokenizer = word_tokenizer(options["vocabulary"])
    model = OpenVLAModel(config, tokenizer=tokenizer, conventions="libero")
    assert 2 * sum(p.numel() for p in model.parameters()) < 16e6 and config.grid**2 >= 196 and config.image_sizes == (224, 224)
    assert tokenizer.get_vocab_size() <= config.vocab - config.n_action_bins, "words and action tokens share no id"
    suites = json.loads((DATA / "libero_instructions" / "libero_task_instructions.json").read_text())
    for task in (task for tasks in suites.values() for task in tasks):
        assert 0 not in model.tokenize(task["instruction_from_filename"]), task


def test_heat_map_targets_are_points():
    points = torch.tensor([[[11.5, 19.5], [3.0, 30.0], [-9.0, 5.0]]])
    target, seen = soft_targets(points, grid=4, patch=8)
    assert seen.tolist() == [[True, True, False]]
    torch.testing.assert_close(target[0, :2].sum(-1), torch.ones(2))
    back = expected_points(target[:, :1].clamp(min=1e-9).log(), 4, 8)
    torch.testing.assert_close(back[0, 0], points[0, 0], atol=1e-3, rtol=0)


def test_dropped_tokens_are_a_choice_of_ascending_ones():
    kept = draw(torch.ones(5, 16), 0.5)
    assert kept.shape == (5, 8) and bool((kept.diff() > 0).all()) and not bool((kept[0] == kept[1]).all())
    assert draw(torch.ones(2, 16), 1.0).tolist() == [list(range(16))] * 2


def test_encoders_may_see_a_part_of_the_patches(tmp_path):
    """Those with much in them more often; seeing all of them by their numbers is seeing the image."""
    m, b = module(tmp_path / "model"), batch()
    b.images[:, :, 16:] = torch.randint(0, 256, (8, 32, 16, 3), dtype=torch.uint8)  # the left half's patches are plain
    chosen = torch.cat([draw(contents(b.images, m.network.model.config.grid), 0.5) for _ in range(50)])
    assert chosen.shape == (400, 8) and bool((chosen.diff() > 0).all())
    assert (chosen % 4 >= 2).float().mean() > 0.7
    asked, _ = m.tokens(b)
    seen, keep, everything = pixels(m.network.model, b.images), draw(torch.ones(8, 16), 0.5), torch.arange(16).expand(8, 16)
    for a, e in zip(m.network(seen, asked, keep, everything), m.network(seen, asked, keep), strict=True):
        torch.testing.assert_close(a, e)
    terms, parts = m.losses(m.network, b, 0.5, 0.5)
    assert parts["heat"].shape == (8, 2, 8) and parts["pointer"].shape == (8, 1, 4)
    assert all(torch.isfinite(t) for t in terms.values())


def test_many_questions_about_an_image_are_as_many_single_ones(tmp_path):
    """Scores as the model's own forward pass gives them; what is not to be learnt changes no loss."""
    m, b = module(tmp_path / "model").eval(), batch()
    labels = b.labels.reshape(4, 2, 7)
    places = b.points[:4, [0, 1, 2, 2]], b.positions[:4, [0, 1, 2, 2]]
    pairs = FrameBatch(b.images[::2], b.instructions, labels, *places, labels[:, :1], b.states[:4])
    asked, actions = m.tokens(pairs)
    seen, keep = pixels(m.network.model, pairs.images), draw(torch.ones(4, 16), 0.5)
    scores, _, pointer, names, reach = m.network(seen, asked, keep)
    model = m.network.model
    for i in range(4):
        for j in range(2):
            prompt = model.tokenize(b.instructions[2 * i + j])
            ids = torch.tensor([prompt + actions[i, j].tolist()])
            alone = model(seen[i : i + 1], ids, keep[i : i + 1])[0, len(prompt) - 1 : -1]  # (D, V)
            torch.testing.assert_close(scores[i, j], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(pointer[0, 0], pointer[0, 1], atol=1e-3)
    assert names.shape == (4, 2, 16) and not torch.allclose(names[0, 0], names[0, 1], atol=1e-3)

    torch.manual_seed(0)
    whole = m.losses(m.network, pairs)[0]
    assert reach.shape == (4, 2, 2, 3)
    pairs.labels[:, 1], pairs.points[:, 3], pairs.positions[:, 3] = np.nan, np.nan, np.nan
    torch.manual_seed(0)
    half = m.losses(m.network, pairs)[0]
    places = pairs.points[:, :3], pairs.positions[:, :3]
    own = FrameBatch(pairs.images, b.instructions[::2], pairs.labels[:, :1], *places, pairs.ahead, pairs.states)
    torch.manual_seed(0)
    alone = m.losses(m.network, own)[0]
    for name in ("action", "heat"):
        torch.testing.assert_close(half[name], alone[name], atol=1e-5, rtol=1e-4)
        assert abs(float((half[name] - whole[name]).detach())) > 1e-5


def test_plain_attention_is_attention(tmp_path):
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    for options in ({}, {"attn_mask": causal}, {"attn_mask": torch.randn(6, 6), "scale": 0.3}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        with PlainAttention():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), expected)


def test_a_resumed_training_counts_on(tmp_path):
    write(tmp_path / "store", a=pictured_episode(0, steps=9), b=pictured_episode(25, steps=9))
    config = {"batch_size": 4, "batches": 3, "validation_batches": 1, "image_size": 32}
    data = FrameData([tmp_path / "store"], augmentation=Augmentation(), **config)

    def run(steps: int) -> tuple[L.Trainer, VLAModule]:
        m = module(tmp_path / "model", save_every=2)
        saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=3, save_last=True)
        trainer = L.Trainer(**QUIET, max_steps=steps, callbacks=[saver], num_sanity_val_steps=0)
        trainer.fit(m, datamodule=data, ckpt_path="last")
        return trainer, m

    first, m = run(6)
    assert first.global_step == 6 and "val/item_pixels" in first.callback_metrics
    averaged = m.average.module.heat[1].weight.clone()
    second, m = run(9)
    assert second.global_step == 9 and second.current_epoch == 3 and data.passes() >= 2
    assert not torch.equal(m.average.module.heat[1].weight, averaged)
    assert not list((tmp_path / "model").glob(".*")), "nothing half written is left"
    from_pretrained(tmp_path / "model")


def test_the_packaged_weights_are_named_while_absent(monkeypatch, tmp_path):
    monkeypatch.setattr("spvla.vlas.nano.PRETRAINED", tmp_path)
    with pytest.raises(InputError, match=r"no packaged weights.*nano_vla\.yaml"):
        load_vla("nano_vla")
