"""Whole updates of the methods that mix sources, against their stated objectives in full.

The objective is written out row by row from the policy's full distributions, with each part's mean
over the whole step, and differentiated by autograd: it shares neither losses, weights, micro-
batches nor the fused head with the learner.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gft_lite import lab
from gft_lite.objective.methods import METHODS
from gft_lite.recipe.schema import Recipe
from gft_lite.training.learner import Learner
from gft_lite.training.teacher_model import TeacherModel
from gft_lite.types import Group, Problem, Response, ScoredGroup

MAX_TOKENS, PROGRESS = 32, 0.4


def moved_by(policy, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def policy(lab_policy):
    """A policy whose adapter does something, and which is not sure of the demonstrations."""
    moved_by(lab_policy, 7, 0.1)
    return lab_policy


def response(policy, text, source, right, prefix=0):
    ids = tuple(policy.tokenizer.encode(text))
    return Response(ids, text, source, correct=right, prefix=prefix)


def scored(policy, number, members, advantages):
    """A group of the lab's problem of that number, its texts cut to unequal lengths."""
    row = lab.rows("train", limit=number + 1)[number]
    texts = [row["expert"][0], *row["teacher"], row["expert"][0]]
    responses = [
        response(policy, text[i:] + "<eos>", *member)
        for i, (text, member) in enumerate(zip(texts, members, strict=False))
    ]
    problem = Problem(str(number), row["problem"], row["answer"],
                      prompt_ids=tuple(policy.tokenizer.encode(row["problem"])))  # fmt: skip
    return ScoredGroup(Group(problem, tuple(responses)), advantages)


@pytest.fixture
def groups(policy):
    """A problem that the samples solve in part, one that they don't, and a flat one."""
    return [
        scored(policy, 0, [("expert", True), ("teacher", False), ("self", True), ("self", False)],
               (0.9, -0.4, 0.7, -1.2)),
        scored(policy, 1, [("expert", True), ("self", False), ("self", False, 4)],
               (1.1, -0.3, 0.5)),
        scored(policy, 2, [("teacher", True), ("self", False), ("self", False)], (0.0, 0.0, 0.0)),
    ]  # fmt: skip


@dataclass
class Told:
    """A row as the objectives speak of it; tensors [R]."""

    p: Tensor
    old: Tensor
    H: Tensor  # Of each token, at the start.
    h: Tensor  # Of each token, with gradient.
    A: float
    d: Tensor  # Whether a token is a demonstration's.
    expert: Tensor
    right: bool
    prefix: int

    @property
    def s(self) -> Tensor:
        return ~self.d

    @property
    def rho(self) -> Tensor:
        return self.p / self.old

    def clipped(self) -> Tensor:
        return -torch.minimum(self.rho * self.A, self.rho.clamp(0.8, 1.2) * self.A)


def distributions(policy, problem, ids):
    sequence = torch.tensor([[*problem.prompt_ids, *ids]])
    logits = policy.model(input_ids=sequence).logits[0].float()
    return logits[len(problem.prompt_ids) - 1 : -1].log_softmax(-1)


def told(policy, groups, old):
    """Every row of the groups; `old` are the distributions at the start, in the same order."""
    rows, starts = [], iter(old)
    for group in groups:
        for member, advantage in group:
            log, start = distributions(policy, group.group.problem, member.token_ids), next(starts)
            pick = torch.tensor(member.token_ids)[:, None]
            place = torch.arange(len(member.token_ids))
            shown = torch.full(place.shape, member.source != "self")
            expert = torch.full(place.shape, member.source == "expert") | (place < member.prefix)
            rows.append(Told(
                log.gather(-1, pick)[:, 0].exp(), start.gather(-1, pick)[:, 0].exp(),
                -(start.exp() * start).sum(-1), -(log.exp() * log).sum(-1), advantage,
                shown | (place < member.prefix), expert, bool(member.correct), member.prefix,
            ))  # fmt: skip
    return rows


def mean(values, masks):
    """The mean over all tokens of a part in the step."""
    return torch.cat([v[m] for v, m in zip(values, masks, strict=True)]).mean()


def constant(values):
    """The sum over tokens divided by the rows and the largest number of tokens."""
    return torch.cat(values).sum() / (len(values) * MAX_TOKENS)


