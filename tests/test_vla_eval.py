"""vla-eval's own LIBERO benchmark drives our server: the actions of our own loop, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("vla_eval")
pytest.importorskip("libero")
from examples.agreement_with_vla_eval import ExpertFromPoses, compare
from spvla import InputError
from spvla.serve import Interface
from spvla.vlas.registry import load_vla
from tests.test_serve import serving  # noqa: F401

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

ROOT = Path(__file__).parents[1]


def untrained(checkpoint=None):
    """A small OpenVLA with random weights, always the same ones."""
    values = yaml.safe_load((ROOT / "configs" / "eval" / "openvla_dry_run.yaml").read_text())
    return load_vla(values["vla"], None, values["vla_options"], "libero_object")


@pytest.mark.parametrize("benchmark", ["LiberoAtStepEnd", "LiberoFrom"])
def test_the_outside_harness_and_our_loop(serving, tmp_path, benchmark):  # noqa: F811
    interface = yaml.safe_load((ROOT / "configs" / "serve" / "libero.yaml").read_text())["interface"]
    one = serving("tests.test_vla_eval:untrained", Interface(**interface), generator="ridge")
    command = [str(Path(sys.executable).with_name("vla-eval")), "run", "--no-docker", "--server-url", one.url]
    command += ["--config", "configs/serve/vla_eval_libero.yaml", "--output-dir", str(tmp_path)]
    fields = {"benchmark": f"examples.agreement_with_vla_eval:{benchmark}", "episodes_per_task": 1, "max_steps": 6}
    for name, value in fields.items():
        command += ["--benchmark-field", f"{name}={value}"]
    command += ["--param", "tasks=[4]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Spec validation passed" in done.stderr
    (recording,) = tmp_path.glob("recording-*.sqlite")
    compare(str(recording), str(tmp_path / "c.json"), "tests.test_vla_eval:untrained", generator="ridge", gate="release")
    result = json.loads((tmp_path / "c.json").read_text())
    assert (result["episodes"], result["same_success"], result["same_steps"]) == (1, 1, 1)
    (row,) = result["rows"]
    assert (row["task"], row["init_state"]) == (4, 30)
    if benchmark == "LiberoAtStepEnd":
        assert row["first_difference"] is None
    else:  # robosuite's own observations are some milliseconds older, but for the first
        assert row["first_difference"] != 0


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(InputError, match="no such recording"):
        compare(str(tmp_path / "x.sqlite"), str(tmp_path / "c.json"), "expert")
    expert = ExpertFromPoses("libero_object")
    with pytest.raises(InputError, match="'fly' belongs to no task of the suite"):
        expert.reset("fly")
    assert np.isfinite(expert.action_space.q01).all()
