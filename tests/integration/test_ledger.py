"""The token ledger: its figures by hand, and a step that is the same with it as without."""

from __future__ import annotations

import math

import pytest
import torch

from gft_lite import lab
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.training.learner import Learner
from gft_lite.training.ledger import record_tokens
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def learner_of(method="gft", **policy):
    """A learner whose adapter does something."""
    tree = {"method": method, "policy": {"gradient_checkpointing": False, **policy},
            "rollout": {"max_tokens": 32}, "train": {"steps": 10}}  # fmt: skip
    recipe = Recipe.from_tree(tree)
    loaded = load_policy(recipe.policy)
    loaded.model.train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loaded.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Learner(loaded, recipe)


def groups_of(learner, advantages=((1.0, -0.5), (0.0, 0.0), (-0.25, 0.75))):
    """Groups of the lab's expert and of another answer as a self sample."""
    encode, found = learner.policy.tokenizer.encode, []
    for row, pair in zip(lab.rows("train", limit=len(advantages)), advantages, strict=True):
        expert, own = (tuple(encode(row[key][0])) for key in ("expert", "teacher"))
        logprobs = tuple(-0.1 * i for i in range(len(own)))
        responses = (
            Response(expert, "", "expert", reward=1.0, correct=True),
            Response(own, "", "self", logprobs=logprobs, reward=0.0, correct=False),
        )
        problem = Problem(row["id"], "", None, tuple(encode(row["problem"])))
        found.append(ScoredGroup(Group(problem, responses), pair))
    return found


def plain_logprobs(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen.gather(-1, torch.tensor(response)[:, None])[:, 0]


def trained(record):
    return [r for group in record["groups"] for r in group["responses"] if r]


def test_figures_are_those_by_hand(tmp_path):
    learner, folder = learner_of(), RunFolder(tmp_path)
    groups = groups_of(learner)
    record_tokens(learner, folder, 1, groups)
    record = folder.tokens(1)
    assert folder.token_steps() == [1]
    assert [group["problem"] for group in record["groups"]] == [g.group.problem.id for g in groups]
    # The flat group has no row; the others have both responses.
    assert [[r is not None for r in g["responses"]] for g in record["groups"]] == [
        [True, True], [False, False], [True, True],
    ]  # fmt: skip
    model = learner.policy.model
    for scored, found in zip(groups, record["groups"], strict=True):
        prompt = scored.group.problem.prompt_ids
        for (response, advantage), entry in zip(scored, found["responses"], strict=True):
            if entry is None:
                continue
            own = plain_logprobs(model, prompt, response.token_ids)
            with learner.policy.base():
                base = plain_logprobs(model, prompt, response.token_ids)
            p = own.exp()
            coefficient = advantage * torch.where(p < 0.7, p, 1.0)
            assert (entry["source"], entry["advantage"]) == (response.source, advantage)
            assert entry["logprob"] == pytest.approx(own.tolist(), rel=1e-3, abs=1e-5)
            assert entry["base"] == pytest.approx(base.tolist(), rel=1e-3, abs=1e-5)
            assert entry["coefficient"] == pytest.approx(coefficient.tolist(), rel=1e-3)
            engine = [None] * len(own) if response.logprobs is None else response.logprobs
            assert entry["engine"] == pytest.approx(list(engine))
            assert len(entry["text"]) == len(own)


def test_coefficients_of_a_loss_with_parts_are_those_of_the_tokens_part(tmp_path):
    learner, folder = learner_of("chord"), RunFolder(tmp_path)
    record_tokens(learner, folder, 1, groups_of(learner))
    for entry in trained(folder.tokens(1)):
        p = [math.exp(value) for value in entry["logprob"]]
        expected = (
            [0.1 * x * (1 - x) for x in p]
            if entry["source"] == "expert"
            else [0.9 * entry["advantage"]] * len(p)
        )
        assert entry["coefficient"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_gradients_of_the_sources_add_up_to_that_of_the_step(tmp_path):
    learner, folder = learner_of(), RunFolder(tmp_path)
    groups = groups_of(learner)
    for step in (1, 2, 10):
        record_tokens(learner, folder, step, groups)
    assert folder.tokens(2)["gradients"] is None
    assert folder.tokens(10)["gradients"] is not None
    found = folder.tokens(1)["gradients"]
    norms, cosines = found["norms"], found["cosines"]
    assert norms.keys() == {"expert", "self"} and cosines.keys() == {"expert, self"}
    learner.gradient(learner.prepare_rows(learner.rows(groups)), 0.05)
    whole = torch.cat([p.grad.flatten() for p in learner.policy.parameters().values()]).norm()
    both = 2 * cosines["expert, self"] * norms["expert"] * norms["self"]
    expected = norms["expert"] ** 2 + norms["self"] ** 2 + both
    assert whole.item() == pytest.approx(math.sqrt(expected), rel=1e-4)


def test_a_step_computes_the_same_with_it_as_without(tmp_path):
    learner = learner_of(lora={"dropout": 0.3})
    before = [p.detach().clone() for p in learner.policy.parameters().values()]
    state = torch.get_rng_state()
    record_tokens(learner, RunFolder(tmp_path), 1, groups_of(learner))
    assert torch.equal(torch.get_rng_state(), state)
    after = learner.policy.parameters().values()
    assert all(torch.equal(p, old) for p, old in zip(after, before, strict=True))
    assert all(p.grad is None for p in after)
    assert learner.policy.model.training


def test_later_steps_are_removed_and_a_damaged_file_is_named(tmp_path):
    learner, folder = learner_of(), RunFolder(tmp_path)
    for step in (1, 2):
        record_tokens(learner, folder, step, groups_of(learner))
    assert folder.group_steps() == []
    folder.truncate_after(0)
    assert folder.token_steps() == [] and folder.tokens(1) is None
    record_tokens(learner, folder, 3, groups_of(learner))
    file = tmp_path / "tokens" / "step-000003.json"
    file.write_text(file.read_text().replace('"base"', '"bass"'))
    with pytest.raises(UserError, match=r"step-000003.json: must be the token ledger of a step"):
        folder.tokens(3)
