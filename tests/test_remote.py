"""A VLA on another machine: the same actions as here, a safe one while it is away, and its own again when it is back."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from spvla import InputError, Observation, VLAUnavailable, accelerate
from spvla.actions import LIBERO
from spvla.history import Source
from spvla.pruning import TokenSelector

pytest.importorskip("vla_eval")
import msgpack
from websockets.sync.server import serve

from spvla.serve import Interface
from spvla.vlas.registry import load_vla
from spvla.vlas.remote import RemoteVLA
from tests.test_serve import Looking, Sharing, obs, serving, wait_until  # noqa: F401

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

STRAIGHT = Interface(image="agentview", state="states")


def seen(t):
    o = obs(t)
    return Observation(o["images"]["agentview"], o["states"])


@pytest.mark.parametrize("pruning", ["none", {"speed": "constant", "keep": 0.5}])
def test_the_generator_here_and_the_vla_there_act_as_both_do_here(serving, pruning):  # noqa: F811
    one = serving(interface=STRAIGHT)
    remote = load_vla("remote", one.url)
    assert remote.action_space == LIBERO
    runs, steps = [], []
    for vla in (remote, Sharing()):
        policy = accelerate(vla, generator="ridge", gate="release", pruning=pruning)
        for instruction in ("put it there", "steady", "put it there"):
            policy.reset(instruction)
            runs.append([policy.select_action(seen(t)) for t in range(15)])
            steps.append([(s.source, s.visual_tokens, s.keep_mass) for s in policy.steps])
    np.testing.assert_array_equal(runs[:3], runs[3:])
    assert steps[:3] == steps[3:] and Source.GENERATOR in {s[0] for s in steps[1]}
    policy.reset("x")
    remote.reset("put it there")
    assert {"turn", "round_trip"} <= remote.predict(seen(0)).timings.keys()


@pytest.mark.parametrize("when", ["stop", "hold", "generator"])
def test_a_server_that_dies_in_mid_episode_and_comes_back(serving, when):  # noqa: F811
    one = serving(interface=STRAIGHT)
    policy = accelerate(RemoteVLA(one.url, timeout=2.0), generator="ridge", gate="release", when_unavailable=when)
    policy.reset("put it there")
    alive = [policy.select_action(seen(t)) for t in range(6)]
    one.loop.call_soon_threadsafe(one.endpoint.stop)
    assert one.stopped.wait(10)
    for t in range(20):
        start = time.monotonic()
        action = policy.select_action(seen(t))
        assert time.monotonic() - start < 0.5
        step = policy.last_step
        assert step.unavailable is not None and one.url in step.unavailable and step.reason == "unavailable"
        if when != "generator":
            np.testing.assert_array_equal(action, LIBERO.stop(alive[-1]) if when == "stop" else alive[-1])
        assert step.source in ((Source.GENERATOR, Source.HELD) if when == "generator" else (Source.HELD,))
    serving(interface=STRAIGHT, port=one.port)
    wait_until(lambda: policy.select_action(seen(0)) is not None and policy.last_step.unavailable is None)
    assert policy.last_step.source == Source.VLA
    assert policy.stats()["unavailable"] >= 20


def test_an_answer_that_is_late_and_a_vla_that_raises(serving, monkeypatch):  # noqa: F811
    one = serving(interface=STRAIGHT)
    policy = accelerate(RemoteVLA(one.url, timeout=0.25), generator="none", when_unavailable="stop")
    policy.reset("put it there")
    policy.select_action(seen(0))
    predict = Sharing.predict

    def slow(self, observation, keep_mass=1.0):
        time.sleep(0.6)
        return predict(self, observation, keep_mass)

    monkeypatch.setattr(Sharing, "predict", slow)
    start = time.monotonic()
    policy.select_action(seen(1))
    assert time.monotonic() - start < 0.5 and "no answer in 0.25 s" in policy.last_step.unavailable

    def broken(self, observation, keep_mass=1.0):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Sharing, "predict", broken)
    wait_until(lambda: policy.select_action(seen(1)) is not None and "out of memory" in policy.last_step.unavailable)
    assert policy.last_step.source == Source.HELD
    monkeypatch.setattr(Sharing, "predict", predict)
    wait_until(lambda: policy.select_action(seen(1)) is not None and policy.last_step.unavailable is None)
    fresh = Sharing()
    fresh.reset("put it there")
    np.testing.assert_array_equal(policy.history.last_action, fresh.predict(seen(1)).actions[0])


def test_an_error_about_the_episodes_start_does_not_shift_the_answers(serving):  # noqa: F811
    one = serving("looking", interface=STRAIGHT)
    vla = RemoteVLA(one.url, selector=TokenSelector())
    vla.reset("put it there")
    for t in range(3):
        with pytest.raises(VLAUnavailable, match="Looking cannot run on fewer visual tokens"):
            vla.predict(seen(t), keep_mass=0.5)
    vla.selector = None
    here = Looking()
    here.reset("put it there")
    for t in range(3):
        np.testing.assert_array_equal(vla.predict(seen(t)).actions, here.predict(seen(t)).actions)


def test_nobody_there():
    with pytest.raises(InputError, match=r"no vla-eval server answers at ws://127\.0\.0\.1:9"):
        RemoteVLA("ws://127.0.0.1:9")
    for url in ("ws://127.0.0.1:abc", "ws://127.0.0.1:999999", "ws://"):
        with pytest.raises(InputError, match=f"needs a server's address as checkpoint, ws://host:port, got '{url}'"):
            RemoteVLA(url, LIBERO)
    with pytest.raises(InputError, match="timeout must be positive, got -1"):
        RemoteVLA("ws://127.0.0.1:9", LIBERO, timeout=-1)
    with pytest.raises(InputError, match="needs a server's address"):
        load_vla("remote", "model/folder")
    with pytest.raises(InputError, match="protocol 'http' is not one of vla-eval, openpi"):
        RemoteVLA("ws://127.0.0.1:9", protocol="http")
    with pytest.raises(InputError, match="keys: 'photo' is not one of image"):
        RemoteVLA("ws://127.0.0.1:9", keys={"photo": "x"})


def openpi_pack(value):
    """openpi's form of arrays, independently of ours."""

    def array(a):
        return {b"__ndarray__": True, b"data": a.tobytes(), b"dtype": a.dtype.str, b"shape": a.shape}

    return msgpack.packb(value, default=array)


