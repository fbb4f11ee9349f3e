"""A recording is known again by its data and its publisher's name, wherever it lies: no store holds it twice, and two data sets
in folders of the same name stay two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.convert import convert
from data.identity import hub_name
from data.lerobot import LerobotSource
from data.splits import _scene
from data.store import RolloutStore
from spvla.errors import InputError
from spvla.store import read_episodes
from tests.conftest import BRIDGE
from tests.test_words_and_cameras import write_lerobot

WORDS = [[0] * 5, [1] * 4, [0] * 6]


def hub(cache: Path, owner: str = "lab", snapshot: str = "1f3a", **options) -> Path:
    """A data set as the hub's cache keeps it."""
    folder = cache / f"datasets--{owner}--cups" / "snapshots" / snapshot
    return write_lerobot(folder, options.pop("words", WORDS), **options)


def held(store: Path) -> list[int]:
    return [len(e) for e in read_episodes(store)]


def refused_as_twice(*args, **options) -> None:
    with pytest.raises(InputError) as error:
        convert("lerobot", *args, **options)
    assert error.value.code == "episode-twice" and error.value.field is not None


def test_a_snapshot_of_the_hubs_cache_is_named_for_its_data_set(tmp_path):
    folder = hub(tmp_path)
    source = LerobotSource(folder)
    assert source.name == "lab--cups" and source.named and source.parts[0].id.startswith("lab--cups-")
    (tmp_path / "link").symlink_to(folder)
    assert hub_name(tmp_path / "link") == "lab--cups"
    assert hub_name(Path("/x/datasets--cups/snapshots/ab/left_arm")) == "cups--left_arm"
    assert hub_name(Path("/x/datasets--cups/blobs/ab")) is None and hub_name(Path("/x/snapshots/ab")) is None


@pytest.mark.parametrize("changed", [False, True])
def test_two_snapshots_never_give_an_episode_twice(tmp_path, changed):
    old = hub(tmp_path)
    new = hub(tmp_path, snapshot="77bc", seed=1 if changed else 0)
    convert("lerobot", old, tmp_path / "store")
    refused_as_twice(new, tmp_path / "store")
    refused_as_twice(new, tmp_path / "store", episodes="0-1")
    assert held(tmp_path / "store") == [5, 4, 6]
    convert("lerobot", old, tmp_path / "store")  # the same again changes nothing
    assert held(tmp_path / "store") == [5, 4, 6]
    other = hub(tmp_path, owner="school", seed=2)  # another publisher's data set of that name
    convert("lerobot", other, tmp_path / "store")
    assert sorted(held(tmp_path / "store")) == [4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize("name", ["renamed", "cups"])
def test_a_copy_is_the_same_data_set_under_any_name(tmp_path, name):
    folder = write_lerobot(tmp_path / "cups", WORDS)
    convert("lerobot", folder, tmp_path / "store", episodes="0-1")
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / name)
    refused_as_twice(copy, tmp_path / "store", episodes="0-1")
    refused_as_twice(copy, tmp_path / "store")
    convert("lerobot", copy, tmp_path / "store", episodes="2")  # these are not there yet
    assert sorted(held(tmp_path / "store")) == [4, 5, 6]


def test_a_stopped_run_goes_on_where_the_data_set_was_moved_to(tmp_path):
    folder = write_lerobot(tmp_path / "cups", [[0] * 3] * 20)  # two parts
    convert("lerobot", folder, tmp_path / "store")
    convert("lerobot", folder, tmp_path / "whole")
    for file in list((tmp_path / "store" / ".shards").glob("cups-000016-*")):
        file.unlink()
    copy = shutil.copytree(folder, tmp_path / "disk" / "cups")
    convert("lerobot", copy, tmp_path / "store")
    assert len(held(tmp_path / "store")) == 20
    shutil.move(folder, tmp_path / "cups2")
    shutil.rmtree(tmp_path / "cups2")
    convert("lerobot", copy, tmp_path / "whole")  # where it was read from is gone: nothing to do


def test_different_data_sets_in_folders_of_one_name_are_two(tmp_path):
    first = write_lerobot(tmp_path / "a" / "data", WORDS)
    second = write_lerobot(tmp_path / "b" / "data", WORDS, seed=1)  # files of the same size
    for _ in range(2):  # and calling again continues both
        convert("lerobot", first, tmp_path / "store")
        convert("lerobot", second, tmp_path / "store")
    assert held(tmp_path / "store") == [5, 4, 6, 5, 4, 6]
    scenes = [_scene(e) for e in RolloutStore(tmp_path / "store").episodes]
    assert len(set(scenes)) == 6
    convert("lerobot", second, tmp_path / "alone")
    alone = {_scene(e) for e in RolloutStore(tmp_path / "alone").episodes}
    assert alone in (set(scenes[:3]), set(scenes[3:]))  # twins across stores


def test_a_file_that_changed_is_told_even_if_its_size_did_not(tmp_path):
    folder = write_lerobot(tmp_path / "cups", WORDS)
    convert("lerobot", folder, tmp_path / "store")
    file = "data/chunk-000/episode_000001.parquet"
    other = write_lerobot(tmp_path / "other", WORDS, seed=5)
    assert (other / file).stat().st_size == (folder / file).stat().st_size
    shutil.copy(other / file, folder / file)
    with pytest.raises(InputError, match="delete"):
        convert("lerobot", folder, tmp_path / "store")


def test_a_store_is_known_by_the_recordings_in_it(tmp_path):
    words = [[0] * 3 + [1] * 3, [1] * 4]
    convert("lerobot", write_lerobot(tmp_path / "cups", words), tmp_path / "store")
    convert("lerobot", tmp_path / "store", tmp_path / "again", episodes="0")
    convert("lerobot", tmp_path / "store", tmp_path / "again", episodes="1-2")  # the second piece of the same recording too
    assert sorted(held(tmp_path / "again")) == [3, 3, 4]
    refused_as_twice(tmp_path / "cups", tmp_path / "again", episodes="0")


def test_rlds_records_of_another_copy(tmp_path):
    convert("rlds", BRIDGE, tmp_path / "store", episodes="0-3")
    copy = shutil.copytree(BRIDGE, tmp_path / "bridge" / "1.0.0")
    with pytest.raises(InputError) as error:
        convert("rlds", copy, tmp_path / "store", episodes="3-5")
    assert error.value.code == "episode-twice"
    convert("rlds", copy, tmp_path / "store", episodes="4-5")
    numbers = [e.metadata["number"] for e in read_episodes(tmp_path / "store")]
    assert sorted(numbers) == [0, 1, 2, 3, 4, 5]
    notes = [json.loads(n.read_text()) for n in (tmp_path / "store" / ".shards").glob("*.json")]
    assert {n["path"] for n in notes} == {str(BRIDGE), str(copy)}