def bonus(rows):
    return -0.001 * torch.cat([row.h for row in rows]).mean()


def sft_part(rows, weight=1.0):
    return mean([-weight * r.p.log() for r in rows], [r.d for r in rows])


def rl_part(rows, values):
    return mean(values, [r.s for r in rows])


def in_groups(rows, chosen):
    """The rows that a method selects: by numbers from 0."""
    return [rows[i] for i in chosen]


def luffy(rows):
    return constant([
        torch.where(r.d, -r.A * r.p / (r.p + 0.1), -r.A * r.rho) for r in rows
    ]) + bonus(rows)  # fmt: skip


def rl_plus(rows):
    return constant([
        torch.where(r.d, -r.A * (1 - r.p.detach()).sqrt() * 2 * r.p / (r.old + (r.old + 1) / 2),
                    -r.A * r.rho)
        for r in rows
    ]) + bonus(rows)  # fmt: skip


def srft(rows):
    entropies = [r.H.mean() for r in rows]
    own = [torch.where(torch.tensor(r.right), -0.1 * H.exp(), 1.0) * r.p.log()
           for r, H in zip(rows, entropies, strict=True)]  # fmt: skip
    rl = [torch.where(r.d, -r.A * r.p / (r.p + 0.1), v) for r, v in zip(rows, own, strict=True)]
    sft = [-0.5 * (-H).exp() * r.p.log() for r, H in zip(rows, entropies, strict=True)]
    return torch.cat(rl).mean() + mean(sft, [r.d for r in rows]) + bonus(rows)


def chord(rows):
    # mu from 0.8 to 0.2 over the half of the budget after a tenth: 0.3 of 0.5 are over.
    mu = 0.2 + 0.6 * (1 + torch.tensor(0.6 * torch.pi).cos()) / 2
    sft = [-(r.p * (1 - r.p)).detach() * r.p.log() for r in rows]
    grpo = rl_part(rows, [r.clipped() for r in rows])
    return (1 - mu) * grpo + mu * mean(sft, [r.d for r in rows])


def hpt(rows):
    # The first problem has a right sample: its samples. The others: their demonstrations.
    rows = in_groups(rows, [2, 3, 4, 7])
    return rl_part(rows, [-r.A * r.rho for r in rows]) + sft_part(rows, 0.3) + bonus(rows)


def relift(rows):
    # The first problem is solved: no demonstration of it.
    rows = in_groups(rows, [2, 3, 4, 5, 6, 7, 8, 9])
    return rl_part(rows, [-r.A * r.rho for r in rows]) + sft_part(rows) + bonus(rows)


def prefix_rft(rows):
    values = []
    for r in rows:
        loss = r.clipped()
        loss = torch.where(torch.tensor(r.A < 0), loss.clamp(max=-1.05 * r.A), loss)
        if r.prefix:  # Four tokens: those that int(0.8 * 4) = 3 of lower entropy are dropped.
            top = r.H[: r.prefix].argmax()
            loss = torch.where((torch.arange(len(loss)) < r.prefix)
                               & (torch.arange(len(loss)) != top), 0.0, loss)  # fmt: skip
        elif bool(r.d.any()):  # A whole demonstration: the top fifth of all its tokens.
            order = r.H.argsort()
            loss = loss.clone()
            loss[order[: int(0.8 * len(loss))]] = 0
        values.append(loss)
    return torch.cat(values).mean() + bonus(rows)


def uft(rows):
    hint = mean([-0.5 * r.p.log() for r in rows], [r.expert for r in rows])
    return rl_part(rows, [r.clipped() for r in rows]) + hint + bonus(rows)


STATED = {
    "sft_rl": (lambda rows: rl_part(rows, [r.clipped() for r in rows]) + sft_part(rows, 0.5),
               {"sft_weight": 0.5}),
    "luffy": (luffy, {}),
    "srft": (srft, {}),
    "chord": (chord, {"mu": 0.8, "mu_end": 0.2, "mu_warmup": 0.1, "mu_decay": 0.5}),
    "hpt": (hpt, {"sft_weight": 0.3}),
    "rl_plus": (rl_plus, {}),
    "relift": (relift, {}),
    "prefix_rft": (prefix_rft, {"dual_clip": 1.05}),
    "uft": (uft, {"hint_weight": 0.5, "kl": 0}),
}  # fmt: skip


