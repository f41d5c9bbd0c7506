"""`gft-lite audit`: every method passes; deliberate errors of losses, learners, optimisers fail."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gft_lite import lab
from gft_lite.cli import main
from gft_lite.objective.losses import LossInputs, LossOutput
from gft_lite.objective.methods import METHODS, Method
from gft_lite.recipe.schema import Recipe
from gft_lite.training.audit import ROUNDINGS, audit, optimizer_gap
from gft_lite.training.learner import Learner

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def recipe(method="gft", **sections):
    tree = {"method": method, "data": {"holdout": 32}, "rollout": {"max_tokens": 32}}
    if method == "opd":  # Whose teacher is not loaded: an audit invents its log-probs.
        tree["teacher"] = {"model": "another"}
    return Recipe.from_tree({**tree, **sections})


def failures(method="gft", **options):
    """The names of the checks that fail, without the two processes."""
    found = audit(recipe(method), processes=False, **options)
    return {check.name for check in found.checks if not check.passed}


# Methods of equal functions and reduction have equal gradients.
DISTINCT = {
    (m.loss, m.select, m.prefixes, m.defaults["objective"].get("reduction")): name
    for name, m in METHODS.items()
}


@pytest.mark.parametrize("method", DISTINCT.values())
def test_every_method_passes(method):
    found = audit(recipe(method), processes=False)
    assert [check for check in found.checks if not check.passed] == []
    rounding, *others = [check for check in found.checks if check.limit is not None]
    # fp32 rounding decides every limit, and no difference is 0 by accident of comparing nothing.
    assert 0 < rounding.difference < 1e-4
    assert all(check.limit < 10 * ROUNDINGS * rounding.difference for check in others)
    assert sum(check.difference > 0 for check in others) >= 5


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"kl": 0.1, "entropy": 0.01, "mask_truncated": True}},
        {"objective": {"importance": {"mode": "token_truncate"}}},
        {"method": "grpo", "objective": {"importance": {"mode": "sequence_mask"}}},
        {"method": "chord", "train": {"updates_per_rollout": 2}},
        {"method": "psft"},
    ],
)
def test_settings_of_the_loss_pass(sections):
    found = audit(recipe(**{"method": "gft", **sections}), processes=False)
    assert [check for check in found.checks if not check.passed] == []


# --- losses of a user --------------------------------------------------------------------------


def mean_of_micro_batch(inputs: LossInputs) -> LossOutput:
    """A loss averaged over the micro-batch that it sees, as in arXiv 2604.23747."""
    return LossOutput(-inputs.logprobs / inputs.logprobs.numel())


def normalised_advantages(inputs: LossInputs) -> LossOutput:
    """Advantages normalised over the micro-batch."""
    advantages = inputs.advantages - inputs.advantages.mean()
    return LossOutput(-advantages * inputs.logprobs)


def penalised(inputs: LossInputs) -> LossOutput:
    """A term that does not vanish with the advantage."""
    return LossOutput(-(inputs.advantages + 0.01) * inputs.logprobs)


SOURCES = ("expert", "teacher", "self")
MEAN = Method(mean_of_micro_batch, SOURCES, "a deliberate error", group_advantages=False)
NORMALISED = Method(normalised_advantages, SOURCES, "a deliberate error")
PENALISED = Method(penalised, SOURCES, "a deliberate error", scales_with_advantage=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MEAN", {"2 micro-batches", "3 micro-batches", "7 micro-batches"}),
        ("NORMALISED", {"2 micro-batches", "3 micro-batches", "7 micro-batches"}),
        ("PENALISED", {"zero-advantage rows kept", "1 micro-batch; token_mean"}),
    ],
)
def test_a_wrong_loss_fails(name, expected):
    assert expected <= failures(f"{__name__}:{name}")


# --- learners and optimisers -------------------------------------------------------------------


class MeanOfMeans(Learner):
    """Averages the micro-batches' own means."""

    def make_micro_batches(self, rows, at_least=1):
        batches = super().make_micro_batches(rows, at_least)
        return [replace(b, weights=b.weights / b.weights.sum() / len(batches)) for b in batches]


class OtherReduction(Learner):
    """Weights rows alike where the recipe states a token mean."""

    def rows(self, groups):
        rows = super().rows(groups)
        return [replace(r, weight=1 / len(rows) / len(r.response_ids)) for r in rows]


