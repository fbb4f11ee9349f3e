"""Pictures of LeRobot folders: which kinds are read as colours, where videos are searched for, which camera is the default."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.batches import End, Frames, FrameStream
from data.convert import convert
from data.derive import Setting
from data.images import ImageCheck, as_rgb_file, read_rgb
from data.lerobot import LerobotSource
from data.parts import Part, Problem
from data.stats import measure
from spvla.errors import InputError
from spvla.store import Episode, read_episodes
from spvla.vlas.conventions import decode_image
from tests.lerobot_sets import STEPS, write_set

H, W = 48, 64
TOP = "observation.images.top"


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def colours(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def alpha(value: int) -> np.ndarray:
    return np.full((H, W), value, np.uint8)


GREY = colours()[..., 0]
PALETTE = Image.fromarray(colours()).quantize(16)
READ = {  # a picture as its file, and its colours
    "RGB": (encoded(Image.fromarray(colours())), colours()),
    "RGBA": (encoded(Image.fromarray(np.dstack([colours(), alpha(255)]))), colours()),
    "L": (encoded(Image.fromarray(GREY)), np.dstack([GREY] * 3)),
    "LA": (encoded(Image.fromarray(np.dstack([GREY, alpha(255)]), "LA")), np.dstack([GREY] * 3)),
    "P": (encoded(PALETTE), np.array(PALETTE.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(PALETTE)]),
}
REFUSED = {
    "half transparent": encoded(Image.fromarray(np.dstack([colours(), alpha(128)]))),
    "one transparent pixel": encoded(
        Image.fromarray(np.dstack([colours(), np.where(np.eye(H, W) > 0, 254, 255).astype("u1")]))
    ),
    "transparent grey": encoded(Image.fromarray(np.dstack([GREY, alpha(0)]), "LA")),
    "transparent palette": encoded(PALETTE, transparency=int(np.asarray(PALETTE)[0, 0])),
    "16 bits": encoded(Image.fromarray(GREY.astype(np.uint16) * 200)),
    "ink": encoded(Image.fromarray(colours()).convert("CMYK"), "JPEG"),
    "bits": encoded(Image.fromarray(GREY).convert("1")),
}


@pytest.mark.parametrize("kind", READ)
def test_opaque_colours_are_read(kind):
    file, want = READ[kind]
    np.testing.assert_array_equal(read_rgb(file), want)
    again = as_rgb_file(file)
    with Image.open(io.BytesIO(again)) as opened:
        assert opened.mode == "RGB"
    np.testing.assert_array_equal(decode_image(again), want)
    assert (again == file) == (kind == "RGB")
    check = ImageCheck((H, W, 4))  # the metadata of pictures with an alpha channel says so
    assert check.add(file) is None and check.add(want) is None and check.end() is None


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused(kind):
    with pytest.raises(InputError) as error:
        read_rgb(REFUSED[kind])
    assert error.value.code == "image-kind"
    assert ImageCheck(None).add(REFUSED[kind]) == f"the image of step 0 {error.value}"


@given(st.lists(st.integers(0, 255), min_size=4, max_size=4))
def test_transparency_of_any_pixel_is_seen(values):
    pixels = np.dstack([colours()[:2, :2], np.array(values, np.uint8).reshape(2, 2)])
    file = encoded(Image.fromarray(pixels))
    if set(values) == {255}:
        np.testing.assert_array_equal(read_rgb(file), colours()[:2, :2])
    else:
        with pytest.raises(InputError):
            read_rgb(file)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictured(folder, files):
    """A data set whose episode k has the picture ``files[k]`` in every step."""

    def pictures(k):
        return pa.array([{"bytes": files[k], "path": None}] * STEPS, STRUCT)

    return write_set(folder, episodes=len(files), extra={TOP: pictures}, cameras={TOP: "image"})


def relabelled(folder, **options):
    """What ``relabel`` decodes: the frames of good episodes by number, and the problems."""
    setting = Setting("lerobot", str(folder), **options)
    seen, episodes, problems = [], {}, []
    for item in FrameStream(setting, setting.open().parts, 7):
        if isinstance(item, Frames):
            seen += list(zip(item.episodes, item.images.numpy(), strict=True))
        else:
            assert isinstance(item, End)
            episodes |= item.episodes
            problems += item.problems
    return [(number, image) for number, image in seen if number in episodes], problems


def test_relabel_and_convert_agree_on_every_kind(tmp_path):
    kinds = [*READ.values(), *((file, None) for file in REFUSED.values())]
    folder = pictured(tmp_path / "s", [file for file, _ in kinds])
    convert("lerobot", folder, tmp_path / "store", images=True, on_error="skip")
    stored = {e.metadata["number"]: e for e in read_episodes(tmp_path / "store")}
    seen, problems = relabelled(folder)
    assert sorted(stored) == list(range(len(READ)))
    assert sorted(p.record for p in problems) == list(range(len(READ), len(kinds)))
    left = json.loads((tmp_path / "store" / "problems.json").read_text())
    assert [(p["record"], p["reason"]) for p in left] == [(p.record, p.reason) for p in problems]
    assert len(seen) == STEPS * len(READ)
    for number, image in seen:
        np.testing.assert_array_equal(image, kinds[number][1])
        np.testing.assert_array_equal(decode_image(stored[number].images["top"][0]), kinds[number][1])


# ------------------------------------------------------------------------------------------- episodes that nobody asked for


class Broken:
    """A source whose episodes 0 and 2 of a part can be read; the part begins at record 5, which is number 40."""

    camera, image_shape = None, None

    def episodes(self, part, images=False):
        for i in range(3):
            facts = {"number": 40 + i}
            good = Episode(np.zeros((2, 7), np.float32), "go", np.arange(2.0), metadata=facts)
            yield Problem("file", "broken", 5 + i) if i == 1 else good


def test_only_wanted_episodes_and_their_problems_come_out():
    part = Part("p", "file", first=5, count=3, start=40, size=0, content="")
    for wanted, count, problems in (((40, 42), 2, 0), ((41,), 0, 1), (None, 2, 1), ((7,), 0, 0)):
        found = list(Setting("lerobot", "x", episodes=wanted).read(Broken(), part))
        assert [len([e for e in found if isinstance(e, kind)]) for kind in (Episode, Problem)] == [count, problems]


def test_a_broken_episode_that_nobody_asked_for_stops_nothing(tmp_path):
    folder = pictured(tmp_path / "s", [READ["RGB"][0]] * 3 + [b"no picture"])
    (folder / "data/chunk-000/episode_000001.parquet").write_bytes(b"no Parquet file")
    convert("lerobot", folder, tmp_path / "store", images=True, episodes="0,2")
    assert [e.metadata["number"] for e in read_episodes(tmp_path / "store")] == [0, 2]
    assert relabelled(folder, episodes=(0, 2))[1] == []
    setting = Setting("lerobot", str(folder), episodes=(0, 2))
    assert sum(len(found.lengths) for _, found in measure(setting, setting.open().parts, "stop")) == 2
    with pytest.raises(InputError) as error:
        convert("lerobot", folder, tmp_path / "other", images=True, episodes="0-1")
    assert error.value.code == "unusable-episode" and "episode_000001" in error.value.field


# ------------------------------------------------------------------------------------------------------------------- videos


def write_video(path, level):
    """Frames of ``level`` and of stripes, so that no frame has one colour."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((H, W, 3), level, np.uint8)
    image[:, ::8] = 255
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt, stream.options = W, H, "yuv420p", {"crf": "1"}
        for _ in range(STEPS):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def levels(source):
    found = [e for part in source.parts for e in source.episodes(part, True)]
    return [None if isinstance(e, Problem) else round(float(np.median(e.images["top"][0])) / 10) * 10 for e in found]


