"""LeRobot columns and metadata in every form that converters store them in: the same episodes come out, or a clear problem."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.lerobot import LerobotSource
from data.lerobot.columns import in_one_form, recorded_times
from data.lerobot.metadata import read_json_lines, whole_number
from data.parts import Problem
from eval.output import append, continued
from spvla.errors import InputError
from spvla.files import read_json
from tests.lerobot_sets import RATE, STEPS, actions, times, write_lines, write_set

VERSIONS = ("v2.1", "v3.0")


def outcomes(source: LerobotSource, images: bool = False) -> list:
    return [e for part in source.parts for e in source.episodes(part, images)]


def require_same(source: LerobotSource, episodes: int = 3) -> None:
    """The episodes are those that ``tests.lerobot_sets`` made."""
    found = outcomes(source)
    assert len(found) == episodes and not [e for e in found if isinstance(e, Problem)]
    for k, episode in enumerate(found):
        np.testing.assert_array_equal(episode.actions, actions(k))
        np.testing.assert_array_equal(episode.states, actions(k + 100)[:, :2])
        np.testing.assert_allclose(episode.timestamps, times(), atol=1e-6)
        assert episode.instruction == "stack the cups" and episode.metadata["number"] == k
    assert source.space.control_rate == RATE


# ------------------------------------------------------------------------------------------------ columns nobody asked for


EXTRA = {
    "subtitles": lambda k: pa.array([["a", "b"][: t % 3] for t in range(STEPS)], pa.list_(pa.string())),
    "events": lambda k: pa.array([[{"text": "x", "at": [1.0] * t}][: t % 2] for t in range(STEPS)]),
    "touch": lambda k: pa.array([[0.5] * (t + k) for t in range(STEPS)], pa.list_(pa.float32())),
    "depths": lambda k: pa.array([[[1.0] * (t + 1)] * 2 for t in range(STEPS)], pa.list_(pa.list_(pa.float64()))),
    "nothing": lambda k: pa.nulls(STEPS),
    "empty": lambda k: pa.array([[]] * STEPS, pa.list_(pa.float32())),
    "prose": lambda k: pa.array(["words"] * STEPS),
    "map": lambda k: pa.array([[("a", 1)]] * STEPS, pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_columns_that_nobody_names_do_not_matter(version, tmp_path):
    require_same(LerobotSource(write_set(tmp_path / "s", version, extra=EXTRA)))


def test_a_ragged_column_that_is_named_costs_its_episode_alone(tmp_path):
    folder = write_set(tmp_path / "s")
    path = folder / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    rows[4] = rows[4][:2]
    pq.write_table(table.set_column(0, "action", pa.array(rows, pa.list_(pa.float32()))), path)
    found = outcomes(LerobotSource(folder))
    assert [isinstance(e, Problem) for e in found] == [False, True, False]
    assert found[1].record == 1 and found[1].field == "action" and "different lengths" in found[1].reason


# ------------------------------------------------------------------------------------------------------------ storage forms


def listed(column: pa.Array, make=pa.list_) -> pa.Array:
    return pa.array([[v] for v in column.to_pylist()], make(column.type))


FORMS = {
    "one-element lists": lambda c: listed(c),
    "large lists": lambda c: listed(c, pa.large_list),
    "fixed lists": lambda c: listed(c, lambda t: pa.list_(t, 1)),
    "nested lists": lambda c: listed(listed(c)),
    "narrow": lambda c: c.cast(pa.float32() if pa.types.is_floating(c.type) else pa.uint8()),
    "doubles": lambda c: c.cast(pa.float64()),
    "decimals": lambda c: pa.array([Decimal(f"{v:.2f}") for v in c.to_pylist()], pa.decimal128(20, 4)),
    "dictionaries": lambda c: c.dictionary_encode(),
    "chunks": lambda c: pa.chunked_array([c.slice(0, 5), c.slice(5)]),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", FORMS)
def test_index_columns_in_any_form(form, version, tmp_path):
    def change(name, column):
        return column if name in ("action", "observation.state") else FORMS[form](column)

    source = LerobotSource(write_set(tmp_path / "s", version, change=change, listed=False))
    require_same(source)
    assert not [note for note in source.notes if "timestamps" in note or "instruction" in note]


SHAPES = {
    "row": lambda x: pa.array(x[:, None].tolist(), pa.list_(pa.list_(pa.float32()))),
    "column": lambda x: pa.array(x[..., None].tolist(), pa.list_(pa.list_(pa.float32()))),
    "deep": lambda x: pa.array(x[:, None, :, None].tolist(), pa.large_list(pa.list_(pa.large_list(pa.float64())))),
    "fixed row": lambda x: pa.array(x[:, None].tolist(), pa.list_(pa.list_(pa.float32(), x.shape[1]), 1)),
    "doubles": lambda x: pa.array(x.tolist(), pa.list_(pa.float64(), x.shape[1])),
    "large": lambda x: pa.array(x.tolist(), pa.large_list(pa.float32())),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_in_any_shape(shape, tmp_path):
    def change(name, column):
        return SHAPES[shape](np.array(column.to_pylist(), np.float32)) if name in ("action", "observation.state") else column

    source = LerobotSource(write_set(tmp_path / "s", "v3.0", change=change))
    require_same(source)
    assert source.layout.widths == {"action": 3, "observation.state": 2}


@given(
    rows=st.integers(0, 6),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    large=st.booleans(),
    empty=st.sets(st.integers(0, 5)),
    cut=st.integers(0, 3),
)
def test_nested_numbers_become_vectors_of_one_size(rows, shape, large, empty, cut):
    """Against numpy's reshape, for rows that are missing too and for slices of a longer column."""
    values = np.random.default_rng(0).normal(size=(rows + cut, *shape))
    kind = pa.float64()
    for _ in shape:
        kind = (pa.large_list if large else pa.list_)(kind)
    stored = [None if k - cut in empty else row.tolist() for k, row in enumerate(values)]
    column = pa.chunked_array([pa.array(stored, kind)]).slice(cut)
    out = in_one_form("action", column)
    if not set(range(rows)) - empty:
        return  # no row says how long rows are
    want = values[cut:].reshape(rows, -1)
    assert out.type.list_size == want.shape[1]
    got = out.to_pylist()
    assert [k for k in range(rows) if got[k] is None] == sorted(empty & set(range(rows)))
    for k in set(range(rows)) - empty:
        np.testing.assert_array_equal(got[k], want[k])