def recipe_of(method, objective, **sections):
    return Recipe.from_tree(
        {
            "method": method,
            "objective": objective,
            "rollout": {"max_tokens": MAX_TOKENS},
            "train": {"updates_per_rollout": 2, "micro_batch_tokens": 50},
            **sections,
        }
    )


def gradient_of(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters().values()])


def autograd(policy, loss):
    grads = torch.autograd.grad(loss, list(policy.parameters().values()))
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("method", STATED)
def test_an_update_has_the_gradient_of_the_whole_stated_objective(policy, groups, method):
    stated, objective = STATED[method]
    learner = Learner(policy, recipe_of(method, objective))
    with torch.no_grad():
        old = [distributions(policy, g.group.problem, r.token_ids) for g in groups for r, _ in g]
    prepared = learner.prepare_rows(learner.rows(groups))
    moved_by(policy, 8, 0.02)  # Off policy, so that some ratios are clipped.
    rows = told(policy, groups, old)
    assert any(((r.rho - 1).abs() > 0.2).any() for r in rows)
    loss = stated(rows)
    expected = autograd(policy, loss)
    assert len(learner.make_micro_batches(prepared)) > 1
    done = learner.gradient(prepared, PROGRESS)
    assert done.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert (gradient_of(policy) - expected).norm() <= 1e-4 * expected.norm()
    assert expected.norm() > 0


@pytest.mark.parametrize("method", ["sdft", "opd"])
def test_a_teachers_update_has_the_gradient_of_the_sampled_kl(policy, groups, method):
    settings = recipe_of(method, {}, teacher={"model": "another"})
    # The teacher is the policy as it was; then the policy moves.
    average = recipe_of("sdft", {})
    teacher = TeacherModel(policy, average, None, sees_demonstration=False)
    with torch.no_grad():
        taught = [distributions(policy, g.group.problem, r.token_ids) for g in groups for r, _ in g]
    moved_by(policy, 8, 0.05)
    learner = Learner(policy, settings, teacher=teacher)
    rows = told(policy, groups, taught)  # `old` is the teacher's probability here.
    loss = torch.cat([(r.p / r.old).log().detach() * r.p.log() for r in rows]).mean()
    expected = autograd(policy, loss)
    done = learner.gradient(learner.prepare_rows(learner.rows(groups)), PROGRESS)
    assert (gradient_of(policy) - expected).norm() <= 1e-4 * expected.norm()
    kl = torch.cat([(r.p / r.old).log() for r in rows]).mean().item()
    assert done.metrics["teacher_kl"].value == pytest.approx(kl, rel=1e-3)
    assert done.metrics["teacher_kl"].count == sum(len(r.p) for r in rows)


# --- limits ----------------------------------------------------------------------------------


def gradient(policy, method, groups, **objective):
    recipe = recipe_of(method, {"entropy": 0, "kl": 0, **objective})
    learner = Learner(policy, recipe)
    learner.gradient(learner.prepare_rows(learner.rows(groups)), PROGRESS)
    return gradient_of(policy)


def only(groups, *sources):
    """The groups with the responses of these sources alone."""
    found = []
    for group in groups:
        pairs = [(r, a) for r, a in group if r.source in sources and not r.prefix]
        responses, advantages = zip(*pairs, strict=True)
        found.append(ScoredGroup(Group(group.group.problem, responses), advantages))
    return found


def close(one, other):
    assert (one - other).norm() <= 1e-5 * other.norm() and other.norm() > 0


def test_chord_at_both_ends(policy, groups):
    plain = [only([g], "expert", "teacher", "self")[0] for g in groups]
    grpo = gradient(policy, "grpo", only(groups, "self"), reduction="token_mean", std="none")
    close(gradient(policy, "chord", plain, mu=0, mu_end=0), grpo)
    sft = gradient(policy, "sft_mix", only(groups, "expert", "teacher"))
    close(gradient(policy, "chord", plain, mu=1, mu_end=1, phi=False), sft)


