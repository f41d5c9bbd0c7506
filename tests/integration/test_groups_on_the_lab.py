"""Groups made of real demonstrations and real samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from gft_lite.data.problems import load_problems
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DataSettings, RolloutSettings
from gft_lite.rollout.registry import start_engine
from gft_lite.training.groups import GroupBuilder
from gft_lite.training.visits import ProblemVisit


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
