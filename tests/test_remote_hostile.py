"""Servers that are not what they were, too slow, out of order, or that send nonsense: the robot gets VLAUnavailable in time."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from spvla import InputError, Observation, VLAUnavailable, accelerate
from spvla.actions import LIBERO
from spvla.history import Source

pytest.importorskip("msgpack")
pytest.importorskip("websockets")
import msgpack
from websockets.sync.server import serve

from spvla.vlas.answers import ProtocolError, read_answer
from spvla.vlas.remote import RemoteVLA
from spvla.wire import decode_array, encode_array

HELLO = {"protocol_version": 1, "model_server": "spvla", "model": "openvla A", "statistics_key": "libero"}
SEEN = Observation(np.zeros((8, 8, 3), np.uint8), np.zeros(8, np.float32))
GOOD = np.full((1, 7), 0.25, np.float32)


def pack(content):
    return msgpack.packb(content, default=encode_array)


def quietly(send, frame):
    with contextlib.suppress(Exception):
        send(frame)


def unpack(frame):
    return msgpack.unpackb(frame, object_hook=decode_array)


@contextlib.contextmanager
def listening(session, port=0):
    """A WebSocket server that does ``session(ws)``; gives its port."""
    with serve(session, "127.0.0.1", port, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()


def numbered(answer, **hello):
    """A session of vla-eval's protocol. ``answer(ws, seq, message)`` returns the payload, or None: it sent something."""

    def session(ws):
        for frame in ws:
            message = unpack(frame)
            seq = message["seq"]
            if message["type"] == "hello":
                said = {**HELLO, "action_space": LIBERO.to_dict(), **hello}
                ws.send(pack({"type": "hello", "payload": said, "seq": seq, "timestamp": 0}))
            elif message["type"] == "observation" and (payload := answer(ws, seq, message["payload"])) is not None:
                ws.send(action(seq, payload))

    return session


def action(seq, payload):
    return pack({"type": "action", "payload": payload, "seq": seq, "timestamp": 0})


def remote(port, timeout=1.0, **options):
    vla = RemoteVLA(f"ws://127.0.0.1:{port}", timeout=timeout, **options)
    vla.reset("go")
    return vla


def until(vla, match, seconds=5.0):
    """Ask until the reason matches."""
    end = time.monotonic() + seconds
    while True:
        try:
            vla.predict(SEEN)
            said = "an answer"
        except VLAUnavailable as error:
            said = str(error)
        if match in said:
            return
        assert time.monotonic() < end, said
        time.sleep(0.02)