PLACES = [
    "videos/{camera}/episode_{k:06d}",
    "videos/chunk-00{k}/{camera}/episode_{k}",
    "movies/old/{camera}/part-1/run-{k:03d}",
]


@pytest.mark.parametrize("place", PLACES)
def test_files_that_are_not_where_the_template_says_are_searched_for(place, tmp_path):
    folder = write_set(tmp_path / "s", cameras={TOP: "video"}, total_videos=3, data_path="data/{episode_index}.parquet")
    for k in range(3):
        write_video(folder / f"{place.format(camera=TOP, k=k)}.mp4", 30 + 40 * k)
    source = LerobotSource(folder)
    assert source.camera == TOP and levels(source) == [30, 70, 110]
    for name in ("video_path", "data_path"):
        assert sum(f"{name} is" in note and "elsewhere" in note for note in source.notes) == 1
    assert not [note for note in source.notes if "total_videos" in note or "not there" in note]


def test_videos_of_v3_are_searched_for(tmp_path):
    folder = write_set(tmp_path / "s", "v3.0", cameras={TOP: "video"})
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    for k, row in enumerate(rows):
        row |= {f"videos/{TOP}/{key}": value for key, value in (("chunk_index", 1), ("file_index", k), ("from_timestamp", 0.0))}
        write_video(folder / f"videos/chunk-001/{TOP}/file-{k:03d}.mp4", 30 + 40 * k)
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert levels(LerobotSource(folder)) == [30, 70, 110]


