"""Exports on the Hugging Face hub: uploaded as one commit, loaded at a commit, described in the hub's own form.

The hub is a stand-in on loopback (tests/hub_stand_in.py); the library is the real one, in a process of its own, since it reads
the hub's address when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from spvla import InputError, load_export, save_export
from spvla.card import measured, model_card
from spvla.export import fingerprint
from spvla.hub import hub_repository, pinned
from tests import hub_stand_in
from tests.test_export import make_export

ROOT = Path(__file__).parents[1]
SUMMARY = {
    "kind": "closed_loop",
    "suite": "libero_object",
    "init_states": "30-49",
    "rows": [
        {"generator": "none", "gate": "none", "risk": None, "episodes": 20, "success_rate": 1.0, "skipped": 0.0},
        {
            **{"generator": "mlp", "gate": "learned", "risk": 0.1, "episodes": 20},
            **{"success_rate": 0.95, "skipped": 0.75, "deviation_rate": None},
        },
    ],
}


def test_the_card_is_valid_and_says_what_the_calibration_says():
    export = make_export()
    card = ModelCard(model_card(export))
    data = card.data
    assert data.library_name == "spvla" and data.license == "mit" and data.pipeline_tag == "robotics"
    risk = export.defaults["risk"]
    expected = {(name, round(float(curve.coverage_at(risk)), 4), risk) for name, curve in export.calibration.items()}
    found = {(r.metric_args["generator"], r.metric_value, r.metric_args["risk"]) for r in data.eval_results}
    assert found == expected
    name, again = model_index_to_eval_results(eval_results_to_model_index(data.model_name, data.eval_results))
    assert name == data.model_name and {r.metric_value for r in again} == {r.metric_value for r in data.eval_results}


def test_closed_loop_results_are_the_cards_metrics():
    results = measured(SUMMARY)
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in results] == [
        ("success_rate", 0.95, "libero_object"),
        ("skipped", 0.75, "libero_object"),
    ]
    listed = ModelCard(model_card(make_export(), results)).data.eval_results
    assert {("success_rate", 0.95), ("skipped", 0.75)} <= {(r.metric_type, r.metric_value) for r in listed}
    with pytest.raises(InputError, match="expected the summary of a closed loop, got one of kind 'latency'"):
        measured({"kind": "latency"})


def test_where_a_folder_came_from(tmp_path):
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    assert pinned("hf://owner/name@v1", snapshot) == f"hf://owner/name@{'a' * 40}"
    assert pinned("some/folder", snapshot) is None
    assert hub_repository(pinned("hf://owner/name", snapshot)) == ("owner/name", "a" * 40)


def test_results_of_another_export_and_names_that_are_none_are_refused(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, "export": "0123456789abcdef"}))
    export = make_export()
    with pytest.raises(InputError, match="are results of another export") as caught:
        export.push_to_hub("owner/name", results=tmp_path / "summary.json")
    assert caught.value.code == "other-export"
    for name in ("name", "owner/name@main", "hf://owner/name"):
        with pytest.raises(InputError) as caught:
            export.push_to_hub(name)
        assert caught.value.code == "hub-address"


UP_AND_DOWN = """
import json, sys, warnings
import spvla
folder, results, changed = sys.argv[1:]
export = spvla.load_export(folder)
first = export.push_to_hub("lab/arm", results=results)
second = spvla.load_export(changed).push_to_hub("lab/arm", private=False)
found = {"first": first, "second": second}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    at_commit = spvla.Export.from_hub("lab/arm", first.partition("@")[2])
    found["told_at_commit"] = [str(w.message) for w in told]
    on_branch = spvla.Export.from_hub("lab/arm", "main")
    found["told_on_branch"] = [str(w.message) for w in told]
found |= {"at_commit": at_commit.source, "on_branch": on_branch.source, "tolerance": on_branch.tolerance}
found["by_address"] = spvla.load_export("hf://lab/arm").source
spvla.save_export(at_commit, sys.argv[1] + "_again")
for call in (lambda: spvla.Export.from_hub("lab/arm", "0" * 40), lambda: spvla.load_export("hf://lab/leg")):
    try:
        call()
    except spvla.InputError as error:
        found.setdefault("errors", []).append(error.code)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_up_and_down_again(tmp_path):
    address, hub = hub_stand_in.start()
    export = make_export()
    folder = save_export(export, tmp_path / "export")
    fewer = {name: part for name, part in export.generators.items() if name != "transformer"}
    gates = {name: gate for name, gate in export.gates.items() if name != "transformer"}
    changed = save_export(replace(export, tolerance=0.3, generators=fewer, gates=gates), tmp_path / "changed")
    results = tmp_path / "summary.json"
    results.write_text(json.dumps({**SUMMARY, "export": fingerprint(str(folder))}))
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = [sys.executable, "-c", UP_AND_DOWN, str(folder), str(results), str(changed)]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    (_, _), (first, files), (second, files_then) = hub.repositories["lab/arm"]
    assert found["first"] == f"hf://lab/arm@{first}" and found["second"] == f"hf://lab/arm@{second}"
    assert found["at_commit"] == found["first"] and found["on_branch"] == found["by_address"] == found["second"]
    assert not found["told_at_commit"] and second in found["told_on_branch"][0]
    assert found["tolerance"] == 0.3 and found["errors"] == ["no-such-folder", "no-such-folder"]
    assert hub.private["lab/arm"]

    saved = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    saved.pop("README.md")
    assert {k: v for k, v in files.items() if k in saved} == saved
    assert set(files) == {*saved, "README.md", ".gitattributes"}
    assert not [name for name in files_then if "transformer" in name], "parts that the new version lacks are gone"
    card = ModelCard(files["README.md"].decode())
    assert ("success_rate", 0.95) in {(r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert files["README.md"].decode() == hub.cards[0], "the hub was asked whether the card is valid"
    again = load_export(Path(f"{folder}_again"))
    for name, generator in export.generators.items():
        for key, value in generator.state_dict().items():
            assert torch.equal(again.generators[name].state_dict()[key], value)
