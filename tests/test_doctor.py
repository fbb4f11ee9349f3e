"""explain and the doctor: an acceleration that does not do what it says is found, with the reason."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import spvla.doctor.__main__ as program
from examples.robot_loop import SimulatedArm, ToyVLA
from spvla import InputError, Observation, SPVLAPolicy, accelerate, explain, save_export
from spvla.actions import LIBERO
from spvla.cli import run as run_command
from spvla.doctor import Sample, examine
from spvla.gates.base import Decisions
from spvla.generators.ridge import LastActionGenerator
from spvla.history import Source
from spvla.judgement import Acted
from spvla.ledger import Ledger
from spvla.pruning import make_pruner
from spvla.realtime import BridgePolicy
from spvla.shadow import ShadowPolicy
from spvla.steps import StepInfo
from spvla.store import Episode, RolloutWriter
from spvla.vlas.base import VLAOutput
from spvla.vlas.conventions import encode_jpeg
from tests.conftest import PrunableVLA, ScriptedVLA
from tests.test_export import make_export
from tests.test_policy import Always, Fixed


def toy() -> ToyVLA:
    return ToyVLA(0.0)


def journey(steps: int = 12, turn=lambda image: image, start=(0.3, -0.2, 0.3)) -> Sample:
    """A simulated arm on its way, its camera mounted as ``turn`` says; the labels are of the upright images."""
    arm, vla = SimulatedArm(), toy()
    arm.position = np.array(start)
    seen, labels = [], []
    for _ in range(steps):
        image, state = arm.image(), arm.state()
        labels.append(vla.predict(Observation(image, state)).actions[0])
        seen.append(Observation(np.ascontiguousarray(turn(image)), state))
        arm.send(0.3 * labels[-1])
    return Sample("go to the middle", seen, labels=np.array(labels))


def found(report, check):
    return next(f for f in report.findings if f.check == check)


class Never:
    """A gate that leaves every step to the VLA."""

    history_length = 1

    def decide(self, window, proposals):
        return Decisions(np.array([False]), np.array(["never"]), np.array([0.9]))


def healthy():
    return SPVLAPolicy(toy(), LastActionGenerator(LIBERO), Always(), max_generated_run=3)


def test_a_healthy_policy_passes_and_its_calls_are_counted_at_the_vla():
    policy = healthy()
    report = examine(policy, [journey(), journey(start=(-0.3, 0.2, 0.3))])
    assert not report.failures and {f.check: f.verdict for f in report.findings if f.check != "latency"} == {
        "unchanged": "ok",
        "actions": "ok",
        "images": "ok",
        "calibration": "ok",
        "calls": "ok",
        "pruning": "ok",
    }
    assert policy.ledger.calls == 6 and policy.ledger.generated == 18, "VGGG in each of twice twelve steps"


@pytest.mark.parametrize("turn", [lambda i: i[::-1, ::-1], lambda i: i[::-1]], ids=["turned", "flipped"])
def test_images_that_are_not_upright(turn):
    finding = found(examine(healthy(), [journey(turn=turn)]), "images")
    assert (finding.verdict, finding.code) == ("failed", "image-orientation")


def test_a_vla_that_does_not_look_is_noticed():
    sample = journey()
    blind = ScriptedVLA(np.tile([0.1, 0.2, 0, 0, 0, 0, -1], (4, 1)))
    assert found(examine(SPVLAPolicy(blind), [sample]), "images").code == "ignores-images"
    bare = Sample("go", [Observation(state=o.state) for o in sample.observations])
    assert found(examine(SPVLAPolicy(blind), [bare]), "images").verdict == "unknown"


@pytest.mark.parametrize(
    ("generator", "gate", "code"),
    [
        (LastActionGenerator(LIBERO), Never(), "gate-never-opens"),
        (Fixed(np.full(7, 1.5)), Always(), "called-every-step"),
    ],
)
def test_a_vla_that_is_called_in_every_step(generator, gate, code):
    report = examine(SPVLAPolicy(toy(), generator, gate), [journey()])
    assert [f.code for f in report.failures] == [code]
    with pytest.raises(InputError) as caught:
        report.require()
    assert (caught.value.code, caught.value.field) == (code, "calls")


class Replayed(SPVLAPolicy):
    """Plays its first answers back, whatever it sees, and books a call each time."""

    kept: VLAOutput | None = None
    real = 1

    def _ask(self, proposal, observation, times):
        if self.real:
            self.real -= 1
            acted = super()._ask(proposal, observation, times)
            self.kept = acted.output
            return acted
        self._queue.clear()
        return Acted(self.kept.actions[0], Source.VLA, self.kept)


def test_a_policy_that_books_calls_that_never_were():
    policy = Replayed(toy(), LastActionGenerator(LIBERO), Always(), max_generated_run=2)
    report = examine(policy, [journey()])
    assert policy.stats()["vla_calls"] == 4 and policy.ledger.calls == 1
    assert [f.code for f in report.failures] == ["miscounted"]
    policy.real, policy.kept = 0, VLAOutput(np.zeros((1, 7), np.float32))
    assert [f.code for f in examine(policy, [journey()]).failures] == ["never-called"]


def test_pruning_that_keeps_everything():
    class Keeping(PrunableVLA):
        def predict(self, observation, keep_mass=1.0):
            return replace(super().predict(observation), visual_tokens=(256, 256))

        def with_pruner(self, pruner):
            twin = Keeping(self.actions, self.action_space)
            twin.pruner, twin.asked = pruner, []
            return twin

    actions = np.tile([0.3, 0.2, 0, 0, 0, 0, -1], (20, 1))
    sample = Sample("go", journey().observations)
    for made, code in ((Keeping, "prunes-nothing"), (PrunableVLA, None)):
        policy = SPVLAPolicy(made(actions), pruner=make_pruner({"speed": "constant", "keep": 0.5}))
        assert found(examine(policy, [sample]), "pruning").code == code
        assert explain(policy)["pruning"].state == ("refused" if code else "active")


def test_an_export_of_another_robot():
    far = [Observation(state=np.array([900.0, 0, -700.0], np.float32)) for _ in range(12)]
    policy = accelerate(ScriptedVLA(np.zeros((5, 7))), make_export(), 0.3)
    report = examine(policy, [Sample("go", far)])
    assert "unfamiliar-states" in [f.code for f in report.failures]
    near = [Observation(state=np.zeros(3, np.float32)) for _ in range(12)]
    degrees = examine(accelerate(ScriptedVLA(np.full((5, 7), 30.0)), make_export(), 0.3), [Sample("go", near)])
    assert degrees.failures[0].code == "other-units"
    half_open = examine(SPVLAPolicy(ScriptedVLA(np.zeros((5, 7)))), [Sample("go", near)])
    assert [f.code for f in half_open.failures] == ["gripper"]


def test_a_vla_that_keeps_a_state_between_calls():
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 7))
    counting = found(examine(SPVLAPolicy(ScriptedVLA(actions)), [journey()]), "unchanged")  # a phase since its reset
    assert (counting.verdict, counting.code) == ("failed", "changed-actions")

    class Drifting(ScriptedVLA):
        def reset(self, instruction):
            pass

    drifting = found(examine(SPVLAPolicy(Drifting(actions)), [journey()]), "unchanged")
    assert (drifting.verdict, drifting.code) == ("warning", "answers-differ")


def test_a_vla_that_samples_is_compared_from_one_seed():
    class Sampling(ToyVLA):
        def predict(self, observation, keep_mass=1.0):
            output = super().predict(observation)
            return VLAOutput(output.actions + 0.01 * torch.randn(1, 7).numpy())

    report = examine(SPVLAPolicy(Sampling(0.0), LastActionGenerator(LIBERO), Always(), max_generated_run=3), [journey()])
    assert found(report, "unchanged").verdict == "ok"


def test_a_live_gate_learns_nothing_from_the_doctor():
    policy = accelerate(ScriptedVLA(np.zeros((5, 7))), make_export(), 0.3, gate="live")
    before = policy.live.to_dict()
    examine(policy, [Sample("go", [Observation(state=np.zeros(3, np.float32))] * 12)])
    assert policy.live.to_dict() == before and policy.ledger.steps == 12


def test_what_cannot_be_examined():
    for policy, samples, code in (
        (healthy(), [], "no-observations"),
        (BridgePolicy(toy(), LastActionGenerator(LIBERO), Always()), [journey()], "unsupported"),
    ):
        with pytest.raises(InputError) as caught:
            examine(policy, samples)
        assert caught.value.code == code


# ------------------------------------------------------------------------------------------------------------- explain


def test_explain_says_which_part_is_what():
    vla = ScriptedVLA(np.zeros((50, 7)))
    policy = accelerate(vla, make_export(), 0.3)
    told = explain(policy)
    assert (told["state"].state, told["noise"].state, told["pruning"].state) == ("unknown", "unknown", "off")
    policy.reset("go")
    for _ in range(10):
        policy.select_action(Observation(state=np.zeros(3, np.float32)))
    told = explain(policy, Observation(state=np.zeros(3, np.float32)))
    assert told.calls == policy.stats()["vla_calls"] and told.steps == 10, "the two questions about noise are no step's"
    assert told["noise"].state == "active" and told["state"].state == "active"
    assert json.loads(json.dumps(told.to_dict()))["parts"]["gate"]["state"] == told["gate"].state
    strict = accelerate(vla, make_export(), 0.3)
    strict.gate = replace(strict.gate, threshold=-1.0)  # as at a risk below every bound of the curve
    assert explain(strict)["gate"].state == "refused"
    off = explain(accelerate(vla, make_export(), generator="none"))
    assert {off[n].state for n in ("generator", "gate", "live", "pruning")} == {"off"}


def test_a_gate_that_never_opens_and_a_shadow_are_limited():
    for made, gate in ((SPVLAPolicy, Never()), (ShadowPolicy, Always())):
        policy = made(toy(), LastActionGenerator(LIBERO), gate)
        policy.reset("go")
        for observation in journey(20).observations:
            policy.select_action(observation)
        told = explain(policy)
        assert told["generator"].state == "limited" and told.calls == 20
        assert told["calls"].state == "limited"


@pytest.mark.parametrize(
    ("source", "own", "level"),
    [(Source.VLA, 1.0, logging.WARNING), (Source.GENERATOR, 200.0, logging.WARNING), (Source.GENERATOR, 1.0, logging.INFO)],
    ids=["never skips", "slower", "faster"],
)
def test_an_accelerated_policy_says_once_what_it_gains(source, own, level, caplog):
    caplog.set_level(logging.INFO, "spvla")
    ledger = Ledger()
    ledger.announce = True
    for step in range(50):
        called = step == 0 or source == Source.VLA
        ledger.calls += called
        ledger.milliseconds.extend([90.0] * called)
        times = {"total": own + 90.0 * called} | ({"vla": 90.0} if called else {})
        ledger.took(StepInfo(source, False, "decided", called_vla=called, milliseconds=times), waits=True)
    (record,) = [r for r in caplog.records if r.name == "spvla"]
    assert record.levelno == level
    if level == logging.INFO:
        assert "VLA alone 90.0 ms" in record.getMessage() and "accelerated 5.5 ms" in record.getMessage()


def test_only_what_is_accelerated_says_so():
    announced = {g: accelerate(toy(), generator=g, gate="tests.test_doctor:Open").ledger.announce for g in ("last", "none")}
    assert announced == {"last": True, "none": False}


class Open(Always):
    def __init__(self, space):
        pass


# ------------------------------------------------------------------------------------------------------------- command


def store_of(folder, *samples: Sample):
    writer = RolloutWriter(folder, LIBERO, policy="toy")
    for i, sample in enumerate(samples):
        steps = len(sample.observations)
        episode = Episode(
            sample.labels,
            sample.instruction,
            np.arange(steps) / 20,
            states=np.array([o.state for o in sample.observations]),
            sources=np.zeros(steps, np.uint8),
            vla_actions=sample.labels,
            images={"image": [encode_jpeg(o.image) for o in sample.observations]},
        )
        writer.write(f"job-{i}", [episode])
    return str(writer.finalize())


def load_toy(checkpoint=None):
    return toy()


def command(*arguments):
    options = ["--vla", "tests.test_doctor:load_toy", "--generator", "last", "--gate", "tests.test_doctor:Open", *arguments]
    return run_command(program.doctor, "", options, prog="doctor")


def test_the_command_ends_with_the_reason(tmp_path, capsys):
    good, bad = (store_of(tmp_path / name, journey(turn=turn)) for name, turn in (("a", lambda i: i), ("b", lambda i: i[::-1])))
    assert command("--data", good, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {f["check"] for f in told["findings"]} >= {"unchanged", "images", "calls"} and told["parts"]["generator"]
    assert command("--data", bad) == 2
    printed = capsys.readouterr()
    assert "failed" in printed.out and printed.err.count("\n") == 1


def test_the_command_refuses_an_export_of_another_robot(tmp_path, capsys):
    export = make_export()
    other = replace(export, space=replace(export.space, kind="eef_absolute"))
    folder = save_export(other, tmp_path / "other")
    data = store_of(tmp_path / "data", journey())
    assert command("--data", data, "--export", str(folder)) == 2
    assert "eef_absolute" in capsys.readouterr().err