OTHERS = {
    "action_space": {"action_space": replace(LIBERO, q01=(-0.1,) * 7).to_dict()},
    "model": {"model": "openvla B"},
    "statistics_key": {"statistics_key": "bridge_orig"},
    "protocol_version": {"protocol_version": 2},
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_restarted_server_of_another_robot_is_never_obeyed(field):
    with listening(numbered(lambda *_: {"actions": GOOD})) as port:
        vla = remote(port)
        vla.predict(SEEN)
    with listening(numbered(lambda *_: {"actions": GOOD * 3}, **OTHERS[field]), port):
        until(vla, f"another server answers: its {field} is")
        with pytest.raises(VLAUnavailable):
            vla.predict(SEEN)
    with listening(numbered(lambda *_: {"actions": GOOD}), port):
        until(vla, "an answer")
    vla.close()


def test_another_openpi_server_is_refused_by_its_metadata():
    def session(name):
        def run(ws):
            ws.send(pack({"robot": name}))
            for frame in ws:
                ws.send(pack({"actions": GOOD + len(frame) * 1e-6}))

        return run

    with listening(session("libero")) as port:
        vla = remote(port, protocol="openpi", space="libero")
        vla.predict(SEEN)
    with listening(session("aloha"), port):
        until(vla, "its robot is 'aloha', it was 'libero'")
    vla.close()


def test_a_server_cannot_name_a_file_of_this_machine_as_its_action_space(tmp_path):
    (tmp_path / "space.json").write_text("{}")
    for said in (str(tmp_path / "space.json"), "libero", ["libero"]):
        with (
            listening(numbered(lambda *_: None, action_space=said)) as port,
            pytest.raises(InputError, match="does not describe its action space by fields"),
        ):
            remote(port)


def refused_in_time(vla, timeout, match="no answer in", seen=SEEN):
    start = time.monotonic()
    with pytest.raises(VLAUnavailable, match=match):
        vla.predict(seen)
    took = time.monotonic() - start
    assert took < timeout + 0.3, f"{took:.2f} s"


def test_foreign_answers_do_not_restart_the_deadline():
    def drip(ws, seq, _):
        with contextlib.suppress(Exception):
            for _ in range(40):
                ws.send(action(seq - 1, {"actions": GOOD}))
                time.sleep(0.1)

    with listening(numbered(drip)) as port:
        refused_in_time(remote(port, 0.4), 0.4)


@contextlib.contextmanager
def below_websockets(session):
    """An openpi server that does ``session(conn)`` on the bare socket after the handshake and the metadata."""

    def run():
        conn, _ = listener.accept()
        with conn:
            head = b""
            while b"\r\n\r\n" not in head:
                head += conn.recv(4096)
            key = next(line.split(b": ")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
            accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            switching = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            metadata = pack({})
            conn.sendall(switching + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
            conn.sendall(bytes([0x82, len(metadata)]) + metadata)
            with contextlib.suppress(OSError):
                session(conn)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=run, daemon=True).start()
        yield listener.getsockname()[1]


def test_sending_has_the_deadline_too():
    """A peer that reads nothing more after the handshake: its buffers fill up."""
    over = threading.Event()
    large = Observation(np.zeros((3000, 3000, 3), np.uint8), np.zeros(8, np.float32))
    with below_websockets(lambda conn: over.wait(10)) as port:
        vla = remote(port, 0.5, protocol="openpi", space="libero")
        refused_in_time(vla, 0.5, seen=large)
        vla.close()
        over.set()


def test_an_answer_that_comes_byte_by_byte_is_too_late():
    def drip(conn):
        conn.recv(2**20)
        conn.sendall(bytes([0x82, 100]))
        for _ in range(50):
            conn.sendall(b"\x00")
            time.sleep(0.1)

    with below_websockets(drip) as port:
        vla = remote(port, 0.4, protocol="openpi", space="libero")
        refused_in_time(vla, 0.4)
        vla.close()


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.15])
def test_a_doubled_openpi_answer_is_never_the_next_observations(delay):
    """The answers say which request they belong to; each is sent twice, the second one at once, soon, or in mid-request."""

    def session(ws):
        ws.send(pack({}))
        with contextlib.suppress(Exception):
            for frame in ws:
                asked = float(unpack(frame)["observation/state"][0])
                time.sleep(0.05)
                answer = pack({"actions": np.full((1, 7), asked, np.float32)})
                ws.send(answer)
                threading.Timer(delay, quietly, (ws.send, answer)).start()

    right = 0
    with listening(session) as port:
        vla = remote(port, protocol="openpi", space="libero")
        for k in range(25):
            with contextlib.suppress(VLAUnavailable):
                output = vla.predict(Observation(SEEN.image, np.full(8, k / 100, np.float32)))
                np.testing.assert_allclose(output.actions, k / 100, atol=1e-6)
                right += 1
            time.sleep(0.06)
        assert right >= 3, "it reconnects"
        vla.close()


def test_a_numbered_server_must_number():
    with listening(numbered(lambda ws, seq, _: ws.send(pack({"type": "action", "payload": {"actions": GOOD}})))) as port:
        refused_in_time(remote(port), 0.5, "without a number")
    with listening(numbered(lambda ws, seq, _: ws.send(pack({"type": "hello", "payload": {}, "seq": seq})))) as port:
        refused_in_time(remote(port), 0.5, "expected an answer of type 'action'")


