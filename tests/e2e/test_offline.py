"""Groups sampled before training: filled once, killed and continued, trained from, refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from io import StringIO

import pytest
from rich.console import Console

from gft_lite import Recipe, RecipeError
from gft_lite.cli import main
from gft_lite.training.presample import presample
from gft_lite.training.presampled_groups import PresampledGroups
from gft_lite.training.run import train
from gft_lite.utils.errors import UserError

# A user's own engine, which writes down every seed that it has sampled by.
ENGINE = """
import os, signal
from pathlib import Path
from gft_lite.rollout.transformers_engine import TransformersEngine

class Engine(TransformersEngine):
    def __init__(self, *args):
        if os.environ.get("ENGINE") == "broken":
            raise RuntimeError("opened")
        super().__init__(*args)

    def generate(self, requests, sampling, *seen):
        done = super().generate(requests, sampling, *seen)
        log = Path(os.environ["ENGINE_LOG"])
        seeds = log.read_text() if log.exists() else ""
        if os.environ.get("ENGINE") == "killed" and len(seeds.split()) > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        log.write_text(seeds + "".join(f"{s} " for r in requests for s in r.seeds))
        return done
"""
# 8 problems to train on, 4 a step: step 3 visits 4 of them again.
SMALL = [
    "train.steps=3", "train.problems_per_step=4", "data.problems=10", "data.holdout=2",
    "monitor.every=1", "monitor.problems=2", "eval.samples=1", "eval.k=[1]", "optim.lr=1e-2",
    "eval.sets.test.problems=2", "eval.sets.retention.problems=2", "optim.warmup=0",
    "rollout.batch_size=4", "rollout.engine=seen_engine:Engine", "checkpoint.every=1",
    "checkpoint.keep=3",
]  # fmt: skip
LAB = "recipes/lab.yaml"


def recipe(*overrides):
    return Recipe.load(LAB, [*SMALL, *overrides])


def trained(out, *overrides, settings=None, **options):
    """A run, and what it said."""
    said = StringIO()
    run = train(
        settings or recipe(*overrides), out, console=Console(file=said, width=500), **options
    )
    return run, said.getvalue()


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder that holds the user's engine."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "seen_engine.py").write_text(ENGINE)
    sys.path.append(str(folder))
    os.environ["ENGINE_LOG"] = str(folder / "seeds")
    yield folder
    del os.environ["ENGINE_LOG"]
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def filled(here):
    """Every problem's group, sampled once; what was computed with the base is formatted anew."""
    folder = here / "filled"
    presample(recipe(), folder)
    for name in ("kl_set.json", "eval/base.json"):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value, indent=3))
    return folder


@pytest.fixture(scope="module")
def offline(here, filled):
    """A run that trains from them, with the engine broken."""
    os.environ["ENGINE"] = "broken"
    try:
        return trained(here / "run", f"group.offline={filled}")
    finally:
        del os.environ["ENGINE"]


def test_while_the_policy_is_the_base_every_step_is_that_of_an_online_run(here, filled):
    still = ["optim.lr=1e-12", "train.steps=2"]
    ours, _ = trained(here / "still", *still, f"group.offline={filled}")
    theirs, _ = trained(here / "still_online", *still)
    for a, b in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert ours.groups(a["step"]) == theirs.groups(a["step"])
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
        assert b["rollout_tokens"] > 0 == a["rollout_tokens"]


def test_later_steps_have_the_bases_responses(filled, offline):
    run, said = offline
    kept = {(g["problem"]["id"], g["visit"]): g for g in lines(filled)}
    assert len(kept) == 8
    for step in (1, 2, 3):
        for group in run.groups(step):
            stored = kept[group["problem"]["id"], 0]["responses"]
            assert [r["token_ids"] for r in group["responses"]] == [r["token_ids"] for r in stored]
            assert [r["reward"] for r in group["responses"]] == [r["reward"] for r in stored]
    assert "(off-policy)" in said
    assert "4 of 12 visits use the group of an earlier epoch" in said
    assert run.summary()["off_policy"] is True


def test_what_the_base_was_asked_is_not_asked_again(filled, offline):
    run, _ = offline
    for name in ("kl_set.json", "eval/base.json"):
        assert (run.path / name).read_bytes() == (filled / name).read_bytes()
    assert set(run.metrics()[0]["kl"]) == {"held_out"}
    assert run.summary()["trained"]["kl"] > 0


def test_an_adapter_to_start_from_samples(here, offline):
    run, _ = offline
    start = [f"policy.adapter={run.adapter}", "train.steps=1"]
    presample(recipe(*start), here / "adapted")
    ours, _ = trained(here / "adapted_run", *start, f"group.offline={here / 'adapted'}")
    theirs, _ = trained(here / "adapted_online", *start)
    assert ours.groups(1) == theirs.groups(1)
    assert ours.groups(1) != run.groups(1)


