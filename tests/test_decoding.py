"""How action tokens are read off the language model: by the lean pass as by transformers', verified as decoded one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import DynamicCache, LlamaConfig, LlamaModel

import spvla
from eval.cells import parse_cells
from spvla.errors import InputError
from spvla.vlas.base import VerifyingVLA
from spvla.vlas.openvla import OpenVLA
from spvla.vlas.openvla.decoder import Decoder, EagerReading
from spvla.vlas.openvla.decoding import verified
from tests.test_openvla import picture, tiny_model

TEXT = "pick up the red mug"


def llama(seed: int = 0, **changes) -> LlamaModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaModel(LlamaConfig(vocab_size=50, **{**sizes, **changes})).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"head_dim": 24},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ],
    ids=lambda c: ",".join(c) or "plain",
)
def test_the_lean_pass_is_transformers(changes):
    model = llama(**changes)
    for p in model.parameters():  # biases and norms begin as zeros and ones
        p.add_(0.05 * torch.randn_like(p))
    x, ids = torch.randn(2, 9, 64), torch.arange(9).expand(2, -1)
    cache = DynamicCache(config=model.config)
    expected = [model(inputs_embeds=x[:, :6], position_ids=ids[:, :6], past_key_values=cache).last_hidden_state]
    expected += [
        model(inputs_embeds=x[:, [i]], position_ids=ids[:, [i]], past_key_values=cache).last_hidden_state for i in (6, 7)
    ]
    reading = Decoder(model).begin(2, 9, x)
    found = [reading.read(x[:, :6], ids[:, :6]), *(reading.read(x[:, [i]], ids[:, [i]]) for i in (6, 7))]
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), rtol=1e-5, atol=1e-5)
    reading.crop(4)  # and several at once behind what is left
    again = reading.read(x[:, 4:], ids[:, 4:])
    torch.testing.assert_close(again[:, :4], torch.cat(expected, 1)[:, 4:], rtol=1e-5, atol=1e-5)


def test_padded_rows_read_as_if_alone():
    decoder = Decoder(llama())
    x, ids = torch.randn(1, 7, 64), torch.arange(7)[None]
    alone = decoder.begin(1, 8, x)
    padded = torch.cat([torch.randn(1, 3, 64), x[:, :4]], 1)  # three places of padding before the row's own four
    both = torch.cat([padded, x]), torch.tensor([[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    reading = decoder.begin(2, 8, x)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    first = reading.read(*both, mask)
    torch.testing.assert_close(first[:1, 3:], alone.read(x[:, :4], ids[:, :4]))
    step, at = torch.randn(1, 1, 64), torch.tensor([[4], [7]])
    torch.testing.assert_close(reading.read(step.expand(2, -1, -1), at)[:1], alone.read(step, at[:1]), rtol=1e-5, atol=1e-5)


def test_weights_are_joined_without_a_copy_and_stay_trainable():
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    decoder = Decoder(model)
    assert decoder.is_of(model)
    attention = model.layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.enable_grad():
        model(inputs_embeds=torch.randn(1, 3, 64)).last_hidden_state.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "embed_tokens" not in name)
    attention.k_proj.weight += 1.0  # an optimiser's step reaches what reads
    x, ids = torch.randn(1, 3, 64), torch.arange(3)[None]
    expected = model(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(decoder.begin(1, 3, x).read(x, ids), expected, rtol=1e-5, atol=1e-5)
    model.to(torch.bfloat16)
    assert not decoder.is_of(model)


def test_what_the_lean_pass_does_not_know_is_left_to_transformers():
    model = tiny_model().model
    assert model.slow is None and not isinstance(model.begin(1, 9), EagerReading)
    hook = model.language_model.model.layers[0].register_forward_hook(lambda *_: None)
    assert model.slow is not None and isinstance(model.begin(1, 9), EagerReading)
    hook.remove()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert isinstance(model.begin(1, 9), EagerReading)


def test_eager_and_lean_give_the_same_output():
    lean, eager = tiny_model(), tiny_model()
    eager.model.eager = True
    texts = [TEXT, "take the blue mug", "pick up a mug"]
    pictures = [picture(i) for i in range(3)]
    for a, b in zip(lean.predict_batch(pictures, texts), eager.predict_batch(pictures, texts), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.features, b.features, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ verification


class Counted:
    """A model's reader that counts the stretches it reads."""

    def __init__(self, reading, stretches):
        self.reading, self.stretches = reading, stretches
        self.crop = reading.crop

    @property
    def length(self):
        return self.reading.length

    def read(self, embeds, ids, mask=None):
        self.stretches.append(embeds.shape[1])
        return self.reading.read(embeds, ids, mask)


def acting_model(seed: int = 0) -> OpenVLA:
    """A random model that writes tokens of actions alone, as a trained one does."""
    policy = tiny_model(seed)
    vocab, bins = policy.model.action_tokenizer.vocab, policy.model.action_tokenizer.bins
    head = policy.model.language_model.lm_head.weight
    head[: vocab - bins + 1] = 0.0
    head[vocab:] = 0.0
    return policy


