"""The policy behind a WebSocket: the same actions as without one, and nothing that one client does reaches another."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from spvla import InputError, Observation, accelerate, save_export
from spvla.actions import LIBERO, ActionSpace
from spvla.vlas.base import VLAOutput
from tests.test_export import make_export

pytest.importorskip("vla_eval")
import msgpack
from vla_eval import specs
from vla_eval.protocol.messages import Message, MessageType, pack_message
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from spvla.serve.endpoint import Endpoint
from spvla.serve.interface import Interface, euler_to_axis_angle
from spvla.serve.messages import MAX_FRAME
from spvla.serve.server import PolicyServer

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

ROOT = Path(__file__).parents[1]
WIRE = Interface(image="agentview", state="states", image_size=(16, 16), rotate_180=True)


class Looking:
    """Acts on every pixel, the state, the instruction and how often it was asked in this episode; may misbehave on request."""

    action_space = LIBERO
    loaded = 0

    def __init__(self) -> None:
        type(self).loaded += 1

    def reset(self, instruction: str) -> None:
        self.instruction, self.asked = instruction, 0

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        if self.instruction == "explode":
            raise RuntimeError("CUDA error: out of memory")
        if self.instruction == "ponder":
            time.sleep(0.4)
        image = observation.require_image()
        self.asked += 1
        if self.instruction == "steady":
            return VLAOutput(np.float32([[0.5, 0.2, 0, 0, 0, 0, 1]]))
        seed = [int(image.astype(np.int64).ravel() @ np.arange(image.size)), len(self.instruction), self.asked]
        g = np.random.default_rng(seed)
        return VLAOutput(g.uniform(-1, 1, (1, 7)).astype(np.float32), features=g.normal(size=5).astype(np.float32))


class Sharing(Looking):
    """One that sessions share."""

    pruner = None

    def with_pruner(self, pruner):
        twin = object.__new__(type(self))
        twin.pruner = pruner
        return twin

    def predict(self, observation, keep_mass=1.0):
        output = super().predict(observation)
        kept = (256 if self.pruner is None else round(256 * keep_mass), 256)
        return VLAOutput(output.actions, features=output.features, visual_tokens=kept)


def looking(checkpoint=None):
    return Looking()


def sharing(checkpoint=None):
    return Sharing()


@pytest.fixture
def serving():
    """Start servers; they end with the test."""
    running = []

    def start(policy="sharing", interface=WIRE, max_sessions=64, port=0, limits=None, **parts):
        parts = {"generator": "last", "gate": "release", **parts}
        server = PolicyServer(policy if ":" in policy else f"tests.test_serve:{policy}", interface=interface, **parts)
        out = SimpleNamespace(server=server, stopped=threading.Event())
        started = threading.Event()

        async def main():
            out.endpoint, out.loop = Endpoint(server, max_sessions, **(limits or {})), asyncio.get_running_loop()
            ready = out.loop.create_future()
            ready.add_done_callback(lambda r: (setattr(out, "port", r.result()), started.set()))
            await out.endpoint.run("127.0.0.1", port, ready)
            out.stopped.set()

        threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
        assert started.wait(20)
        out.url = f"ws://127.0.0.1:{out.port}"
        running.append(out)
        return out

    yield start
    for one in running:
        with contextlib.suppress(RuntimeError):  # stopped by the test
            one.loop.call_soon_threadsafe(one.endpoint.stop)
        assert one.stopped.wait(20), "the server does not stop"


def decoded(frame):
    from vla_eval.protocol.messages import unpack_message

    return unpack_message(frame)


class Client:
    """A client in a thread's own terms."""

    def __init__(self, url, start=True, **config):
        self.ws, self.seq = connect(url, compression=None, max_size=None), 0
        if start:
            self.tell("episode_start", {"task": {"name": "x"}, **config})

    def tell(self, kind, payload):
        self.seq += 1
        self.ws.send(pack_message(Message(MessageType(kind), payload, self.seq)))

    def ask(self, obs):
        self.tell("observation", obs)
        reply = decoded(self.ws.recv(timeout=20))
        assert reply.seq == self.seq
        return reply

    def act(self, obs):
        reply = self.ask(obs)
        assert reply.type == MessageType.ACTION, reply.payload
        return reply.payload["actions"]

    def error(self, obs):
        reply = self.ask(obs)
        assert reply.type == MessageType.ERROR
        return reply.payload["error"]


