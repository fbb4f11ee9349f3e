"""One good client of the policy server, alone and beside clients that send what is too much: how long its steps take.

Server, attackers and the good client are processes of their own. The good client asks at a robot's rate; a step is the time
from sending an observation to having the action.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from spvla.wire import encode_array

ROOT = Path(__file__).parents[2]
RATE = 50.0  # steps a second of the good client
LIMITS = {"p99 beside an attack, in the p99 alone": 5.0, "slowest step, ms": 250.0}


def png(pixels: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((pixels, pixels), np.uint8)).save(stream, "PNG")
    return {"__image__": True, "format": "png", "data": stream.getvalue()}


def pack(kind: str, payload: Any, seq: int = 1) -> bytes:
    packed: bytes = msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}, default=encode_array)
    return packed


def seen(**changes: Any) -> dict[str, Any]:
    image = np.zeros((224, 224, 3), np.uint8)
    return {"images": {"agentview": image}, "states": np.zeros(8, np.float32), "task_description": "steady"} | changes


def empties(lists: int, each: int) -> bytes:
    """An observation with ``lists`` lists of ``each`` empty lists; with one, a single long list."""
    inner = b"\xdd" + each.to_bytes(4, "big") + b"\x90" * each
    content = inner if lists == 1 else b"\xdd" + lists.to_bytes(4, "big") + inner * lists
    return b"\x82\xa4type\xabobservation\xa7payload\x81\xa1x" + content


ATTACKS = {
    "16 million empty lists": lambda: empties(1, 16_000_000),
    "16 million empty lists in lists of 10,000": lambda: empties(1600, 10_000),
    "a type of 16 MB": lambda: pack("t" * 16_000_000, {}),
    "120 black PNGs of 2,896 x 2,896 pixels": lambda: pack(
        "observation", seen(images={f"{k}": picture for picture in [png(2896)] for k in range(120)})
    ),
    "one PNG of 2,048 x 2,048 pixels": lambda: pack("observation", seen(images={"agentview": png(2048)})),
    "an instruction of 15 MB": lambda: pack("observation", seen(task_description="pick " * 3_000_000)),
    "an instruction of 65,000 characters": lambda: pack("observation", seen(task_description="pick " * 13_000)),
    "a state of 15 MB": lambda: pack("observation", seen(states=np.zeros(3_900_000, np.float32))),
}
"""Frames within the size limit, each sent again as soon as it was answered."""


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a server over a tiny VLA, in a process of its own."""
    line = [sys.executable, "-m", "spvla.serve", "--vla", "tests.test_serve:sharing", "--interface.state", "states"]
    line += ["--generator", "none", "--port", "0"]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = next(found[1] for said in process.stderr if (found := re.search(r"ready: ws://[\d.]+:(\d+)", said)))
        log = multiprocessing.get_context("fork").Process(target=process.stderr.read, daemon=True)
        log.start()  # its log is read, so that it never waits for somebody to read it
        try:
            yield f"ws://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)
            log.terminate()


def attack(url: str, frame: bytes, sent: Any) -> None:
    """Send the frame, read the answer, again without pause; ``sent`` counts."""
    while True:
        with contextlib.suppress(ConnectionClosed, OSError), connect(url, compression=None, max_size=None) as ws:
            ws.send(pack("episode_start", {"task": {"name": "x"}}))
            while True:
                ws.send(frame)
                ws.recv()
                sent.value += 1


def steps(url: str, seconds: float) -> np.ndarray:
    """Milliseconds of each step of a good client."""
    times = []
    with connect(url, compression=None, max_size=None) as ws:
        ws.send(pack("episode_start", {"task": {"name": "x"}}))
        frame = pack("observation", seen(), 7)
        end = time.perf_counter() + seconds
        due = time.perf_counter()
        while due < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            began = time.perf_counter()
            ws.send(frame)
            answer = msgpack.unpackb(ws.recv(timeout=60))
            times.append(1e3 * (time.perf_counter() - began))
            assert answer["type"] == "action" and answer["seq"] == 7, answer
            due = max(due + 1 / RATE, time.perf_counter())
    return np.array(times)


def beside_attacks(seconds: float) -> dict[str, Any]:
    """The good client's times in turn alone and beside each attack; a row for each attack."""
    fork = multiprocessing.get_context("fork")
    alone, rows = [], []
    with serving() as url:
        steps(url, 1.0)
        for name, frame in ATTACKS.items():
            alone.append(steps(url, seconds))
            sent = fork.Value("q", 0)
            attacker = fork.Process(target=attack, args=(url, frame(), sent), daemon=True)
            attacker.start()
            while not sent.value and attacker.is_alive():
                time.sleep(0.01)
            began = sent.value
            beside = steps(url, seconds)
            rows.append({"attack": name, "answered": sent.value - began, **quantiles(beside)})
            attacker.terminate()
            attacker.join()
    baseline = quantiles(np.concatenate(alone))
    factor, slowest = LIMITS.values()
    for row in rows:
        row["in_p99_alone"] = round(row["p99_ms"] / baseline["p99_ms"], 2)
        row["within"] = bool(row["in_p99_alone"] <= factor and row["slowest_ms"] < slowest)
    return {"rate": RATE, "seconds": seconds, "alone": baseline, "rows": rows}


def quantiles(times: np.ndarray) -> dict[str, Any]:
    p50, p99 = np.quantile(times, (0.5, 0.99))
    return {"steps": len(times)} | {
        name: round(float(ms), 2) for name, ms in (("p50_ms", p50), ("p99_ms", p99), ("slowest_ms", times.max()))
    }
