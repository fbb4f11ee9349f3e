"""A generator, a gate and a pruning score of one's own come in by one file and a name; so does a camera, by its name alone."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import spvla.registry
from spvla import InputError, accelerate, load_export
from spvla.actions import LIBERO
from spvla.gates.base import Decisions
from spvla.generators import GENERATORS, make_network
from spvla.generators.features import FeatureConfig
from spvla.generators.learned import GeneratorConfig, LearnedGenerator
from spvla.pruning import make_pruner
from tests.conftest import ScriptedVLA
from train.distill import distill


@dataclass(frozen=True)
class MixtureConfig(GeneratorConfig):
    """A configuration with a field of its own."""

    parts: int = 2


class Mixture(LearnedGenerator):
    """A mean of linear layers."""

    config_class = MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        inputs = self.features.size + config.features.history * self.changes_size
        self.layers = nn.ModuleList(nn.Linear(inputs, self.out) for _ in range(config.parts))

    def outputs(self, window, changes):
        x = self.features(window)
        x = x if changes is None else torch.cat([x, changes.flatten(1)], dim=1)
        return torch.stack([layer(x) for layer in self.layers]).mean(0)


class EverySecond:
    """A gate without an export: the generator may act after each step of the VLA's, in a space with ``limit`` dimensions."""

    history_length = 1

    def __init__(self, space, limit=7):
        assert space.dim <= limit

    def decide(self, window, proposals):
        by_vla = window.sources[:, -1] == 0
        return Decisions(by_vla, np.where(by_vla, "its turn", "not its turn"))


def corner(queries, keys, images):
    """A score: the first tokens matter most."""
    weight = torch.linspace(1, 0, queries.shape[2]).expand(queries.shape[0], -1)
    return weight / weight.sum(1, keepdim=True)


def test_a_generator_of_ones_own_is_distilled_exported_and_accelerates(store_folder, tmp_path):
    network = {"width": 8, "more": {"parts": 3}}
    distill(
        [store_folder],
        tmp_path / "export",
        generators=["tests.test_own_parts:Mixture"],
        networks={"tests.test_own_parts:Mixture": network},
        baselines=[],
        **{"history": 8, "steps": 20, "gate_steps": 20, "batch_size": 64, "threads": 1, "default_risk": 0.5},
    )
    export = load_export(tmp_path / "export")
    generator = export.generators["Mixture"]
    assert isinstance(generator, Mixture) and generator.config.parts == 3 and len(generator.layers) == 3
    policy = accelerate(ScriptedVLA(np.zeros((5, 7))), tmp_path / "export")
    assert policy.generator is not None and policy.generator.network.config == generator.config


def test_a_gate_of_ones_own_decides():
    name = "tests.test_own_parts:EverySecond"
    policy = accelerate(ScriptedVLA(np.zeros((9, 7))), generator="last", gate=name, rule={"limit": 8})
    policy.reset("go")
    for _ in range(6):
        policy.select_action(spvla.Observation())
    assert [s.source for s in policy.steps] == [0, 1, 0, 1, 0, 1] and policy.steps[1].reason == "its turn"


def test_a_pruning_score_of_ones_own_chooses_the_tokens():
    pruner = make_pruner(
        {"speed": "constant", "measure": "ratio", "keep": 0.25, "contours": False, "score": "tests.test_own_parts:corner"}
    )
    assert pruner is not None
    scores = pruner.selector.scores(torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 16, 4), [])
    np.testing.assert_array_equal(pruner.selector.choose(scores[0].numpy(), None, 0.25), np.arange(4))


def test_names_come_from_entry_points_too(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("mixture", "tests.test_own_parts:Mixture", GENERATORS.group)
    monkeypatch.setattr(spvla.registry, "entry_points", lambda group: [point] if group == GENERATORS.group else [])
    assert isinstance(make_network({"kind": "mixture", "features": FeatureConfig(LIBERO.dim, 8)}), Mixture)
    with pytest.raises(InputError) as error:
        make_network({"kind": "nobody", "features": FeatureConfig(LIBERO.dim, 8)})
    assert (error.value.code, error.value.field) == ("unknown-generator", "generator")
