"""Shadow mode: the VLA acts on every step, and what the accelerated policy would have done is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from spvla.history import Source
from spvla.judgement import Acted, Judged
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.steps import StepInfo


class ShadowPolicy(SPVLAPolicy):
    """A policy that never skips a call, and says of each step whether it would have been skipped and how far off it would
    have been. The run limit and the published rules count a step that would have been skipped as generated.

    Arguments are those of :class:`SPVLAPolicy`.
    """

    def _act(self, judged: Judged, observation: Observation | Callable[[], Observation], times: dict[str, float]) -> Acted:
        return super()._act(replace(judged, refused=True), observation, times)

    def _account(self, judged: Judged, acted: Acted, times: dict[str, float]) -> StepInfo:
        previous = self.history.last_action
        step = replace(super()._account(judged, acted, times), propensity=None)
        if judged.skips:
            self.history.credit(Source.GENERATOR)
        if acted.output is None or judged.proposal is None or previous is None:
            return step
        proposed, reference = self.space.normalize(judged.proposal), self.space.normalize(acted.action)
        return replace(
            step,
            deviates=bool(self.space.deviation(proposed, reference, self.tolerance)),
            error=float(np.abs(proposed - reference)[list(self.space.continuous)].max(initial=0.0)),
        )
