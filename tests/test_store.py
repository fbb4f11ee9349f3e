"""The rollout store, and that training windows are what a policy's history holds."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from data.splits import split_episodes
from data.store import RolloutStore, last_vla_frame
from data.windows import BatchStream, Windows, frames_of, shuffled
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.history import ActionHistory, Source
from spvla.store import Episode, RolloutWriter, finalize, read_episodes
from spvla.vlas.base import VLAOutput
from spvla.vlas.conventions import encode_jpeg, jpeg_round_trip
from tests.conftest import smooth_episode, write_store


def test_windows_are_what_a_history_holds(store_folder):
    """Replays two recorded episodes through an ActionHistory and compares every window with the gathered one."""
    store = RolloutStore(store_folder)
    windows = Windows([store], history=8, horizon=3)
    for which in (3, 41):
        info, episode = store.episodes[which], list(read_episodes(store_folder))[which]
        batch = windows.batch(np.arange(info.start, info.start + info.length))
        history = ActionHistory(LIBERO, 8)
        for t in range(len(episode)):
            history.observe(episode.states[t])
            online = history.window()
            for name, value in vars(online).items():
                if value is not None:
                    gathered = getattr(batch.window, "sources" if name == "credited" else name)  # in shadow mode they differ
                    assert_allclose(gathered[t], value[0], atol=1e-6, err_msg=f"{name} at step {t}")
            known = min(3, len(episode) - t)
            assert_allclose(batch.targets[t, :known], LIBERO.normalize(episode.vla_actions[t : t + known]), atol=1e-6)
            assert batch.valid[t].tolist() == [1.0] * known + [0.0] * (3 - known)
            source = Source(int(episode.sources[t]))
            output = VLAOutput(episode.vla_actions[t][None]) if source == Source.VLA else None
            history.act(episode.actions[t], source, output)


def test_hiding_the_vla_moves_its_last_output_back(store_folder):
    store = RolloutStore(store_folder)
    windows = Windows([store], history=8)
    first = store.episodes[2].start
    frames = np.arange(first + 5, first + 45)
    plain, hidden = windows.batch(frames), windows.batch(frames, np.full(40, 4))
    assert (hidden.window.sources[:, -4:] == 1).all()
    assert_array_equal(hidden.window.actions, plain.window.actions)
    assert (hidden.window.vla_age >= 5).all() and (hidden.window.vla_age >= plain.window.vla_age).all()
    at_start = windows.batch(np.array([first + 1]), np.array([8]))
    assert at_start.window.vla_age[0] == 1  # the first step of an episode is always the VLA's


def test_several_stores_are_gathered_in_order(tmp_path, store_folder):
    a, b = RolloutStore(store_folder), RolloutStore(write_store(tmp_path / "more", range(60, 64)))
    windows = Windows([a, b], history=4)
    frames = np.random.default_rng(0).permutation(len(windows))[:500]
    batch = windows.batch(frames)
    for i in range(0, 500, 50):
        alone = windows.batch(frames[i : i + 1])
        assert_array_equal(batch.targets[i], alone.targets[0])
        assert_array_equal(batch.window.states[i], alone.window.states[0])


def test_one_writer_or_many_in_any_order_give_the_same_store(tmp_path):
    write_store(tmp_path / "one", range(6))
    for seed in (5, 0, 3, 1, 4, 2, 3):  # two writers taking turns, one job written twice
        RolloutWriter(tmp_path / "many", LIBERO, policy="synthetic").write(f"job-{seed:03d}", [smooth_episode(seed)])
    RolloutWriter(tmp_path / "many", LIBERO).finalize()
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file() and ".shards" not in path.parts:
            assert path.read_bytes() == (tmp_path / "many" / path.relative_to(tmp_path / "one")).read_bytes(), path.name


def test_the_folder_is_a_lerobot_v3_data_set(store_folder):
    info = json.loads((store_folder / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["total_episodes"] == 60 and info["fps"] == 20
    data = pq.read_table(store_folder / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(data.column_names) == set(info["features"])
    assert data["index"].to_pylist() == list(range(info["total_frames"]))
    episodes = pq.read_table(store_folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    assert [e["dataset_to_index"] - e["dataset_from_index"] for e in episodes] == [e["length"] for e in episodes]
    stats = json.loads((store_folder / "meta" / "stats.json").read_text())["action"]
    actions = np.array(data["action"].to_pylist())
    assert_allclose(stats["mean"], actions.mean(0), atol=1e-5)
    assert_allclose(stats["std"], actions.std(0), atol=1e-5)
    tasks = pq.read_table(store_folder / "meta" / "tasks.parquet").to_pandas()
    assert tasks.loc["task 1", "task_index"] == 1


def test_hugging_face_datasets_reads_it(store_folder):
    datasets = pytest.importorskip("datasets", reason="the train extra is not installed")
    loaded = datasets.load_dataset(str(store_folder), split="train", cache_dir=str(store_folder.parent / "hf"))
    assert loaded.num_rows == RolloutStore(store_folder).frames
    assert "vla_action" in loaded.column_names


def test_images_travel_encoded(tmp_path):
    """LeRobot's image feature: bytes in the Parquet file, which `datasets` decodes; training arrays leave them alone."""
    datasets = pytest.importorskip("datasets", reason="the train extra is not installed")
    pictures = [np.random.default_rng(i).integers(0, 256, (8, 6, 3), np.uint8) for i in range(6)]
    writer = RolloutWriter(tmp_path / "s", LIBERO)
    for i in range(2):
        episode = smooth_episode(i, steps=3)
        episode.images = {"main": [encode_jpeg(p) for p in pictures[3 * i : 3 * i + 3]]}
        writer.write(f"job-{i}", [episode])
    folder = writer.finalize()
    assert [e.images["main"] for e in read_episodes(folder)] == [
        [encode_jpeg(p) for p in pictures[:3]],
        [encode_jpeg(p) for p in pictures[3:]],
    ]
    feature = json.loads((folder / "meta" / "info.json").read_text())["features"]["observation.images.main"]
    assert feature["dtype"] == "image" and feature["shape"] == [8, 6, 3]
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "hf"))
    for row, picture in zip(loaded, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(row["observation.images.main"]), jpeg_round_trip(picture))
    assert len(loaded[0]["action"]) == 7 and "observation.images.main" not in RolloutStore(folder).arrays
    episode = smooth_episode(0, steps=1)
    episode.images = {"main": [b"no image"]}
    writer = RolloutWriter(tmp_path / "bad", LIBERO)
    writer.write("a", [episode])
    with pytest.raises(InputError, match=r"a\.parquet: observation\.images\.main: the first image cannot be read"):
        writer.finalize()


