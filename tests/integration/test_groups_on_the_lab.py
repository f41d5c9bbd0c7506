"""Groups made of real demonstrations and real samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gft_lite.data.problems import load_problems
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DataSettings, RolloutSettings
from gft_lite.rollout.registry import start_engine
from gft_lite.training.groups import GroupBuilder
from gft_lite.training.visits import ProblemVisit
from gft_lite.types import Group


@pytest.fixture
def build(lab_policy):
    format = PromptFormat(lab_policy.tokenizer, DataSettings().prompt)
    engine = start_engine(RolloutSettings(engine="transformers"), lab_policy, Path())
    problems = load_problems(DataSettings(problems=3), format).problems

    def build(max_tokens, stop=(), **counts):
        tree = {"group": counts, "rollout": {"max_tokens": max_tokens, "stop": list(stop)}}
        builder = GroupBuilder(Recipe.from_tree(tree), problems, engine, format, list)
        return builder.sample([ProblemVisit(problem, 1, 0) for problem in problems])

    return build


def test_experts_then_teachers_then_self_samples(build, lab_policy):
    made = build(32, expert=1, teacher=2, self=3)
    assert len(made) == 3
    for group in made:
        assert [r.source for r in group] == ["expert"] + ["teacher"] * 2 + ["self"] * 3
        assert [r.text for r in group][:1] == list(group.problem.experts)
        for response in group:
            decoded = lab_policy.tokenizer.decode(response.token_ids, skip_special_tokens=True)
            assert decoded == response.text
            assert response.truncated or response.token_ids[-1] in lab_policy.eos_ids
            assert (response.logprobs is not None) == (response.source == "self")
    assert build(32, expert=1, teacher=2, self=3) == made


def test_a_demonstration_is_graded_up_to_a_stop_string_as_a_sample_is(build):
    for group in build(32, stop=["#"], expert=1, teacher=0, self=0):
        [expert], [demonstration] = group, group.problem.experts
        assert "#" in demonstration
        assert expert.text == demonstration.split("#")[0]


# --- prefixes of demonstrations --------------------------------------------------------------


@pytest.fixture
def build_prefixed(lab_policy):
    format = PromptFormat(lab_policy.tokenizer, DataSettings().prompt)
    engine = start_engine(RolloutSettings(engine="transformers"), lab_policy, Path())
    problems = load_problems(DataSettings(problems=4), format).problems

    def build(method, progress, *, max_tokens=32, problems=problems, seed=0, **objective):
        tree = {"method": method, "rollout": {"max_tokens": max_tokens}, "seed": seed,
                "group": {"self": 5}, "objective": objective}  # fmt: skip
        builder = GroupBuilder(Recipe.from_tree(tree), problems, engine, format, list)
        visits = [ProblemVisit(problem, 1, 0) for problem in problems]
        return builder, builder.sample(visits, progress)

    return build


def expert_ids(policy, problem):
    return tuple(policy.tokenizer.encode(problem.experts[0] + "<eos>"))


def test_one_sample_of_prefix_rft_begins_as_the_demonstration(build_prefixed, lab_policy):
    _, made = build_prefixed("prefix_rft", 0.2, low=0.5, high=0.5)
    for group in made:
        assert [r.source for r in group] == ["self"] * 5
        ids = expert_ids(lab_policy, group.problem)
        length = len(ids) // 2
        assert sorted(r.prefix for r in group) == [0, 0, 0, 0, length]
        [prefixed] = [r for r in group if r.prefix]
        assert prefixed.token_ids[:length] == ids[:length]
        assert len(prefixed.logprobs) == len(prefixed.token_ids) > length
        assert prefixed.logprobs[:length] == (0.0,) * length
        assert all(logprob < 0 for logprob in prefixed.logprobs[length:])
        text = lab_policy.tokenizer.decode(prefixed.token_ids, skip_special_tokens=True)
        assert prefixed.text == text
    # The schedule's random numbers are those of seed, step and problem.
    assert build_prefixed("prefix_rft", 0.2)[1] == build_prefixed("prefix_rft", 0.2)[1]
    lengths = [
        [r.prefix for g in build_prefixed("prefix_rft", 0.9, seed=seed)[1] for r in g]
        for seed in (0, 1)
    ]
    assert lengths[0] != lengths[1]


def test_hints_of_uft_are_equal_in_a_group_and_end(build_prefixed):
    _, made = build_prefixed("uft", 0.0)
    for group in made:
        [length] = {r.prefix for r in group}
        assert length > 0
        assert len({r.token_ids[:length] for r in group}) == 1
        assert len({r.token_ids for r in group}) > 1 or length > 10
    _, late = build_prefixed("uft", 0.6)
    assert {r.prefix for group in late for r in group} == {0}


def test_a_prefix_leaves_a_token_and_no_response_is_longer_than_the_limit(
    build_prefixed, lab_policy
):
    whole = {"low": 1.0, "high": 1.0, "hint_share": 1.0}
    _, made = build_prefixed("uft", 0.0, max_tokens=32, **whole)
    for group in made:  # Without the end token, which is left to the policy.
        ids = expert_ids(lab_policy, group.problem)
        assert {r.prefix for r in group} == {len(ids) - 1}
        assert {r.token_ids[: len(ids) - 1] for r in group} == {ids[:-1]}
    _, short = build_prefixed("uft", 0.0, max_tokens=8, **whole)
    for group in short:
        for response in group:
            assert (response.prefix, len(response.token_ids)) == (7, 8)
            assert response.truncated


def test_a_problem_without_an_expert_has_samples_without_prefix(build_prefixed):
    _, made = build_prefixed("uft", 0.0)
    bare = [replace(group.problem, experts=()) for group in made]
    _, found = build_prefixed("uft", 0.0, problems=bare)
    assert {r.prefix for group in found for r in group} == {0}


def test_advantages_of_prefixed_samples_are_against_those_without(build_prefixed):
    builder, made = build_prefixed("prefix_rft", 0.0)

    def advantages(prefixes, rewards):
        responses = tuple(
            replace(made[0].responses[0], prefix=p, reward=r, verdict="ok")
            for p, r in zip(prefixes, rewards, strict=True)
        )
        [scored] = builder.score([Group(made[0].problem, responses)])
        return scored.advantages

    # Mean of the four without: 1/4. The prefixed one is compared with it, and not part of it.
    assert advantages([7, 0, 0, 0, 0], [1, 1, 0, 0, 0]) == (0.75, 0.75, -0.25, -0.25, -0.25)
    assert advantages([7, 0, 0, 0, 0], [0, 1, 0, 0, 0]) == (-0.25, 0.75, -0.25, -0.25, -0.25)
    assert advantages([7, 0, 0, 0, 0], [1, 0, 0, 0, 0]) == (1.0, 0.0, 0.0, 0.0, 0.0)
    # Where all begin with one, as UFT's do, they are compared with each other.
    assert advantages([3, 3], [1, 0]) == (0.5, -0.5)