def obs(t, instruction="put it there", seed=0):
    g = np.random.default_rng([seed, t])
    image = g.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return {"images": {"agentview": image}, "states": g.normal(size=8).astype(np.float32), "task_description": instruction}


def expected(steps, instruction="put it there", seed=0):
    """What the policy does without a server: it sees the images as the simulator gives them, upside down."""
    policy = accelerate(Looking(), generator="last", gate="release")
    policy.reset(instruction)
    out = []
    for t in range(steps):
        o = obs(t, instruction, seed)
        out.append(policy.select_action(Observation(o["images"]["agentview"][::-1, ::-1], o["states"])))
    return np.array(out)


class Held(Sharing):
    """Answers when the test lets it."""

    allowed = threading.Semaphore(0)

    def predict(self, observation, keep_mass=1.0):
        assert self.allowed.acquire(timeout=20)
        return VLAOutput(np.float32([[0.5, 0.2, 0, 0, 0, 0, 1]]))


def held(checkpoint=None):
    return Held()


def test_a_server_that_never_waits_answers_while_its_vla_thinks(serving):
    client = Client(serving("held", mode="bridge", generator="last").url)
    Held.allowed.release()  # for the first step
    first = client.ask(obs(0)).payload
    after = [client.ask(obs(t)).payload for t in range(1, 6)]
    assert first["source"] == "vla" and {a["source"] for a in after} <= {"generator", "held"}
    Held.allowed.release(10)


@pytest.mark.parametrize("policy", ["looking", "sharing"])
def test_the_same_actions_as_without_a_server(serving, policy):
    one = serving(policy)
    client = Client(one.url)
    for _ in range(2):
        np.testing.assert_array_equal([client.act(obs(t)) for t in range(25)], expected(25))
        client.tell("episode_end", {})
        client.tell("episode_start", {})


def test_vla_evals_own_client_and_its_own_server(serving):
    from vla_eval.api import serve_background
    from vla_eval.connection import Connection

    async def drive(url):
        async with Connection(url) as connection:
            await connection.start_episode({"task": {}})
            return connection.server_info, [(await connection.act(obs(t)))["actions"] for t in range(12)]

    one = serving(
        interface=Interface(**{**vars(WIRE), "action_spec": {"gripper": "GRIPPER_CLOSE_POS"}, "benchmark": {"seed": 0}})
    )
    info, actions = asyncio.run(drive(one.url))
    np.testing.assert_array_equal(actions, expected(12))
    assert specs.DimSpec.from_dict(info["action_spec"]["gripper"]) == specs.GRIPPER_CLOSE_POS
    assert info["observation_params"] == {"seed": 0} and ActionSpace.from_dict(info["action_space"]) == LIBERO
    with serve_background(one.server) as handle:
        np.testing.assert_array_equal(asyncio.run(drive(handle.url))[1], expected(12))


def test_health(serving):
    one = serving()
    client = Client(one.url)
    client.act(obs(0))
    with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/health") as answer:
        assert answer.status == 200 and json.load(answer) == {"status": "ok", "sessions": 1, "max_sessions": 64}


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def changed(**changes):
    return {**obs(0), **changes}


BAD_OBSERVATIONS = [
    (changed(images=None), r"images: expected a dict"),
    (changed(images={}), r"images\['agentview'\]: missing"),
    (changed(images={"agentview": np.zeros((16, 16), np.uint8)}), r"expected an RGB image"),
    (changed(images={"agentview": np.zeros((8, 8, 3), np.uint8)}), r"is \(8, 8\), but this server was set up for \(16, 16\)"),
    (changed(images={"agentview": np.full((16, 16, 3), np.nan)}), r"expected uint8 in 0..255, got float64"),
    (changed(images={"agentview": "cat"}), r"expected an RGB image"),
    (changed(states=None), r"states: expected|expected shape"),
    (changed(states="left"), r"states: expected numbers, got str"),
    (changed(states=np.zeros((2, 4))), r"expected shape \(S,\), got \(2, 4\)"),
    (changed(states=np.zeros(5)), r"5 values, earlier steps had 8"),
    (changed(states=np.full(8, np.nan)), r"NaN"),
    (changed(task_description=3), r"task_description: expected a text instruction, got int"),
    ({"task_description": "x", "images": obs(0)["images"]}, r"states: missing; the observation has: task_description, images"),
]
BAD_FRAMES = [
    (b"", "not readable as msgpack"),
    (b"\xc1", "not readable as msgpack"),
    ("hello", "expected a binary frame"),
    (msgpack.packb([1, 2]), "expected a map, got list"),
    (msgpack.packb({"type": "dance", "payload": {}}), "type 'dance' is not one of hello, observation"),
    (msgpack.packb({"type": ["x"], "payload": {}}), "is not one of|unhashable"),
    (msgpack.packb({"type": "observation", "payload": 7}), "payload must be a map, got int"),
    (msgpack.packb({"type": "action", "payload": {}}), "a client must not send 'action'"),
    (
        msgpack.packb({"x": {"__ndarray__": True, "dtype": "<f4", "shape": [9], "data": b"123"}}),
        "36 bytes, but data has 3",
    ),
    (
        msgpack.packb({"x": {"__ndarray__": True, "dtype": "O", "shape": [1], "data": b"12345678"}}),
        "'O' is not supported|dtype 'O' is not read",
    ),
    (msgpack.packb({"x": {"__image__": True, "format": "png", "data": b"no picture"}}), "neither PNG nor JPEG"),
    (
        msgpack.packb({"x": {"__image__": True, "format": "png", "data": png(np.zeros((4000, 4000), np.uint8))}}),
        "4000 x 4000 pixels, more than|4000 x 4000 pixels exceed the limit of",
    ),
]


