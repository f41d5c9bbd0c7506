"""Every policy back end on a GPU: the same figures, gradients and files, and Unsloth's engine."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from gft_lite import Recipe, lab
from gft_lite.objective.losses import LossInputs
from gft_lite.objective.methods import METHODS
from gft_lite.policy.batching import Row, cut
from gft_lite.policy.registry import BACKENDS, load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.registry import start_engine
from gft_lite.training.run import train

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU to compare the back ends on", allow_module_level=True)

SMALL = [
    "train.steps=2", "train.problems_per_step=4", "data.problems=20", "data.holdout=4",
    "monitor.every=1", "monitor.problems=2", "eval.samples=1", "eval.k=[1]",
    "eval.sets.test.problems=4", "eval.sets.retention.problems=4", "policy.dtype=bfloat16",
    "policy.context=256",
]  # fmt: skip


def needed(*packages):
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def load(backend, **settings):
    needed(*filter(None, [BACKENDS[backend].needs]))
    common = {"dtype": "bfloat16", "context": 256, "gradient_checkpointing": False}
    policy = load_policy(PolicySettings(backend=backend, **(common | settings)), 3)
    policy.model.train()
    return policy


@pytest.fixture(params=sorted(BACKENDS))
def policy(request):
    return moved(load(request.param))


def moved(policy):
    """With random weights in the adapter, as a few steps would leave them."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter.device))
    return policy


def rows(policy, count=8):
    """Rows of unequal length, two to a prompt, with advantages of both signs."""
    encode = policy.tokenizer.encode
    return [
        Row(tuple(encode(row["problem"])), tuple(encode(text)), 1.5 - i % 4, 0.1)
        for i, row in enumerate(lab.rows("train", limit=count // 2))
        for text in (row["expert"][0], row["teacher"][0] + "#" * i)
    ]


def gradient(policy, batches):
    policy.model.zero_grad()
    for batch in batches:
        batch = batch.to(policy.device)
        scores = policy.token_scores(batch)
        # Without a threshold, at which half precision would decide otherwise for a few tokens.
        inputs = LossInputs(scores.logprobs, batch.advantages)
        loss = METHODS["gft_no_dcr"].loss(inputs).per_token
        (batch.weights * loss).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters().values()]).double()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_masters_are_float32(policy):
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}


def test_scores_and_gradients_are_those_of_float32(policy):
    """As near as transformers in bfloat16 is on a CPU: 0.984."""
    exact = moved(load("transformers", dtype="float32", layout="padded"))
    batches = policy.batches(rows(policy), 10**6)
    plain = cut(rows(exact), 10**6)
    with torch.no_grad():
        gaps = [
            p.token_scores(b).logprobs[b.row.argsort(stable=True).to(p.device)]
            for p, [b] in ((policy, batches), (exact, plain))
        ]
    assert (gaps[0] - gaps[1]).abs().mean() < 0.02
    assert cosine(gradient(policy, batches), gradient(exact, plain)) > 0.97


def test_every_layout_has_the_same_gradient(policy):
    padded = gradient(policy, cut(rows(policy), 10**6))
    assert policy.layout != "padded"
    assert cosine(gradient(policy, cut(rows(policy), 100, layout=policy.layout)), padded) > 0.97


def test_recomputation_changes_nothing(policy):
    again = moved(load(policy.settings.backend, gradient_checkpointing=True))
    whole = gradient(policy, cut(rows(policy), 10**6))
    assert cosine(gradient(again, cut(rows(again), 10**6)), whole) > 0.999


def test_the_base_is_the_policy_without_its_adapter(policy):
    fresh = load(policy.settings.backend)
    batch = cut(rows(policy), 10**6)[0]
    with torch.no_grad(), policy.base():
        off = policy.token_scores(batch).logprobs
    with torch.no_grad():
        assert torch.equal(off, fresh.token_scores(batch).logprobs)
        assert not torch.equal(off, policy.token_scores(batch).logprobs)


def test_a_saved_adapter_is_the_reference_of_the_next_stage(policy, tmp_path):
    saved = policy.save_adapter(tmp_path / "adapter")
    again = load(policy.settings.backend, adapter=str(saved), reference="adapter")
    for name, parameter in again.parameters().items():
        assert torch.equal(parameter, policy.parameters()[name])
    assert again.divergence(cut(rows(again), 10**6)[0]).forward.abs().max() < 1e-6


def test_decoding_gives_the_scores_of_the_whole(policy, tmp_path):
    engine = start_engine(RolloutSettings(engine="transformers"), policy, tmp_path)
    engine.sync(tmp_path, 1)
    prompts = [row.prompt_ids for row in rows(policy)[::2]]
    asked = [Request(ids, (1, 2)) for ids in prompts]
    for ids, completions in zip(prompts, engine.generate(asked, Sampling(max_tokens=24)),
                                strict=True):  # fmt: skip
        for completion in completions:
            scored = torch.tensor(engine.score(ids, completion.token_ids))
            assert (scored - torch.tensor(completion.logprobs)).abs().mean() < 0.03


def test_a_run(policy, tmp_path):
    backend = policy.settings.backend
    recipe = Recipe.load("recipes/lab.yaml", [*SMALL, f"policy.backend={backend}",
                                              "rollout.engine=transformers"])  # fmt: skip
    run = train(recipe, tmp_path / "run")
    assert [m["skipped"] for m in run.metrics()] == [None, None]
    assert (run.adapter / "adapter_model.safetensors").exists()


def test_unsloths_engine_serves_every_adapter(tmp_path):
    needed("unsloth", "vllm", "vllm_bnb_plugin")
    recipe = Recipe.load("recipes/lab.yaml", [*SMALL, "policy.backend=unsloth",
                                              "rollout.engine=unsloth"])  # fmt: skip
    run = train(recipe, tmp_path / "run")
    assert max(m["sync_gap"] for m in run.metrics()) < 0.05