def test_hpt_with_all_right_is_grpo_and_with_all_wrong_sft(policy, groups):
    def as_if(right):
        plain = only(groups, "expert", "teacher", "self")
        return [
            ScoredGroup(
                Group(g.group.problem, tuple(
                    Response(r.token_ids, r.text, r.source, correct=right) for r in g.group
                )), g.advantages,
            ) for g in plain
        ]  # fmt: skip

    grpo = gradient(policy, "grpo", only(groups, "self"), reduction="token_mean")
    sft = gradient(policy, "sft_mix", only(groups, "expert", "teacher"))
    close(gradient(policy, "hpt", as_if(right=True)), grpo)
    close(gradient(policy, "hpt", as_if(right=False)), sft)
    close(gradient(policy, "hpt", as_if(right=True), gate=8), sft)
    # ReLIFT adds the demonstrations of unsolved problems, each part under its own mean.
    close(gradient(policy, "relift", as_if(right=True)), grpo)
    close(gradient(policy, "relift", as_if(right=False)), grpo + sft)
    close(gradient(policy, "sft_rl", as_if(right=True)), grpo + sft)


def test_a_step_with_one_kind_of_rows_lacks_a_part_and_nothing_else(policy, groups):
    shown, own = only(groups, "expert", "teacher"), only(groups, "self")
    for method in ("srft", "luffy", "rl_plus", "sft_rl", "chord"):
        for part in (shown, own):
            found = gradient(policy, method, part, **({"mu": 0.5} if method == "chord" else {}))
            assert bool(found.isfinite().all()) and found.norm() > 0
    close(gradient(policy, "sft_rl", shown), gradient(policy, "sft_mix", shown))


def test_without_prefixes_prefix_rft_and_uft_are_grpo(policy, groups):
    own = only(groups, "self")
    grpo = gradient(policy, "grpo", own, reduction="token_mean")
    close(gradient(policy, "prefix_rft", own), grpo)
    close(gradient(policy, "uft", own), grpo)


# --- inputs of a pass before the update, entropy bonus ---------------------------------------


def test_entropies_at_the_start_by_hand(policy, groups):
    learner = Learner(policy, recipe_of("srft", {}))
    prepared = learner.prepare_rows(learner.rows(groups))
    other = Learner(policy, recipe_of("prefix_rft", {}))
    ranked = other.prepare_rows(other.rows(groups))
    members = [(g, r) for g in groups for r, _ in g]
    for (group, member), row, rank in zip(members, prepared, ranked, strict=True):
        with torch.no_grad():
            log = distributions(policy, group.group.problem, member.token_ids)
        entropy = -(log.exp() * log).sum(-1)
        assert row.loss_inputs["row_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
        for part in (slice(0, member.prefix), slice(member.prefix, None)):
            own = entropy[part].tolist()
            shares = [sum(x <= y + 1e-6 for x in own) / len(own) for y in own]
            assert rank.loss_inputs["entropy_quantile"][part].tolist() == pytest.approx(shares)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chunk", [5, None])
def test_the_entropy_bonus_has_the_gradient_of_the_entropy(
    policy, groups, fused, chunk, monkeypatch
):
    if chunk:
        size = 4 * policy.model.config.vocab_size * chunk
        monkeypatch.setattr("gft_lite.policy.scoring.LOGIT_CHUNK_BYTES", size)
    policy.head.fused = fused
    own = only(groups, "self")
    bare = gradient(policy, "gft", own)
    found = gradient(policy, "gft", own, entropy=0.3) - bare
    with torch.no_grad():
        old = [distributions(policy, g.group.problem, r.token_ids) for g in own for r, _ in g]
    rows = told(policy, own, old)
    expected = autograd(policy, -0.3 * torch.cat([r.h for r in rows]).mean())
    assert (found - expected).norm() <= 2e-4 * expected.norm()
    assert expected.norm() > 0.01 * bare.norm()


def test_every_mixed_method_is_told():
    assert set(STATED) | {"sdft", "opd"} == {
        name for name, method in METHODS.items()
        if method.parts or method.select or method.uses_demonstrations
        or {"source", "teacher_logprobs"} & set(method.needs)
    }  # fmt: skip