@pytest.mark.parametrize(
    ("name", "column", "reason"),
    [
        ("frame_index", pa.array([0.0, 1.5]), "no whole numbers"),
        ("episode_index", pa.array([[0], [0, 1]]), "not one number"),
        ("task_index", pa.array([["a"], ["b"]]), "no whole numbers"),
        ("frame_index", pa.array([0, None]), "1 empty entries"),
        ("action", pa.array([[[1.0], [2.0]], [[1.0]]]), "different lengths"),
    ],
)
def test_columns_that_have_no_one_form_are_refused(name, column, reason):
    with pytest.raises(ValueError, match=reason):
        in_one_form(name, pa.chunked_array([column]))


# -------------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("fps", [RATE, None, 7, 0])
@pytest.mark.parametrize(("factor", "unit"), [(1e3, "ms"), (1e6, "us"), (1e9, "ns")])
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()])
def test_times_in_another_unit_are_converted_and_this_is_noted(kind, factor, unit, fps, tmp_path):
    def change(name, column):
        return pa.array(np.rint(times() * factor).tolist()).cast(kind) if name == "timestamp" else column

    source = LerobotSource(write_set(tmp_path / "s", change=change, fps=fps))
    require_same(source)
    assert any(f"taken as {unit} and converted to seconds" in note for note in source.notes)


