"""Frames for training a VLA: read beside a writer, split by initial states, points where the image shows them."""

from dataclasses import replace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from data.envs.base import POINTS
from data.envs.libero.labels import image_points, other_questions
from data.envs.libero.scene import project
from data.frames import GIVEN_UP, Frame, Frames, Question, mistakes
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.store import Episode, RolloutWriter
from spvla.store.columns import vectors
from spvla.store.shards import shard_info
from spvla.vlas.conventions import Conventions, conventions_by_name, decode_image, encode_jpeg
from train.vla.frames import Augmentation, FrameData, FrameStream, questions, view

SIZE = 64
SCENE = {
    "bodies": ["milk_1", "basket_1"],
    "centres": [[0.0, 0.0, 0.05], [0.1, 0.0, 0.0]],
    "camera": [[60.0, 0.0, -31.5, 60.0], [0.0, 60.0, -31.5, 10.0], [0.0, 0.0, -1.0, 2.0]],
    "item": "milk_1",
    "place": "basket_1",
}


def pictured_episode(seed: int, steps: int = 4, **metadata) -> Episode:
    """A frame's label is its number; its image has one brightness."""
    g = np.random.default_rng(seed)
    poses = np.tile([0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 1.0], (steps, 2)).astype(np.float32)
    hand = np.concatenate([g.uniform(-0.3, 0.3, (steps, 3)), np.zeros((steps, 5))], 1).astype(np.float32)
    labels = np.zeros((steps, 7), np.float32)
    labels[:, 0] = np.arange(steps) / 1000
    return Episode(
        np.zeros((steps, 7), np.float32),
        "pick up the milk and place it in the basket",
        np.arange(steps) / 20,
        vla_actions=labels,
        environment_states=np.concatenate([hand, poses], 1),
        images={"agentview": [encode_jpeg(np.full((SIZE, SIZE, 3), 10 * i % 256, np.uint8)) for i in range(steps)]},
        success=metadata.pop("success", True),
        metadata={"init_state": seed, "suite": "libero_object", "scene": SCENE, "images": "upright", **metadata},
    )


def write(folder, **episodes: Episode) -> None:
    writer = RolloutWriter(folder, LIBERO, policy="synthetic")
    for job, episode in episodes.items():
        writer.write(job, [episode])


def test_frames_grow_with_the_store_and_stay_where_they_belong(tmp_path):
    write(tmp_path, a=pictured_episode(0), b=pictured_episode(25), c=pictured_episode(3, steps=3))
    frames, held_out = Frames([tmp_path]), Frames([tmp_path], validation=True)
    assert len(frames) == 0 and frames.scan() == 7 and frames.episodes == 2 and held_out.scan() == 4
    assert [float(frames[i].label[0]) for i in range(7)] == pytest.approx([0, 0.001, 0.002, 0.003, 0, 0.001, 0.002])
    assert [int(frames[i].image.mean()) for i in range(7)] == [0, 10, 20, 30, 0, 10, 20]
    assert frames[5].instruction == "pick up the milk and place it in the basket"
    write(tmp_path, d=pictured_episode(7), e=pictured_episode(21, student={"policy": "nano_vla"}))
    assert frames.scan() == 4 and frames.scan() == 0 and len(frames) == 11
    assert held_out.scan() == 0, "validation is demonstrations only"
    again = pictured_episode(3, steps=2)
    again.vla_actions[:, 0] = 0.5
    write(tmp_path, c=again)
    assert frames.scan() == -1 and [float(frames[i].label[0]) for i in (3, 4, 5)] == pytest.approx([0.003, 0.5, 0.5])


def test_chunks_are_the_labels_that_follow_in_the_episode(tmp_path):
    unlabelled = pictured_episode(5, steps=5)
    unlabelled.vla_actions[2] = np.nan
    write(tmp_path, a=pictured_episode(0), b=unlabelled)
    frames = Frames([tmp_path], chunk=3)
    assert frames.scan() == 8
    ahead = np.stack([1000 * frames[i].ahead[:, 0] for i in range(8)])
    off = np.nan
    expected = [[0, 1, 2], [1, 2, 3], [2, 3, off], [3, off, off], [0, 1, off], [1, off, off], [3, 4, off], [4, off, off]]
    np.testing.assert_allclose(ahead, expected, rtol=1e-6)
    for i in range(8):
        np.testing.assert_array_equal(frames[i].ahead[0], frames[i].label)
    assert frames[0].state.shape == (1,) and np.isnan(frames[0].state).all(), "no state was recorded"


