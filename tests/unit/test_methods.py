"""Every method of the table: its settings, and its loss on tokens of all sources."""

from __future__ import annotations

import math
from itertools import repeat
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import (
    F64,
    INPUTS,
    close,
    f64,
    in_part,
    inputs_of,
    loss_parameters,
    output,
    parts_of,
    recipe_of,
    scored,
    token_loss,
)
from torch import Tensor

from gft_lite.objective.methods import METHODS
from gft_lite.objective.mixed_losses import chord_mu
from gft_lite.objective.reduction import Part, token_weights
from gft_lite.recipe.objective_sections import ObjectiveSettings
from gft_lite.types import SOURCES

PROBS = f64([0.25, 0.5, 0.8], [0.5, 0.9, 0.125])
LOGPROBS = PROBS.log()
ADVANTAGES = f64(2, -1)
SELF, DEMONSTRATIONS = ("self",), ("expert", "teacher")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- the table -------------------------------------------------------------------------------

# Group, needs, advantage (None: 1 everywhere), and what differs from the recipe's defaults (token
# mean, tau 0.7, lam 0.1, both clips 0.2, nothing masked, no KL, no entropy bonus).
RATIO = ("old_logprobs",)
BONUS = {"entropy": 0.001}
DESIGN: dict[str, tuple[Any, ...]] = {
    "sft": ((1, None, None), (), None, {}),
    "sft_mix": ((1, 3, None), (), None, {}),
    "distillation": ((None, 3, None), (), None, {}),
    "dft": ((1, 0, None), (), None, {}),
    "asft": ((1, 0, None), ("reference_kl",), None, {}),
    "psft": ((1, 0, None), RATIO, None, {"clip_high": 0.28}),
    "grpo": ((None, None, 8), RATIO, ("sample", 1e-4), {"reduction": "sequence_mean"}),
    "dr_grpo": ((None, None, 8), RATIO, ("none", 1e-6), {"reduction": "constant"}),
    "dapo": ((None, None, 8), RATIO, ("sample", 1e-4), {"clip_high": 0.28, "mask_truncated": True}),
    "gft": ((1, 3, 4), (), ("sample", 1e-6), {}),
    "gft_no_gal": ((1, 3, None), (), None, {}),
    "gft_no_dcr": ((1, 3, 4), (), ("sample", 1e-6), {}),
    "gft_no_mix": ((1, None, 7), (), ("sample", 1e-6), {}),
    "sft_rl": ((1, 0, 7), RATIO, ("sample", 1e-6), {"sft_weight": 1.0}),
    "luffy": ((1, 0, 7), ("source", *RATIO), ("none", 1e-6),
              {"reduction": "constant", "gamma": 0.1, **BONUS}),
    "srft": ((1, 0, 7), ("source", "row_entropy", "correct"), ("none", 1e-6),
             {"gamma": 0.1, "sft_weight": 0.5, "rl_weight": 0.1, **BONUS}),
    "chord": ((1, 0, 8), (*RATIO, "progress"), ("sample", 1e-6),
              {"mu": 0.1, "mu_end": 0.1, "mu_warmup": 0.0, "mu_decay": 1.0, "phi": True}),
    "hpt": ((1, 0, 8), RATIO, ("none", 1e-6), {"sft_weight": 1.0, "gate": 0, **BONUS}),
    "rl_plus": ((1, 0, 7), ("source", *RATIO), ("none", 1e-6),
                {"reduction": "constant", "exponent": 0.5, **BONUS}),
    "relift": ((1, 0, 8), RATIO, ("none", 1e-6), {"sft_weight": 1.0, **BONUS}),
    "prefix_rft": ((None, None, 8), ("source", *RATIO, "entropy_quantile"), ("none", 1e-6),
                   {"prefix_share": 0.2, "dual_clip": 3.0, "low": 0.05, "high": 0.95, **BONUS}),
    "uft": ((None, None, 8), RATIO, ("sample", 1e-6),
            {"hint_weight": 0.001, "slices": 5, "low": 0.05, "high": 0.95, "hint_share": 0.6,
             "kl": 0.001, **BONUS}),
    "sdft": ((None, None, 8), ("teacher_logprobs",), None, {}),
    "opd": ((None, None, 8), ("teacher_logprobs",), None, {}),
}  # fmt: skip


