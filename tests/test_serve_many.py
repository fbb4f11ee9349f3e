"""One VLA for many robots: calls answered together, a deadline with a safe action, and what the server counts."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from typing import ClassVar

import numpy as np
import pytest

from spvla import InputError, Observation
from spvla.vlas.base import VLAOutput, VLAUnavailable
from spvla.vlas.registry import load_vla

pytest.importorskip("vla_eval")
pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed

from spvla.serve.server import PolicyServer
from spvla.serve.turns import InTurn, Turns
from tests.test_serve import Client, Sharing, obs, serving, wait_until  # noqa: F401

pytestmark = pytest.mark.slow


class Together(Sharing):
    """Answers many observations in one pass, when the test lets it; notes the passes."""

    passes: ClassVar[list[int]] = []
    allowed = threading.Semaphore(0)
    called = threading.Semaphore(0)

    def predict(self, observation, keep_mass=1.0):
        return self.predict_batch([observation], [self.instruction], keep_mass)[0]

    def predict_batch(self, observations, instructions, keep_mass=1.0):
        type(self).called.release()
        assert type(self).allowed.acquire(timeout=20)
        type(self).passes.append(len(observations))
        if "fail" in instructions:
            raise RuntimeError("no")
        out = []
        for seen, told in zip(observations, instructions, strict=True):
            mean = float(seen.require_image().mean()) / 255
            out.append(VLAOutput(np.float32([[mean, len(told) / 100, keep_mass, 0, 0, 0, 1]])))
        return out


@pytest.fixture
def together():
    Together.passes, Together.allowed, Together.called = [], threading.Semaphore(0), threading.Semaphore(0)
    yield Together
    Together.allowed.release(1000)


def make_together(checkpoint=None):
    return Together()


def image(value):
    return Observation(np.full((4, 4, 3), value, np.uint8))


def ask_in_order(vlas, observations, keep_masses=None, first_alone=True):
    """Each VLA asked in a thread of its own, the calls queued in this order: what they answered, or their errors.

    ``first_alone``: the first call is under way when the others come; else all of them wait before any is answered.
    """
    answers, turns, threads, hold = [None] * len(vlas), vlas[0].turns, [], threading.Event()
    if not first_alone:
        turns._worker.submit(hold.wait)

    def ask(k):
        try:
            answers[k] = vlas[k].predict(observations[k], keep_mass=(keep_masses or [1.0] * len(vlas))[k])
        except Exception as error:
            answers[k] = error

    for k in range(len(vlas)):
        threads.append(threading.Thread(target=ask, args=(k,)))
        threads[-1].start()
        if first_alone and k == 0:
            assert Together.called.acquire(timeout=20)
        else:
            wait_until(lambda waiting=k + (not first_alone): len(turns._waiting) == waiting)
    hold.set()
    if turns.deadline is None:
        Together.allowed.release(100)
    for thread in threads:
        thread.join(60)
    return answers


def in_turn(turns, instruction="go"):
    vla = InTurn(Together(), turns)
    vla.reset(instruction)
    return vla


def test_calls_that_wait_together_are_answered_in_one_pass_each_with_its_own_answer(together):
    turns = Turns(most=3)
    vlas = [in_turn(turns, "x" * (k + 1)) for k in range(6)]
    answers = ask_in_order(vlas, [image(10 * k) for k in range(6)])
    assert together.passes == [1, 3, 2]
    for k, answer in enumerate(answers):
        np.testing.assert_allclose(answer.actions[0, :2], [10 * k / 255, (k + 1) / 100], atol=1e-6)


def test_calls_that_keep_other_tokens_are_not_answered_together(together):
    turns = Turns(most=8)
    vlas = [in_turn(turns) for _ in range(5)]
    answers = ask_in_order(vlas, [image(0)] * 5, [1.0, 0.5, 1.0, 0.5, 1.0])
    assert together.passes == [1, 2, 2]
    assert [float(a.actions[0, 2]) for a in answers] == [1.0, 0.5, 1.0, 0.5, 1.0]


def test_where_a_pass_fails_each_call_fails_or_is_answered_alone(together):
    turns = Turns(most=8)
    vlas = [in_turn(turns, told) for told in ("go", "fail", "go")]
    answers = ask_in_order(vlas, [image(0)] * 3, first_alone=False)
    assert [type(a).__name__ for a in answers] == ["VLAOutput", "RuntimeError", "VLAOutput"]
    assert together.passes == [3, 1, 1, 1]


def test_a_call_that_is_late_is_given_up(together):
    turns = Turns(deadline=0.2)
    first, second = in_turn(turns), in_turn(turns)
    answers = ask_in_order([first, second], [image(0)] * 2)
    assert all(isinstance(a, VLAUnavailable) and "within the deadline of 0.2 s" in str(a) for a in answers)
    together.allowed.release(10)
    assert in_turn(Turns(deadline=20)).predict(image(0)).actions.shape == (1, 7)
    wait_until(lambda: len(together.passes) == 2)  # the one under way was finished; the one that waited was never begun
    assert together.passes == [1, 1] and turns.metrics.late._value.get() == 2


def test_the_packaged_vla_answers_together_as_it_does_alone():
    vla = load_vla("nano_vla")
    g = np.random.default_rng(0)
    seen = [Observation(g.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]
    told = ["pick up the milk", "pick up the milk and place it in the basket", "stop"]
    turns = Turns(most=3)
    vlas = []
    for instruction in told:
        vlas.append(InTurn(vla.with_pruner(None), turns))
        vlas[-1].reset(instruction)
    answers = ask_in_order(vlas, seen, first_alone=False)
    for answer, instruction, observation in zip(answers, told, seen, strict=True):
        vla.reset(instruction)
        alone = vla.predict(observation)
        np.testing.assert_array_equal(answer.tokens, alone.tokens)
        np.testing.assert_array_equal(answer.actions, alone.actions)
    assert turns.metrics.batch_size._sum.get() == 3 and "spvla_vla_seconds_count 1.0" in turns.metrics.text()


def families(port, token=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *s.labels.values()): s.value for s in samples if not s.name.endswith("_created")}


def test_the_metrics_are_what_the_clients_saw(serving):  # noqa: F811
    one = serving(generator="ridge", max_sessions=2)
    clients = [Client(one.url) for _ in range(2)]
    made = [client.ask(obs(t, "steady")).payload["source"] for t in range(10) for client in clients]
    clients[0].error({})
    with pytest.raises(ConnectionClosed, match="sessions are open"):
        Client(one.url).act(obs(0))
    found = families(one.port)
    calls = made.count("vla")
    assert 0 < calls < 20
    assert found["spvla_steps_total", "vla"] == calls and found["spvla_steps_total", "generator"] == 20 - calls
    assert found[("spvla_skips_total",)] == 20 - calls and found["spvla_steps_total", "held"] == 0
    assert found[("spvla_batch_size_sum",)] == found[("spvla_turn_seconds_count",)] == calls
    assert found[("spvla_answer_seconds_count",)] == 20 and found[("spvla_errors_total",)] == 1
    assert found[("spvla_sessions",)] == 2 and found[("spvla_episodes_total",)] == 2
    assert found["spvla_refused_total", "sessions"] == 1


def test_a_live_gates_audits_are_counted(serving):  # noqa: F811
    client = Client((one := serving(export="generator_libero_expert", generator="mlp", gate="live")).url)
    steps = [client.ask({**obs(t, "steady"), "states": np.zeros(8, np.float32)}).payload for t in range(60)]
    audits = sum(step["reason"] == "audit" for step in steps)
    assert families(one.port)[("spvla_audits_total",)] == audits


def test_metrics_want_the_token_where_there_is_one(serving):  # noqa: F811
    token = "a-token-of-the-right-length"
    one = serving(limits={"token": token})
    with pytest.raises(urllib.error.HTTPError) as refused:
        families(one.port)
    assert refused.value.code == 401 and b"token is missing" in refused.value.read()
    assert families(one.port, token)["spvla_refused_total", "token"] == 1
    with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/health") as answer:
        assert answer.status == 200


@pytest.mark.parametrize("when_late", ["stop", "hold"])
def test_a_robot_whose_vla_is_late_gets_the_safe_action_in_time(serving, together, when_late):  # noqa: F811
    policy = "tests.test_serve_many:make_together"
    one = serving(policy, generator="none", gate=None, deadline=0.3, when_late=when_late)
    client = Client(one.url)
    assert "the VLA did not answer within the deadline of 0.3 s" in client.error(obs(0)), "nothing is known to be safe yet"
    together.allowed.release(2)  # for the call given up, and for this one
    first = client.act(obs(0))
    late = client.ask(obs(1)).payload
    want = first if when_late == "hold" else np.float32([0, 0, 0, 0, 0, 0, first[6]])
    np.testing.assert_array_equal(late["actions"], want)
    assert late["source"] == "held" and late["reason"] == "unavailable"
    together.allowed.release(10)
    assert client.ask(obs(2)).payload["source"] == "vla", "it is asked again"
    assert families(one.port)[("spvla_late_total",)] == 2


def test_options_that_cannot_be_kept_are_refused():
    for options, message in (
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"deadline": 0.0}, "deadline must be positive"),
        ({"deadline": 0.1, "mode": "bridge"}, "never waits for the VLA; leave it out"),
        ({"deadline": 0.1, "when_late": "panic"}, "'panic' is not one of raise, stop, hold, generator"),
    ):
        with pytest.raises(InputError, match=message):
            PolicyServer("tests.test_serve:sharing", generator="last", gate="release", **options)
