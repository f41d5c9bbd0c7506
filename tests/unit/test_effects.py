"""Which results depend on a field: every field has metadata, and its three readers go by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel

from gft_lite.recipe.annotations import section_class
from gft_lite.recipe.effects import (
    EVALUATION,
    EVERYTHING,
    NO_RESULT,
    SAMPLING,
    TRAINING,
    Affects,
    fields_affecting,
)
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import base_inputs
from gft_lite.runs.folder import find_folder
from gft_lite.training.presampled_groups import check_sampling_recipe
from gft_lite.utils.distributed import SINGLE_PROCESS
from gft_lite.utils.errors import RecipeError


def effects(schema: type[BaseModel], above: str = "", given: Affects | None = None) -> Iterator:
    """Every field that is no section, with what it affects."""
    for name, field in schema.model_fields.items():
        own = next((m for m in field.metadata if isinstance(m, Affects)), given)
        section = section_class(field.annotation)
        if section and not str(field.annotation).startswith(("list", "dict")):
            yield from effects(section, f"{above}{name}.", own)
        else:
            yield f"{above}{name}", own


def test_every_field_of_every_section_has_metadata():
    found = dict(effects(Recipe))
    assert len(found) > 90
    assert [name for name, affected in found.items() if affected is None] == []
    # Whatever the base's samples depend on, the run does as well.
    assert all(not affected or Affects.RUN in affected for affected in found.values())


def test_a_field_without_metadata_is_an_error():
    class Inner(BaseModel):
        right: Annotated[int, TRAINING] = 1
        left: int = 2

    class Outer(BaseModel):
        inner: Inner = Inner()

    with pytest.raises(TypeError, match=r"inner\.left: must have an Affects"):
        fields_affecting(Outer, Affects.RUN)


def test_sections_are_cut_to_the_fields_that_count():
    class Inner(BaseModel):
        both: Annotated[int, EVERYTHING] = 1
        run: Annotated[int, TRAINING] = 2

    class Outer(BaseModel):
        inner: Inner = Inner()
        marked: Annotated[Inner, SAMPLING] = Inner()
        free: Annotated[Inner, NO_RESULT] = Inner()

    assert fields_affecting(Outer, Affects.GROUPS) == {"inner": {"both": True}, "marked": True}
    assert fields_affecting(Outer, Affects.BASE) == {"inner": {"both": True}}
    assert fields_affecting(Outer, EVALUATION | SAMPLING) == {"inner": {"both": True}}
    assert fields_affecting(Outer, Affects.RUN) == {
        "inner": {"both": True, "run": True}, "marked": True,
    }  # fmt: skip


# Override, and what it changes: the presampled groups, the base's files, the run.
CASES = [
    ("seed=1", "base run"),
    ("name=other", "run"),
    ("method=gft_no_dcr", "run"),
    ("policy.model=other", "groups base run"),
    ("policy.revision=v2", "groups base run"),
    ("policy.adapter=other", "groups base run"),
    ("policy.quantization=int8", "groups base run"),
    ("policy.context=512", "groups base run"),
    ("policy.dtype=float16", "base run"),
    ("policy.attention=eager", "base run"),
    ("policy.lora.rank=4", "run"),
    ("policy.layout=padded", "run"),
    ("policy.gradient_checkpointing=false", ""),
    ("policy.offload_checkpoints=true", ""),
    ("data.source=rows.jsonl", "groups base run"),
    ("data.columns.expert=[a, b]", "groups base run"),
    ("data.prompt.template='Q: {problem}'", "groups base run"),
    ("data.prompt={style: chat, chat_template_kwargs: {x: 1}}", "groups base run"),
    ("data.columns.messages=talk", "groups base run"),
    ("data.seed=3", "groups base run"),
    ("data.holdout=5", "groups base run"),
    ("data.difficulty.from=x", "run"),
    ("group.self=2", "groups run"),
    ("group.shortfall=drop", "groups run"),
    ("group.offline=folder", "run"),
    ("objective.tau=0.1", "run"),
    ("objective.kl=0.1", "run"),
    ("reward.functions=[math, format]", "groups base run"),
    ("reward.functions=[{name: math, weight: 2}]", "groups base run"),
    ("reward.timeout=1", "base run"),
    ("reward.workers=7", ""),
    ("reward.concurrency=7", ""),
    ("rollout.temperature=0.5", "groups run"),
    ("rollout.top_p=0.5", "groups run"),
    ("rollout.top_k=5", "groups run"),
    ("rollout.max_tokens=5", "groups base run"),
    ("rollout.stop=END", "groups base run"),
    ("rollout.engine=transformers", "base run"),
    ("rollout.base=original", "base run"),
    ("rollout.dtype=bfloat16", "base run"),
    ("rollout.resample=1", "run"),
    ("rollout.gpu_memory=0.4", ""),
    ("rollout.batch_size=7", ""),
    ("rollout.probe_limit=0.5", ""),
    ("optim.lr=0.5", "run"),
    ("optim.betas=[0.5, 0.6]", "run"),
    ("train.steps=7", "run"),
    ("train.micro_batch_tokens=77", ""),
    ("train.memory=8GiB", ""),
    ("budget.problems=7", "run"),
    ("stages=[gft, gft]", "run"),
    ("monitor.every=3", "run"),
    ("monitor.problems=3", "base run"),
    ("eval.samples=16", "base run"),
    ("eval.sets={a: {source: lab}}", "base run"),
    ("eval.problems=5", "run"),
    ("early_stop.min_delta=0.1", "run"),
    ("guard.window=9", "run"),
    ("guard.action=none", "run"),
    ("checkpoint.every=3", ""),
    ("checkpoint.keep=3", ""),
    ("log.groups=false", ""),
    ("log.trackers=[wandb]", ""),
]


@pytest.mark.parametrize(("override", "expected"), CASES)
def test_a_changed_field(override: str, expected: str, tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("data: {holdout: 4}\n")
    old, new = Recipe.load(file), Recipe.load(file, [override])
    assert old != new
    (tmp_path / "recipe.yaml").write_text(old.to_yaml())
    changed = []
    field = override.partition("=")[0]
    try:
        check_sampling_recipe(tmp_path, new, "group.offline")
    except RecipeError as error:
        assert str(error).startswith(field)
        changed.append("groups")
    if base_inputs(old) != base_inputs(new):
        changed.append("base")
    try:
        folder = find_folder(new, tmp_path, resume=True, distributed=SINGLE_PROCESS)
        assert folder.path == tmp_path
    except RecipeError as error:
        assert f"recipe.yaml differs in {field}" in str(error)
        changed.append("run")
    assert changed == expected.split()


def test_without_held_out_problems_the_groups_select_those_of_the_kl_set():
    def inputs(*overrides: str) -> str:
        return base_inputs(Recipe.load("recipes/lab.yaml", ["data.holdout=0", *overrides]))

    assert inputs("group.self=2") != inputs()
    assert inputs("data.difficulty.from=x") != inputs()
    assert inputs("group.offline=x") == inputs()


def test_samples_that_go_on_need_the_same_seed(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(Recipe().to_yaml())
    other = Recipe.from_tree({"seed": 5})
    check_sampling_recipe(tmp_path, other, "--out")
    with pytest.raises(RecipeError, match=r"^seed: must be 0 as in .*, got 5\."):
        check_sampling_recipe(tmp_path, other, "--out", compare_seed=True)