def test_bad_episodes_and_stores_are_named(tmp_path, store_folder):
    writer = RolloutWriter(tmp_path / "s", LIBERO)
    bad = smooth_episode(0)
    bad.states[7, 1] = np.nan
    with pytest.raises(InputError, match=r"job j, episode 0: states contains NaN or infinity at step 7"):
        writer.write("j", [bad])
    with pytest.raises(InputError, match="no finished shards"):
        writer.finalize()
    writer.write("a", [smooth_episode(1)])
    with pytest.raises(InputError, match="not finalised"):
        list(read_episodes(tmp_path / "s"))
    (tmp_path / "s" / ".shards" / "b.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match=r"b\.parquet: not a whole shard"):
        writer.finalize()
    with pytest.raises(InputError, match="job id"):
        writer.write("../escape", [smooth_episode(1)])
    with pytest.raises(InputError, match="not a finalised rollout store"):
        RolloutStore(tmp_path)


def test_nan_in_a_store_is_found_with_field_episode_and_step(tmp_path):
    folder = write_store(tmp_path / "s", range(3))
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    column = np.array(table["action"].to_pylist(), np.float32)
    column[60 + 17, 2] = np.nan
    values = pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), 7)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", values), path)
    with pytest.raises(InputError, match="action contains NaN or infinity in episode 1 at step 17"):
        RolloutStore(folder)


