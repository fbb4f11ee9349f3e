"""Clients that send too much, nothing, or do not read: they get a reason, the log a line, and the server can always stop."""

from __future__ import annotations

import io
import logging
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from spvla import InputError

pytest.importorskip("vla_eval")
import msgpack
from vla_eval.protocol.messages import MessageType
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from spvla.serve.command import is_loopback, serve_policy
from spvla.serve.endpoint import Endpoint
from spvla.vlas.base import VLAOutput
from spvla.vlas.remote import RemoteVLA
from spvla.wire import read_token
from tests.test_serve import ROOT, Client, Sharing, changed, decoded, expected, obs, serving  # noqa: F401

TOKEN = "0123456789abcdefXYZ"


class Huge(Sharing):
    """Reports 4 MB with every action, or hangs."""

    def predict(self, observation, keep_mass=1.0):
        if self.instruction == "hang":
            time.sleep(1000)
        return VLAOutput(np.zeros((1, 7), np.float32), features=np.zeros(2**20, np.float32))


def huge(checkpoint=None):
    return Huge()


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((pixels, pixels), np.uint8)).save(stream, "PNG")
    return {"__image__": True, "format": "png", "data": stream.getvalue()}


OBSERVATIONS = [
    (changed(task_description="a" * 2001), "task_description: 2001 characters are more than 2000"),
    (changed(states=np.zeros(5000)), "states: 5000 values are more than 4096"),
    (changed(images={"x" * 30_000: 1}), r"missing; the observation has: x{150,200}\.\.\.$"),
    (changed(images={"agentview": np.zeros((1, 2**22 + 1, 3), np.uint8)}), "1 x 4194305 pixels exceed the limit"),
]
FRAMES = [
    ({"type": "observation", "payload": {"images": {k: png(2000) for k in "abc"}}}, "2000 x 2000 pixels are more than"),
    ({"type": "t" * 60_000, "payload": {}}, "message: type 't{150,200}"),
    ({"type": "observation", "payload": {f"{k}": k for k in range(2000)}}, "not readable as msgpack"),
    ({"type": "observation", "payload": {"x": [0] * 20_000}}, "not readable as msgpack"),
    ({"type": "observation", "payload": {"x": [[[]] * 9000] * 4}}, "more than 32768 entries in lists and maps"),
    ({"type": "observation", "payload": {"x": "t" * 2**17}}, "not readable as msgpack"),
    ({"x": {"__ndarray__": True, "dtype": "<f4", "shape": [1] * 500, "data": b"1234"}}, "at most 8 sizes"),
    ({"x": {"__ndarray__": True, "dtype": "z" * 50_000, "shape": [1], "data": b"1"}}, "dtype 'z{150,200}"),
    ({"type": "episode_start", "payload": {"vla": True, "pruning": {"x" * 5000: 1}}}, "pruning: more than 2000 characters"),
]


@pytest.mark.slow
def test_what_is_too_much_is_refused_with_a_short_reason_and_the_episode_goes_on(serving):  # noqa: F811
    client = Client(serving().url)
    want = expected(len(OBSERVATIONS) + len(FRAMES) + 1)
    np.testing.assert_array_equal(client.act(obs(0)), want[0])
    for t, (bad, message) in enumerate(OBSERVATIONS, 1):
        told = client.error(bad)
        assert re.search(message, told) and len(told) <= 400, told
        np.testing.assert_array_equal(client.act(obs(t)), want[t])
    for bad, message in FRAMES:
        client.ws.send(msgpack.packb(bad))
        reply = decoded(client.ws.recv(timeout=20))
        told = reply.payload["error"]
        assert reply.type == MessageType.ERROR and re.search(message, told) and len(told) <= 400, told


@pytest.mark.slow
def test_who_sends_much_that_is_refused_waits_for_as_long_as_its_size_says(serving, monkeypatch):  # noqa: F811
    client, pauses = Client(serving().url), []

    async def pause(endpoint, ws, seconds):
        pauses.append(seconds)

    monkeypatch.setattr(Endpoint, "_pause", pause)
    client.act(obs(0))
    large = changed(states=np.zeros(2**20, np.float32))
    client.error(large)
    client.error(changed(states="x"))
    client.act(obs(1))
    assert len(pauses) == 2 and pauses[0] == pytest.approx(1.0, rel=0.01) and pauses[1] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("mass", [float("nan"), 0.0, -1.0, 1.5, float("inf"), True, "all"])
def test_keep_mass_is_above_0_and_at_most_1(serving, mass):  # noqa: F811
    client = Client(serving().url, vla=True)
    assert "keep_mass: expected a number above 0 and at most 1" in client.error(changed(keep_mass=mass))
    client.act(changed(keep_mass=1))


