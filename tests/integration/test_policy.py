"""The QLoRA policy on the lab base: log-probs, gradients, adapter swaps, the served base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from gft_lite import lab
from gft_lite.objective.losses import LossInputs
from gft_lite.objective.methods import METHODS
from gft_lite.objective.reduction import token_weights
from gft_lite.policy import scoring
from gft_lite.policy.batching import Row, cut
from gft_lite.policy.lora import LoraPolicy
from gft_lite.policy.registry import load_policy
from gft_lite.policy.scoring import OutputHead
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError


def rows(policy, count=8):
    """Training rows of unequal length with advantages of both signs."""
    out = []
    for i, row in enumerate(lab.rows("train", limit=count)):
        encode = policy.tokenizer.encode
        response = (row["expert"] + row["teacher"])[i % 4] + "#" * (i % 3)
        out.append(Row(tuple(encode(row["problem"])), tuple(encode(response)), 1.5 - i % 4))
    weights = token_weights([len(r.response_ids) for r in out])
    return [Row(r.prompt_ids, r.response_ids, r.advantage, w)
            for r, w in zip(out, weights, strict=True)]  # fmt: skip


def move(policy, scale=0.05):
    """Give the adapter random weights, as a few steps would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def gradient(policy, batches, method="gft", **parameters):
    """The gradient of a loss over micro-batches, as one vector in fp64."""
    policy.model.zero_grad()
    for batch in batches:
        scores = policy.token_scores(batch)
        inputs = LossInputs(scores.logprobs, batch.advantages)
        per_token = METHODS[method].loss(inputs, **parameters).per_token
        (batch.weights * per_token).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters().values()]).double()


def test_token_scores_equal_the_plain_distribution(lab_policy, full_distribution):
    move(lab_policy)
    batch = cut(rows(lab_policy), 10**6)[0]
    with torch.no_grad():
        scores, plain = lab_policy.token_scores(batch), full_distribution(lab_policy, batch)
    assert (scores.logprobs - plain.log_prob(batch.targets)).abs().max() < 1e-5
    assert (scores.entropy - plain.entropy()).abs().max() < 1e-5