def test_without_evaluation_nothing_is_sampled(here, monkeypatch):
    tree = recipe("data.holdout=0", "train.steps=2").model_dump()
    tree["eval"]["sets"] = {}
    presample(Recipe.from_tree(tree), here / "bare")
    tree["group"]["offline"] = str(here / "bare")
    monkeypatch.setenv("ENGINE", "broken")
    run, _ = trained(here / "bare_run", settings=Recipe.from_tree(tree))
    assert json.loads((run.path / "eval" / "trained.json").read_text()) == {}
    assert (run.path / "kl_set.json").read_bytes() == (here / "bare/kl_set.json").read_bytes()
    assert run.summary()["steps"] == 2


def test_a_resumed_run_ends_as_if_nothing_was(here, filled, offline):
    run, _ = offline
    again = here / "again"
    shutil.copytree(run.path, again)
    for gone in ("checkpoints/step-000002", "checkpoints/step-000003", "adapter"):
        shutil.rmtree(again / gone, ignore_errors=True)
    assert [p.name for p in (again / "checkpoints").iterdir()] == ["step-000001"]
    trained(again, f"group.offline={filled}", resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (run.path / weights).read_bytes()


def test_killed_and_continued_samples_nothing_twice(here, filled, monkeypatch, capsys, fork_server):
    out, log = here / "killed", here / "killed_seeds"
    monkeypatch.setenv("ENGINE_LOG", str(log))
    arguments = ["groups", LAB, *SMALL, "--out", str(out)]
    with contextlib.chdir(here):
        killed = fork_server.run(*arguments, env=os.environ | {"ENGINE": "killed"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    begun = len(lines(out))
    assert 0 < begun < 8
    with pytest.raises(RecipeError, match=f"8 problems .* without {8 - begun} of them"):
        trained(here / "early", f"group.offline={out}")
    assert main(arguments) == 0
    seeds = log.read_text().split()
    assert len(seeds) == len(set(seeds)) > 32
    assert (out / "groups.jsonl").read_bytes() == (filled / "groups.jsonl").read_bytes()
    shown = capsys.readouterr().out
    assert "8 groups, " in shown
    assert "responses" in shown and "8" in shown


def test_further_visits_are_drawn_anew(here, filled):
    out = here / "twice"
    shutil.copytree(filled, out)
    presample(recipe(), out, visits=2)
    old, new = lines(out)[:8], lines(out)[8:]
    assert old == lines(filled)
    assert [g["visit"] for g in new] == [1] * 4
    first = {g["problem"]["id"]: own_ids(g) for g in old}
    assert all(own_ids(g) != first[g["problem"]["id"]] for g in new)


def test_half_a_line_is_cut_off(filled, tmp_path):
    shutil.copytree(filled, tmp_path / "torn")
    file = tmp_path / "torn" / "groups.jsonl"
    whole = file.read_bytes()
    os.truncate(file, len(whole) - 30)
    groups = PresampledGroups(tmp_path / "torn")
    assert len(groups) == 7
    groups.add([], [])
    assert file.read_bytes() == whole[: whole[:-1].rfind(b"\n") + 1]


def test_another_recipe_is_refused_with_every_difference(filled, tmp_path):
    with pytest.raises(RecipeError) as caught:
        trained(tmp_path, f"group.offline={filled}", "policy.quantization=none", "group.self=3",
                "rollout.temperature=0.5", "data.seed=7")  # fmt: skip
    found = {text.partition(":")[0]: text for text in caught.value.problems}
    assert set(found) == {"policy.quantization", "group.self", "rollout.temperature", "data.seed"}
    assert "must be 4 as in" in found["group.self"] and "got 3." in found["group.self"]


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda g: g["responses"][-1]["logprobs"].__setitem__(0, -90.0), "samples of this base"),
        (lambda g: g["problem"].update(answer="x"), "must be of the same data"),
        (lambda g: g.pop("visit"), "groups.jsonl:1: must be a group"),
    ],
)
def test_groups_of_something_else_are_refused(filled, tmp_path, changed, message):
    shutil.copytree(filled, tmp_path / "other")
    groups = lines(filled)
    for group in groups:
        group["responses"] = group["responses"][:4] + group["responses"][-1:]
        changed(group)
    text = "".join(json.dumps(g) + "\n" for g in groups)
    (tmp_path / "other" / "groups.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        trained(tmp_path / "run", f"group.offline={tmp_path / 'other'}")


def test_what_does_not_go_with_offline_groups_is_told_at_once():
    with pytest.raises(RecipeError) as caught:
        Recipe.load("recipes/lab_grpo.yaml", ["group.offline=x", "rollout.resample=1"])
    told = " ".join(caught.value.problems)
    assert "rollout.resample: must be 0 with group.offline" in told
    assert "method: must not need samples of the current policy, as grpo does," in told
    with pytest.raises(RecipeError, match=r"stages: must be empty with group\.offline"):
        recipe("group.offline=x", "stages=[gft, gft]")


def test_no_folder_is_told_with_what_fills_it(tmp_path):
    with pytest.raises(RecipeError, match="must be a folder that gft-lite groups filled"):
        trained(tmp_path / "run", f"group.offline={tmp_path / 'none'}")


def lines(folder):
    return [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]


def own_ids(group):
    return [r["token_ids"] for r in group["responses"] if r["source"] == "self"]