@pytest.mark.slow
def test_a_client_gets_one_short_line_in_the_log_a_second(serving, caplog):  # noqa: F811
    client = Client(serving().url)
    caplog.set_level(logging.INFO, "spvla.serve")
    start = time.monotonic()
    for _ in range(300):
        client.tell("error", {"error": "line\n" * 1000})
        client.error(obs(0, "explode"))
    took = time.monotonic() - start
    lines = [r.getMessage() for r in caplog.records if "127.0.0.1: " in r.getMessage()]
    assert 1 <= len(lines) <= took + 2
    assert all(len(line) < 300 and "\n" not in line for line in lines)
    assert all(r.exc_info is None for r in caplog.records)


@pytest.mark.slow
def test_silent_and_idle_connections_end(serving):  # noqa: F811
    one = serving(limits={"first": 0.3, "idle": 1.0})
    silent, idle = Client(one.url, start=False), Client(one.url)
    idle.act(obs(0))
    for client, message in ((silent, r"no message in 0\.3 s"), (idle, "no message in 1 s")):
        with pytest.raises(ConnectionClosed) as closed:
            client.ws.recv(timeout=5)
        assert closed.value.rcvd.code == 1008 and re.search(message, closed.value.rcvd.reason)


@pytest.mark.slow
def test_one_address_cannot_take_every_session(serving):  # noqa: F811
    one = serving(limits={"max_per_host": 2})
    clients = [Client(one.url) for _ in range(2)]
    clients[0].act(obs(0))
    with pytest.raises(ConnectionClosed) as closed:
        Client(one.url).act(obs(0))
    assert closed.value.rcvd.code == 1013 and "2 sessions are open from this address" in closed.value.rcvd.reason


@pytest.mark.slow
def test_a_page_in_a_browser_cannot_connect(serving):  # noqa: F811
    with pytest.raises(InvalidStatus) as refused:
        connect(serving().url, origin="http://127.0.0.1:8000")
    assert refused.value.response.status_code == 403


@pytest.mark.slow
def test_a_token_is_asked_for(serving, tmp_path):  # noqa: F811
    from spvla.serve import Interface

    one = serving(limits={"token": TOKEN}, interface=Interface(image="agentview", state="states"))
    for wrong in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": "Bearer \u00e9"}):
        with pytest.raises(InvalidStatus) as refused:
            connect(one.url, additional_headers=wrong)
        assert refused.value.response.status_code == 401
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert RemoteVLA(one.url, token_file=str(file)).with_pruner(None).server_info["model"] == "tests.test_serve:sharing"
    Client(f"{one.url}/?token={TOKEN}").act(obs(0))
    with pytest.raises(InputError, match=r"no vla-eval server answers.*401"):
        RemoteVLA(one.url)


def test_other_machines_are_let_in_with_a_token_or_on_request_only(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "gpu.example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(InputError, match="lets other machines in: give token_file, or insecure") as error:
            serve_policy("nobody", host=host)
        assert error.value.code == "token-required"
        with pytest.raises(InputError, match="VLA 'nobody' is unknown"):
            serve_policy("nobody", host=host, insecure=True)
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"))
    for content in ("", "short", "with spaces in between", "\x00" * 20):
        (tmp_path / "token").write_text(content)
        with pytest.raises(InputError, match="expected at least 16 printable ASCII characters"):
            read_token(tmp_path / "token")
    with pytest.raises(InputError, match="cannot be read"):
        serve_policy("nobody", token_file=str(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.parametrize("state", ["nothing", "silent", "idle", "unread", "hung", "all"])
def test_sigterm_ends_the_server_within_five_seconds(state):
    line = [sys.executable, "-m", "spvla.serve", "--vla", "tests.test_serve_hostile:huge", "--interface.state", "states"]
    line += ["--generator", "none", "--port", "0"]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r"ws://[\d.]+:(\d+)", next(said for said in process.stderr if "ready" in said))[1])
            url, held = f"ws://127.0.0.1:{port}", []
            if state in ("silent", "all"):
                held.append(socket.create_connection(("127.0.0.1", port)))
            if state in ("idle", "all"):
                held.append(Client(url))
            if state in ("unread", "all"):
                client = Client(url, start=False)
                client.ws.close()
                client.ws = connect(url, compression=None, max_size=None, max_queue=1)
                client.tell("episode_start", {"task": {}, "vla": True})
                for t in range(8):
                    client.tell("observation", obs(t))
                held.append(client)
            if state in ("hung", "all"):
                client = Client(url)
                client.tell("observation", obs(0, "hang"))
                held.append(client)
            time.sleep(1.0)
            start = time.monotonic()
            process.terminate()
            code = process.wait(10)
            took = time.monotonic() - start
            assert took < 5, f"{took:.1f} s"
            assert code == (1 if state in ("hung", "all") else 0)
            print(f"{state}: {took:.2f} s")
        finally:
            process.kill()
