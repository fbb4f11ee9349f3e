"""Folders and files that somebody made to harm: no code runs, nothing outside is read, every refusal is one line.

The payloads are harmless: a marker file that must not appear, a secret that must not be read.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.convert import convert
from data.images import ImageCheck, read_rgb
from data.lerobot.metadata import whole_number
from data.parts import Problem
from data.rlds.features import RldsFolder
from data.sources import open_source
from spvla import InputError, load_export
from spvla.actions import LIBERO
from spvla.files import building, inside, locked, parse_json, process_mark, read_json, writing
from spvla.hub import PRETRAINED, resolve_folder
from spvla.images import open_image
from spvla.store import RolloutWriter
from spvla.store.columns import read_parquet
from spvla.store.shards import SHARD_KEY, shard_info, shard_schema
from spvla.vlas.checkpoint import weight_files
from tests.conftest import BRIDGE, smooth_episode
from tests.lerobot_sets import STEPS, write_set


def picture(form: str, width: int = 64, height: int = 48) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def bomb(width: int = 30000, height: int = 30000) -> bytes:
    """A PNG of a few hundred bytes whose header claims a picture of 2.7 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["EPS", "BMP", "TIFF", "GIF", "PPM", "ICO"])
def test_only_png_and_jpeg_are_opened(form):
    if form == "EPS":
        encoded = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n"
    else:
        encoded = picture(form)
    with pytest.raises(InputError, match="neither PNG nor JPEG"):
        read_rgb(encoded)
    assert "neither PNG nor JPEG" in str(ImageCheck(None).add(encoded))


def test_pixels_are_bounded_and_shapes_compared_before_anything_is_decoded(monkeypatch):
    for size in ((30000, 30000), (6000, 6000)):
        with pytest.raises(InputError, match="pixels") as caught, open_image(bomb(*size)):
            pass
        assert caught.value.code == "image-size"
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert "(4000, 4000, 3), the data set says (48, 64, 3)" in str(ImageCheck((48, 64, 3)).add(bomb(4000, 4000)))
    for odd in ("text", 3, {"path": "x"}):
        assert "cannot be read (expected PNG or JPEG bytes" in str(ImageCheck(None).add(odd))


def test_one_bad_picture_is_a_problem_of_its_episode(tmp_path):
    images = {0: picture("PNG"), 1: bomb(), 2: picture("JPEG")}

    def column(episode: int) -> pa.Array:
        fields = [pa.array([images[episode]] * STEPS, pa.binary()), pa.nulls(STEPS, pa.string())]
        return pa.StructArray.from_arrays(fields, ["bytes", "path"])

    folder = write_set(tmp_path / "set", extra={"observation.images.top": column}, cameras={"observation.images.top": "image"})
    options = {"camera": "observation.images.top", "images": True, "workers": 1}
    convert("lerobot", folder, tmp_path / "store", on_error="skip", **options)
    problems = json.loads((tmp_path / "store" / "problems.json").read_text())
    assert [p["record"] for p in problems] == [1] and "too many pixels" in problems[0]["reason"]
    with pytest.raises(InputError, match="too many pixels"):
        convert("lerobot", folder, tmp_path / "other", **options)


@pytest.mark.parametrize(
    "entry",
    ['"pythonClassName": "payload.Feature"', '"type": "payload.Feature", "content": {}', '"python_class_name": "payload.F"'],
)
def test_no_class_of_another_package_is_imported_for_features(tmp_path, monkeypatch, entry):
    folder = shutil.copytree(BRIDGE, tmp_path / "bridge_dataset" / "1.0.0")
    (folder / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    features = folder / "features.json"
    named = '"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor"'
    features.write_text(features.read_text().replace(named, entry, 1))
    with pytest.raises(InputError, match=r"features\.json: .* 'payload\.F\w*'; only classes of tensorflow_datasets") as caught:
        RldsFolder(folder)
    assert caught.value.code == "foreign-class" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["runs/typo", "openvla/openvla-7b", "a", "./runs/x", "hf:/a/b", "~/x"])
def test_a_folder_that_is_not_there_is_no_download(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    for load in (resolve_folder, load_export):
        with pytest.raises(InputError, match=r"no such folder; a repository .* is hf://owner/name") as caught:
            load(path)
        assert caught.value.code == "no-such-folder" and caught.value.field == path


def test_a_hub_address_is_downloaded_at_its_revision(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k["revision"])) or tmp_path)
    assert resolve_folder("hf://a/b") == resolve_folder("hf://a/b@v1.0") == tmp_path
    assert asked == [(("a/b",), None), (("a/b",), "v1.0")]
    for path in ("hf://a", "hf://a/b/c", "hf://a/b@", "hf://../b@x y"):
        with pytest.raises(InputError, match="expected hf://owner/name"):
            resolve_folder(path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/hostname", "link.safetensors", "loop.safetensors", "a\0b", "x" * 5000]
)
def test_weight_maps_stay_inside_the_checkpoint(tmp_path, name):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_text("secret")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"leads out of|not a usable path") as caught:
        weight_files(folder)
    assert caught.value.code == "outside-folder" and "\n" not in str(caught.value)


def test_links_inside_a_folder_and_in_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    (tmp_path / "same").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "same"):
        assert read_json(inside(folder, "config.json")) == {}


@pytest.mark.parametrize(
    "template",
    [
        "{episode_chunk.__class__}",
        "{episode_index:1000000000d}",
        "{episode_index!r}",
        "{episode_chunk[0]}",
        "../other/episode_{episode_index:06d}.parquet",
        "/etc/passwd{episode_index}",
        "{",
        "{unknown:03d}",
    ],
)
def test_path_templates_have_integer_fields_alone_and_stay_inside(tmp_path, template):
    folder = write_set(tmp_path / "set", data_path=template)
    with pytest.raises(InputError, match=r"cannot fill in|leads out of") as caught:
        open_source("lerobot", folder)
    assert caught.value.code in ("path-template", "outside-folder") and len(str(caught.value)) < 1000