class LastMicroBatch(torch.optim.AdamW):
    """An optimiser that offloads each micro-batch's gradient over that of the one before."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.sums, self.last = {}, {}
        for parameter in self.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self.offload)

    def offload(self, parameter):
        before = self.sums.get(parameter, 0.0)
        self.last[parameter] = parameter.grad - before
        self.sums[parameter] = parameter.grad.clone()

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.copy_(self.last[parameter])
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        self.sums.clear()
        super().zero_grad(set_to_none)


class Offloading(Learner):
    """A learner with that optimiser."""

    def __init__(self, policy, settings):
        super().__init__(policy, settings)
        self.optimizer = LastMicroBatch(policy.parameters().values())

    def gradient(self, *arguments, **options):
        self.optimizer.sums.clear()
        return super().gradient(*arguments, **options)


OPTIMIZER = "2 steps of AdamW, 3 micro-batches each"


@pytest.mark.parametrize(
    ("learner", "expected"),
    [
        (MeanOfMeans, {"2 micro-batches", "3 micro-batches", "7 micro-batches", OPTIMIZER}),
        (OtherReduction, {"1 micro-batch; token_mean", "the loss that is reported"}),
    ],
)
def test_a_wrong_learner_fails(learner, expected):
    assert expected <= failures("sft_mix", make_learner=learner)


def test_an_optimizer_that_drops_micro_batches_fails():
    assert failures(make_learner=Offloading) == {OPTIMIZER}


def test_optimizers_are_compared_on_equal_gradients():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 32, generator=generator)]
    assert optimizer_gap(torch.optim.AdamW, torch.optim.AdamW, weights, "cpu") == 0
    assert optimizer_gap(torch.optim.Adam, torch.optim.SGD, weights, "cpu") > 1e-3


# --- the command -------------------------------------------------------------------------------


OWN_LOSS = """
from gft_lite.objective.losses import LossOutput
from gft_lite.objective.methods import Method

def loss(inputs):
    return LossOutput(-(inputs.advantages + 0.01) * inputs.logprobs)

METHOD = Method(loss, ("expert", "teacher", "self"), "an error", scales_with_advantage=True)
"""


@pytest.fixture
def results_of(tmp_path, monkeypatch, capsys):
    """The exit code of the command, and what its table has at the right of each check."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_loss.py").write_text(OWN_LOSS)

    def run(method):
        recipe = f"method: {method}\npolicy: {{model: lab}}\nrollout: {{max_tokens: 32}}\n"
        (tmp_path / "recipe.yaml").write_text(recipe)
        code = main(["audit", "recipe.yaml", "--allow-code"])
        rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
        return code, {row[0].strip(): row[-1].strip() for row in rows if len(row) > 3}

    return run


def failed(results):
    return {check for check, result in results.items() if result.startswith("FAILED")}


def test_the_command_prints_a_table(results_of):
    code, results = results_of("own_loss:METHOD")
    assert (code, results["2 processes"]) == (1, "ok")
    assert failed(results) == {
        "1 micro-batch; token_mean", "the loss that is reported", "zero-advantage rows kept",
    }  # fmt: skip


def test_the_command_of_a_right_method_ends_with_0(results_of, monkeypatch):
    # Several processes, whose start costs more than all else, are in the test above.
    alone = functools.partial(audit, processes=False)
    monkeypatch.setattr("gft_lite.training.audit.audit", alone)
    code, results = results_of("sft")
    assert (code, failed(results)) == (0, set()) and "ok" in results.values()


def test_a_model_is_replaced_by_a_small_one_of_its_kind(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=256, num_hidden_layers=5, num_attention_heads=8,
        intermediate_size=512, bos_token_id=1, eos_token_id=2, head_dim=32,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(lab.BASE).save_pretrained(tmp_path)
    found = audit(recipe("gft", policy={"model": str(tmp_path)}), processes=False)
    assert [check for check in found.checks if not check.passed] == []
    assert "llama with 0." in found.title


def test_a_wrong_recipe_is_an_error(capsys):
    code = main(["audit", str(ROOT / "recipes" / "lab.yaml"), "data.source=nowhere.jsonl"])
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("data.source: ")
