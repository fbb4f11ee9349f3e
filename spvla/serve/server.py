"""The accelerated policy as a `vla-eval <https://github.com/allenai/vla-evaluation-harness>`_ model server.

    python -m spvla.serve --vla openvla --checkpoint PATH --export EXPORT --risk 0.05 --config configs/serve/libero.yaml

Each session (one WebSocket connection) has a joint policy of its own around one set of VLA weights. Calls of the VLA take
turns (:mod:`spvla.serve.turns`), and an intuitive step of one session never waits for another's call. A session may also ask
for the VLA itself, with all it reports: that is how :class:`~spvla.vlas.remote.RemoteVLA` runs generator and gate on a robot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import anyio.to_thread
import numpy as np
from vla_eval import specs
from vla_eval.model_servers.base import ModelServer, SessionContext

from spvla.assemble import accelerate
from spvla.errors import InputError
from spvla.export import load_export
from spvla.fields import naming
from spvla.history import ActionHistory
from spvla.policy import SPVLAPolicy
from spvla.pruning.pruner import make_pruner
from spvla.realtime import BridgePolicy, ThreadedCalls
from spvla.serve.interface import Interface
from spvla.serve.metrics import Metrics
from spvla.serve.turns import InTurn, Turns
from spvla.vlas.base import VLA, PrunableVLA, VLAUnavailable
from spvla.vlas.registry import VLASource
from spvla.wire import shorten

MAX_INSTRUCTION = 2000  # characters
LONGEST_DEADLINE = 3600.0  # seconds


@dataclass
class _Session:
    """One connection's episode: with a joint policy, or with the VLA itself (``plain``)."""

    policy: SPVLAPolicy
    vla: VLA
    plain: InTurn | None = None
    instruction: str | None = None
    spoiled: bool = False  # something unforeseen happened in it: it is not used again