def test_chunks_change_nothing(lab_policy, monkeypatch):
    move(lab_policy)
    batches = cut(rows(lab_policy), 10**6)
    whole = gradient(lab_policy, batches)
    monkeypatch.setattr(scoring, "LOGIT_CHUNK_BYTES", 4 * lab_policy.config.vocab_size * 5)
    assert (gradient(lab_policy, batches) - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("budget", [1, 120])
def test_gradient_is_the_same_for_every_micro_batching(lab_policy, layout, budget):
    move(lab_policy)
    data = rows(lab_policy)
    whole = gradient(lab_policy, cut(data, 10**6))
    parts = cut(data, budget, layout=layout)
    assert len(parts) == 8 if budget == 1 else 1 < len(parts) < 8
    assert (gradient(lab_policy, parts) - whole).norm() / whole.norm() < 1e-6


def test_gradient_checkpointing_changes_nothing(lab_policy):
    move(lab_policy)
    other = load_policy(PolicySettings(gradient_checkpointing=True))
    other.model.train()
    move(other)
    data = rows(lab_policy)
    plain, checkpointed = (gradient(p, cut(data, 10**6)) for p in (lab_policy, other))
    assert torch.equal(plain, checkpointed)


def test_only_lora_is_trained_and_in_fp32(lab_policy):
    trainable = {n for n, p in lab_policy.model.named_parameters() if p.requires_grad}
    assert trainable == set(lab_policy.parameters())
    layers, projections = lab_policy.config.num_hidden_layers, 7
    assert len(trainable) == 2 * layers * projections
    assert {p.dtype for p in lab_policy.parameters().values()} == {torch.float32}


def test_swapping_leaves_the_base_bit_equal(lab_policy):
    [batch] = cut(rows(lab_policy), 10**6)

    def base():
        with torch.no_grad(), lab_policy.base():
            return lab_policy.token_scores(batch).logprobs

    before = base()
    optimizer = torch.optim.AdamW(lab_policy.parameters().values(), lr=1e-2)
    gradient(lab_policy, [batch])
    optimizer.step()
    assert torch.equal(base(), before)
    with torch.no_grad():
        assert not torch.equal(lab_policy.token_scores(batch).logprobs, before)
    assert torch.equal(base(), before)
    lab_policy.model.eval()  # Where the AVX512 repacking of bitsandbytes would strike.
    assert torch.equal(base(), before)
    lab_policy.model.train()
    assert torch.equal(base(), before)


def test_adapter_round_trip(lab_policy, tmp_path):
    [batch] = cut(rows(lab_policy), 10**6)
    move(lab_policy)
    folder = lab_policy.save_adapter(tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".md") == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    other = load_policy(PolicySettings(gradient_checkpointing=False))
    other.load_adapter(folder)
    with torch.no_grad():
        assert torch.equal(
            other.token_scores(batch).logprobs, lab_policy.token_scores(batch).logprobs
        )


def test_continuing_from_an_adapter_it_can_be_the_reference(lab_policy, tmp_path):
    [batch] = cut(rows(lab_policy), 10**6)
    move(lab_policy)
    folder = lab_policy.save_adapter(tmp_path / "adapter")
    settings = PolicySettings(
        adapter=str(folder), reference="adapter", gradient_checkpointing=False
    )
    policy = load_policy(settings)
    with torch.no_grad():
        start = policy.token_scores(batch).logprobs
    assert torch.equal(start, lab_policy.token_scores(batch).logprobs)
    move(policy)
    with torch.no_grad():
        moved = policy.token_scores(batch).logprobs
        with policy.reference():
            reference = policy.token_scores(batch).logprobs
        after = policy.token_scores(batch).logprobs
    assert torch.equal(reference, start)
    assert not torch.equal(moved, start)
    assert torch.equal(after, moved)
    assert all(p.requires_grad for p in policy.parameters().values())


def test_divergence_is_zero_at_the_start_and_exact_afterwards(lab_policy, full_distribution):
    [batch] = cut(rows(lab_policy), 10**6)
    still = lab_policy.divergence(batch)
    assert still.forward.abs().max() == 0
    assert still.reverse.abs().max() == 0
    move(lab_policy)
    found = lab_policy.divergence(batch)
    with torch.no_grad():
        policy = full_distribution(lab_policy, batch)
        with lab_policy.base():
            base = full_distribution(lab_policy, batch)
    kl = torch.distributions.kl_divergence
    assert (found.forward - kl(base, policy)).abs().max() < 1e-5
    assert (found.reverse - kl(policy, base)).abs().max() < 1e-5
    assert (found.ref_logprobs - base.log_prob(batch.targets)).abs().max() < 1e-5


@pytest.mark.parametrize("chunked", [False, True])
def test_reference_kl_is_exact_and_so_is_its_gradient(lab_policy, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(scoring, "LOGIT_CHUNK_BYTES", 4 * lab_policy.config.vocab_size * 5)
    [batch] = cut(rows(lab_policy), 10**6)
    start = lab_policy.token_scores(batch, reference_kl=True)
    assert start.reference_kl.abs().max() == 0
    assert lab_policy.token_scores(batch).reference_kl is None
    move(lab_policy)
    parameters = list(lab_policy.parameters().values())
    found = lab_policy.token_scores(batch, reference_kl=True)
    found_gradient = torch.autograd.grad(found.reference_kl.sum(), parameters)

    def distribution():
        model = lab_policy.model
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return torch.distributions.Categorical(logits=logits.flatten(0, 1)[batch.predicts])

    with torch.no_grad(), lab_policy.base():
        base = distribution()
    kl = torch.distributions.kl_divergence(base, distribution())
    assert kl.mean() > 0.01
    assert (found.reference_kl - kl).abs().max() < 1e-5
    for one, other in zip(found_gradient, torch.autograd.grad(kl.sum(), parameters), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
    with torch.no_grad():
        assert torch.equal(
            lab_policy.token_scores(batch, reference_kl=True).logprobs,
            lab_policy.token_scores(batch).logprobs,
        )


@pytest.mark.parametrize("reference_kl", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_gets_detached_entropy_for_its_slice(lab_policy, fused, reference_kl, monkeypatch):
    monkeypatch.setattr(scoring, "LOGIT_CHUNK_BYTES", 4 * lab_policy.config.vocab_size * 5)
    policy = LoraPolicy(
        lab_policy.model,
        lab_policy.tokenizer,
        lab_policy.settings.model_copy(update={"fused_head": fused}),
        lab_policy.dtype,
    )
    move(policy)
    [batch] = cut(rows(policy), 10**6)
    with torch.no_grad():
        expected = policy.token_scores(batch).entropy
    spans = []

    def loss(scores, span):
        assert not scores.entropy.requires_grad
        assert (scores.entropy - expected[span]).abs().max() < 1e-4
        assert (scores.reference_kl is not None) == reference_kl
        spans.append(torch.arange(len(expected))[span])
        return -(scores.entropy * scores.logprobs).sum()

    value, scores = policy.backward(batch, loss, reference_kl=reference_kl)
    assert torch.equal(torch.cat(spans), torch.arange(len(expected)))
    assert len(spans) == (-(-len(expected) // 5) if fused and not reference_kl else 1)
    assert value == pytest.approx(-(expected * scores.logprobs).sum().item(), rel=1e-4)


def test_a_head_with_a_bias_takes_the_path_of_full_logits(lab_policy, monkeypatch):
    move(lab_policy)
    monkeypatch.setattr(scoring, "HEAD_TILE_WORDS", 16)  # Tiles would leave out the bias.
    plain = lab_policy.head.module
    head = nn.Linear(plain.in_features, plain.out_features)
    head.weight = plain.weight
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-2, 2, plain.out_features))
    biased = OutputHead(head, plain.out_features, lab_policy.device, lab_policy.dtype)
    monkeypatch.setattr(lab_policy, "head", biased)
    [batch] = cut(rows(lab_policy), 10**6)

    def gradient_of(backward):
        lab_policy.model.zero_grad()
        backward()
        return torch.cat([p.grad.flatten() for p in lab_policy.parameters().values()])

    full = gradient_of(lambda: lab_policy.token_scores(batch).logprobs.sum().backward())
    own = gradient_of(lambda: lab_policy.backward(batch, lambda scores, _: scores.logprobs.sum()))
    assert torch.equal(own, full) and full.norm() > 0


def test_dropout_applies_to_the_policy_and_not_to_the_reference(tmp_path):
    dropping = PolicySettings(lora={"dropout": 0.5}, gradient_checkpointing=False)
    first = load_policy(dropping)
    move(first)
    folder = first.save_adapter(tmp_path / "adapter")
    policy = load_policy(
        dropping.model_copy(update={"adapter": str(folder), "reference": "adapter"})
    )
    policy.model.train()
    [batch] = cut(rows(policy), 10**6)
    with torch.no_grad():
        noisy = [policy.token_scores(batch).logprobs for _ in range(2)]
        with policy.reference():
            still = [policy.token_scores(batch).logprobs for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*still)
    assert policy.model.training


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_served_base_has_the_trainers_own_weights(quantization):
    policy = load_policy(PolicySettings(quantization=quantization, gradient_checkpointing=False))
    folder = policy.serving_base("nf4_dequantised").location
    served = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    [batch] = cut(rows(policy), 10**6)
    with torch.no_grad():
        logits = served(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        predicted = logits.log_softmax(-1).flatten(0, 1)[batch.predicts]
        expected = predicted.gather(-1, batch.targets[:, None])
        gap = (policy.token_scores(batch).logprobs - expected[:, 0]).abs().max()
    # int8 also rounds activations in the trainer's forward, which no dequantised copy can.
    assert gap < (1e-5 if quantization == "nf4" else 0.5)
    assert gap > 0 or quantization == "nf4"
    assert Path(policy.serving_base("original").location) == lab.BASE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_compute_keeps_fp32_masters(dtype, tmp_path):
    policy = load_policy(PolicySettings(dtype=dtype, gradient_checkpointing=False))
    exact = load_policy(PolicySettings(gradient_checkpointing=False))
    for p in (policy, exact):
        p.model.train()
        move(p)
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}
    saved = load_file(policy.save_adapter(tmp_path / "adapter") / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    data = rows(policy)
    # Without rectification, whose step at tau a rounded probability may fall off.
    low, high = (gradient(p, cut(data, 10**6), "gft_no_dcr") for p in (policy, exact))
    assert torch.nn.functional.cosine_similarity(low, high, dim=0) > 0.99


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model": "/nowhere/at/all"}, "policy.model: must be the folder of a base model"),
        ({"adapter": "/nowhere/at/all"}, "policy.adapter: must be a PEFT adapter of lab"),
    ],
)
def test_an_unknown_name_is_an_error(settings, text):
    with pytest.raises(RecipeError, match=text):
        load_policy(PolicySettings(**settings))


def test_an_adapter_of_another_rank_is_rejected(lab_policy, tmp_path):
    folder = lab_policy.save_adapter(tmp_path / "adapter")
    settings = PolicySettings(adapter=str(folder), lora={"rank": 4})
    with pytest.raises(RecipeError, match=r"policy.lora.rank: must be 16.*got 4"):
        load_policy(settings)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12),
    budget=st.integers(1, 60),
    layout=st.sampled_from(["padded", "packed", "shared"]),
)
@settings(max_examples=300)
def test_cut_keeps_every_response_token_within_the_budget(lengths, budget, layout):
    data = [Row((1,) * p, tuple(range(2, 2 + r)), weight=i) for i, (p, r) in enumerate(lengths)]
    batches = cut(data, budget, layout=layout)
    seen = sorted(i for b in batches for i in set(b.row.tolist()))
    assert seen == [i for i, row in enumerate(data) if row.response_ids]
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(set(batch.row.tolist())) == 1
        before = batch.input_ids.flatten()[batch.predicts]
        for i in set(batch.row.tolist()):
            assert batch.targets[batch.row == i].tolist() == list(data[i].response_ids)
            assert before[batch.row == i].tolist() == [1, *data[i].response_ids[:-1]]
            assert set(batch.weights[batch.row == i].tolist()) == {float(i)}
