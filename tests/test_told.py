"""What commands print of labels and of their progress."""

from __future__ import annotations

import re

import numpy as np

from data.inspect import inspect
from data.relabel import relabel
from spvla.actions import LIBERO
from spvla.store import Episode, RolloutWriter
from tests.test_words_and_cameras import picture


def make_store(folder, labels: bool, images: bool = False):
    """40 steps: executed 0.25, labelled -0.5."""
    writer = RolloutWriter(folder, LIBERO)
    actions = np.tile(np.float32([0.25] * 6 + [1]), (40, 1))
    episode = Episode(actions, "go", np.arange(40) / 20, states=np.zeros((40, 3), np.float32))
    if labels:
        episode.vla_actions = np.tile(np.float32([-0.5] * 6 + [-1]), (40, 1))
        episode.vla_actions[:30] = np.nan  # the teacher was asked at ten steps
    if images:
        episode.images = {"image": [picture(t)["bytes"] for t in range(40)]}
    writer.write("a", [episode])
    return writer.finalize()


def test_executed_actions_and_labels_are_two_tables(tmp_path, capsys):
    inspect(data=make_store(tmp_path / "labelled", labels=True))
    told = capsys.readouterr().out
    _, executed, labels = re.split(r"\n *(?:action|label) +q01", told)
    assert "0.250" in executed and "-0.500" not in executed
    assert "-0.500" in labels and "0.250" not in labels and "nan" not in labels and "25.0% of the steps" in told
    inspect(data=make_store(tmp_path / "recorded", labels=False))
    assert not re.search(r"\n *label +q01", capsys.readouterr().out)


class Still:
    action_space = LIBERO

    def reset(self, instruction):
        pass

    def predict(self, observation, keep_mass=1.0):
        from spvla.vlas.base import VLAOutput

        return VLAOutput(np.zeros((1, 7), np.float32))


def test_the_progress_bar_is_not_drawn_for_every_frame(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.relabel.load_vla", lambda *args: Still())
    store = make_store(tmp_path / "seen", labels=False, images=True)
    relabel(tmp_path / "out", "still", data=store, batch_size=1, decode_ahead=False, accelerator="cpu")
    drawn = capsys.readouterr().err.count("relabel seen")
    assert 0 < drawn < 20  # of 40 frames