def test_two_files_for_one_episode_are_no_answer(tmp_path):
    folder = write_set(tmp_path / "s", cameras={TOP: "video"})
    for k, where in ((0, "a"), (0, "b"), (1, "a"), (2, "a")):
        write_video(folder / "videos" / where / TOP / f"episode_{k:06d}.mp4", 30 + 40 * k)
    source = LerobotSource(folder)
    assert levels(source) == [None, 70, 110]
    (folder / "data/other").mkdir()
    file = folder / "data/chunk-000/episode_000001.parquet"
    (folder / "data/other" / file.name).write_bytes(file.read_bytes())
    assert levels(LerobotSource(folder)) == [None, 70, 110]  # the one where the template says
    file.rename(folder / "data" / file.name)
    assert levels(LerobotSource(folder)) == [None, None, 110]


def test_the_default_camera_has_pictures(tmp_path):
    cameras = {"observation.image": "video", "observation.images.depot": "image", TOP: "video"}
    folder = write_set(tmp_path / "s", cameras=cameras)
    for k in range(2):
        write_video(folder / f"videos/chunk-000/{TOP}/episode_{k:06d}.mp4", 30)
    write_video(folder / "videos/chunk-000/observation.images.hand/episode_000000.mp4", 30)
    source = LerobotSource(folder)
    assert source.camera == TOP
    (told,) = [note for note in source.notes if "3 of 3 videos of observation.image are not there" in note]
    assert f"pictures of {TOP}" in told and "observation.images.hand hold videos" in told
    assert any(f"1 of 3 videos of {TOP} are not there" in note for note in source.notes)


def test_without_any_pictures_there_is_no_default_camera(tmp_path):
    folder = write_set(tmp_path / "s", cameras={TOP: "video"})
    source = LerobotSource(folder)
    assert source.camera is None
    with pytest.raises(InputError) as error:
        list(source.episodes(source.parts[0], images=True))
    assert error.value.code == "no-camera"


@pytest.mark.parametrize(("videos", "chunks"), [(3, 1), (9, 4)])
def test_wrong_totals_are_noted(videos, chunks, tmp_path):
    folder = write_set(tmp_path / "s", cameras={TOP: "video"}, total_videos=videos, total_chunks=chunks)
    for k in range(3):
        write_video(folder / f"videos/chunk-000/{TOP}/episode_{k:06d}.mp4", 30)
    notes = "\n".join(LerobotSource(folder).notes)
    assert (f"total_videos claims {videos}, the data holds 3" in notes) == (videos != 3)
    assert (f"total_chunks claims {chunks}, the data holds 1" in notes) == (chunks != 1)
