"""The check of the GPU path, in full on a CPU at tiny size: every part, and what happens when one
raises, dies, hangs or is not reached."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from waiting import wait_until

from benchmarks.gpu_check.parts import Part, Skip, run
from benchmarks.gpu_check.results import written
from benchmarks.gpu_check.scale import MIDDLE, MODELS, SMALL, Setup
from benchmarks.record import RESULTS

ROOT = Path(__file__).resolve().parents[2]
TINY = Setup("cpu", tiny=True)


def start(out, *parts, minutes=30):
    """The script in a process of its own, as anybody runs it."""
    command = [
        sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny",
        "--minutes", str(minutes), "--parts", *parts, "--out", str(out),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The figures of all parts, half of them in one process and half in another."""
    folder = tmp_path_factory.mktemp("check")
    halves = {
        "a": ("environment", "attention", "gradients", "steps_7b"),
        "b": ("cards", "engine", "trl", "steps_8b"),
    }
    running = {name: start(folder / f"{name}.json", *parts) for name, parts in halves.items()}
    figures = {}
    for name, process in running.items():
        out, errors = process.communicate(timeout=2400)
        assert process.returncode == 0, errors
        assert f"written: {folder / name}.json" in out
        figures |= json.loads((folder / f"{name}.json").read_text())["figures"]
    return figures


def cases(found, part):
    """A part's cases, all of them without an error or a wrong answer."""
    entry = found[part]
    assert entry["status"] == "done", entry["status"]
    for name, figures in entry["cases"].items():
        assert "error" not in figures, f"{name}: {figures['error']}"
        assert figures.get("right", True), name
    return entry["cases"]


def test_the_machine_and_its_ceilings(found):
    figures = cases(found, "environment")
    assert "gpu" not in figures["machine"]
    assert figures["copy"]["gb_per_s"] > 0.1
    assert figures["matmul"]["tflop_per_s"] > 1e-4


def test_segment_attention_is_attention_under_its_mask(found):
    figures = cases(found, "attention")
    for heads in ("qwen_1.5b", "qwen_7b", "llama_8b", "deepseek_7b", "window"):
        # Two prompts, and three responses of each.
        assert figures[heads]["segments"] == 2 * (1 + 3)
        assert max(figures[heads]["ours"]["relative_gap"].values()) < 1e-5
    assert {figures[f"layout of {model}"]["layout"] for model in MODELS} == {"shared"}


def test_every_path_has_the_reference_s_gradient(found):
    figures = cases(found, "gradients")
    paths = [name for name in figures if name.startswith("nf4 ")]
    assert len(paths) == 7
    assert all(figures[name]["relative_gap"] < 1e-5 for name in paths)
    layouts = {figures[f"nf4 {name}"]["layout"] for name in ("default", "packed", "padded")}
    assert layouts == {"shared", "packed", "padded"}
    # bf16 rounds to 3 digits; NF4 changes far more, and is told apart from it.
    assert 1e-4 < figures["bf16"]["relative_gap"] < 0.03 < figures["quantisation"]["relative_gap"]


@pytest.mark.parametrize("part", ["steps_7b", "steps_8b"])
def test_steps_agree_with_each_other_and_with_the_plan(found, part):
    figures = cases(found, part)
    del figures["build"]
    names = [name for name in figures if "40_percent" not in name]
    losses = [figures[name]["loss"] for name in names]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    for name, case in figures.items():
        assert not case["halved"]
        assert abs(case["over_plan_percent"]) < 10, name


def test_steps_count_their_tokens(found):
    from benchmarks.gpu_check.work import make_groups

    groups = make_groups(TINY, 512)
    lengths = [[len(response) for response in group["responses"]] for group in groups]
    trained = sum(map(sum, lengths))
    figures = cases(found, "steps_7b")

    def forwarded(case):
        return figures[case]["forwarded_per_trained"] * trained

    # A group of 8 with its prompt of 24 may not fit a micro-batch of 256 tokens.
    assert forwarded("large_micro_batches") == pytest.approx(5 * 24 + trained)
    assert forwarded("layout_packed") == pytest.approx(40 * 24 + trained)
    assert forwarded("layout_padded") > forwarded("layout_packed")
    kept = sum(map(sum, lengths[2:]))
    assert forwarded("40_percent_flat") == pytest.approx(3 * 24 + kept)
    assert figures["40_percent_flat"]["loss"] == pytest.approx(
        figures["40_percent_flat_kept"]["loss"], rel=1e-5
    )


def test_what_the_plan_promises_fits(found):
    figures = cases(found, "cards")
    assert len(figures) == 4 * len(MODELS)
    assert all(case["training_fits"] for case in figures.values())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