BAD = [
    ({}, "without actions; it has: nothing"),
    ({"actions": None}, "actions: expected an array of numbers"),
    ({"actions": "12"}, "actions: expected an array of numbers"),
    ({"actions": ["1"] * 7}, "actions: expected an array of numbers"),
    ({"actions": [[1, 2], [3]]}, "actions: expected an array of numbers"),
    ({"actions": np.zeros((1, 6))}, r"actions have shape \(1, 6\), expected \(T, 7\)"),
    ({"actions": np.zeros((0, 7))}, r"shape \(0, 7\)"),
    ({"actions": np.zeros((1001, 7))}, "T from 1 to 1000"),
    ({"actions": np.zeros((1, 1, 7))}, r"shape \(1, 1, 7\)"),
    ({"actions": GOOD * np.nan}, "NaN or infinity"),
    ({"actions": np.full((1, 7), np.inf)}, "NaN or infinity"),
    ({"actions": np.full((1, 7), 2e6)}, r"beyond 1e\+06"),
    ({"actions": np.full((1, 7), -(2**40))}, r"beyond 1e\+06"),
    ({"actions": GOOD, "confidence": np.ones(6)}, r"confidence: shape \(6,\), expected \(7,\)"),
    ({"actions": GOOD, "confidence": np.full(7, np.nan)}, "confidence: contain NaN"),
    ({"actions": GOOD, "confidence": np.full(7, 3.0)}, "not within 0 and 1"),
    ({"actions": GOOD, "features": np.ones(6)}, r"features: shape \(6,\), expected \(5,\)"),
    ({"actions": GOOD, "features": np.ones((1, 5))}, "features: shape"),
    ({"actions": GOOD, "features": "x"}, "features: expected an array"),
    ({"actions": GOOD, "visual_tokens": 3}, "visual_tokens: expected"),
    ({"actions": GOOD, "visual_tokens": [5, 3]}, "visual_tokens: expected"),
    ({"actions": GOOD, "visual_tokens": ["a", "b"]}, "visual_tokens: expected"),
    ({"actions": GOOD, "visual_tokens": []}, "visual_tokens: expected"),
    ({"actions": GOOD, "visual_tokens": [2, 4], "kept_tokens": [0, 4]}, "kept_tokens: expected the ascending"),
    ({"actions": GOOD, "visual_tokens": [2, 4], "kept_tokens": [1, 1]}, "kept_tokens: expected the ascending"),
    ({"actions": GOOD, "kept_tokens": [[1, 2], 3]}, "kept_tokens: expected an array of numbers"),
    ({"actions": GOOD, "visual_tokens": [2, 4], "kept_tokens": [1]}, "kept_tokens: expected the ascending"),
    ({"actions": GOOD, "tokens": np.zeros((2, 7), np.int64)}, "tokens have shape"),
    ({"actions": GOOD, "tokens": np.zeros((1, 7))}, "tokens: expected an array of numbers"),
    ({"actions": GOOD, "timings": [1]}, "timings: expected"),
    ({"actions": GOOD, "timings": {"a": "x"}}, "timings: expected"),
    ({"actions": GOOD, "timings": {"a": float("nan")}}, "timings: expected"),
    ({"actions": GOOD, "timings": {f"{k}": 1.0 for k in range(101)}}, "timings: expected"),
    ({"x" * 5000: 1}, r"^.{1,200}$"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_an_answer_is_checked_in_one_place(case):
    reply, message = BAD[case]
    sent = unpack(pack(reply))
    with pytest.raises(ProtocolError, match=message):
        read_answer(sent, 7, 5)


def test_what_fails_the_check_is_unavailable_and_caught_by_when_unavailable():
    answers = [{"actions": GOOD, "features": np.ones(5)}, *(reply for reply, _ in BAD)]

    def answer(ws, seq, message):
        return answers[int(message["states"][0])]

    with listening(numbered(answer)) as port:
        vla = remote(port)
        policy = accelerate(vla, generator="none", when_unavailable="stop")
        policy.reset("go")
        for case in range(len(answers)):
            end = time.monotonic() + 5
            while True:
                chosen = policy.select_action(Observation(SEEN.image, np.full(8, case, np.float32)))
                why = policy.last_step.unavailable
                if why is None or "reconnecting" not in why:
                    break
                assert time.monotonic() < end, why
                time.sleep(0.01)
            assert (why is None) == (case == 0), (case, why)
            assert policy.last_step.source == (Source.VLA if case == 0 else Source.HELD) and np.isfinite(chosen).all()
        vla.close()


def test_errors_repeat_little_of_what_the_server_said():
    def answer(ws, seq, _):
        ws.send(pack({"type": "error", "payload": {"error": "no\x1b[31m" * 1000}, "seq": seq}))

    with listening(numbered(answer)) as port, pytest.raises(VLAUnavailable) as error:
        remote(port).predict(SEEN)
    assert len(str(error.value)) < 250 and "\x1b" not in str(error.value)
