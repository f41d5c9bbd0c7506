"""The correction for a sampling engine in whole updates, against weights put in by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gft_lite import lab
from gft_lite.recipe.schema import Recipe
from gft_lite.training.learner import Learner
from gft_lite.types import Group, Problem, Response, ScoredGroup

LN2 = math.log(2)
# Trainer - engine in nats at the first tokens of each self sample, 0 at the others.
SHIFTS = ((LN2, -LN2, math.log(5)), (-math.log(8), 0.0, 0.0), (LN2, LN2, 0.0))


@pytest.fixture
def policy(lab_policy):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lab_policy.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lab_policy


def logprobs(policy, prompt_ids, ids):
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0].float()
    log = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return log.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.fixture
def group(policy):
    """A demonstration and three self samples, one of them after a prefix of four tokens."""
    [row] = lab.rows("train", limit=1)
    prompt = tuple(policy.tokenizer.encode(row["problem"]))
    texts = [row["expert"][0], *row["teacher"]]
    responses = [Response(tuple(policy.tokenizer.encode(texts[0])), "", "expert")]
    for number, (text, shifts) in enumerate(zip(texts[1:], SHIFTS, strict=True)):
        ids, prefix = tuple(policy.tokenizer.encode(text)), 4 * (number == 2)
        engine = logprobs(policy, prompt, ids)
        engine[prefix : prefix + 3] -= torch.tensor(shifts)
        engine[:prefix] = 0.0  # As the rollout gives them.
        responses.append(
            Response(ids, "", "self", logprobs=tuple(engine.tolist()), prefix=prefix)
        )  # fmt: skip
    problem = Problem("p", row["problem"], row["answer"], prompt_ids=prompt)
    return ScoredGroup(Group(problem, tuple(responses)), (1.0, -0.5, 0.7, 1.2))


def learner(policy, mode, *, method="gft_no_dcr", updates=1, **limits):
    return Learner(
        policy,
        Recipe.from_tree(
            {
                "method": method,
                "objective": {"importance": {"mode": mode, **limits}},
                "train": {"micro_batch_tokens": 40, "updates_per_rollout": updates},
            }
        ),
    )


def gradient(learner, rows):
    done = learner.gradient(rows)
    return torch.cat([p.grad.flatten() for p in learner.policy.parameters().values()]), done


# The weights of the shifted tokens: w = 2, 1/2, 5; 1/8, 1, 1; 2, 2, 1, and of a whole row the
# product, 5; 1/8; 4.
CASES = {
    "token_truncate": ({"cap": 3.0}, [[2, 0.5, 3], [0.125, 1, 1], [2, 2, 1]], None),
    "token_band": ({"low": 0.4, "high": 2.5}, [[2, 0.5, 0], [0, 1, 1], [2, 2, 1]], None),
    "sequence_mask": ({"cap": 4.5}, None, [0, 0.125, 4]),
    "none": ({}, [[1, 1, 1]] * 3, None),
}


@pytest.mark.parametrize("mode", CASES)
def test_each_mode_weights_the_tokens_of_self_samples(policy, group, mode):
    limits, tokens, whole = CASES[mode]
    plain = learner(policy, "none")
    rows = plain.prepare_rows(plain.rows([group]))
    [demonstration, *own] = rows

    # The same by hand: advantages of single tokens, as rows of one token with a longer prompt.
    weighted = [demonstration]
    for number, row in enumerate(own):
        for t, token in enumerate(row.response_ids):
            place = t - row.prefix
            weight = 1.0
            if place >= 0 and whole is not None:
                weight = whole[number]
            elif 0 <= place < 3:
                weight = tokens[number][place]
            single = replace(
                row, prompt_ids=row.prompt_ids + row.response_ids[:t], response_ids=(token,),
                advantage=row.advantage * weight, prefix=0, loss_inputs={},
                weight=row.prefix_weight if t < row.prefix else row.weight,
            )  # fmt: skip
            weighted.append(single)
    expected, _ = gradient(plain, weighted)
    unweighted, bare = gradient(plain, rows)

    corrected = learner(policy, mode, **limits)
    prepared = corrected.prepare_rows(corrected.rows([group]))
    assert len(corrected.make_micro_batches(prepared)) > 1
    found, done = gradient(corrected, prepared)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert (mode == "none") == bool((found - unweighted).norm() < 0.05 * expected.norm())
    # The gaps are measured whatever the mode, of sampled tokens alone.
    count = sum(len(row.response_ids) - row.prefix for row in own)
    shifts = sorted(s for row in SHIFTS for s in row if s)
    for update in (done, bare):
        assert len(update.gaps) == count
        moved = sorted(g for g in update.gaps.tolist() if abs(g) > 1e-3)
        assert moved == pytest.approx(shifts, abs=1e-4)


def test_a_correction_compares_with_the_policy_of_the_rollout(policy, group):
    """In a later update the policy has moved, the weights have not."""
    corrected = learner(policy, "token_truncate", cap=3.0, updates=2, method="gft_no_dcr")
    prepared = corrected.prepare_rows(corrected.rows([group]))
    assert all("old_logprobs" in row.loss_inputs for row in prepared)
    before = gradient(corrected, prepared)[1].gaps
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.mul_(1.5)
    torch.testing.assert_close(gradient(corrected, prepared)[1].gaps, before)


def test_without_a_ratio_only_the_first_update_reports_the_gap(policy, group):
    """The policy that the later ones could compare with is not the one that was sampled from."""
    groups = [group, replace(group, group=replace(group.group))]
    own = learner(policy, "none", updates=2)
    first, second = own.train_on(1, groups)
    assert len(first.gaps) > 0 and len(second.gaps) == 0
    compared = learner(policy, "none", updates=2, method="grpo")
    assert all(len(update.gaps) for update in compared.train_on(1, groups))
