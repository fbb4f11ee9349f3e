"""What a server counts, in Prometheus's terms, for ``GET /metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from spvla.history import Source
from spvla.steps import StepInfo

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
SIZES = (1, 2, 4, 8, 16, 32)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """The counters of one server. Names begin with ``spvla_``.

    Attributes:
        steps: control steps by who made the action: ``vla``, ``generator``, ``plan`` or ``held``.
        skips: steps in which the VLA was not asked.
        audits: steps in which a live gate asked the VLA to check itself.
        late: calls of the VLA that the deadline ended.
        sessions: open connections.
        episodes: episodes begun.
        refused: connections that were not let in, by reason.
        errors: messages that were answered with an error.
        answer_seconds: from an observation's arrival to its answer.
        vla_seconds: of a pass of the VLA. Their count is the number of passes.
        batch_size: calls that a pass answered. Their sum is the number of calls.
        turn_seconds: that a call waited for the VLA.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here = self.registry
        self.steps = Counter("spvla_steps", "Control steps by who made the action", ["source"], registry=here)
        for source in Source:
            self.steps.labels(source.name.lower())
        self.skips = Counter("spvla_skips", "Control steps in which the VLA was not asked", registry=here)
        self.audits = Counter("spvla_audits", "Control steps in which a live gate asked the VLA to check itself", registry=here)
        self.late = Counter("spvla_late", "Calls of the VLA that the deadline ended", registry=here)
        self.sessions = Gauge("spvla_sessions", "Open connections", registry=here)
        self.episodes = Counter("spvla_episodes", "Episodes begun", registry=here)
        self.refused = Counter("spvla_refused", "Connections that were not let in", ["reason"], registry=here)
        self.errors = Counter("spvla_errors", "Messages that were answered with an error", registry=here)
        self.answer_seconds = Histogram(
            "spvla_answer_seconds", "From an observation's arrival to its answer", buckets=SECONDS, registry=here
        )
        self.vla_seconds = Histogram("spvla_vla_seconds", "A pass of the VLA", buckets=SECONDS, registry=here)
        self.batch_size = Histogram("spvla_batch_size", "Calls that a pass of the VLA answered", buckets=SIZES, registry=here)
        self.turn_seconds = Histogram("spvla_turn_seconds", "Wait of a call for the VLA", buckets=SECONDS, registry=here)

    def took(self, step: StepInfo) -> None:
        """Count a control step."""
        self.steps.labels(step.source.name.lower()).inc()
        self.skips.inc(not step.called_vla and step.unavailable is None)
        self.audits.inc(step.reason == "audit")

    def text(self) -> str:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry).decode()