def test_the_table_is_the_designs():
    assert set(DESIGN) == set(METHODS)
    defaults = {"reduction": "token_mean", "tau": 0.7, "lam": 0.1, "clip_low": 0.2,
                "clip_high": 0.2, "kl": 0.0, "entropy": 0.0, "mask_truncated": False}  # fmt: skip
    for name, (counts, needs, advantage, differs) in DESIGN.items():
        method, group = METHODS[name], recipe_of(name).group
        for source, count in zip(SOURCES, counts, strict=True):
            assert (source in method.sources) == (count is not None), name
            assert getattr(group, source) == (count or 0), name
        assert method.needs == needs, name
        assert method.group_advantages == (advantage is not None), name
        objective = recipe_of(name).objective
        assert advantage in (None, (objective.std, objective.eps)), name
        shown = objective.model_dump(exclude={"std", "eps", "importance"})
        assert shown == defaults | differs, name
        assert method.formula and method.citation, name
    # With a single update psft would be SFT.
    assert recipe_of("psft").train.updates_per_rollout > 1


# What else a run has to know of the methods that mix demonstrations with self samples.
TWO_MEANS = (Part(SELF), Part(DEMONSTRATIONS, "token_mean"))
HINT = (Part(SELF), Part(("expert",), "token_mean"))
OWN_PART = (Part(), Part(DEMONSTRATIONS, "token_mean"))
MIXED = {
    # Parts, baseline, scales_with_advantage, select, prefixes.
    "sft_rl": (TWO_MEANS, SELF, SELF, None, None),
    "luffy": ((), SOURCES, True, None, None),
    "srft": (OWN_PART, SOURCES, False, None, None),
    "chord": (TWO_MEANS, SELF, SELF, None, None),
    "hpt": (TWO_MEANS, SELF, SELF, "select_by_gate", None),
    "rl_plus": ((), SOURCES, True, None, None),
    "relift": (TWO_MEANS, SELF, SELF, "select_unsolved", None),
    "prefix_rft": ((), SOURCES, True, None, "cosine_prefix"),
    "uft": (HINT, SOURCES, SELF, None, "binomial_hints"),
    "sdft": ((), SOURCES, False, None, None),
    "opd": ((), SOURCES, False, None, None),
}


def test_mixed_methods_state_parts_baseline_selection_and_prefixes():
    for name, method in METHODS.items():
        functions = [f and f.__name__ for f in (method.select, method.prefixes)]
        stated = (method.parts, method.baseline, method.scales_with_advantage, *functions)
        expected = MIXED.get(name, ((), SOURCES, method.group_advantages, None, None))
        assert stated == expected, name
    assert [n for n, m in METHODS.items() if m.uses_demonstrations] == ["prefix_rft", "uft", "sdft"]
    assert [n for n, m in METHODS.items() if m.teacher_sees_demonstration] == ["sdft"]


@pytest.mark.parametrize("name", METHODS)
def test_a_table_entry_names_the_parameters_of_its_functions(name: str):
    method = METHODS[name]
    assert set(method.needs) <= INPUTS
    for parameter in method.parameters.values():
        kind = get_args(parameter.annotation) or [parameter.annotation]
        assert kind[0] in (float, int, bool) and parameter.default is not parameter.empty
    own = set(method.parameters) - set(ObjectiveSettings.model_fields)
    if name not in MIXED:
        assert not own
    assert set(method.parameters) <= set(recipe_of(name).objective.model_dump())
    assert set(method.sources) <= set(SOURCES)
    counts = method.defaults["group"]
    assert all(counts[source] == 0 or source in method.sources for source in counts if
               source != "shortfall")  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_metrics_have_a_value_per_token_and_no_gradient(name: str):
    logprobs = torch.randn(5, dtype=F64).sub(1).requires_grad_()
    known = inputs_of(name, logprobs)
    needed = {need: known[need] for need in METHODS[name].needs}
    result = output(METHODS[name].loss, logprobs, f64(1, 1, -1, 0, 2), **needed,
                    **loss_parameters(name))  # fmt: skip
    for metric in result.metrics.values():
        assert metric.shape == logprobs.shape and not metric.requires_grad