def test_what_cannot_be_used_is_told_and_the_episode_goes_on_as_if_it_had_not_been_sent(serving):
    one = serving()
    client, other = Client(one.url), Client(one.url)
    want = expected(len(BAD_OBSERVATIONS) + len(BAD_FRAMES) + 1)
    np.testing.assert_array_equal(client.act(obs(0)), want[0])
    for t, (bad, message) in enumerate(BAD_OBSERVATIONS, 1):
        assert re.search(message, told := client.error(bad)), told
        np.testing.assert_array_equal(client.act(obs(t)), want[t])
        np.testing.assert_array_equal(other.act(obs(t - 1)), want[t - 1])
    for t, (bad, message) in enumerate(BAD_FRAMES, len(BAD_OBSERVATIONS) + 1):
        client.ws.send(bad)
        reply = decoded(client.ws.recv(timeout=20))
        assert reply.type == MessageType.ERROR and re.search(message, reply.payload["error"]), reply
        np.testing.assert_array_equal(client.act(obs(t)), want[t])


def test_no_observation_before_an_episode(serving):
    assert "send episode_start first" in Client(serving().url, start=False).error(obs(0))


def test_a_frame_too_large_ends_that_session_alone(serving):
    one = serving()
    large, other = Client(one.url), Client(one.url)
    with pytest.raises(ConnectionClosed) as closed:
        large.tell("observation", {"images": {"agentview": b"x" * (MAX_FRAME + 1)}})
        large.ws.recv(timeout=20)
    assert closed.value.rcvd.code == 1009
    np.testing.assert_array_equal([other.act(obs(t)) for t in range(5)], expected(5))


@pytest.mark.parametrize("policy", ["looking", "sharing"])
def test_a_vla_that_raises_is_told_to_its_own_session(serving, policy, caplog):
    one = serving(policy)
    bad, other = Client(one.url), Client(one.url)
    for t in range(3):
        assert bad.error(obs(t, "explode")) == "RuntimeError: CUDA error: out of memory"
        np.testing.assert_array_equal(other.act(obs(t)), expected(3)[t])
    np.testing.assert_array_equal(bad.act(obs(0)), expected(1)[0])  # another instruction: another episode


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_vanishes_in_mid_step_leaves_nothing_behind(serving):
    one = serving("looking")
    other = Client(one.url)
    for _ in range(3):
        gone = Client(one.url)
        gone.tell("observation", obs(0, "ponder"))
        time.sleep(0.1)
        gone.ws.socket.close()
    wait_until(lambda: one.endpoint.sessions == 1)
    np.testing.assert_array_equal([other.act(obs(t)) for t in range(5)], expected(5))
    other.ws.close()
    wait_until(lambda: one.endpoint.sessions == 0)
    assert len(one.server._sessions) == 0
    loaded = Looking.loaded
    np.testing.assert_array_equal([Client(one.url).act(obs(0)) for _ in range(4)], np.tile(expected(1), (4, 1)))
    assert Looking.loaded == loaded + 1, "sessions that ended are used again; one was loaded to compare with"


