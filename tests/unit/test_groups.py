"""Group composition, the shortfall rule, and the seeds of samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gft_lite.recipe.sections import GroupSettings
from gft_lite.rollout import sampling
from gft_lite.training import groups
from gft_lite.types import Group, Problem, Response


def problem(experts=1, teachers=3, id="p"):
    return Problem(
        id, "text", "42", prompt_ids=(1, 2),
        experts=tuple(f"e{i}" for i in range(experts)),
        teachers=tuple(f"t{i}" for i in range(teachers)),
    )  # fmt: skip


def composed(settings, visit=0, **counts):
    composition = groups.compose(problem(**counts), GroupSettings(**settings), visit)
    return composition and (composition.experts, composition.teachers, composition.self_samples)


def test_what_the_recipe_asks_for():
    assert composed({"expert": 1, "teacher": 2, "self": 5}) == (("e0",), ("t0", "t1"), 5)


def test_more_demonstrations_than_wanted_take_turns():
    settings = {"expert": 1, "teacher": 2, "self": 0}
    seen = [composed(settings, visit, teachers=3)[1] for visit in range(3)]
    assert seen == [("t0", "t1"), ("t2", "t0"), ("t1", "t2")]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("self", (("e0",), ("t0",), 6)), ("repeat", (("e0",), ("t0",) * 3, 4)), ("drop", None)],
)
def test_shortfall(rule, expected):
    settings = {"expert": 1, "teacher": 3, "self": 4, "shortfall": rule}
    assert composed(settings, teachers=1) == expected


def test_nothing_to_repeat_drops_the_problem():
    assert composed({"shortfall": "repeat"}, teachers=0) is None


counts = st.integers(0, 4)


@given(counts, counts, counts, counts, st.integers(0, 5), st.integers(0, 9),
       st.sampled_from(["self", "repeat", "drop"]))  # fmt: skip
def test_a_group_always_has_its_size(expert, teacher, experts, teachers, own, visit, rule):
    if expert + teacher + own == 0:
        return
    settings = GroupSettings(expert=expert, teacher=teacher, self=own, shortfall=rule)
    composition = groups.compose(problem(experts, teachers), settings, visit)
    if composition is None:
        assert rule != "self"
        assert experts < expert or teachers < teacher
    else:
        size = len(composition.experts) + len(composition.teachers) + composition.self_samples
        assert size == settings.size


def test_no_two_samples_share_a_seed_and_every_part_counts():
    problems = [problem(id="a"), problem(id="b"), problem(id="a")]

    def seeds(problems, parts):
        draws = [sampling.Draw(problem, 4, parts) for problem in problems]
        return [r.seeds for r in sampling.make_requests(draws)]

    drawn = [s for parts in [(0, 1), (0, 2), (1, 1)] for r in seeds(problems, parts) for s in r]
    assert len(set(drawn)) == 36
    assert all(0 <= s < 2**63 for s in drawn)
    assert seeds(problems[1:2], (0, 1)) == [tuple(drawn[4:8])]


def test_a_seed_is_the_same_on_every_machine():
    assert sampling.sample_seed(0, 1, "p", 2) == 7141471975444775072


def test_an_unscored_group_has_no_rewards():
    group = Group(problem(), (Response((1,), "", "self"),))
    with pytest.raises(ValueError, match="not every response has been graded"):
        group.rewards  # noqa: B018
