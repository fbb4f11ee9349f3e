"""Every cell of generator x gate x pruning in the simulator, paired: ``python -m eval closed_loop``.

All cells run the same tasks, initial states and seeds. Success is counted over workers in parallel; policy time is taken
afterwards in one uncontended process with one thread.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.envs import load_tasks, simulator, stamp
from data.envs.base import RenderMode
from data.envs.perturb import Nudge, RealTime
from data.jobs import Group
from data.parallel import Workers
from eval.cells import default_cells, parse_cells
from eval.lerobot_info import write_eval_info
from eval.output import append, continued, table, write_csv, write_summary
from eval.run import Evaluation, Facts, Job, belonging, groups_of, in_turn, load_runner, starts_of
from eval.summary import Row, by_task, columns_of, summarise, write_traces
from eval.timing import measure_time
from spvla.cli import NonNegativeFloat, NonNegativeInt, PositiveInt
from spvla.errors import InputError
from spvla.export import fingerprint, load_export
from spvla.files import locked, write_text
from spvla.gates.floor import NoiseFloor
from spvla.vlas.registry import VLASource


def closed_loop(
    suite: str,
    output: Path,
    vla: str = "expert",
    checkpoint: str | None = None,
    vla_options: dict[str, Any] = {},  # noqa: B006
    export: str | None = None,
    tasks: list[int | str] | None = None,
    init_states: str | None = "30-49",
    random_resets: NonNegativeInt = 0,
    cells: list[str] | None = None,
    risk: list[float] | None = None,
    rules: dict[str, dict[str, int | float]] = {},  # noqa: B006
    pruning: dict[str, dict[str, Any]] = {},  # noqa: B006
    max_generated_run: PositiveInt | None = None,
    max_steps: PositiveInt | None = None,
    label: bool = True,
    real_time: bool = False,
    vla_ms: NonNegativeFloat | None = None,
    hold: Literal["stop", "last"] = "stop",
    mode: Literal["wait", "bridge"] = "wait",
    nudge: NonNegativeFloat = 0.0,
    render: RenderMode = "full",
    films: bool = True,
    rerun: bool = False,
    timing_episodes: NonNegativeInt = 5,
    workers: PositiveInt = 2,
    seed: NonNegativeInt = 0,
) -> None:
    """Evaluate cells of generator x gate x pruning in closed loop, paired against the VLA alone.

    The VLA alone executes its plans whole. What is kept of a plan beside that (plan@4, pace, or a gate that decides about
    plans) counts as made without a fresh look: it deviates where a fresh plan would have begun with another action.

    Stopped, it continues where it was when called again with the same output. With another export there, only the cells
    that use it run anew. All episodes of a cell with a live gate are one deployment: its tasks one after another, in one
    worker, whatever the number of workers.

    Args:
        suite: the simulator's suite of tasks, for example libero_object, or a YAML file that describes a Gymnasium environment.
        output: folder for summary.json, episodes.csv.gz, tasks.txt (successes by task), traces, timing, and eval_info.json in
            LeRobot's form.
        vla: the VLA: nano_vla, openvla, lerobot, remote, expert (scripted, sees poses), an entry point of spvla.vlas, or
            package.module:factory.
        checkpoint: the VLA's folder or hf://owner/name.
        vla_options: the VLA's other options, for openvla such as {dtype: bfloat16} (see spvla.vlas.openvla.load).
        export: exported folder; needed by learned cells.
        tasks: task indices or names; all if omitted.
        init_states: the suite's fixed initial states; 30-49 are for evaluation; null for none.
        random_resets: seeded random resets of each task, beside them.
        cells: what to compare with the VLA alone: generator+gate, generator+gate+pruning or vla+pruning; a risk
            of its own goes last, as in mlp+learned+half_dual@0.05; plan@4 executes four actions of each plan, pace plans again
            where the plan is slow, reuse repeats an action that hardly changes. If omitted: ridge+release where the robot moves
            in three translations, and the export's default generator under the learned gate.
        risk: allowed risks at which learned gates are evaluated; the export's default if omitted.
        rules: constants of the hand-set rules, by rule.
        pruning: prunings by name, fields as spvla.pruning.make_pruner takes; fast_fewer and slow_fewer need no entry.
        max_generated_run: longest run of generated actions; the export's default if omitted.
        max_steps: step limit of an episode; the suite's if omitted.
        label: ask the VLA for its action on generated steps too, outside the policy's time, to measure deviation.
        real_time: the simulated world moves on while the policy thinks, at the robot's control rate.
        vla_ms: real time: milliseconds of a step that asks the VLA, such as 240 for OpenVLA on an RTX 4090; as measured if
            omitted.
        hold: real time: what the robot does while it waits: stop, or repeat the last action.
        mode: real time: wait for the VLA where it is asked, or bridge: the generator acts while the VLA thinks. A cell may have
            its own, as in mlp+learned:bridge@0.2; vla:paused is the VLA without latency, and what others are paired with.
        nudge: metres by which the asked object is moved while the hand is on its way; 0: not at all.
        render: full draws everything for each image; fast draws what stands still once an episode, takes half the time, and
            differs at the edges of what moves.
        films: where the policy sees images, film the first episode of every cell (not in real time).
        rerun: log the first episode of every cell for Rerun, into OUTPUT/rerun/CELL.rrd (needs rerun-sdk).
        timing_episodes: episodes for the timing after the success cells, the tasks in turn; 0 skips it.
        workers: processes, one thread each.
        seed: of resets.
    """
    for name, value, unset in (("vla_ms", vla_ms, None), ("hold", hold, "stop"), ("mode", mode, "wait")):
        if value != unset and not real_time:
            raise InputError(f"{name}: applies in real time only; add --real_time true", field=name)
    setting = Evaluation(
        source=VLASource(vla, checkpoint, vla_options, suite),
        export=export,
        rules=dict(rules),
        pruning=dict(pruning) or None,
        max_generated_run=max_generated_run,
        max_steps=max_steps,
        label=label,
        real_time=RealTime(vla_ms, hold, mode) if real_time else None,
        nudge=Nudge(nudge) if nudge else None,
        render=render,
        environment=stamp(suite),
    )
    loaded = load_export(export) if export else None
    default_risk = None if loaded is None else float(loaded.defaults["risk"])
    cells = default_cells(simulator(suite).action_space, loaded) if cells is None else cells
    wanted = parse_cells(cells, risk or [default_risk])
    setting.check(wanted)
    starts = starts_of(load_tasks(suite, tasks, max_steps), init_states, random_resets, seed)
    content = fingerprint(export)
    raw = output / "episodes.jsonl"
    with locked(output):
        with Workers[tuple[Group[Job], ...], Row, Facts](partial(load_runner, setting, wanted), workers) as pool:
            facts = pool.facts()
            films = films and facts.needs_images and not real_time
            fixed = {"suite": next(iter(starts)).suite, "seed": seed, "weights": facts.weights, **setting.facts()}
            del fixed["export"]  # cells that use no export are the same with another one
            done = continued(raw, output / "setting.json", fixed)
            done = [e for e in done if e["generator"] == "none" or e["export"] == content]
            shown = [output / name if asked else None for name, asked in (("films", films), ("rerun", rerun))]
            groups = groups_of(starts, wanted, done, workers, *shown)
            total, left = len(wanted) * sum(map(len, starts.values())), sum(len(g.jobs) for part in groups for g in part)
            from tqdm import tqdm

            for row in tqdm(pool.run(groups), f"closed loop {suite}", total, initial=total - left, unit="episode"):
                append(raw, row)
                done.append(row)
        timing: dict[str, dict[str, float]] = {}
        beside: dict[str, Any] = {}
        if timing_episodes:
            beside = {"load_average_before": os.getloadavg()[0]}  # timings taken beside other work say little
            timing, timed = measure_time(wanted, in_turn(starts)[:timing_episodes], setting)
            write_csv(output / "timing.csv.gz", timed)
        mine = belonging(done, wanted, starts)
        rows = summarise(mine, timing)
        write_csv(
            output / "episodes.csv.gz",
            [{k: v for k, v in e.items() if k not in ("trace", "kept_tokens", "live")} for e in mine],
        )
        write_traces(output / "traces.json.gz", mine)
        write_eval_info(output, mine)
        what = {"init_states": init_states, "random_resets": random_resets, "tasks": [t.name for t in starts], **fixed}
        floor = None if loaded is None else NoiseFloor.of(loaded.provenance)
        what |= {} if floor is None else {"noise_floor": floor.to_dict()}
        path = write_summary(output, "closed_loop", rows, export=content, **what, timing_episodes=timing_episodes, **beside)
        text = table(rows, columns_of(rows, real_time=real_time, nudge=bool(nudge)))
        write_text(output / "table.txt", text + "\n")
        tasks_table = by_task(mine)
        write_text(output / "tasks.txt", table(tasks_table, list(tasks_table[0])) + "\n")
        print(text)
        print(
            f"written: {path} and, beside it, episodes.csv.gz, traces.json.gz, {{table,tasks}}.txt{', films' if films else ''}"
        )
