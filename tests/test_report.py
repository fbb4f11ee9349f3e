"""The report: one page from raw files, whole and without anything from outside."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from eval.film import write_film
from eval.report.command import report
from eval.report.offline import risk_advice
from spvla import InputError
from spvla.export import save_export
from spvla.history import Source
from spvla.steps import StepInfo
from tests.conftest import BROWSER
from tests.test_export import make_export

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report over the results that come with the repository, with a film and kept tokens in one of them."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(RESULTS, folder / "results")
    images = list(np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8))
    steps = [StepInfo(Source.GENERATOR if i % 3 else Source.VLA, bool(i % 3), "") for i in range(12)]
    write_film(folder / "results" / "libero_object" / "closed_loop" / "films", "vla", images, steps, [None] * 12, 20)
    path = folder / "results" / "libero_object" / "closed_loop" / "summary.json"
    summary = json.loads(path.read_text())
    summary["rows"][0]["kept_share"] = [0.5] * 196
    path.write_text(json.dumps(summary))
    report(folder / "results", folder / "page.html")
    return folder / "page.html"


@pytest.mark.slow
def test_every_result_is_on_the_page(page):
    text = page.read_text()
    for path in RESULTS.rglob("summary.json"):
        summary = json.loads(path.read_text())
        assert str(path.relative_to(RESULTS)) in text
        for row in summary["rows"]:
            if summary["kind"] == "closed_loop":
                assert f"{row['vla_calls_per_episode']:.1f}" in text, (path, row["cell"])
    assert "<video" in text and "Kept tokens" in text


@pytest.mark.parametrize(
    ("episodes", "measured", "error", "advised"),
    [(200, 0.02, 0.005, "0.05"), (200, 0.045, 0.005, "no risk"), (10, 0.02, 0.005, "no risk"), (200, 0.0, None, "no risk")],
)
def test_a_risk_is_advised_only_where_episodes_speak_for_it(episodes, measured, error, advised):
    row = {"generator": "mlp", "risk": 0.05, "skipped": 0.8, "measured_risk": measured, "deviating_among_skipped": 0.01}
    assert advised in " ".join(risk_advice([row | {"measured_risk_standard_error": error}], episodes))


def test_a_recording_is_judged_by_an_export(store_folder, tmp_path):
    export_folder = save_export(make_export(), tmp_path / "export")
    report(store_folder, tmp_path / "page.html", export=export_folder)
    assert "held-out episodes" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match="is a recording without a live gate: give the --export"):
        report(store_folder, tmp_path / "page.html")
    with pytest.raises(InputError, match="is not a recording"):
        report(RESULTS, tmp_path / "page.html", export=export_folder)


@pytest.mark.slow
def test_pictures_are_sound_and_nothing_comes_from_outside(page):
    text = page.read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) >= 10
    for picture in pictures:
        assert len(list(ElementTree.fromstring(picture).iter())) > 20
    sources = re.findall(r"""(?:src|href)=["']?(?!#)([^"'\s>]+)""", text)
    assert sources and all(source.startswith("data:") for source in sources)


@pytest.mark.browser
@pytest.mark.slow
def test_a_browser_shows_every_picture_and_has_nothing_to_say(page, tmp_path):
    check = (
        "<script>addEventListener('load', () => { document.title = 'pictures ' + [...document.images].filter(i => "
        "!i.naturalWidth).length + '/' + document.images.length })</script></body>"
    )
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", check))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    run = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in run.stderr
    broken, count = map(int, re.search(r"<title>pictures (\d+)/(\d+)", run.stdout).groups())
    assert broken == 0 < count


def test_the_documented_tables_are_the_raw_files(tmp_path):
    report(RESULTS, tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "tables.md").read_text()


def test_results_of_older_versions_are_read(tmp_path):
    """The gate was once called scheduler, the VLA policy."""
    for name, words in (("now", ()), ("then", (('"gate', '"scheduler'), ('"vla":', '"policy":')))):
        text = (RESULTS / "chunked" / "summary.json").read_text().replace('"policy":', '"vla":')
        for new, old in words:
            text = text.replace(new, old)
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "summary.json").write_text(text)
        report(tmp_path / name, tmp_path / f"{name}.md")
    assert (tmp_path / "then.md").read_text() == (tmp_path / "now.md").read_text().replace("`now/", "`then/").replace(
        "/now/", "/then/"
    )


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(InputError, match=r"no summary\.json"):
        report(tmp_path, tmp_path / "page.html")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        report(tmp_path, tmp_path / "page.html")
    with pytest.raises(InputError, match=r"ends in \.html or \.md"):
        report(tmp_path, tmp_path / "page.pdf")


@pytest.mark.parametrize("folder", ["real_time", "libero_object/offline", "latency"])
def test_damaged_results_are_named(folder, tmp_path):
    def drawn(summary):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        for name in ("page.html", "page.md"):
            report(tmp_path, tmp_path / name)

    whole = json.loads((RESULTS / folder / "summary.json").read_text())
    for name in ("episodes.csv.gz", "traces.json.gz"):
        if (RESULTS / folder / name).exists():
            (tmp_path / name).write_bytes((RESULTS / folder / name).read_bytes())
    drawn(whole)
    for damaged in ([], {}, {**whole, "rows": []}, {**whole, "rows": [3]}, {**whole, "kind": 4}):
        with pytest.raises(InputError, match=r"summary\.json: (not a summary|expected a JSON object)"):
            drawn(damaged)
    needed = {"closed_loop": "success_rate", "offline": "max_abs_error", "latency": "gate_ms_p50"}[whole["kind"]]
    for row in whole["rows"]:
        row.pop(needed, None)
    with pytest.raises(InputError, match=f"{tmp_path}.*damaged"):
        drawn(whole)