def test_the_engine_serves_what_the_trainer_has(found):
    figures = cases(found, "engine")
    assert figures["hot_loads"]["wrong_greedy_answers"] == 0
    assert figures["hot_loads"]["worst_gap_nats"] < 1e-4
    assert figures["sleep"]["right"]
    assert figures["generate"]["tokens_per_s"] > 0


def test_trl_takes_the_same_step(found):
    figures = cases(found, "trl")
    # It rounds the adapter to bf16, the recommendation of QLoRA's authors.
    assert figures["trl to ours"]["cosine"] > 0.9999
    assert figures["trl_tuned to ours"]["cosine"] > 0.9999


# --- parts that don't end well -----------------------------------------------------------------


def good(setup, notes):
    notes.add("sum", {"value": setup})


def raising(setup, notes):
    notes.add("before", {"value": 1})
    raise ZeroDivisionError("of something")


def dying(setup, notes):
    notes.add("before", {"value": 2})
    os._exit(7)


def hanging(setup, notes):
    notes.add("before", {"value": 3})
    time.sleep(1000)


def out_of_place(setup, notes):
    raise Skip("no such device")


def half_failing(setup, notes):
    notes.case("bad", lambda: {"value": 1 / 0})
    notes.case("out of place", out_of_place, setup, notes)
    notes.case("good", lambda: {"value": 4})


def test_a_part_that_fails_stops_no_other(tmp_path):
    functions = (raising, dying, hanging, out_of_place, half_failing, good)
    parts = {
        f.__name__: Part(f"test_gpu_check:{f.__name__}", 0.15 if f is hanging else 1)
        for f in functions
    }
    finished, file = [], tmp_path / "out.json"
    run(parts, 42, file, {"head": 0}, 5, lambda name, document: finished.append(name), preload=())
    figures = json.loads(file.read_text())["figures"]
    assert finished == list(parts)
    statuses = {name: entry["status"].splitlines()[0] for name, entry in figures.items()}
    assert statuses == {
        "raising": "failed: ZeroDivisionError: of something",
        "dying": "failed: its process ended with 7",
        "hanging": "stopped: it had 9 s",
        "out_of_place": "skipped: no such device",
        "half_failing": "done",
        "good": "done",
    }
    noted = [figures[name]["cases"]["before"]["value"] for name in ("raising", "dying", "hanging")]
    assert noted == [1, 2, 3]
    half = figures["half_failing"]["cases"]
    assert half["bad"]["error"].startswith("ZeroDivisionError")
    assert half["out of place"]["skipped"] == "no such device"
    assert half["good"]["value"] == 4
    assert figures["good"]["cases"]["sum"]["value"] == 42


# --- a check that goes on where one was killed --------------------------------------------------

HEAD = {"device": "cpu", "tiny": True, "machine": {"gpu": None}, "versions": {"a": "1", "b": None}}
BEFORE = {"good": Part("test_gpu_check:good", 1), "long": Part("test_gpu_check:long", 1),
          "last": Part("test_gpu_check:good", 1)}  # fmt: skip


def long(setup, notes):
    notes.case("process", lambda: {"id": os.getpid()})
    notes.case_once("first", lambda: {"value": setup})
    notes.case("failing", lambda: {"value": 1 / 0})
    if setup == "before":
        time.sleep(1000)
    notes.case_once("second", lambda: {"value": setup})


def check_again(file, setup, head=HEAD, **options):
    document = run(BEFORE, setup, file, head, 5, lambda *_: None, preload=(), **options)
    return document["figures"]


def test_a_killed_check_loses_one_case_and_is_resumed(tmp_path, capfd):
    file = tmp_path / "out.json"
    check = get_context("spawn").Process(target=check_again, args=(file, "before"))
    check.start()
    wait_until(lambda: file.exists() and '"failing"' in file.read_text())
    os.kill(check.pid, signal.SIGKILL)
    check.join()
    kept = json.loads(file.read_text())["figures"]
    assert [entry["status"] for entry in kept.values()] == ["done", "running", "not reached"]
    part = Path(f"/proc/{kept['long']['cases']['process']['id']}")
    wait_until(lambda: not part.exists())  # Its GPU would stay in use.
    figures = check_again(file, "after", HEAD | {"versions": {"a": "1", "b": "2"}})
    assert [entry["status"] for entry in figures.values()] == ["done"] * 3
    cases = figures["long"]["cases"]
    assert (cases["first"]["value"], cases["second"]["value"]) == ("before", "after")
    assert cases["process"]["id"] != kept["long"]["cases"]["process"]["id"]
    assert [figures[name]["cases"]["sum"]["value"] for name in ("good", "last")] == [
        "before", "after",
    ]  # fmt: skip
    assert "good: done before" in capfd.readouterr().out
    anew = check_again(file, "third", again=True)
    assert {anew[part]["cases"]["sum"]["value"] for part in ("good", "last")} == {"third"}
    assert anew["long"]["cases"]["first"]["value"] == "third"