def test_failures_count_only_where_a_student_made_them(tmp_path):
    long = pictured_episode(2, steps=GIVEN_UP + 5, success=False, student={"policy": "nano_vla"})
    write(tmp_path, failed=pictured_episode(1, success=False), student=long)
    frames = Frames([tmp_path])
    assert frames.scan() == GIVEN_UP and frames.episodes == 1


def test_unusable_shards_are_named(tmp_path):
    write(tmp_path / "a", late=pictured_episode(30))
    with pytest.raises(InputError, match=r"late.*initial state 30, which is for evaluation only"):
        Frames([tmp_path / "a"]).scan()
    for field, message in (("images", "holds no images"), ("vla_actions", "has no vla_action")):
        episode = pictured_episode(0)
        setattr(episode, field, {} if field == "images" else None)
        write(tmp_path / field, blind=episode)
        with pytest.raises(InputError, match=f"blind.*{message}"):
            Frames([tmp_path / field]).scan()
    with pytest.raises(InputError, match="no frames for training"):
        FrameData([tmp_path / "none"]).setup("fit")


def recorded(seed: int, **metadata) -> Episode:
    """An episode of a robot that nobody labelled, with two cameras of 48 x 64."""
    g = np.random.default_rng(seed)
    images = {
        name: [encode_jpeg(np.full((48, 64, 3), 12 * seed + k, np.uint8))] * 3 for k, name in enumerate(("front", "wrist"))
    }
    actions = g.uniform(-1, 1, (3, 7)).astype(np.float32)
    return Episode(actions, f"task {seed}", np.arange(3) / 10, images=images, success=False, metadata=metadata)


def test_unlabelled_frames_need_images_and_instructions_only(tmp_path):
    writer = RolloutWriter(tmp_path, LIBERO, policy="somebody")
    for job in range(20):
        writer.write(f"part {job}", [recorded(2 * job % 12), recorded((2 * job + 1) % 12)])
    frames, held_out = (Frames([tmp_path], validation, labelled=False) for validation in (False, True))
    assert frames.scan() + held_out.scan() == 120 and 0 < held_out.episodes < 10
    for part in (frames, held_out):
        for i in range(len(part)):
            frame = part[i]
            assert frame.instruction == f"task {round(frame.image.mean() / 12)}", "each image has its own episode's instruction"
            assert np.isnan(frame.label).all() and np.isnan(frame.points).all() and frame.image.shape == (48, 64, 3)
    wrist = Frames([tmp_path], labelled=False, camera="wrist")
    wrist.scan()
    assert wrist[0].image.mean() == pytest.approx(frames[0].image.mean() + 1, abs=0.5)
    with pytest.raises(InputError, match=r"part 0.*no camera 'top'; available: front, wrist"):
        Frames([tmp_path], labelled=False, camera="top").scan()
    with pytest.raises(InputError, match="2 episodes in one shard"):
        Frames([tmp_path]).scan()
    with pytest.raises(InputError, match="needs labels"):
        Frames([tmp_path], others=True, labelled=False)
    write(tmp_path / "libero", a=pictured_episode(3), b=pictured_episode(25), c=pictured_episode(2, success=False))
    assert [Frames([tmp_path / "libero"], validation, labelled=False).scan() for validation in (False, True)] == [8, 4]
    write(tmp_path / "late", late=recorded(1, init_state=40))
    with pytest.raises(InputError, match="initial state 40, which is for evaluation only"):
        Frames([tmp_path / "late"], labelled=False).scan()