def counting(policy, monkeypatch):
    stretches, begin = [], policy.model.begin
    monkeypatch.setattr(policy.model, "begin", lambda *a: Counted(begin(*a), stretches))
    return stretches


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("right", range(8))
def test_an_exactly_verified_proposal_gives_the_greedy_tokens(right, eager, monkeypatch):
    policy = acting_model()
    policy.model.eager = eager
    policy.reset(TEXT)
    space = policy.action_space
    for seed in range(5):
        expected = policy.predict(picture(seed))
        own = expected.actions[0]
        other = space.denormalize(np.where(space.normalize(own) > 0, -0.9, 0.9))
        proposal = np.where(np.arange(7) < right, own, other)  # a few dimensions right, the rest wrong
        equal = policy.model.action_tokens(space.clip(proposal)[None])[0] == expected.tokens[0]
        leading = int(np.argmin(equal)) if not equal.all() else 7
        stretches = counting(policy, monkeypatch)
        found = policy.verify(picture(seed), proposal)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.actions, expected.actions)
        np.testing.assert_allclose(found.features, expected.features, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.confidence, expected.confidence, rtol=1e-3)
        # Nothing is read twice: the prompt with six tokens at once, then one stretch for each token still unknown.
        assert found.accepted == leading >= min(right, 6) and stretches[1:] == [1] * max(0, 6 - leading)
        monkeypatch.undo()


def test_tolerance_accepts_what_the_action_space_says_does_not_deviate():
    policy = acting_model()
    policy.reset(TEXT)
    space = policy.action_space
    own = policy.predict(picture(3))
    normalized = space.normalize(own.actions[0])
    near = normalized.copy()
    near[list(space.continuous)] += np.where(near[list(space.continuous)] > 0, -0.03, 0.03)
    proposal = space.denormalize(near)
    exact, loose = policy.verify(picture(3), proposal), policy.verify(picture(3), proposal, tolerance=0.2)
    np.testing.assert_array_equal(exact.tokens, own.tokens)
    assert exact.accepted < loose.accepted
    answer = space.normalize(loose.actions[0])[: loose.accepted]
    assert not space.deviating(near, space.normalize(loose.actions[0]), 0.2)[: loose.accepted].any() and len(answer)


def test_every_pattern_of_agreement_ends_in_a_whole_action():
    policy = acting_model()
    policy.reset(TEXT)
    model = policy.model
    visual = torch.randn(4, model.projector.fc2.out_features)
    sequences = model.sequences([visual], [model.tokenize(TEXT)], [torch.arange(4)], 4)
    proposal = np.full(7, model.action_tokenizer.vocab - 9)
    for accepted in range(8):
        agrees = np.arange(7) < accepted
        found = verified(model, sequences[0], sequences[2], proposal, lambda _, agrees=agrees: agrees)
        assert found.accepted == accepted and found.tokens.shape == (1, 7) and found.scores.shape[:2] == (1, 7)


def test_openvla_says_that_it_verifies():
    assert isinstance(tiny_model(), VerifyingVLA)


# ------------------------------------------------------------------------------------------------------ in the control loop


def run(policy, steps=6):
    policy.reset(TEXT)
    return np.array([policy.select_action(picture(i // 2)) for i in range(steps)])


def test_exact_verification_in_the_loop_changes_no_action_and_is_counted():
    vla = acting_model()
    alone = run(spvla.accelerate(vla, generator="none"))
    policy = spvla.accelerate(vla, generator="last", gate="never", verify="exact")
    np.testing.assert_array_equal(run(policy), alone)
    assert [s.called_vla for s in policy.steps] == [True] * 6
    # Every picture is seen twice: the second time, the last action is what the VLA would do again (its gripper is not binary).
    accepted = [s.accepted for s in policy.steps]
    for i in (1, 3, 5):
        vla.reset(TEXT)
        own = vla.predict(picture(i // 2)).tokens[0]
        np.testing.assert_array_equal(vla.model.action_tokens(alone[i][None])[0], own)
    assert min(accepted[1::2]) >= 6
    assert policy.stats()["accepted_mean"] == np.mean(accepted)


def test_verification_that_cannot_be_is_refused():
    vla = acting_model()
    for options in ({"generator": "none", "verify": "exact"}, {"generator": "last", "gate": "never"}):
        with pytest.raises(InputError) as error:
            spvla.accelerate(vla, **options)
        assert error.value.code in ("cannot-verify", "cannot-matter")

    class Plain:
        action_space = vla.action_space

        def reset(self, instruction): ...

        def predict(self, observation, keep_mass=1.0): ...

    with pytest.raises(InputError) as error:
        spvla.accelerate(Plain(), generator="last", gate="never", verify="tolerant")
    assert error.value.code == "cannot-verify"


def test_cells_say_how_to_verify():
    cells = parse_cells(["mlp+never:exact", "mlp+learned:tolerant@0.1", "mlp+learned:bridge@0.1"], [])
    assert [(c.name, c.verify, c.mode) for c in cells[1:]] == [
        ("mlp+never:exact", "exact", None),
        ("mlp+learned:tolerant@0.1", "tolerant", None),
        ("mlp+learned:bridge@0.1", "none", "bridge"),
    ]
    for wrong in ("mlp+never:sloppy", "mlp+never:exact:tolerant"):
        with pytest.raises(InputError) as error:
            parse_cells([wrong], [])
        assert error.value.code == "unknown-name"