@pytest.mark.parametrize(
    "other", [{"versions": {"a": "2"}}, {"machine": {"gpu": "G"}}, {"tiny": False}]
)
def test_results_of_two_machines_are_not_mixed(tmp_path, other):
    file = tmp_path / "out.json"
    file.write_text(json.dumps(HEAD | {"figures": {}}))
    with pytest.raises(SystemExit, match=r"--out: must be a new file or have results of this "):
        check_again(file, 1, HEAD | other)


def test_no_part_starts_when_the_time_is_over(tmp_path):
    process = start(tmp_path / "out.json", "environment", "steps_7b", minutes=0)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [entry["status"] for entry in figures.values()] == [
        "skipped: the 0 minutes were over"
    ] * 2
    assert "the 0 minutes were over" in out


# --- what it is made of ------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SMALL, MIDDLE], ids=["tied", "untied"])
def test_the_random_model_is_the_one_that_would_load(model, tmp_path):
    """Quantised layer by layer, it scores as its weights do when they are loaded from a folder."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.against_trl import rows
    from benchmarks.gpu_check.work import _shake, make_groups, random_policy
    from gft_lite.policy.registry import load_policy, model_location

    recipe = TINY.recipe(model)
    made = random_policy(TINY, recipe.policy)
    plain = random_policy(TINY, TINY.recipe(model, policy={"quantization": "none"}).policy)
    plain.model.unload().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_location("lab")).save_pretrained(tmp_path)
    loaded = load_policy(recipe.policy.model_copy(update={"model": str(tmp_path)}))
    _shake(loaded)
    batch = made.batches(rows(recipe, make_groups(TINY, 512)[:1]), 10**9)[0]
    with torch.no_grad():
        scores = [policy.token_scores(batch).logprobs for policy in (made, loaded)]
    assert torch.equal(*scores)
    assert scores[0].std() > 1e-3


def test_the_dense_mask_by_hand():
    from benchmarks.gpu_check.attention import dense_mask
    from gft_lite.policy.batching import Segment

    # A prompt of two tokens, then responses of two and one, each after that prompt alone.
    segments = (Segment(0, 0, 0, 2), Segment(0, 2, 2, 4), Segment(0, 2, 4, 5))
    assert dense_mask(segments, 5, None, "cpu").int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip
    assert dense_mask(segments, 5, 2, "cpu").int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1],
    ]  # fmt: skip


def test_flops_by_hand():
    from benchmarks.gpu_check.work import flops
    from gft_lite.policy.batching import Row, cut

    shape = Setup("cpu", tiny=True).shape(SMALL)
    # Two layers: query and output 128 x 128, key and value 128 x 64, three of 128 x 256.
    weights = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert shape.linear_parameters == weights
    rows = [Row((1, 2, 3, 4), (5, 6)), Row((1, 2, 3, 4), (7, 8, 9, 10))]
    # Once the prompt's 4 tokens, then 2 and 4; each pair costs 4 times 4 heads of 32, twice.
    pairs = 4 * 4 / 2 + 2 * (4 + 1) + 4 * (4 + 2)
    forward = 2 * weights * 10 + 2 * 4 * 128 * pairs
    backward = 2 * weights * 10 + 2 * 4 * 128 * pairs * 2.5
    head = 2 * 2 * 512 * 128 * 6
    [batch] = cut(rows, 100, layout="shared")
    assert flops(shape, [batch], 0) == forward + backward + head
    assert flops(shape, [batch], 1) == 2 * forward + backward + head


# --- what was measured -------------------------------------------------------------------------


def test_the_table_of_results_is_that_of_the_files():
    text = (RESULTS / "README.md").read_text()
    assert text == written(), "run: python -m benchmarks.gpu_check.results"
    assert all(file.name in text for file in RESULTS.glob("*.json"))


def test_only_what_ran_on_a_gpu_has_met_one(tmp_path):
    machine = {"cpu": "C", "cores": 2, "gpu": None}
    parts = {
        "one": {"status": "done", "cases": {"x": {"error": "E"}, "y": {"right": False}}},
        "two": {"status": "stopped: it had 60 s", "cases": {}},
    }
    common = {"date": "2026-11-21", "figures": {}}
    (tmp_path / "old.json").write_text(json.dumps(common | {"machine": machine}))
    check = common | {"machine": machine | {"gpu": "H"}, "figures": parts, "tiny": False}
    (tmp_path / "gpu_check.json").write_text(json.dumps(check))
    lines = written(tmp_path).splitlines()
    assert "| `old.json` | 2026-11-21 | C, 2 cores | no |" in lines
    assert "| `gpu_check.json` | 2026-11-21 | H | yes |" in lines
    assert "| one | done | 2 | 1 | 1 | yes |" in lines
    assert "| two | stopped: it had 60 s | 0 | 0 | 0 | no |" in lines