def test_points_are_projections_of_what_the_state_holds():
    episode = pictured_episode(0)
    points = image_points(episode.environment_states, SCENE)
    assert points.shape == (4, len(POINTS), 2)
    np.testing.assert_allclose(points[:, 0], project(SCENE["camera"], episode.environment_states[:, :3]), atol=1e-4)
    np.testing.assert_allclose(points[0, 1], project(SCENE["camera"], [0.3, 0.1, 0.0]), atol=1e-4)
    np.testing.assert_allclose(points[0, 2], project(SCENE["camera"], [0.2, 0.1, 0.05]), atol=1e-4)
    assert np.isnan(image_points(episode.environment_states, None)).all()
    assert np.isnan(image_points(episode.environment_states, {**SCENE, "item": None})[:, 2]).all()


def dotted(column: int, row: int):
    """A frame with a white dot, and the dot as its points."""
    image = np.zeros((256, 256, 3), np.uint8)
    image[row - 2 : row + 3, column - 2 : column + 3] = 255
    label = np.zeros((1, 7), np.float32)
    places = np.tile(np.float32([column, row]), (3, 1)), np.zeros((3, 3), np.float32)
    return Frame(image, "", label[0], *places, ahead=label, state=np.zeros(8, np.float32))


@pytest.mark.parametrize("conventions", [Conventions(), conventions_by_name("libero")])
@pytest.mark.parametrize("augmentation", [None, Augmentation(shift=9, brightness=0, contrast=0, tint=0)])
def test_points_move_with_the_image(conventions, augmentation):
    generator = np.random.default_rng(0)
    for column, row in ((60, 100), (140, 47), (200, 210)):
        frame = dotted(column, row)
        seen, points = view(frame.image, frame.points, conventions, 224, augmentation, generator)
        weight = seen.astype(float).sum(-1)
        centre = [(weight.sum(0) @ np.arange(224)) / weight.sum(), (weight.sum(1) @ np.arange(224)) / weight.sum()]
        np.testing.assert_allclose(points[2], centre, atol=0.1)


