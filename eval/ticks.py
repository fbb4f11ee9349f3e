"""Does a policy that never waits keep the beat, whatever its VLA does? ``python -m eval ticks``."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.latency import smooth_motion
from eval.output import table, write_summary
from spvla.assemble import accelerate
from spvla.cli import NonNegativeInt, PositiveFloat, PositiveInt
from spvla.export import load_export
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput, VLAUnavailable

MOODS = (*(12 * ("answers",)), "late", *(4 * ("answers",)), "away", *(4 * ("answers",)), "hangs")
WARM_UP = 2.0  # seconds


class MoodyVLA:
    """A VLA in its thread that answers, is late, cannot be asked or hangs, in turn.

    Args:
        export: whose action space it acts in.
        seconds: that an answer takes; late ones take four times as long, and it hangs for ten.
        seed: of its actions.
    """

    needs_images = False

    def __init__(self, export: Any, seconds: float, seed: int) -> None:
        self.action_space = export.space
        self.seconds = seconds
        self.actions, _ = smooth_motion(export, 2000, seed)
        self.moods = cycle(MOODS)
        self.calls = dict.fromkeys(MOODS, 0)
        self._over = threading.Event()

    def reset(self, instruction: str) -> None:
        """Start an episode."""

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """An action, or not."""
        mood = next(self.moods)
        self.calls[mood] += 1
        self._over.wait(self.seconds * {"late": 4.0, "away": 0.1, "hangs": 10.0}.get(mood, 1.0))
        if mood == "away":
            raise VLAUnavailable("away")
        return VLAOutput(self.actions[sum(self.calls.values()) % len(self.actions)][None])

    def close(self) -> None:
        """Answer at once from now on."""
        self._over.set()


def ticks(
    output: Path,
    export: str = "generator_libero_expert",
    rates: list[PositiveFloat] = [20.0, 50.0],  # noqa: B006
    ticks: PositiveInt = 20000,
    vla_ms: PositiveFloat = 240.0,
    risk: float | None = None,
    seed: NonNegativeInt = 0,
) -> None:
    """Run a control loop at fixed rates around a policy that never waits, and measure how late its actions are.

    The VLA, in its thread, answers after vla_ms; now and then it is four times as late, not available, or hangs. It only
    sleeps: a VLA that computes on the same processor cores takes them from the loop.

    Args:
        output: folder for summary.json.
        export: exported folder.
        rates: of the loop, ticks per second.
        ticks: at each rate, after two seconds of warm-up.
        vla_ms: milliseconds of an answer.
        risk: the one knob; the export's default if omitted.
        seed: of the motion.
    """
    from tqdm import tqdm

    torch.set_num_threads(1)
    loaded = load_export(export)
    load = os.getloadavg()[0]
    rows = []
    for rate in rates:
        vla = MoodyVLA(loaded, vla_ms / 1e3, seed)
        space = replace(loaded.space, control_rate=rate)
        vla.action_space = space
        policy = accelerate(vla, replace(loaded, space=space), risk, mode="bridge")
        states = smooth_motion(loaded, ticks, seed)[1]
        policy.reset("go on")
        period, warm_up = 1 / rate, int(WARM_UP * rate)
        late, took = np.zeros(ticks + warm_up), np.zeros(ticks + warm_up)
        start = time.monotonic()
        for i in tqdm(range(ticks + warm_up), f"{rate:g} Hz", unit="tick"):
            due = start + i * period
            time.sleep(max(0.0, due - time.monotonic()))
            state, began = states[i % len(states)], time.monotonic()
            policy.tick(lambda s=state: Observation(state=s), state)  # type: ignore[misc]
            done = time.monotonic()
            took[i], late[i] = done - began, done - due
        vla.close()
        late, took = 1e3 * late[warm_up:], 1e3 * took[warm_up:]
        found = {
            f"{name}_ms_p{q:g}": float(np.percentile(x, q))
            for name, x in (("tick", took), ("late", late))
            for q in (50, 99, 99.9)
        }
        held = policy.stats()["held"]
        row = {"rate": rate, "ticks": ticks, **found, "tick_ms_max": float(took.max()), "late_ms_max": float(late.max())}
        rows.append(row | {"over_period": int((late > 1e3 * period).sum()), "held": int(held), "calls": dict(vla.calls)})
    output.mkdir(parents=True, exist_ok=True)
    path = write_summary(
        output, "ticks", rows, export=str(export), vla_ms=vla_ms, risk=risk, seed=seed, load_average_before=load
    )
    print(table(rows, [c for c in rows[0] if c != "calls"]))
    print(f"written: {path}; tick: from an action's request to the action; late: from the tick's time to the action")