# --- gradients -------------------------------------------------------------------------------


def kept(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """The clipped surrogate told in cases: where to learn, and where the ratio went too far."""
    too_far = torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    bound = torch.where(advantages > 0, 1 + high, 1 - low)
    return -advantages * torch.where(too_far, bound, ratio)


def grpo(p: Tensor, A: Tensor, s: Any, i: Any) -> Tensor:
    return kept(p / i.old, A, s.clip_low, s.clip_high)


def dual_clip(p: Tensor, A: Tensor, s: Any, i: Any) -> Tensor:
    ratio = p / i.old
    capped = torch.where(ratio > s.dual_clip, s.dual_clip, ratio)
    return kept(torch.where(A < 0, capped, ratio), A, s.clip_low, s.clip_high)


def chord_weight(s: Any, i: Any) -> float:
    return chord_mu(i.progress, s.mu, s.mu_end, s.mu_warmup, s.mu_decay)


# The objectives again, as plain functions of p: their gradients are those of the losses, whose
# coefficients stop it (d p = p d log p). `s` is the method's ObjectiveSettings, `i` its inputs and
# `i.d` where the token is a demonstration's. Sums of parts, each where it applies.
SECOND = {
    "sft": lambda p, A, s, i: -p.log(),
    "dft": lambda p, A, s, i: -p,
    "asft": lambda p, A, s, i: -p + s.lam * i.kl,
    "psft": lambda p, A, s, i: kept(p / i.old, torch.ones_like(A), s.clip_low, s.clip_high),
    "grpo": grpo,
    "gft": lambda p, A, s, i: -A * torch.where(p < s.tau, p, p.log()),
    "gft_no_gal": lambda p, A, s, i: -torch.where(p < s.tau, p, p.log()),
    "gft_no_dcr": lambda p, A, s, i: -A * p.log(),
    "sft_rl": lambda p, A, s, i: torch.where(i.d, -s.sft_weight * p.log(), grpo(p, A, s, i)),
    "luffy": lambda p, A, s, i: -A * torch.where(i.d, 1 - s.gamma / (p + s.gamma), p / i.old),
    "srft": lambda p, A, s, i: torch.where(
        i.d,
        -s.sft_weight * torch.exp(-i.H) * p.log() - A * (1 - s.gamma / (p + s.gamma)),
        torch.where(i.right, -s.rl_weight * torch.exp(i.H), 1.0) * p.log(),
    ),
    # d (p - p^2 / 2) = p (1 - p) d log p.
    "chord": lambda p, A, s, i: torch.where(
        i.d,
        chord_weight(s, i) * (p.square() / 2 - p),
        (1 - chord_weight(s, i)) * grpo(p, A, s, i),
    ),
    "hpt": lambda p, A, s, i: torch.where(i.d, -s.sft_weight * p.log(), -A * p / i.old),
    # d (1 - p)^1.5 * -2/3 = (1 - p)^0.5 d p.
    "rl_plus": lambda p, A, s, i: torch.where(
        i.d, A * (4 / 3) * (1 - p) ** 1.5 / (1.5 * i.old + 0.5), -A * p / i.old
    ),
    "prefix_rft": lambda p, A, s, i: torch.where(
        i.d & (i.quantile <= 1 - s.prefix_share), 0.0, dual_clip(p, A, s, i)
    ),
    "uft": lambda p, A, s, i: torch.where(i.d, -s.hint_weight * p.log(), grpo(p, A, s, i)),
    # d ((log p)^2 / 2 - log p_T log p) = (log p - log p_T) d log p.
    "sdft": lambda p, A, s, i: p.log().square() / 2 - i.teacher * p.log(),
}  # fmt: skip
SAME_AS = {"sft_mix": "sft", "distillation": "sft", "dr_grpo": "grpo", "dapo": "grpo",
           "gft_no_mix": "gft", "relift": "hpt", "opd": "sdft"}  # fmt: skip
OTHER_SETTINGS = {
    "chord": {"mu": 0.7, "mu_end": 0.2, "mu_warmup": 0.1, "mu_decay": 0.5},
    "prefix_rft": {"dual_clip": 1.5},
    "hpt": {"sft_weight": 0.3},
    "uft": {"hint_weight": 0.5},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_the_objective_in_another_form(name: str):
    changed = OTHER_SETTINGS.get(name, {})
    chosen = recipe_of(name, objective=changed).objective
    advantages = f64(1.5, -0.5, 0.7)
    gradients = []
    for second in (False, True):
        torch.manual_seed(5)
        logits, logprobs, onehot = scored(tokens=60)
        old = (logprobs.detach() + 0.3 * torch.randn(3, 60, dtype=F64)).exp()
        categorical = torch.distributions.Categorical
        reference = categorical(logits=torch.randn(3, 60, 6, dtype=F64))
        given = inputs_of(name, logprobs) | {
            "old_logprobs": old.log(),
            "reference_kl": torch.distributions.kl_divergence(
                reference, categorical(logits=logits)
            ),
            "row_entropy": torch.rand(3, 1, dtype=F64).expand(3, 60),
            "entropy_quantile": torch.rand(3, 60, dtype=F64),
            "correct": torch.randint(2, (3, 60)).to(F64),
            "teacher_logprobs": torch.randn(3, 60, dtype=F64) - 2,
        }
        if second:
            p = (logits.softmax(-1) * onehot).sum(-1)
            inputs = SimpleNamespace(
                old=old, kl=given["reference_kl"], H=given["row_entropy"],
                right=given["correct"] > 0, quantile=given["entropy_quantile"],
                teacher=given["teacher_logprobs"], d=given["source"] != SOURCES.index("self"),
                progress=given["progress"],
            )  # fmt: skip
            loss = SECOND[SAME_AS.get(name, name)](p, advantages[:, None], chosen, inputs)
        else:
            own = {n: v for n, v in changed.items() if n in loss_parameters(name)}
            loss = token_loss(name, logprobs, advantages, **given, **own)
        loss.sum().backward()
        gradients.append(logits.grad)
    close(gradients[0], gradients[1], 1e-9)
    assert gradients[1].abs().max() > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_keeps_shape_type_and_inputs(name: str):
    for dtype in (torch.float32, F64):
        logprobs, advantages = LOGPROBS.to(dtype), ADVANTAGES.to(dtype)
        before = logprobs.clone(), advantages.clone()
        loss = token_loss(name, logprobs, advantages)
        assert (loss.shape, loss.dtype) == (logprobs.shape, dtype)
        assert loss.isfinite().all()
        assert torch.equal(logprobs, before[0]) and torch.equal(advantages, before[1])


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_has_a_value_for_each_part_and_token(name: str):
    known = inputs_of(name, LOGPROBS.flatten())
    needed = {need: known[need] for need in METHODS[name].needs}
    per_token = output(METHODS[name].loss, LOGPROBS.flatten(), torch.ones(6), **needed,
                       **loss_parameters(name)).per_token  # fmt: skip
    parts = len(METHODS[name].parts)
    assert per_token.shape == ((parts, 6) if parts else (6,))


@pytest.mark.parametrize("name", METHODS)
def test_advantages_may_be_one_per_row_per_token_or_one(name: str):
    def loss(advantages: Tensor, logprobs: Tensor = LOGPROBS) -> Tensor:
        return token_loss(name, logprobs, advantages)

    per_row = loss(ADVANTAGES)
    close(loss(ADVANTAGES[:, None].expand(2, 3)), per_row, 0)
    close(loss(ADVANTAGES[0])[0], per_row[0], 0)
    flat = loss(ADVANTAGES.repeat_interleave(3), LOGPROBS.flatten())
    close(flat.view(2, 3), per_row, 0)
    mixed = f64([2, -1, 0], [0, 1, 1])
    single = [[loss(mixed[i, j])[i, j] for j in range(3)] for i in range(2)]
    close(loss(mixed), torch.stack([torch.stack(row) for row in single]), 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_token_of_weight_zero_has_no_gradient(name: str):
    _, logprobs, _ = scored()
    logprobs = logprobs.detach().requires_grad_()
    weights = torch.ones(3, 4, dtype=F64)
    weights[1, 2] = weights[2, 0] = 0
    (weights * token_loss(name, logprobs, f64(1.5, -0.5, 0.3))).sum().backward()
    assert ((logprobs.grad != 0) == (weights != 0)).all()


@given(st.sampled_from(sorted(METHODS)), st.integers(0, 2**31), st.booleans())
@settings(deadline=None, max_examples=200, derandomize=True)
def test_a_loss_said_to_scale_is_zero_with_its_advantage(name: str, seed: int, right: bool):
    """Value and gradient, where the table says so; elsewhere some advantage-free term is left."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = (-3 * torch.rand(30, dtype=F64, generator=generator)).requires_grad_()
    other = {
        "old_logprobs": logprobs.detach() + torch.randn(30, dtype=F64, generator=generator),
        "entropy_quantile": torch.rand(30, dtype=F64, generator=generator),
        "correct": torch.full((30,), float(right), dtype=F64),
    }
    loss = token_loss(name, logprobs, torch.zeros(30, dtype=F64), **other)
    loss.sum().backward()
    source = inputs_of(name, logprobs)["source"]
    for number in source.unique().tolist():
        own, kind = source == number, SOURCES[number]
        if METHODS[name].ignores_flat(kind):
            assert loss[own].abs().max() == 0
            assert logprobs.grad[own].abs().max() == 0
        else:
            assert logprobs.grad[own].abs().max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_step_down_the_gradient_raises_what_was_better(name: str):
    logits, logprobs, _ = scored(rows=2)
    token_loss(name, logprobs, f64(1, 1)).sum().backward()
    with torch.no_grad():
        stepped = (logits - 1e-3 * logits.grad).log_softmax(-1)
        targets = torch.isclose(logits.log_softmax(-1), logprobs[..., None])
        assert (stepped[targets] > logits.log_softmax(-1)[targets]).all()


@given(
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(["token_mean", "sequence_mean", "constant"]),
    st.lists(st.integers(1, 6), min_size=2, max_size=6),
    st.data(),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_the_gradient_is_the_same_for_every_cut_into_micro_batches(name, reduction, lengths, data):
    """Rows share a weight matrix; each micro-batch is padded and adds its own gradient."""
    torch.manual_seed(sum(lengths))
    weight = torch.randn(5, 7, dtype=F64, requires_grad=True)
    inputs = [torch.randn(length, 5, dtype=F64) for length in lengths]
    targets = [torch.randint(7, (length,)) for length in lengths]
    advantages = torch.randn(len(lengths), dtype=F64)
    sources = inputs_of(name, advantages)["source"]
    # A weight for each part and row: one denominator a part, over the rows of its sources.
    inside = [(torch.tensor(lengths) * in_part(p, sources)).tolist() for p in parts_of(name)]
    reductions = [part.reduction or reduction for part in parts_of(name)]
    weights = f64(*map(token_weights, inside, reductions, repeat(6)))

    def gradient(batches: list[list[int]]) -> Tensor:
        weight.grad = None
        for batch in batches:
            x = torch.nn.utils.rnn.pad_sequence([inputs[i] for i in batch], batch_first=True)
            y = torch.nn.utils.rnn.pad_sequence([targets[i] for i in batch], batch_first=True)
            within = torch.arange(x.shape[1]) < torch.tensor([lengths[i] for i in batch])[:, None]
            logprobs = (x @ weight).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
            source = sources[batch][:, None].expand_as(y)
            known = inputs_of(name, logprobs) | {"source": source}
            needed = {need: known[need] for need in METHODS[name].needs}
            loss = output(METHODS[name].loss, logprobs, advantages[batch], **needed,
                          **loss_parameters(name)).per_token  # fmt: skip
            (weights[:, batch, None] * within * loss).sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    whole = gradient([list(range(len(lengths)))])
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1))))
    bounds = list(zip([0, *cuts], [*cuts, len(lengths)], strict=True))
    close(gradient([list(order[a:b]) for a, b in bounds]), whole)
    assert whole.abs().max() > 0 and math.isfinite(whole.sum())