def test_splits_are_by_initial_state_and_evaluation_is_refused(tmp_path, store_folder):
    windows = Windows([RolloutStore(store_folder)], history=4)
    split = split_episodes(windows)
    assert len(split.train) == 40 and len(split.calibration) == 20
    assert not set(frames_of(split.train)) & set(frames_of(split.calibration))
    writer = RolloutWriter(tmp_path / "eval", LIBERO)
    episode = smooth_episode(0)
    episode.metadata["init_state"] = 31
    writer.write("a", [episode])
    with pytest.raises(InputError, match="initial state 31, which is for evaluation only"):
        split_episodes(Windows([RolloutStore(writer.finalize())], history=4))


def test_random_splits_depend_on_the_seed_alone(tmp_path):
    writer = RolloutWriter(tmp_path / "s", LIBERO)
    for seed in range(20):
        episode = smooth_episode(seed)
        episode.metadata = {}
        writer.write(f"{seed:02d}", [episode])
    windows = Windows([RolloutStore(writer.finalize())], history=4)
    assert split_episodes(windows, 0.25, 1) == split_episodes(windows, 0.25, 1)
    assert split_episodes(windows, 0.25, 1) != split_episodes(windows, 0.25, 2)
    assert len(split_episodes(windows, 0.25).calibration) == 5
    with pytest.raises(InputError, match="no calibration episodes"):
        split_episodes(windows, 0.0)
    for seed in range(20):  # a robot's recordings: whatever they call a seed, they are no simulated scene
        episode = smooth_episode(seed)
        episode.metadata = {"seed": 0}
        writer.write(f"{seed:02d}", [episode])
    assert len(split_episodes(Windows([RolloutStore(writer.finalize())], history=4), 0.25).calibration) == 5


def test_scenes_are_on_one_side_and_later_stores_move_nothing(tmp_path):
    def store(name, seeds):
        writer = RolloutWriter(tmp_path / name, LIBERO)
        for seed in seeds:
            episode = smooth_episode(seed)
            episode.metadata = {"suite": "libero_object", "task": 3, "init_state": None, "seed": seed}
            writer.write(f"{seed:03d}", [episode])
        return RolloutStore(writer.finalize())

    def scenes(spans, stores):
        windows = Windows(stores, history=4)
        of = {first: info.metadata["seed"] for _, first, info in windows.episodes}
        return {of[first] for first, _ in spans}

    first, second, third = store("first", range(30)), store("second", range(10, 40)), store("third", range(100, 110))
    alone = split_episodes(Windows([first], history=4))
    both = split_episodes(Windows([first, second], history=4))
    assert set(alone.train) <= set(both.train) and set(alone.calibration) <= set(both.calibration)
    assert len(both.train) + len(both.calibration) == 60
    assert not scenes(both.train, [first, second]) & scenes(both.calibration, [first, second])
    whole = split_episodes(Windows([first, second, third], history=4), whole=1)
    assert whole.train == both.train and len(whole.calibration) == len(both.calibration) + 10
    with pytest.raises(InputError) as error:
        split_episodes(Windows([first, second], history=4), whole=1)
    assert error.value.code == "calibration-leak" and error.value.field.endswith("second")


def test_finalising_again_or_copying_changes_no_fingerprint(tmp_path, store_folder):
    folder = shutil.copytree(store_folder, tmp_path / "copy")
    before = RolloutStore(store_folder).fingerprint
    assert RolloutStore(folder).fingerprint == RolloutStore(finalize(folder)).fingerprint == before
    writer = RolloutWriter(folder, RolloutStore(folder).space)
    writer.write("more", [replace(e, metadata={}) for e in [next(iter(read_episodes(folder)))]])
    assert RolloutStore(writer.finalize()).fingerprint != before


def test_batches_keep_the_weights_of_small_stores_and_ranks_draw_their_own(tmp_path):
    stores = []
    for name, count in (("small", 2), ("large", 40)):
        writer = RolloutWriter(tmp_path / name, LIBERO)
        writer.write("a", [smooth_episode(i) for i in range(count)])
        stores.append(RolloutStore(writer.finalize()))
    windows = Windows(stores, history=4)
    spans = [(first, info.length) for _, first, info in windows.episodes]

    def frames(rank):
        stream = BatchStream(windows, spans, 512, batches=20, weights=[1, 1], rank=rank)
        return np.stack([frames for frames, _ in stream])

    drawn = frames(0)
    assert drawn.shape == (20, 512)
    assert abs((drawn < stores[0].frames).mean() - 0.5) < 0.03  # 10,240 draws: 6 standard deviations
    assert not np.array_equal(drawn, frames(1))