@pytest.mark.parametrize("fps", [500, 0.5])
def test_the_claimed_rate_tells_units_apart_where_two_are_possible(fps, tmp_path):
    """Steps of 2: seconds of a slow robot, or milliseconds of a fast one."""
    folder = write_set(tmp_path / "s", change=lambda n, c: pa.array(np.arange(12) * 2.0) if n == "timestamp" else c, fps=fps)
    source = LerobotSource(folder)
    assert source.space.control_rate == fps
    np.testing.assert_allclose(outcomes(source)[0].timestamps, np.arange(12) / fps)


def test_a_unit_that_nobody_can_tell_is_refused(tmp_path):
    """Steps of 2000: 0.5 Hz in milliseconds or 500 Hz in microseconds."""
    folder = write_set(tmp_path / "s", change=lambda n, c: pa.array(np.arange(12) * 2000) if n == "timestamp" else c, fps=None)
    with pytest.raises(InputError) as error:
        LerobotSource(folder)
    assert error.value.code == "control-rate" and error.value.field == "timestamp"


DAY = datetime.datetime(2026, 3, 1, 12)
TYPED = {
    "dates": lambda t: pa.array([DAY + datetime.timedelta(seconds=float(s)) for s in t], pa.timestamp("us")),
    "durations": lambda t: pa.array((t * 1e9).astype(np.int64), pa.duration("ns")),
    "milliseconds": lambda t: pa.array((t * 1e3).round().astype(np.int64), pa.duration("ms")),
    "time of day": lambda t: pa.array((t * 1e3).round().astype(np.int32), pa.time32("ms")),
    "seconds since 1970": lambda t: pa.array(t + 1.7e9),
    "nanoseconds since 1970": lambda t: pa.array((t * 1e9).astype(np.int64) + 1_700_000_000 * 10**9),
    "listed durations": lambda t: listed(pa.array((t * 1e9).astype(np.int64), pa.duration("ns"))),
}


@pytest.mark.parametrize("form", TYPED)
def test_dates_and_durations_are_seconds_of_the_episode(form, tmp_path):
    source = LerobotSource(write_set(tmp_path / "s", change=lambda n, c: TYPED[form](times()) if n == "timestamp" else c))
    require_same(source)


@pytest.mark.parametrize("fps", [0.05, 2500])
@pytest.mark.parametrize("timed", [True, False])
def test_rates_that_no_robot_has_are_refused(fps, timed, tmp_path):
    def change(name, column):
        return column if name != "timestamp" else pa.array(np.arange(STEPS) / fps) if timed else None

    with pytest.raises(InputError) as error:
        LerobotSource(write_set(tmp_path / "s", change=change, fps=fps))
    assert error.value.code == "control-rate"


@given(st.floats(0.2, 1000), st.floats(0, 1e5))
def test_times_in_seconds_stay_as_they_are(rate, start):
    recorded = start + np.arange(5) / rate
    np.testing.assert_array_equal(recorded_times(pa.table({"timestamp": recorded})), recorded)