def test_linked_data_files_outside_the_folder_are_not_read(tmp_path):
    folder = write_set(tmp_path / "set")
    file = folder / "data" / "chunk-000" / "episode_000001.parquet"
    file.rename(tmp_path / "elsewhere.parquet")
    file.symlink_to(tmp_path / "elsewhere.parquet")
    source = open_source("lerobot", folder)
    found = [e for part in source.parts for e in source.episodes(part)]
    assert [isinstance(e, Problem) for e in found] == [False, True, False] and "leads out of" in found[1].reason
    bridge = shutil.copytree(BRIDGE, tmp_path / "bridge_dataset" / "1.0.0")
    shard = next(bridge.glob("*-train.tfrecord*"))
    shard.rename(tmp_path / "elsewhere.tfrecord")
    shard.symlink_to(tmp_path / "elsewhere.tfrecord")
    with pytest.raises(InputError, match="leads out of"):
        open_source("rlds", bridge)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        ("folder", "is not a file"),
        ("pipe", "is not a file"),
        ("link", "missing"),
        ("device", "is not a file"),
    ],
)
def test_json_that_is_none_is_one_line(tmp_path, content, message):
    file = tmp_path / "x.json"
    if content == "folder":
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    elif content in ("link", "device"):
        file.symlink_to("nowhere" if content == "link" else "/dev/zero")
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value) and caught.value.field == str(file) and "\n" not in str(caught.value)


def test_json_lines_nested_too_deep_are_notes(tmp_path):
    folder = write_set(tmp_path / "set")
    with (folder / "meta" / "tasks.jsonl").open("a") as stream:
        stream.write("[" * 100_000 + "\n")
    assert any("not a JSON object" in note for note in open_source("lerobot", folder).notes)
    with pytest.raises(InputError, match="thing: not valid JSON"):
        parse_json("[" * 100_000, "thing")


@pytest.mark.parametrize(
    "features",
    [
        [],
        {"action": {"shape": 1}},
        {"action": {"shape": [[3], "x"]}},
        {"action": 3},
        {"action": {"dtype": 3, "shape": "x", "names": 7}},
        "x",
    ],
)
def test_features_of_another_form_are_one_line(tmp_path, features):
    folder = write_set(tmp_path / "set", features=features)
    try:
        source = open_source("lerobot", folder)
        assert [e for part in source.parts for e in source.episodes(part)]
    except InputError as error:
        assert "\n" not in str(error)


def test_what_dead_processes_left_goes_and_what_runs_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = process_mark().partition("-")[2]
    pairs = []
    for mark in (f"{dead.pid}-{here}", f"{os.getppid()}-{here}", f"{dead.pid}-01234567", f"{os.getppid()}-89abcdef"):
        pairs.append((tmp_path / f".file.json.{mark}.tmp", tmp_path / f".store.{mark}"))
        pairs[-1][0].write_text("")
        pairs[-1][1].mkdir()
    for path in pairs[3]:  # another machine's, of two days ago
        os.utime(path, times=(time.time() - 2 * 86_400,) * 2)
    left, used = [*pairs[0], *pairs[3]], [*pairs[1], *pairs[2]]
    with writing(tmp_path / "x.json") as temporary:
        temporary.write_text("")
    with building(tmp_path / "store"):
        pass
    assert not any(path.exists() for path in left) and all(path.exists() for path in used)


def test_two_runs_do_not_share_an_output(tmp_path):
    program = "import sys, time; from spvla.files import locked\n"
    program += "with locked(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        told = rf"run: is in use by another run \(process {other.pid}\)"
        with pytest.raises(InputError, match=told) as caught, locked(tmp_path / "run"):
            pass
        assert caught.value.code == "in-use"
        other.send_signal(signal.SIGKILL)
    with locked(tmp_path / "run"):  # the lock ended with its process
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / "run" / ".lock").exists()
    with pytest.raises(RuntimeError), locked(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists(), "a run that began nothing leaves nothing"


def test_names_of_columns_that_are_no_text_are_damage(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"distinct": [1, 2]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"distinct", b"disti\xffct"))
    for read in (read_parquet, shard_schema):
        with pytest.raises(InputError, match=r"x\.parquet.*damaged"):
            read(path)


def test_what_a_shard_says_of_itself_has_a_check_sum(tmp_path):
    """Parquet's own check sums do not cover it."""
    writer = RolloutWriter(tmp_path, LIBERO, policy="x")
    writer.write("job", [smooth_episode(0)])
    (shard,) = (tmp_path / ".shards").glob("*.parquet")
    table = pq.read_table(shard)
    metadata = dict(table.schema.metadata)
    text = metadata[SHARD_KEY]
    pq.write_table(table.replace_schema_metadata(metadata | {SHARD_KEY: text.replace(b"task 0", b"task 1")}), shard)
    with pytest.raises(InputError, match="SHA-256"):
        shard_info(shard)
    pq.write_table(table.replace_schema_metadata({SHARD_KEY: text}), shard)  # as earlier versions wrote it
    assert shard_info(shard)["episodes"][0]["instruction"] == "task 0"


def test_numbers_of_episodes_beyond_64_bits_are_none():
    assert [whole_number(x) for x in (7, "7", [7.0], 2**53, 2**63, 1e308, -1e300)] == [7, 7, 7, 2**53, None, None, None]


def test_a_file_of_the_package_is_not_outside():
    assert inside(PRETRAINED, "generator_nano").is_dir()
