"""Training that goes on from another checkpoint's weights, and instructions in other words."""

import numpy as np
import pytest
import torch

from spvla.errors import InputError
from tests.test_train_vla import ARCHITECTURE, WORDS, module
from train.vla.frames import reword
from train.vla.module import VLAModule


def test_training_starts_with_the_checkpoints_weights_and_may_know_more_words(tmp_path):
    first = module(tmp_path / "first")
    with torch.no_grad():
        first.network.model.projector.fc1.weight.add_(1.0)
    first.average.update_parameters(first.network)
    first.save()
    second = VLAModule(ARCHITECTURE, [*WORDS, "lift", "grab"], tmp_path / "second", start=str(tmp_path / "first"))
    for name, value in first.average.module.model.state_dict().items():
        torch.testing.assert_close(second.network.model.state_dict()[name], value, rtol=1e-2, atol=1e-2)  # stored as bfloat16


def test_words_must_keep_their_tokens_and_weights_their_shapes(tmp_path):
    module(tmp_path / "first").save()
    with pytest.raises(InputError) as error:
        VLAModule(ARCHITECTURE, ["grab", *WORDS], tmp_path / "second", start=str(tmp_path / "first"))
    assert (error.value.code, error.value.field) == ("vocabulary-mismatch", "vocabulary")
    smaller = {**ARCHITECTURE, "text_config": {**ARCHITECTURE["text_config"], "intermediate_size": 32}}
    with pytest.raises(InputError) as error:
        VLAModule(smaller, WORDS, tmp_path / "second", start=str(tmp_path / "first"))
    assert error.value.code == "shape-mismatch"


def test_other_words_ask_for_the_same_thing():
    rng = np.random.default_rng(0)
    said = {reword("pick up the orange juice and place it in the basket", rng) for _ in range(300)}
    assert {"grab orange juice and put it into basket", "lift the orange juice and set it in the basket"} <= said
    assert all(text.count("orange juice") == 1 and text.endswith("basket") for text in said)
    bowl = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert all("black bowl between the plate and the ramekin and" in reword(bowl, rng) for _ in range(50))
    assert reword("open the top drawer", rng) == "open the top drawer"
