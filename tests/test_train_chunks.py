"""Continuing a one-step VLA as OpenVLA-OFT: it overfits a batch of chunks, and its checkpoint acts as it was trained."""

import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from spvla.errors import InputError
from spvla.hub import PRETRAINED
from spvla.observation import Observation
from spvla.vlas.openvla_oft import OpenVLAOFT
from spvla.vlas.registry import load_vla
from tests.conftest import DATA
from tests.test_train_vla import QUIET, batch, module
from train.vla.chunks import ChunkModule
from train.vla.frames import FrameBatch

pytestmark = pytest.mark.slow  # needs a training

ROOT = Path(__file__).parents[1]
CHUNK = 4
RANGE = {"state_low": [-1.0, -2.0, 0.0], "state_high": [1.0, 1.0, 2.0]}


@pytest.fixture
def parent(tmp_path):
    """A one-step VLA's checkpoint."""
    folder = tmp_path / "parent"
    folder.mkdir()
    module(folder).write(folder)
    return str(folder)


def chunks() -> FrameBatch:
    """Frames whose chunks go on from their labels; the last one's episode ends after two steps."""
    b = batch()
    ahead = b.labels.repeat(1, CHUNK, 1)
    ahead[:, :, :6] *= torch.linspace(1, -1, CHUNK)[:, None]
    ahead[7, 2:] = np.nan
    return replace(b, ahead=ahead)


def continued(parent, output, **options) -> ChunkModule:
    torch.manual_seed(0)
    defaults = {"chunk": CHUNK, "context": 160, "warmup_steps": 5, "averaging": 0.8, "weight_decay": 0.0}
    return ChunkModule(output, start=parent, **RANGE, **{**defaults, **options})


def test_it_overfits_chunks_and_its_checkpoint_acts_likewise(tmp_path, parent):
    m, b = continued(parent, tmp_path / "model", learning_rate=5e-3, cooldown=0.5, keep=(1.0, 1.0)), chunks()
    eyes = {name: p.clone() for name, p in m.network.vla.vision_backbone.named_parameters()}
    before = float(m.eval().training_step(b, 0).detach())
    loader = torch.utils.data.DataLoader([b] * 250, batch_size=None)
    L.Trainer(**QUIET, max_steps=250, enable_checkpointing=False).fit(m, loader)
    for name, p in m.network.vla.vision_backbone.named_parameters():
        torch.testing.assert_close(p, eyes[name], rtol=0, atol=0)
    with torch.inference_mode():
        trained = m.eval().predict(m.average.module, b)  # (B, T, D)
    error = (trained - m.targets(b)).abs()
    assert float(error.nanmean()) < 0.1 * before

    options = {"recipe": {"cameras": ["image"], "chunk": CHUNK}, "conventions": {"signed_gripper": True, "bound": 1.0}}
    vla = load_vla("nano_oft", str(tmp_path / "model"), options)
    assert isinstance(vla, OpenVLAOFT) and vla.state_dim == 3 and vla.cameras == ("image",)
    for i, text in enumerate(b.instructions):
        vla.reset(text)
        actions = vla.predict(Observation(b.images[i].numpy(), b.states[i].numpy())).actions
        statistics = m.network.vla.statistics
        expected = m.network.vla.conventions.to_environment(statistics.denormalize(trained[i].numpy()), (6,))
        np.testing.assert_allclose(actions, expected, atol=1e-5)


def test_it_begins_with_its_parents_weights(tmp_path, parent):
    m = continued(parent, tmp_path / "model")
    earlier = load_vla("nano_vla", parent).model.state_dict()
    for name, tensor in m.network.vla.state_dict().items():
        torch.testing.assert_close(tensor, earlier[name], rtol=0, atol=0)
    assert m.network.tokenize("pick up the milk") == load_vla("nano_vla", parent).model.tokenize("pick up the milk")


def test_it_goes_on_from_its_own_checkpoint(tmp_path, parent):
    first = continued(parent, tmp_path / "model")
    first.save()
    second = continued(str(tmp_path / "model"), tmp_path / "next").network.state_dict()
    for name, tensor in first.average.module.state_dict().items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)
    with pytest.raises(InputError) as told:
        continued(str(tmp_path / "model"), tmp_path / "next", context=128)
    assert told.value.code == "shape-mismatch"


def test_frames_of_another_chunk_or_without_state_are_refused(tmp_path, parent):
    m, b = continued(parent, tmp_path / "model"), chunks()
    with pytest.raises(InputError) as told:
        m.training_step(replace(b, ahead=b.ahead[:, :2]), 0)
    assert told.value.code == "shape-mismatch" and told.value.field == "data.chunk"
    with pytest.raises(InputError) as told:
        m.training_step(replace(b, states=torch.full((8, 1), torch.nan)), 0)
    assert told.value.code == "state"


def test_the_packaged_recipe_is_small_and_has_room_for_every_instruction(tmp_path):
    config = yaml.safe_load((ROOT / "configs" / "train" / "nano_oft.yaml").read_text())
    options = config["model"]["init_args"]
    m = ChunkModule(**{**options, "output": tmp_path})
    assert 2 * sum(p.numel() for p in m.network.parameters()) < 16e6
    assert m.network.recipe.chunk == config["data"]["init_args"]["chunk"] == 16
    suites = json.loads((DATA / "libero_instructions" / "libero_task_instructions.json").read_text())
    for task in (task for tasks in suites.values() for task in tasks):
        assert 0 not in m.network.tokenize(task["instruction_from_filename"]), task


def test_the_packaged_chunked_vla_plans_sixteen_actions_from_pixels_and_state():
    vla = load_vla("nano_oft")
    assert isinstance(vla, OpenVLAOFT) and vla.state_dim == 8 and vla.cameras == ("image",)
    vla.reset("pick up the milk and place it in the basket")
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    actions = vla.predict(Observation(image, np.array([-0.1, 0, 0.3, 3.1, 0, 0, 0.04, -0.04], np.float32))).actions
    assert actions.shape == (16, 7) and set(np.unique(actions[:, 6])) <= {-1.0, 1.0}
    size = sum(file.stat().st_size for file in (PRETRAINED / "nano_oft").iterdir())
    assert size < 16e6