def test_last_vla_frame():
    sources, start = np.array([0, 1, 1, 0, 1, 0, 1], np.uint8), np.array([0, 0, 0, 0, 0, 5, 5])
    assert last_vla_frame(sources, start).tolist() == [-1, 0, 0, 0, 3, -1, 5]


def test_streams_visit_every_frame_once_a_pass(store_folder):
    windows = Windows([RolloutStore(store_folder)], history=4)
    spans = [(60 * k, 60) for k in range(10)] + [(3000, 40)]
    stream = BatchStream(windows, spans, batch_size=64, seed=3)
    one, two = (np.concatenate([f for f, _ in stream]) for _ in range(2))
    assert sorted(one) == sorted(two) == frames_of(spans).tolist() and one.tolist() != two.tolist()
    again = BatchStream(windows, spans, batch_size=64, seed=3)
    assert_array_equal(np.concatenate([f for f, _ in again]), one)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 200), st.integers(0, 99))
def test_shuffling_in_blocks_visits_every_frame_once(lengths, most, seed):
    ends = np.cumsum(lengths)
    spans = [(int(e) - n + 5, n) for e, n in zip(ends, lengths, strict=True)]
    passes = shuffled(spans, np.random.default_rng(seed), most)
    for _ in range(2):
        seen = np.zeros(0, np.int64)
        while len(seen) < ends[-1]:
            block = next(passes)
            assert len(block) <= most + max(lengths)
            seen = np.concatenate([seen, block])
        assert_array_equal(np.sort(seen), frames_of(spans))


def test_mixtures_draw_by_weight_whatever_the_sizes(tmp_path, store_folder):
    stores = [RolloutStore(store_folder), RolloutStore(write_store(tmp_path / "small", range(3)))]
    windows = Windows(stores, history=4)
    spans = [(first, info.length) for _, first, info in windows.episodes]
    stream = BatchStream(windows, spans, batch_size=100, seed=1, batches=200, weights=[1, 3])
    drawn = np.concatenate([f for f, _ in stream])
    assert len(drawn) == 20_000
    assert abs((drawn >= windows.offsets[1]).mean() - 0.75) < 0.02
    assert set(drawn[drawn >= windows.offsets[1]]) == set(range(windows.offsets[1], windows.offsets[2]))
    with pytest.raises(InputError, match="1 for 2 stores"):
        BatchStream(windows, spans, 100, weights=[1])
    with pytest.raises(InputError, match="must not be negative"):
        BatchStream(windows, spans, 100, weights=[1, -1])
    with pytest.raises(InputError, match="no training episodes"):
        BatchStream(windows, spans[:60], 100, weights=[1, 1])


def test_action_spaces_of_different_sizes_are_kept_apart(tmp_path, store_folder):
    eight = replace(LIBERO, name="eight", q01=(-1,) * 8, q99=(1,) * 8, low=(-1,) * 8, high=(1,) * 8)
    writer = RolloutWriter(tmp_path / "eight", eight)
    writer.write("a", [Episode(np.zeros((5, 8), np.float32), "x", np.arange(5) / 20, states=np.zeros((5, 5), np.float32))])
    writer.finalize()
    with pytest.raises(InputError, match="eight: action space 'eight' has dim = 8, but 'libero' has dim = 7"):
        Windows([RolloutStore(store_folder), RolloutStore(tmp_path / "eight")], history=4)


def test_an_episode_without_steps_is_refused():
    with pytest.raises(InputError, match="no steps"):
        Episode(np.zeros((0, 7), np.float32), "x", np.zeros(0)).check(LIBERO, "here")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_folders_of_others_are_not_replaced(tmp_path, store_folder):
    """A copy without its shards, somebody's data set and somebody's project are refused before anything is collected."""
    copy = shutil.copytree(store_folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".shards"))
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "code.py").write_text("mine")
    for folder in (copy, project):
        before = contents(folder)
        with pytest.raises(InputError, match=r"has data.*no \.shards.*choose another folder"):
            RolloutWriter(folder, LIBERO)
        assert contents(folder) == before and not (folder / ".shards").exists()
    owned = write_store(tmp_path / "owned", range(2))
    (owned / "meta" / "notes.txt").write_text("mine")
    before = contents(owned)
    with pytest.raises(InputError, match=r"meta/notes\.txt: not a rollout store's file, it would be deleted"):
        finalize(owned)
    assert contents(owned) == before
    (owned / "meta" / "notes.txt").unlink()
    (owned / "meta" / "spvla.json").unlink()
    with pytest.raises(InputError, match=r"has data and meta, but no \.shards"):
        finalize(owned)


