"""The dry step of one run: what it repeats, what it keeps, and what it depends on."""

from __future__ import annotations

import datetime
import os
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import find_folder
from gft_lite.training import dry_step as module
from gft_lite.training.dry_step import dry_step
from gft_lite.training.setup import Place, setup_run
from gft_lite.utils.distributed import SINGLE_PROCESS

TINY = [
    "rollout.engine=transformers", "train.problems_per_step=2", "data.problems=12",
    "data.holdout=2", "monitor.problems=1", "eval.sets={}",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run at its start, with a cache of its own."""
    recipe = Recipe.load("recipes/lab.yaml", TINY)
    folder = find_folder(recipe, tmp_path_factory.mktemp("run") / "run", resume=False,
                         distributed=SINGLE_PROCESS)  # fmt: skip
    with ExitStack() as stack:
        console = Console(file=StringIO(), width=200)
        yield setup_run(recipe, Place(folder, SINGLE_PROCESS, console, stack))


@pytest.fixture
def printed(run, tmp_path, monkeypatch):
    """Takes the dry step of the run with an empty cache at first; returns what is printed."""
    monkeypatch.setenv("GFT_LITE_CACHE", str(tmp_path / "cache"))

    def take():
        console = Console(file=StringIO(), width=400)
        dry_step(replace(run, console=console))
        return console.file.getvalue()

    return take


def test_a_step_that_fitted_is_not_repeated(run, printed):
    before = datetime.date.today()
    assert printed().startswith("dry step: forward and backward")
    record, text = module._record(run), printed()
    assert text.startswith("dry step: skipped, as micro-batches of ")
    days = (before, datetime.date.today())  # Midnight may have passed.
    assert text.endswith(tuple(f" tokens fitted on {day.isoformat()}\n" for day in days))
    for damage in ("", "{}", '{"fitted": 3}', '{"fitted": "yesterday"}', "\0"):
        record.write_text(damage)
        assert printed().startswith("dry step: forward and backward")
        assert printed().startswith("dry step: skipped")
    record.unlink()
    assert printed().startswith("dry step: forward and backward")


def test_a_step_for_which_memory_ran_out_is_repeated(run, printed):
    limit, failures = (
        run.learner.micro_batch_tokens,
        [torch.OutOfMemoryError("CUDA out of memory.")],
    )

    def full_once(*_):
        if failures:
            raise failures.pop()

    hook = run.policy.model.get_base_model().model.register_forward_pre_hook(full_once)
    printed()
    hook.remove()
    assert failures == []
    assert run.learner.micro_batch_tokens < limit
    run.learner.micro_batch_tokens = limit
    assert printed().startswith("dry step: forward and backward")
    assert printed().startswith("dry step: skipped")


def test_it_depends_on_what_it_is_computed_from_and_on_nothing_else(run, monkeypatch):
    def record(**sections):
        tree = run.recipe.model_dump()
        for name, own in sections.items():
            tree[name] = tree[name] | own if isinstance(own, dict) else own
        return module._record(replace(run, recipe=Recipe.model_validate(tree)))

    same = record()
    assert same.name.endswith(".json")
    assert same == record(seed=5, name="other", optim={"lr": 3e-6}, train={"steps": 7})
    others = [
        record(group={"self": 3}), record(rollout={"max_tokens": 9}),
        record(policy={"fused_head": False}), record(objective={"tau": 0.3}),
        record(train={"problems_per_step": 3}),
    ]  # fmt: skip
    run.learner.micro_batch_tokens += 1
    others.append(record())
    run.learner.micro_batch_tokens -= 1
    two = replace(run.distributed, world_size=2)
    others.append(module._record(replace(run, distributed=two)))
    longest = max(run.builder.problems, key=lambda problem: len(problem.prompt_ids))
    longer = replace(longest, prompt_ids=(*longest.prompt_ids, 1))
    for changed, name, value in (
        (run.builder, "problems", [*run.builder.problems, longer]),
        (run.policy.config, "max_position_embeddings", 7),
        (module, "__version__", "0.0.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(changed, name, value)
            others.append(record())
    assert record() == same
    assert len({same, *others}) == 1 + len(others)
    # The code of others may change between two runs.
    assert record(policy={"trust_remote_code": True}) is None
    with monkeypatch.context() as patch:
        patch.setattr(run.learner, "teacher", run.policy)
        assert record() is None
    assert os.path.dirname(same).endswith("dry_steps")