def test_an_intuitive_step_waits_for_no_other_sessions_vla(serving):
    one = serving(generator="ridge")
    quick, slow = Client(one.url), Client(one.url)
    made = [quick.ask(obs(t, "steady")).payload["source"] for t in range(4)]
    slow.tell("observation", obs(0, "ponder"))
    time.sleep(0.1)
    start = time.monotonic()
    made += [quick.ask(obs(t, "steady")).payload["source"] for t in range(4, 7)]
    assert made == ["vla"] * 4 + ["generator"] * 3 and time.monotonic() - start < 0.2
    quick.ask(obs(7, "steady"))  # the VLA's turn comes when the other session's call has ended
    assert time.monotonic() - start > 0.25


def test_fifty_sessions_at_once(serving):
    one = serving()
    wrong, threads = [], []

    def drive(k):
        client = Client(one.url)
        out = [client.act(obs(t, "go " * (k + 1), seed=k)) for t in range(20)]
        if not np.array_equal(out, expected(20, "go " * (k + 1), seed=k)):
            wrong.append(k)

    for k in range(50):
        threads.append(threading.Thread(target=drive, args=(k,)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_one_session_too_many_is_refused(serving):
    one = serving(max_sessions=2)
    clients = [Client(one.url) for _ in range(2)]
    clients[0].act(obs(0))
    with pytest.raises(ConnectionClosed) as closed:
        Client(one.url).act(obs(0))
    assert closed.value.rcvd.code == 1013 and "2 sessions are open" in closed.value.rcvd.reason
    clients.pop().ws.close()
    wait_until(lambda: one.endpoint.sessions == 1)
    Client(one.url).act(obs(0))


def test_a_stop_lets_the_running_step_finish(serving):
    one = serving()
    busy, idle = Client(one.url), Client(one.url)
    idle.act(obs(0))
    busy.tell("observation", obs(0, "ponder"))
    time.sleep(0.1)
    one.loop.call_soon_threadsafe(one.endpoint.stop)
    assert decoded(busy.ws.recv(timeout=5)).type == MessageType.ACTION
    for client in (busy, idle):
        with pytest.raises(ConnectionClosed) as closed:
            client.ws.recv(timeout=5)
        assert closed.value.rcvd.code == 1001
    assert one.stopped.wait(5)


def test_the_vla_itself_with_all_it_reports(serving):
    one = serving()
    client = Client(one.url, vla=True, pruning={"speed": "constant", "keep": 0.5})
    vla = Sharing()
    vla.reset("put it there")
    for t in range(4):
        o = obs(t)
        want = vla.predict(Observation(o["images"]["agentview"][::-1, ::-1]))
        reply = client.ask({**o, "keep_mass": 0.5}).payload
        np.testing.assert_array_equal(reply["actions"], want.actions)
        np.testing.assert_array_equal(reply["features"], want.features)
        assert reply["visual_tokens"] == [128, 256] and reply["confidence"] is None and "turn" in reply["timings"]
    refused = Client(one.url, vla=True, pruning={"ratio": 2})
    reply = decoded(refused.ws.recv(timeout=5))
    assert reply.type == MessageType.ERROR and "field 'ratio' is unknown" in reply.payload["error"]


def test_the_vla_itself_answers_in_its_own_units(serving):
    """What a benchmark's gripper reads is for the joint policy's sessions; a plain one is told the VLA's action space."""
    one = serving(interface=replace(WIRE, gripper_from=(1.0, -1.0), gripper_to=(0.0, 1.0)))
    reply = Client(one.url, vla=True).ask(obs(0, "steady")).payload
    np.testing.assert_array_equal(reply["actions"], np.float32([[0.5, 0.2, 0, 0, 0, 0, 1]]))
    joint = Client(one.url).ask(obs(0, "steady")).payload
    np.testing.assert_array_equal(joint["actions"], np.float32([0.5, 0.2, 0, 0, 0, 0, 0]))


def test_conventions_of_other_benchmarks():
    from scipy.spatial.transform import Rotation

    g = np.random.default_rng(0)
    angles = np.concatenate([g.uniform(-3, 3, (200, 3)), g.normal(size=(50, 3)) * 1e-7, np.zeros((1, 3))])
    matrices = Rotation.from_euler("xyz", angles).as_matrix()
    np.testing.assert_allclose(Rotation.from_rotvec(euler_to_axis_angle(angles)).as_matrix(), matrices, atol=2e-6)
    calvin = Interface(gripper_from=(0, 1), gripper_to=(-1, 1), euler_to_axis_angle=True)
    out = calvin.action(np.array([[0, 0, 0, 0.1, 0, 0, 0], [0, 0, 0, 0.1, 0.2, 0, 1]], np.float32), LIBERO)
    assert out[:, 6].tolist() == [-1, 1] and np.allclose(out[0, 3:6], [0.1, 0, 0])
    with pytest.raises(InputError, match=r"no spec 'GRIPPER_SLIPPERY'; it has: .*GRIPPER_CLOSE_POS"):
        Interface(action_spec={"gripper": "GRIPPER_SLIPPERY"})
    with pytest.raises(InputError, match="both gripper_from and gripper_to"):
        Interface(gripper_from=(0, 1))
    with pytest.raises(InputError, match=r"interface: image_size must be at least 1, got \[-1, 0\]"):
        Interface(image_size=[-1, 0])


def test_an_export_that_reads_the_state_needs_one(tmp_path):
    export = str(save_export(make_export(), tmp_path / "export"))
    PolicyServer("tests.test_serve:sharing", export=export, interface=WIRE)
    PolicyServer("tests.test_serve:sharing", export=export, generator="none")
    PolicyServer("tests.test_serve:sharing", export=export, generator="last", gate="release")
    for generator in ("mlp", "ridge"):  # the gate of the latter alone reads it
        with pytest.raises(InputError, match=r"interface\.state is not given, though .*: observation\.state: has 0 values"):
            PolicyServer("tests.test_serve:sharing", export=export, generator=generator)


BENCHMARKS = {
    "libero": ("libero.benchmark:LIBEROBenchmark", {}),
    "simpler_widowx": ("simpler.benchmark:SimplerEnvBenchmark", {}),
    "simpler_google_robot": ("simpler.benchmark:SimplerEnvBenchmark", {}),
    "calvin": ("calvin.benchmark:CALVINBenchmark", {}),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_configurations_that_ship_declare_what_the_benchmarks_expect(name):
    from vla_eval.orchestrator import _merge_observation_params
    from vla_eval.registry import resolve_import_string

    values = yaml.safe_load((ROOT / "configs" / "serve" / f"{name}.yaml").read_text())
    interface = Interface(**values["interface"])
    server = object.__new__(PolicyServer)
    server.interface = interface
    target, parameters = BENCHMARKS[name]
    cls = resolve_import_string(f"vla_eval.benchmarks.{target}")
    merged = _merge_observation_params(cls, parameters, server.get_observation_params())
    assert set(interface.benchmark) <= set(merged), "the benchmark knows every parameter"
    benchmark = cls(**merged)
    assert not specs.check_specs(
        server.get_action_spec(), benchmark.get_action_spec(), server.get_observation_spec(), benchmark.get_observation_spec()
    )


@contextlib.contextmanager
def command(*options):
    """The server as a process of its own, and its address."""
    line = [
        sys.executable,
        "-m",
        "spvla.serve",
        "--vla",
        "tests.test_serve:sharing",
        "--interface.state",
        "states",
        *options,
    ]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = next(line for line in process.stderr if "ready" in line)
            yield process, re.search(r"ws://[\d.]+:\d+", said).group()
        finally:
            process.kill()


def test_the_command_serves_on_loopback_until_it_is_told_to_stop():
    with command("--generator", "ridge", "--port", "0") as (process, url):
        assert url.startswith("ws://127.0.0.1:")
        client = Client(url)
        assert client.act(obs(0)).shape == (7,)
        process.terminate()
        assert process.wait(20) == 0
        with pytest.raises(ConnectionClosed):
            client.ws.recv(timeout=5)
    for options, message in (
        (["--vla", "tests.test_serve:sharing", "--port", "99999"], "cannot serve at 127.0.0.1:99999"),
        (["--vla", "nobody", "--port", "0"], "VLA 'nobody' is unknown"),
    ):
        bad = subprocess.run([sys.executable, "-m", "spvla.serve", *options], cwd=ROOT, capture_output=True, text=True)
        assert bad.returncode == 2 and message in bad.stderr and "Traceback" not in bad.stderr


def test_ten_thousand_steps_in_one_episode_and_a_thousand_episodes_hold_no_memory():
    with command("--generator", "last", "--gate", "release", "--port", "0") as (process, url):

        def resident():
            return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096 / 2**20

        client, seen = Client(url), [obs(t) for t in range(20)]
        for t in range(2000):
            client.act(seen[t % 20])
        before = resident()
        for t in range(10_000):
            client.act(seen[t % 20])
        assert resident() - before < 4
        for _ in range(1000):
            client.tell("episode_start", {})
            client.act(seen[0])
        assert resident() - before < 4