def test_a_store_that_was_killed_while_finalising_goes_on(tmp_path):
    folder = write_store(tmp_path / "s", range(3))
    before = contents(folder)
    shutil.rmtree(folder / "meta")
    assert contents(finalize(folder)) == before


def test_a_readme_of_somebody_else_stays(tmp_path):
    (tmp_path / "README.md").write_text("my project")
    write_store(tmp_path, range(1))
    assert (tmp_path / "README.md").read_text() == "my project"
    (tmp_path / "README.md").unlink()
    assert "2: nobody" in (finalize(tmp_path) / "README.md").read_text()


def test_other_features_are_refused_before_they_are_written(tmp_path):
    writer = RolloutWriter(tmp_path, LIBERO)
    writer.write("b", [smooth_episode(1)])
    unlabelled, narrow = smooth_episode(2), smooth_episode(3)
    unlabelled.vla_actions = None
    narrow.states = narrow.states[:, :2]
    for job in ("a", "c"):
        with pytest.raises(
            InputError, match=r"features differ from those of .*b\.parquet: vla_action \(absent, there 7 entries\)"
        ):
            writer.write(job, [unlabelled])
    with pytest.raises(InputError, match=r"job c, episode 1: .*: observation.state \(2 entries, there 5 entries\)"):
        writer.write("c", [smooth_episode(2), narrow])
    assert [p.name for p in writer.shards.iterdir()] == ["b.parquet"]
    writer.write("b", [unlabelled])  # the only shard is replaced: nothing to agree with
    with pytest.raises(InputError, match=r"job b, episode 1: features differ from those of job b, episode 0"):
        writer.write("b", [unlabelled, smooth_episode(1)])
    assert len(list(read_episodes(writer.finalize()))) == 1


def test_cameras_may_come_in_any_order(tmp_path):
    writer = RolloutWriter(tmp_path, LIBERO)
    image = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    for job, cameras in (("a", ("left", "right")), ("b", ("right", "left"))):
        episode = smooth_episode(0, steps=1)
        episode.images = {name: [image] for name in cameras}
        writer.write(job, [episode])
    assert [set(e.images) for e in read_episodes(writer.finalize())] == [{"left", "right"}] * 2


@pytest.mark.parametrize("kind", ["shard", "data"])
def test_a_flipped_bit_is_found(tmp_path, kind):
    folder = write_store(tmp_path / "s", range(2))
    before = contents(folder)
    path = folder / {"shard": ".shards/job-001.parquet", "data": "data/chunk-000/file-000.parquet"}[kind]
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    calls = {"shard": [finalize], "data": [RolloutStore, lambda f: list(read_episodes(f))]}[kind]
    for call in calls:
        with pytest.raises(InputError, match=rf"{path.name}: damaged Parquet file"):
            call(folder)
    after = contents(folder)
    assert all(after[p] == b for p, b in before.items() if p != path.relative_to(folder))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("timestamps", np.arange(5) / 20, r"timestamps, shape \(5,\): expected 60 finite ones"),
        ("timestamps", np.full(60, np.nan), "timestamps"),
        ("sources", np.zeros(5, np.uint8), r"sources has shape \(5,\), expected \(60,\)"),
        ("sources", np.full(60, 9, np.uint8), "sources is 9 at step 0, expected one of 0, 1, 2"),
        ("vla_actions", np.zeros((60, 6), np.float32), "vla_actions have 6 dimensions, the action space 7"),
        ("instruction", None, "instruction is None, expected text"),
        ("metadata", {"x": np.float32(1)}, "metadata or success cannot be written as JSON"),
    ],
)
def test_unusable_episodes_are_not_written(tmp_path, field, value, told):
    episode = smooth_episode(0)
    setattr(episode, field, value)
    writer = RolloutWriter(tmp_path, LIBERO)
    with pytest.raises(InputError, match=f"job j.*{told}"):
        writer.write("j", [episode])
    with pytest.raises(InputError, match="job j: no episodes"):
        writer.write("j", [])
    assert not list(writer.shards.iterdir())


