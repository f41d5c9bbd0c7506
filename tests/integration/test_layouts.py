"""Layouts, the fused head, dropped rows, checkpoints and offload: each against the plain path."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
import torch
import transformers
from rich.console import Console

from gft_lite import lab
from gft_lite.objective.advantages import group_advantages
from gft_lite.objective.methods import METHODS
from gft_lite.objective.reduction import token_weights
from gft_lite.policy.base import evaluating, without_dropout
from gft_lite.policy.batching import SELF, Row, cut
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.training.learner import Learner
from gft_lite.training.teacher_model import TeacherModel
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.errors import RecipeError

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama": transformers.LlamaConfig(**SHAPE),
    "window": transformers.MistralConfig(**SHAPE, sliding_window=6),
    "some_windows": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1,
        eos_token_id=2,
    ),
    # Attention scores squashed by tanh, which segments can't, and a dense mask can.
    "softcap": transformers.Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=None),
    # Positions as slopes of the mask: it takes no position ids at all.
    "slopes": transformers.BloomConfig(
        vocab_size=512, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(save_random_models):
    """A random model of each kind."""
    return save_random_models(CONFIGS)


def load(folder, **settings):
    """A policy in training mode whose adapter does something."""
    common = {"quantization": "none", "gradient_checkpointing": False}
    policy = load_policy(PolicySettings(model=str(folder), **{**common, **settings}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.model.train()
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2's own, which would be drawn anew in every layout.
    return policy


@pytest.fixture(scope="module")
def rows():
    """Three groups of four responses to prompts of unequal length, one of the groups flat."""
    generator = torch.Generator().manual_seed(3)

    def tokens(length):
        return tuple(torch.randint(3, 512, (length,), generator=generator).tolist())

    found = []
    for length, rewards in ((23, [1, 0, 0, 1]), (9, [1, 1, 1, 1]), (14, [0, 0, 1, 0])):
        prompt = tokens(length)
        responses = [tokens(n) for n in torch.randint(1, 30, (4,), generator=generator).tolist()]
        for response, advantage in zip(responses, group_advantages(rewards).tolist(), strict=True):
            found.append(Row(prompt, response, advantage))
    weights = token_weights([len(row.response_ids) for row in found])
    return [replace(row, weight=weight) for row, weight in zip(found, weights, strict=True)]


@pytest.fixture(scope="module")
def groups(rows):
    """The rows as groups: an expert, a teacher, a self sample after a prefix, and one without."""
    found = []
    for number, first in enumerate(range(0, len(rows), 4)):
        members = rows[first : first + 4]
        responses = [
            Response(row.response_ids, "", source, correct=row.advantage > 0,
                     prefix=len(row.response_ids) // 3 * after_prefix)
            for row, (source, after_prefix) in zip(members, KINDS, strict=True)
        ]  # fmt: skip
        problem = Problem(str(number), "", "1", prompt_ids=members[0].prompt_ids)
        advantages = tuple(row.advantage for row in members)
        found.append(ScoredGroup(Group(problem, tuple(responses)), advantages))
    return found


KINDS = (("expert", False), ("teacher", False), ("self", True), ("self", False))


def learner_for(policy, method, *, objective=None, train=None):
    """A learner of any method, with a teacher where it needs one."""
    train = {"micro_batch_tokens": 10**6} | (train or {})
    tree = {"method": method, "objective": objective or {}, "train": train}
    if "teacher_logprobs" not in METHODS[method].needs:
        return Learner(policy, Recipe.from_tree(tree))
    recipe = Recipe.from_tree({**tree, "teacher": {"model": "another"}})
    # Another than the policy, which moves only afterwards.
    average = Recipe.from_tree({"method": "sdft"})
    teacher = TeacherModel(policy, average, None, sees_demonstration=False)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.mul_(2)
    return Learner(policy, recipe, teacher=teacher)


def logprobs(policy, rows, layout):
    [batch] = cut(rows, 10**6, layout=layout)
    with torch.no_grad():
        return policy.token_scores(batch).logprobs[batch.row.argsort(stable=True)]


def flat_gradient(policy, rows, *, method="gft", budget=10**6, train=None, **objective):
    """The gradient of an update, and the update."""
    train = {"micro_batch_tokens": budget} | (train or {})
    recipe = Recipe.from_tree({"method": method, "objective": objective, "train": train})
    learner = Learner(policy, recipe)
    done = learner.gradient(learner.prepare_rows(rows))
    found = torch.cat([p.grad.flatten() for p in policy.parameters().values()]).double()
    return found, done


def gap(one, other):
    return (one - other).norm() / other.norm()


@pytest.mark.parametrize("name", ["qwen2", "llama", "window", "some_windows", "gpt2"])
def test_prompts_are_shared_where_the_model_takes_segments(folders, rows, name):
    policy = load(folders[name])
    assert policy.layout == "shared"
    padded = logprobs(policy, rows, "padded")
    for layout in ("shared", "packed"):
        assert (logprobs(policy, rows, layout) - padded).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "attention", "layout"),
    [("llama", "eager", "packed"), ("softcap", "sdpa", "packed"), ("slopes", "eager", "padded")],
)
def test_other_models_fall_back(folders, rows, name, attention, layout):
    policy = load(folders[name], attention=attention)
    assert policy.layout == layout
    found = logprobs(policy, rows, layout)
    assert (found - logprobs(policy, rows, "padded")).abs().max() < 1e-5
    with pytest.raises(
        RecipeError, match=r"policy.layout: must be one that .* supports, got 'shar"
    ):
        load(folders[name], attention=attention, layout="shared")
    assert load(folders[name], attention=attention, layout="padded").layout == "padded"


@pytest.mark.parametrize("budget", [60, 10**6])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("name", ["qwen2", "llama", "some_windows"])
def test_gradients_are_those_of_padded_rows(folders, rows, name, layout, budget):
    plain, _ = flat_gradient(load(folders[name], layout="padded", fused_head=False), rows)
    found, done = flat_gradient(load(folders[name], layout=layout), rows, budget=budget)
    assert gap(found, plain) < 1e-5
    assert done.tokens == sum(len(row.response_ids) for row in rows if row.advantage)


def test_forwarded_tokens_are_counted_by_hand(folders):
    data = [Row((1, 2, 3), (4, 5)), Row((1, 2, 3), (6,)), Row((7, 8), (9, 9, 9, 9))]
    # Side by side 3 rows of 6; one after another 5 + 4 + 6; the prompt once 3 + 2 + 1 + 2 + 4.
    for layout, tokens in (("padded", 18), ("packed", 15), ("shared", 12)):
        policy = load(folders["qwen2"], layout=layout)
        assert flat_gradient(policy, data)[1].forwarded == tokens


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_in_bf16_a_layout_is_as_near_to_fp32_as_padding_is(folders, rows, layout):
    def distance(**settings):
        # Without rectification, whose step at tau a rounded probability may fall off.
        found, _ = flat_gradient(load(folders["qwen2"], **settings), rows, method="gft_no_dcr")
        return 1 - torch.nn.functional.cosine_similarity(found, exact, dim=0)

    exact, _ = flat_gradient(load(folders["qwen2"], layout="padded"), rows, method="gft_no_dcr")
    padded = distance(layout="padded", dtype="bfloat16")
    assert 1e-6 < padded < 1e-3  # bf16 it is.
    assert distance(layout=layout, dtype="bfloat16") < 1.5 * padded
    assert distance(layout=layout, dtype="float32") < 1e-10


@pytest.mark.parametrize(("kl", "chunk"), [(0.1, 7), (0.0, None)])
@pytest.mark.parametrize("method", METHODS)
def test_the_fused_head_gives_every_methods_gradient(
    folders, groups, method, kl, chunk, monkeypatch
):
    if chunk:
        monkeypatch.setattr("gft_lite.policy.scoring.LOGIT_CHUNK_BYTES", 4 * 512 * chunk)
    # More than the adapter that takes the old log-probs, so that rho is not 1.
    found = []
    for fused in (True, False):
        policy = load(folders["qwen2"], fused_head=fused)
        learner = learner_for(
            policy, method, objective={"kl": kl}, train={"updates_per_rollout": 2}
        )
        prepared = learner.prepare_rows(learner.rows(groups))
        with torch.no_grad():
            for parameter in policy.parameters().values():
                parameter.mul_(1.5)
        done = learner.gradient(prepared, 0.3)
        grads = torch.cat([p.grad.flatten() for p in policy.parameters().values()])
        found.append((grads.double(), done))
    (fused, one), (plain, other) = found
    assert plain.norm() > 0
    assert gap(fused, plain) < 1e-5
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.metrics.keys() == other.metrics.keys()
    # Tokens of demonstrations, prefixes among them, have figures of their own.
    shown = sum(len(row.response_ids) if row.source != SELF else row.prefix for row in prepared)
    assert 0 < shown < one.tokens == sum(len(row.response_ids) for row in prepared)
    for name, mean in one.metrics.items():
        count = shown if name in ("shaping", "sft_factor", "exploration") else one.tokens
        assert mean.count == other.metrics[name].count == count
        assert mean.sum == pytest.approx(other.metrics[name].sum, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_dropped_rows_leave_the_gradient_alone(folders, groups, method):
    policy, found = load(folders["qwen2"]), []
    for drop in (False, True):
        # Without KL and entropy bonus, which pull on every row.
        learner = learner_for(
            policy, method, objective={"kl": 0, "entropy": 0}, train={"drop_zero_advantage": drop}
        )
        rows = learner.rows(groups)
        done = learner.gradient(learner.prepare_rows(rows), 0.3)
        grads = torch.cat([p.grad.flatten() for p in policy.parameters().values()])
        found.append((grads.double(), done.tokens))
        if "teacher_logprobs" in METHODS[method].needs:
            with torch.no_grad():
                for parameter in policy.parameters().values():
                    parameter.div_(2)  # As the next learner takes it to be.
    (kept, all_tokens), (left, tokens) = found
    assert gap(left, kept) < 1e-6
    assert all_tokens == sum(len(row.response_ids) for row in rows)
    scales = METHODS[method].scales_with_advantage
    flat = [row for row in rows if not row.advantage]
    if scales == ("self",):  # Demonstrations count at any advantage, and uft's hint does.
        flat = [row for row in flat if row.source == SELF and not row.prefix]
    elif not scales:
        flat = []
    assert tokens == all_tokens - sum(len(row.response_ids) for row in flat)
    # hpt's gate keeps the samples of groups that are not flat.
    assert bool(flat) == bool(scales) or METHODS[method].select


def test_rows_that_the_kl_pulls_on_are_kept(folders, rows):
    _, done = flat_gradient(load(folders["qwen2"]), rows, kl=0.1)
    assert done.tokens == sum(len(row.response_ids) for row in rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 2},
        {"gradient_checkpointing": True, "offload_checkpoints": True},
        {"offload_embedding": True},
        {"gradient_checkpointing": True, "quantization": "nf4", "offload_embedding": True},
    ],
)
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_saving_memory_changes_no_gradient(folders, rows, settings, layout):
    base = {"layout": layout, "quantization": settings.get("quantization", "none")}
    plain, _ = flat_gradient(load(folders["qwen2"], **base), rows)
    found, _ = flat_gradient(load(folders["qwen2"], **{**base, **settings}), rows)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_without_dropout_two_passes_are_equal_and_layers_are_still_recomputed(folders, rows, name):
    policy = load_policy(
        PolicySettings(
            model=str(folders[name]), quantization="none", gradient_checkpointing=True,
            lora={"dropout": 0.3},
        )
    )  # fmt: skip
    base = policy.model.get_base_model()
    if name == "qwen2":
        base.model.layers[0].self_attn.attention_dropout = 0.2  # A plain attribute, no module.
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.05)
    policy.model.train()
    layer = base.transformer.h[0] if name == "gpt2" else base.model.layers[0]
    calls = []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    [batch] = policy.batches(rows, 10**6)

    def passes():
        with torch.no_grad():
            old = policy.token_scores(batch).logprobs
        return old, policy.backward(batch, lambda scores, _: scores.logprobs.sum())[1].logprobs

    old, now = passes()
    assert (now - old).abs().max() > 1e-2
    calls.clear()
    with without_dropout(policy):
        old, now = passes()
    assert torch.equal(now, old)
    assert len(calls) == 3
    with torch.no_grad(), evaluating(policy):
        assert torch.equal(policy.token_scores(batch).logprobs, old)
    old, now = passes()
    assert (now - old).abs().max() > 1e-2


def test_with_dropout_the_ratio_is_one_before_any_update(folders, rows):
    own = {"model": str(folders["qwen2"]), "quantization": "none", "lora": {"dropout": 0.3}}
    train = {"updates_per_rollout": 2}
    recipe = Recipe.from_tree({"method": "grpo", "policy": own, "train": train})
    policy = load_policy(recipe.policy)
    policy.model.train()
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.05)
        noisy = [logprobs(policy, rows, "padded") for _ in range(2)]
    assert (noisy[0] - noisy[1]).abs().max() > 1e-2
    log = StringIO()
    learner = Learner(policy, recipe, console=Console(file=log, width=200))
    assert log.getvalue().startswith("policy.lora.dropout: off, as grpo compares log-probs")
    metrics = learner.gradient(learner.prepare_rows(rows)).metrics
    assert metrics["ratio"].sum == metrics["ratio"].count > 0
    assert metrics["clip_fraction"].sum == 0


def test_gradient_checkpointing_recomputes_the_given_number_of_layers(folders, rows):
    policy = load(folders["qwen2"], gradient_checkpointing=2)
    calls = []
    for number, layer in enumerate(policy.model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    flat_gradient(policy, rows)
    assert sorted(calls) == [0, 0, 1, 1, 2]


def test_a_tied_embedding_stays_where_the_head_is(folders):
    config = transformers.AutoConfig.from_pretrained(lab.BASE)
    assert config.tie_word_embeddings
    with pytest.raises(RecipeError, match=r"policy.offload_embedding: must be false for a model"):
        load(lab.BASE, offload_embedding=True)


def run_out_above(policy, limit, tokens=None):
    """Let the card be full above so many tokens, as CUDA says it."""

    def check(_, args, kwargs):
        size = kwargs["input_ids"].numel()
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if tokens is not None:
            tokens.append(size)

    policy.model.get_base_model().model.register_forward_pre_hook(check, with_kwargs=True)


def test_out_of_memory_halves_the_micro_batches_and_repeats_the_step(folders, rows):
    plain, whole = flat_gradient(load(folders["qwen2"]), rows)
    policy, sizes = load(folders["qwen2"]), []
    run_out_above(policy, whole.forwarded // 3, sizes)
    found, done = flat_gradient(policy, rows)
    assert gap(found, plain) < 1e-6
    assert whole.forwarded // 8 < done.micro_batch_tokens <= whole.forwarded // 3
    assert max(sizes) <= whole.forwarded // 3
    assert (done.tokens, done.loss) == (whole.tokens, pytest.approx(whole.loss, rel=1e-5))


def test_a_row_too_long_for_the_memory_ends_it_with_advice(folders, rows):
    policy = load(folders["qwen2"])
    run_out_above(policy, 12)
    with pytest.raises(MemoryError, match=r"train.micro_batch_tokens: out of memory with one row"):
        flat_gradient(policy, rows)


def test_other_errors_are_not_taken_for_a_lack_of_memory(folders, rows):
    policy = load(folders["qwen2"])
    with pytest.raises(IndexError):
        flat_gradient(policy, [replace(rows[0], response_ids=(10**6,))])
