"""Winning back what pruning costs: the adapter learns, is all that is written, and loads where any adapter does."""

import json

import lightning as L
import numpy as np
import pytest
import torch

from spvla.errors import InputError
from spvla.observation import Observation
from spvla.pruning import TokenSelector
from spvla.vlas.openvla import OpenVLA, from_pretrained
from spvla.vlas.openvla.weights import save_pretrained
from tests.test_frames import recorded, write
from tests.test_train_vla import QUIET, batch, module
from train.recover import RecoverModule
from train.vla.frames import FrameData

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The PEFT config's:UserWarning")]


@pytest.fixture
def checkpoint(tmp_path):
    """A small model with opinions: larger weights than a fresh one's, so that pruning changes its answers."""
    model = module(tmp_path).network.model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "patch_embed" not in name:
                p.mul_(4.0)
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def plain(checkpoint, **options) -> OpenVLA:
    model = from_pretrained(checkpoint, **options)
    model.selector = TokenSelector(measure="ratio", contours=False)
    return model


def test_its_answers_are_the_policys(checkpoint, tmp_path):
    m, b, model = RecoverModule(str(checkpoint), tmp_path / "out").eval(), batch(), plain(checkpoint)
    pixels, prompts = m.prepare(b)
    whole, scores, (features, attention) = m.teach(pixels, prompts)
    keep = m.choose(attention, b.images, 0.25)
    assert all(len(k) == 4 for k in keep)
    with torch.no_grad():
        pruned, _ = m.answer(features, prompts, keep)
        _, forced = m.answer(features, prompts, [torch.arange(16)] * 8, whole)
    torch.testing.assert_close(forced, scores, atol=1e-3, rtol=1e-3)
    for share, tokens in ((1.0, whole), (0.25, pruned)):
        for i, text in enumerate(b.instructions):
            model.reset(text)
            assert model.predict(Observation(b.images[i].numpy()), share).tokens[0].tolist() == tokens[i].tolist()
    assert (pruned != whole).any(), "pruning changes nothing here: there would be nothing to win back"


@pytest.mark.parametrize(
    "options", [{"temperature": 2.0}, {"targets": r"(projector\.fc\d|_proj)"}], ids=["encoders too", "behind the encoders"]
)
def test_the_adapter_wins_back_agreement_and_loads(checkpoint, tmp_path, options):
    m, b = RecoverModule(str(checkpoint), tmp_path / "out", learning_rate=5e-3, **options), batch()
    assert m.sees_anew == ("targets" not in options)
    loader = torch.utils.data.DataLoader([b] * 20, batch_size=None)
    held = torch.utils.data.DataLoader([b], batch_size=None)
    trainer = L.Trainer(**QUIET, max_steps=60, max_epochs=-1, num_sanity_val_steps=0, default_root_dir=tmp_path)
    trainer.fit(m, loader, held)
    before, after = (float(trainer.callback_metrics[f"val/{name}_0.25"]) for name in ("before", "agreement"))
    assert after > before + 0.5 * (1 - before), f"{before} to {after}: less than half is won back"
    assert float(trainer.callback_metrics["val/regained_0.25"]) == pytest.approx((after - before) / (1 - before))

    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(checkpoint)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    untouched, adapted = plain(checkpoint), plain(checkpoint, adapter=tmp_path / "out")
    right = 0.0
    for i, text in enumerate(b.instructions):
        picture = Observation(b.images[i].numpy())
        untouched.reset(text)
        adapted.reset(text)
        whole = untouched.predict(picture).tokens
        right += float(np.mean(adapted.predict(picture, 0.25).tokens == whole)) / len(b.instructions)
    assert right == pytest.approx(after, abs=0.02)


def test_it_continues_and_reads_a_store_that_nobody_labelled(checkpoint, tmp_path):
    write(tmp_path / "store", **{f"part{i}": recorded(i) for i in range(20)})
    data = FrameData(
        [tmp_path / "store"], batch_size=4, batches=2, validation_batches=1, image_size=32, labelled=False, conventions=None
    )
    for steps in (2, 4):
        m = RecoverModule(str(checkpoint), tmp_path / "out", keep=(0.25, 0.5))
        saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
        trainer = L.Trainer(**QUIET, max_steps=steps, max_epochs=-1, callbacks=[saver], num_sanity_val_steps=0)
        trainer.fit(m, datamodule=data, ckpt_path="last")
        assert trainer.global_step == steps and "val/regained_0.5" in trainer.callback_metrics
    trainer = L.Trainer(**QUIET, max_steps=1, max_epochs=-1, num_sanity_val_steps=0, default_root_dir=tmp_path)
    trainer.fit(RecoverModule(str(checkpoint), tmp_path / "early"), datamodule=data)
    assert "val/regained_0.25" not in trainer.callback_metrics and (tmp_path / "early" / "adapter_config.json").exists()


def test_bad_options_are_refused(checkpoint, tmp_path):
    for options, message in (
        ({"keep": (0.25, 1.0)}, "between 0 and 1"),
        ({"targets": "nothing_of_it"}, "targets 'nothing_of_it'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            RecoverModule(str(checkpoint), tmp_path, **options)