EPISODES, DATA = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"


def edit(path, column, values=None):
    """Put ``values`` (by the old ones) in place of a column, or drop it."""
    table = pq.read_table(path)
    if values is None:
        return pq.write_table(table.drop_columns([column]), path)
    array = values(table[column].to_pylist())
    return pq.write_table(table.set_column(table.column_names.index(column), column, array), path)


def listed(rows, width=7):
    return pa.array(rows, pa.list_(pa.float32(), width))


@pytest.mark.parametrize(
    ("file", "column", "values", "told"),
    [
        (EPISODES, "length", None, "episode 0: length is missing"),
        (EPISODES, "length", lambda v: pa.array([-60, 60, 60]), "episode 0: dataset_from_index is 0 and length -60"),
        (EPISODES, "length", lambda v: pa.array([50, 70, 60]), "episode 1: dataset_from_index is 60 and length 70"),
        (EPISODES, "metadata", lambda v: pa.array(["{"] * 3), "episode 0: metadata: not valid JSON"),
        (EPISODES, "metadata", lambda v: pa.nulls(3, pa.string()), "episode 0: metadata is None"),
        (EPISODES, "tasks", lambda v: pa.array([[]] * 3, pa.list_(pa.string())), r"tasks is \[\], expected an instruction"),
        (DATA, "action", None, "no column action; there are: observation.state"),
        (DATA, "action", lambda v: listed([None, *v[1:]]), "action has 1 empty entries"),
        (
            DATA,
            "action",
            lambda v: listed([a[:6] for a in v], 6),
            "actions? ha(s|ve) 6 (entries|dimensions), the action space 7",
        ),
        (DATA, "action", lambda v: pa.array(v, pa.list_(pa.float32())), "action is list.*, expected vectors of one size"),
        (DATA, "action", lambda v: pa.array(["x"] * len(v)), "action is string, expected vectors of one size"),
        (DATA, "vla_action", lambda v: listed([a[:6] for a in v], 6), "vla_actions? ha(s|ve) 6 (entries|dimensions)"),
        (DATA, "action.source", None, "no column action.source"),
        (DATA, "action.source", lambda v: pa.array([*v[:-1], None]), "action.source has 1 empty entries"),
        (DATA, "action.source", lambda v: pa.array([9, *v[1:]]), "sources? is 9 at step 0, expected one of 0, 1, 2"),
        (DATA, "action.source", lambda v: pa.array(["vla"] * len(v)), "action.source is string, expected integers"),
        (DATA, "frame_index", lambda v: pa.array(v[1:] + v[:1]), "frame_index does not agree with the episodes"),
    ],
)
def test_damaged_stores_are_named(tmp_path, file, column, values, told):
    folder = write_store(tmp_path / "s", range(3))
    edit(folder / file, column, values)
    with pytest.raises(InputError, match=f"file-000.parquet.*{told}"):
        RolloutStore(folder)
    if column != "frame_index":
        with pytest.raises(InputError, match=f"file-000.parquet.*{told}"):
            list(read_episodes(folder))


@pytest.mark.parametrize("text", ['{"action', "{}", "[]", '{"action_space": []}', '{"action_space": {"name": 5}}'])
def test_damaged_action_spaces_are_named(tmp_path, text):
    folder = write_store(tmp_path / "s", range(1))
    (folder / "meta" / "spvla.json").write_text(text)
    with pytest.raises(InputError, match=r"meta/spvla\.json"):
        RolloutStore(folder)


def test_cut_off_files_of_a_store_are_named(tmp_path):
    for k, file in enumerate((EPISODES, DATA)):
        folder = write_store(tmp_path / str(k), range(2))
        (folder / file).write_bytes((folder / file).read_bytes()[:-20])
        for call in (RolloutStore, lambda f: list(read_episodes(f))):
            with pytest.raises(InputError, match=f"{file}: damaged Parquet file"):
                call(folder)