def test_conventions_state_a_possible_rate(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text("kind: joint_velocity\ncontrol_rate: 5000\naction:\n- {role: joint, key: action}\n")
    with pytest.raises(InputError) as error:
        LerobotSource(write_set(tmp_path / "s"), path)
    assert error.value.code == "control-rate" and "fast.yaml" in error.value.field


# ----------------------------------------------------------------------------------------------------------------- metadata

SEPARATORS = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\ufeff"]


@given(st.lists(st.text() | st.sampled_from(SEPARATORS), min_size=1), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.booleans())
def test_json_lines_come_back_whatever_their_text(tmp_path_factory, texts, mark, windows):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    end = b"\r\n" if windows else b"\n"
    path.write_bytes(mark + end.join(json.dumps({"task": t}, ensure_ascii=False).encode() for t in texts) + end)
    assert read_json_lines(path) == ([{"task": text} for text in texts], [])


@pytest.mark.parametrize("separator", [*SEPARATORS, "\t"])
def test_unescaped_separators_stand_inside_instructions(separator, tmp_path):
    words = f"open the drawer{separator}then wait"
    folder = write_set(tmp_path / "s", tasks={0: words}, listed=False)
    (folder / "meta/tasks.jsonl").write_bytes(f'{{"task_index": 0, "task": "{words}"}}\r\n'.encode())
    assert [e.instruction for e in outcomes(LerobotSource(folder))] == [words] * 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_before_json(encoding, tmp_path):
    path = tmp_path / "info.json"
    path.write_text('{"a": "é"}', encoding)
    assert read_json(path) == {"a": "é"} and read_json_lines(path) == ([{"a": "é"}], [])


def test_joined_files_and_broken_lines_are_read_as_far_as_possible(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n\xef\xbb\xbf{"a": 2}\n{"a": \n[3]\n{"a": 4}')
    found, notes = read_json_lines(path)
    assert found == [{"a": 1}, {"a": 2}, {"a": 4}]
    assert [note.partition(",")[2].partition(":")[0] for note in notes] == [" line 4", " line 5"]


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), ("3", 3), ([3], 3), ([["3"]], 3), (3.0, 3), (3.5, None), (None, None), ("x", None), ([], None)],
)
def test_whole_numbers(value, number):
    assert whole_number(value) == number


def test_indices_in_json_may_be_lists_or_text(tmp_path):
    folder = write_set(tmp_path / "s", listed=False)
    write_lines(folder / "meta/tasks.jsonl", [{"task_index": ["0"], "task": "stack the cups"}])
    write_lines(folder / "meta/episodes.jsonl", [{"episode_index": [k], "length": [STEPS]} for k in range(3)])
    source = LerobotSource(folder)
    require_same(source)
    assert not [note for note in source.notes if "episodes.jsonl" in note]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tasks", [{0: "stack the cups", 1: ""}, {0: "stack the cups"}, {0: "stack the cups", 1: " \n"}])
def test_a_task_that_lost_its_words_is_a_problem(version, tasks, tmp_path):
    folder = write_set(tmp_path / "s", version, tasks=tasks, task_of=lambda k: int(k == 1), listed=False)
    found = outcomes(LerobotSource(folder))
    assert [isinstance(e, Problem) for e in found] == [False, True, False]
    assert found[1].record == 1 and found[1].field == "task_index"


def test_a_data_set_without_any_words_is_read_and_this_is_noted(tmp_path):
    source = LerobotSource(write_set(tmp_path / "s", tasks={0: ""}))
    assert [e.instruction for e in outcomes(source)] == [""] * 3
    assert any("3 of the first 3 episodes have no instruction" in note for note in source.notes)


def test_rows_of_an_evaluation_are_lines_at_line_feeds(tmp_path):
    raw, setting = tmp_path / "rows.jsonl", tmp_path / "setting.json"
    rows = [{"words": f"a{s}b"} for s in SEPARATORS]
    setting.write_text("{}")
    for row in rows:
        append(raw, row)
    assert continued(raw, setting, {}) == rows
    raw.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    assert continued(raw, setting, {}) == rows


# ------------------------------------------------------------------------------------------------------- episodes and files


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_an_episode_without_rows_says_so(version, tmp_path):
    found = outcomes(LerobotSource(write_set(tmp_path / "s", version, steps=lambda k: STEPS if k != 1 else 0)))
    assert [isinstance(e, Problem) for e in found] == [False, True, False]
    assert found[1].reason == "the episode has no rows" and found[1].record == 1


def test_an_episode_that_v3_lists_without_rows_is_noted(tmp_path):
    source = LerobotSource(write_set(tmp_path / "s", "v3.0", steps=lambda k: STEPS if k != 1 else 0))
    assert [e.metadata["number"] for e in outcomes(source)] == [0, 2]
    assert any("lists 1 episodes without rows in any data file: 1" in note for note in source.notes)