class PolicyServer(ModelServer):
    """Joint policies for any number of sessions over one VLA.

    Args:
        vla, checkpoint, vla_options, suite: which VLA, as for :func:`~spvla.vlas.registry.load_vla`. One that can share
            its weights (``with_pruner``) does so between sessions; another one is loaded once per session at a time.
        export: folder or hf://owner/name of the export; None for built-in generators and rules.
        risk, generator, gate, pruning, mode: as for :func:`~spvla.accelerate`.
        interface: the benchmark's conventions.
        max_batch: calls of different sessions that one pass of the VLA may answer, if it can; 1: one at a time.
        deadline: seconds within which the VLA must answer, the wait for its turn included; None: any time.
        when_late: what a session does where it has not: ``stop``, ``hold`` or ``generator``, see ``when_unavailable`` of
            :func:`~spvla.accelerate`. An episode's first step, before which no action is known to be safe, is an error then.
    """

    def __init__(
        self,
        vla: str,
        checkpoint: str | None = None,
        export: str | None = None,
        risk: float | None = None,
        *,
        vla_options: dict[str, Any] | None = None,
        suite: str | None = None,
        generator: str | None = None,
        gate: str | None = None,
        pruning: Any = None,
        mode: str = "wait",
        interface: Interface | None = None,
        max_batch: int = 8,
        deadline: float | None = None,
        when_late: str = "stop",
    ) -> None:
        if max_batch < 1:
            raise InputError(f"max_batch must be at least 1, got {max_batch}", field="max_batch")
        if deadline is not None and mode == "bridge":
            raise InputError("deadline: a server in mode bridge never waits for the VLA; leave it out", field="deadline")
        if deadline is not None and not 0 < deadline < LONGEST_DEADLINE:
            raise InputError(f"deadline must be positive and below {LONGEST_DEADLINE:g} s, got {deadline}", field="deadline")
        self.interface = interface or Interface()
        self._source = VLASource(vla, checkpoint, vla_options, suite)
        self.identity = {"model": f"{vla} {checkpoint or ''}".strip(), "statistics_key": (vla_options or {}).get("unnorm_key")}
        self._vla = self._source.load()
        self._export = None if export is None else load_export(export)
        self._parts = {"risk": risk, "generator": generator, "gate": gate, "pruning": pruning, "mode": mode}
        if deadline is not None:
            self._parts["when_unavailable"] = when_late
        self.metrics = Metrics()
        self._turns = Turns(max_batch, deadline, self.metrics)
        self._sessions: WeakKeyDictionary[SessionContext, _Session] = WeakKeyDictionary()
        self._spare = [self._make(first=True)]  # made now, so that mismatches are reported before anyone connects
        self.space = self._vla.action_space
        if self.interface.state is None:
            self._require_no_state(self._spare[0].policy)

    @staticmethod
    def _require_no_state(policy: SPVLAPolicy) -> None:
        """Raise :class:`InputError` if generator or gate read the state, which this interface does not pass on."""
        if policy.generator is None or policy.gate is None:
            return
        own = policy.history
        history = ActionHistory(policy.space, own.length, own.plans, own.errors)
        history.observe(None)
        with naming("interface.state is not given, though the generator or its gate needs it"):
            window = history.window()
            policy.gate.decide(window, policy.generator.propose(window)[:, 0])

    def _make(self, first: bool = False) -> _Session:
        # A VLA that cannot share its weights serves the first session itself; further ones load their own.
        vla = self._vla if first and not isinstance(self._vla, PrunableVLA) else self._source.second(self._vla)
        policy = accelerate(vla, self._export, **self._parts)
        assert isinstance(policy, SPVLAPolicy), "a server records nothing"
        policy.vla = InTurn(policy.vla, self._turns, None if policy.pruner is None else policy.pruner.selector)
        if isinstance(policy, BridgePolicy):
            policy.calls = ThreadedCalls(policy.ledger.counted(policy.vla))
        return _Session(policy, vla)

    def get_action_spec(self) -> dict[str, specs.DimSpec]:
        """vla-eval's spec per action component."""
        return {name: getattr(specs, spec) for name, spec in self.interface.action_spec.items()}

    def get_observation_spec(self) -> dict[str, specs.DimSpec]:
        """vla-eval's spec per observation component; image sizes are in the description."""
        out = {name: getattr(specs, spec) for name, spec in self.interface.observation_spec.items()}
        size = self.interface.image_size
        for name in (self.interface.image, self.interface.wrist_image, *self.interface.cameras.values()):
            if size is not None and name in out:
                out[name] = replace(out[name], description=f"{size[0]} x {size[1]}")
        return out

    def get_observation_params(self) -> dict[str, Any]:
        """The arguments for the benchmark's constructor."""
        return dict(self.interface.benchmark)

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Begin an episode. ``config["vla"]``: serve the VLA itself; ``config["pruning"]``: with this pruner."""
        session = await anyio.to_thread.run_sync(self._start, config)
        self._sessions[ctx] = session
        self.metrics.episodes.inc()

    def _start(self, config: Mapping[str, Any]) -> _Session:
        try:
            session = self._spare.pop()
        except IndexError:
            session = self._make()
        if config.get("vla"):
            vla, pruning, selector = session.vla, config.get("pruning"), None
            if pruning is not None:
                try:
                    if not isinstance(vla, PrunableVLA):
                        raise InputError(f"pruning: {type(vla).__name__} cannot run on fewer visual tokens")
                    if len(repr(pruning)) > MAX_INSTRUCTION:
                        raise InputError(f"pruning: more than {MAX_INSTRUCTION} characters")
                    pruner = make_pruner(pruning)
                    selector = None if pruner is None else pruner.selector
                    vla = vla.with_pruner(selector)
                except InputError:
                    self._spare.append(session)
                    raise
            session.plain = InTurn(vla, self._turns, selector)
        return session

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Act, and send the action."""
        await ctx.send_action(await self.act(obs, ctx))

    async def act(self, obs: Any, ctx: SessionContext) -> dict[str, Any]:
        """The reply to an observation: ``actions`` (D,), and who made it.

        A session that asked for the VLA itself gets ``actions`` (T, D), ``tokens``, ``confidence``, ``features``,
        ``visual_tokens`` and ``timings``; its observations may hold ``keep_mass``.

        Raises:
            InputError: the observation cannot be used; the message names the field. The session goes on.
            VLAUnavailable: it did not answer in time, and there is no safe action. The session goes on.
        """
        session = self._sessions.get(ctx)
        if session is None:
            raise InputError("observation: send episode_start first")
        if not isinstance(obs, dict):
            raise InputError(f"observation: expected a dict, got {type(obs).__name__}")
        return await anyio.to_thread.run_sync(self._act, session, obs)

    def _act(self, session: _Session, obs: dict[str, Any]) -> dict[str, Any]:
        instruction = obs.get("task_description")
        if not isinstance(instruction, str):
            raise InputError(f"task_description: expected a text instruction, got {type(instruction).__name__}")
        if len(instruction) > MAX_INSTRUCTION:  # before anything reads it, under the VLA's lock too
            raise InputError(f"task_description: {len(instruction)} characters are more than {MAX_INSTRUCTION}")
        observation = self.interface.observation(obs)
        try:
            if session.plain is not None:
                if instruction != session.instruction:
                    session.plain.reset(instruction)
                    session.instruction = instruction
                keep_mass = obs.get("keep_mass", 1.0)
                number = isinstance(keep_mass, int | float | np.floating) and not isinstance(keep_mass, bool)
                if not number or not 0 < keep_mass <= 1:
                    raise InputError(f"keep_mass: expected a number above 0 and at most 1, got {shorten(repr(keep_mass), 40)}")
                output = session.plain.predict(observation, keep_mass=float(keep_mass))
                return dict(vars(output))
            if instruction != session.instruction or obs.get("episode_restart"):
                session.policy.reset(instruction)
                session.instruction = instruction
            action = session.policy.select_action(observation)
        except (InputError, VLAUnavailable):
            raise
        except Exception:
            session.spoiled = True
            raise
        step = session.policy.last_step
        self.metrics.took(step)
        del session.policy.steps[:-1]  # an episode may be endless
        return {"actions": self.interface.action(action, self.space), "source": step.source.name.lower(), "reason": step.reason}

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Free what the session held."""
        session = self._sessions.pop(ctx, None)
        if session is not None and not session.spoiled:
            session.instruction = session.plain = None
            self._spare.append(session)