def openpi_unpack(frame):
    def array(m):
        return np.frombuffer(m[b"data"], m[b"dtype"]).reshape(m[b"shape"]) if b"__ndarray__" in m else m

    return msgpack.unpackb(frame, object_hook=array)


@pytest.fixture
def openpi():
    """A server as openpi's ``serve_policy`` is: metadata first, a chunk of 8 per observation, a traceback as text."""
    received = []

    def session(ws):
        ws.send(openpi_pack({"robot": "libero"}))
        for frame in ws:
            message = openpi_unpack(frame)
            received.append(message)
            if message["prompt"] == "explode":
                ws.send("Traceback (most recent call last):\n  ...\nValueError: no such norm stats\n")
                ws.close(1011)
                return
            first = np.arange(56, dtype=np.float64).reshape(8, 7) / 100 + len(received) / 1000
            ws.send(openpi_pack({"actions": first, "server_timing": {"infer_ms": 3.5}}))

    with serve(session, "127.0.0.1", 0, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", received
        server.shutdown()


def test_openpi_chunks_and_its_way_to_fail(openpi):
    url, received = openpi
    with pytest.raises(InputError, match="does not say what its actions are; give action_space"):
        RemoteVLA(url, protocol="openpi")
    with pytest.raises(InputError, match="cannot run on fewer visual tokens"):
        RemoteVLA(url, "libero", protocol="openpi", selector=TokenSelector())
    vla = RemoteVLA(url, "libero", protocol="openpi", timeout=2.0, keys={"wrist_image": None}, conventions={"rotate_180": True})
    policy = accelerate(vla, generator="none", when_unavailable="hold")
    policy.reset("fold the towel")
    out = np.array([policy.select_action(seen(t)) for t in range(16)])
    want = np.arange(56).reshape(8, 7) / 100
    np.testing.assert_allclose(out, np.concatenate([want + 0.001, want + 0.002]), atol=1e-6)
    assert len(received) == 2 and received[1]["prompt"] == "fold the towel"
    np.testing.assert_array_equal(received[1]["observation/image"], seen(8).image[::-1, ::-1])
    np.testing.assert_array_equal(received[1]["observation/state"], seen(8).state)
    assert received[0].keys() == {"observation/image", "observation/state", "prompt"}
    vla.reset("explode")
    policy.select_action(seen(16))
    assert "ValueError: no such norm stats" in policy.last_step.unavailable and policy.last_step.source == Source.HELD
    vla.reset("fold the towel")
    wait_until(lambda: policy.select_action(seen(16)) is not None and policy.last_step.unavailable is None)


def test_nothing_is_sent_before_reset_and_a_closed_one_stays_closed(serving):  # noqa: F811
    vla = RemoteVLA(serving(interface=STRAIGHT).url)
    with pytest.raises(InputError, match="reset"):
        vla.predict(seen(0))
    vla.reset("x")
    vla.predict(seen(0))
    vla.close()
    with pytest.raises(VLAUnavailable):
        vla.predict(seen(0))
    assert Looking.action_space == vla.action_space