def test_without_augmentation_a_view_is_what_the_policy_sees():
    image = np.kron(np.random.default_rng(0).integers(0, 256, (16, 16, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    frame = dotted(20, 20)
    frame = replace(frame, image=decode_image(encode_jpeg(image)))
    conventions = conventions_by_name("libero")
    seen, _ = view(frame.image, frame.points, conventions, 224, None, np.random.default_rng(0))
    expected = conventions.apply_image(frame.image, 224)
    assert np.abs(seen.astype(int) - expected).mean() < 6, "two interpolations in one: edges differ a little"
    inner = np.abs(seen.astype(int) - expected).max(-1) < 12
    assert inner.mean() > 0.8


@pytest.mark.parametrize("height, width", [(240, 320), (480, 640), (512, 512)])
def test_other_shapes_of_image_are_seen_as_the_policy_sees_them(height, width):
    g = np.random.default_rng(0)
    image = cv2.resize(g.integers(0, 256, (12, 16, 3)).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for conventions in (Conventions(), conventions_by_name("libero")):
        seen, points = view(image, np.float32([[width / 4 - 0.5, height / 4 - 0.5]]), conventions, 224, None, g)
        expected = cv2.resize(conventions.apply_image(image, 224), (224, 224), interpolation=cv2.INTER_AREA)
        assert np.abs(seen.astype(int) - expected).mean() < 3
        side, low = np.sqrt(conventions.center_crop), 0.75 if conventions.rotate_180 else 0.25
        np.testing.assert_allclose(points, ((low - 0.5) / side + 0.5) * 224 - 0.5, atol=0.5)


def test_streams_are_seeded_and_validation_never_changes(tmp_path):
    write(tmp_path, a=pictured_episode(0, steps=9), b=pictured_episode(25, steps=9))
    data = FrameData([tmp_path], batch_size=4, batches=3, image_size=32, conventions="libero")
    data.setup("fit")

    def labels(loader):
        return [batch.labels[:, 0, 0].tolist() for batch in loader]

    assert labels(data.val_dataloader()) == labels(data.val_dataloader())
    first = labels(data.train_dataloader())
    assert first == labels(data.train_dataloader()) and len(first) == 3, "the epoch decides, here none"
    stream = FrameStream(data, data.train_frames, 2, data.augmentation)
    batch = next(iter(stream))
    assert batch.images.shape == (4, 32, 32, 3) and batch.points.shape == (4, 3, 2) and batch.labels.shape == (4, 1, 7)


def test_other_questions_are_drawn_and_too_few_are_filled_up():
    generator, label, point = np.random.default_rng(0), np.zeros(7, np.float32), np.zeros(2, np.float32)
    others = tuple(Question(name, label, point, np.zeros(3, np.float32)) for name in "abc")
    places = np.ones((3, 2), np.float32), np.ones((3, 3), np.float32)
    frame = Frame(np.zeros((4, 4, 3), np.uint8), "own", label, *places, label[None], np.zeros(8, np.float32), others)
    drawn = [[q.instruction for q in questions(frame, 3, generator)] for _ in range(20)]
    assert all(d[0] == "own" and len(set(d)) == 3 for d in drawn) and {q for d in drawn for q in d} == {"own", *"abc"}
    filled = questions(frame, 6, generator)
    assert [q.instruction for q in filled[4:]] == ["own"] * 2
    assert all(np.isnan(q.label).all() and np.isnan(q.item).all() for q in filled[4:])
    assert np.isfinite(filled[0].label).all() and filled[0].item.tolist() == [1, 1]


@pytest.mark.slow
def test_other_questions_have_the_experts_answers(tmp_path):
    """A demonstration's frames also say what to do for each other object, while the hand is empty."""
    pytest.importorskip("libero", reason="the libero extra is not installed")
    from data.collect import collect

    options = {"suite": "libero_object", "tasks": [0], "init_states": "0", "images": True, "workers": 1}
    collect(output=tmp_path, max_steps=45, **options)
    shard = next((tmp_path / ".shards").glob("*.parquet"))
    states = vectors(pq.read_table(shard)["observation.environment_state"])
    episode = shard_info(shard)["episodes"][0]
    labels = vectors(pq.read_table(shard)["vla_action"])
    found = other_questions(states, labels, episode["metadata"], episode["instruction"])
    assert len(found) == 5 and episode["instruction"] not in found
    for text, (actions, items, where) in found.items():
        free = np.isfinite(actions).all(1)
        assert free[0] and not free[labels[:, 6] > 0].any() and np.isfinite(items).all()
        assert where.shape == (len(states), 3) and np.ptp(where, 0).max() < 0.05, "nothing else moves"
        assert (actions[free, 6] == -1).all() and np.abs(actions[free, :2] - labels[free, :2]).max() > 0.5, text


def test_mistakes_weigh_more():
    labels = np.zeros((5, 7), np.float32)
    labels[:, 6] = -1
    actions = labels.copy()
    actions[1, 2], actions[2, 0], actions[3, 4], actions[4, 6] = (
        0.5,
        -1.5,
        1.0,
        1.0,
    )  # a half, too much, a rotation, the gripper
    np.testing.assert_allclose(mistakes(actions, labels, LIBERO), [0, 0.5, 1, 0, 1])


def test_recordings_from_before_images_were_upright_are_turned(tmp_path):
    """LIBERO stores of earlier versions hold OpenGL's rows; image, points and labels of both kinds are the same frames."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((SIZE // 4, SIZE // 4, 1))).astype(np.uint8)
    old, new = pictured_episode(0), pictured_episode(1)
    del old.metadata["images"]
    old.environment_states = new.environment_states
    for episode, image in ((old, picture[::-1, ::-1]), (new, picture)):
        episode.images = {"agentview": [encode_jpeg(np.ascontiguousarray(image))] * len(episode)}
    write(tmp_path / "old", a=old)
    write(tmp_path / "new", a=new)
    first, second = Frames([tmp_path / "old"]), Frames([tmp_path / "new"])
    assert first.scan() == second.scan() == 4
    assert np.abs(first[1].image.astype(int) - second[1].image).mean() < 3
    np.testing.assert_allclose(first[1].points, SIZE - 1 - second[1].points, atol=1e-4)
