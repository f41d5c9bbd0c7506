"""`gft-lite report` of real runs and a real sweep, looked at in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from rich.console import Console

from gft_lite.cli import main
from gft_lite.cli.common import DONE, WRONG_INPUT
from gft_lite.data.prompts import PromptFormat
from gft_lite.experiments.sweep_config import Sweep
from gft_lite.experiments.sweep_runner import sweep
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.report.page import write_report
from gft_lite.runs.folder import RunFolder
from gft_lite.training.run import train
from gft_lite.types import Group, Problem, Response, ScoredGroup

QUIET = Console(quiet=True)
SMALL = {
    "train": {"steps": 2, "problems_per_step": 4},
    "data": {"problems": 40, "holdout": 4},
    "checkpoint": {"every": 1},
    "monitor": {"every": 1, "problems": 2},
    "eval": {"samples": 2, "k": [1, 2], "sets": {"test": {"problems": 6}}},
    "optim": {"lr": 3e-3},
}
HOSTILE = (
    "</script><script>window.harm = 1</script><img src=x onerror='window.harm = 2'> & \"q\" 世"
)
HIDDEN = "\u202edesrever\u0000\u001b[31m"


# --- runs, sweeps and pages ------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def run(folder):
    """A short GFT run with a checkpoint and a token ledger at each step."""
    overrides = [f"{field}={json.dumps(value)}" for field, value in SMALL.items()]
    recipe = Recipe.load("recipes/lab.yaml", [*overrides, "name=gft", "log.tokens=true"])
    return train(recipe, folder / "gft", console=QUIET)


@pytest.fixture(scope="module")
def hostile(folder):
    """A run whose folder, problem and responses are written by somebody mean."""
    run = RunFolder(folder / "a$b$ <i>run")
    run.create(Recipe.load("recipes/lab.yaml", ["seed=1"]).to_yaml())
    right = Response((5, 1), HOSTILE, "expert", reward=1.0, verdict="ok")
    wrong = Response((6,), HIDDEN, "self", "length", reward=0.0, verdict="no_answer")
    mixed = Group(Problem("<b>id", HOSTILE, "<u>7"), (right, wrong))
    flat = Group(Problem("second", "what?", None), (wrong, wrong))
    run.write_groups(1, [ScoredGroup(mixed, (0.7, -0.7)), ScoredGroup(flat, (0.0, 0.0))])
    return run


@pytest.fixture(scope="module")
def swept(folder):
    """Two seeds at two values of tau."""
    plan = Sweep.from_tree(
        {
            "name": "tau", "recipe": "recipes/lab.yaml", "seeds": 2,
            "overrides": {**SMALL, "train": {"steps": 1, "problems_per_step": 2}},
            "grid": {"objective.tau": [0.3, 0.7]},
        }
    )  # fmt: skip
    return sweep(plan, folder / "tau", console=QUIET)


@pytest.fixture(scope="module")
def page(folder, run):
    """The page of one run, by the command line."""
    out = folder / "one.html"
    done = main(["report", str(run.path), "--out", str(out), "--plots", str(folder / "plots")])
    assert done == DONE
    return out


@pytest.fixture(scope="module")
def page_of_all(folder, run, hostile, swept):
    folders = [run.path, hostile.path, swept.path]
    return write_report(folders, folder / "all.html", tokens=False, console=QUIET)


# --- what a reader sees ----------------------------------------------------------------------


def test_a_run_renders(opened, page, run, folder):
    shown = opened(page)
    assert shown.texts("h1") == ["gft"]
    assert shown.texts("h2") == ["Summary", "Curves", "Gradients by source", "Groups", "Recipes"]
    trained = run.summary()["trained"]
    card = shown.texts(".card")[0]
    assert "test, pass@1" in card and f"{100 * trained['pass@1']:.1f}%" in card
    names = shown.each("svg", "e.dataset.plot")
    assert {"reward", "kl", "rectified", "gradient-norm", "entropy", "speed", "memory",
            "flat-groups", "pass-at-k-test"} <= set(names)  # fmt: skip
    assert min(shown.each(".chart canvas", "e.clientHeight")) > 150
    assert len(shown.texts(".chart")) == len(names)
    assert {"expert", "teacher", "self"} <= set(shown.texts("svg[data-plot=reward] text"))
    files = {file.name for file in (folder / "plots").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}


def test_it_fits_a_phone_and_follows_the_dark(opened, page, page_of_all):
    light = opened(page, width=390)
    assert light.js("document.documentElement.scrollWidth") == 390
    white = light.styles("body", "backgroundColor")
    every = opened(page_of_all, width=390)
    assert every.js("document.documentElement.scrollWidth") == 390
    dark = opened(page, scheme="dark")
    assert dark.styles("body", "backgroundColor") != white
    ink = dark.styles("body", "color")[0]
    assert ink in dark.styles("svg[data-plot=reward] text", "fill")


def test_p_is_what_the_policy_of_the_step_says(page, run):
    """Step 1 saw the base, step 2 the first checkpoint: p by a plain softmax over one row."""
    groups = embedded(page)
    assert [(g["step"], g["policy"]) for g in groups[::4]] == [
        (1, "the base, where step 1 began"),
        (2, "step 1's checkpoint, where step 2 began"),
    ]
    recipe = Recipe.load(run.path / "recipe.yaml")
    policy = load_policy(recipe.policy)
    format = PromptFormat(policy.tokenizer, recipe.data.prompt)
    for step, adapter in ((1, None), (2, run.checkpoints / "step-000001" / "adapter")):
        if adapter:
            policy.load_adapter(adapter)  # The fresh one before it changes nothing of the base.
        [group, *_] = run.groups(step)
        shown = next(g for g in groups if g["id"] == group["problem"]["id"] and g["step"] == step)
        for response, card in zip(group["responses"], shown["responses"], strict=True):
            prompt, answer = format.prompt_ids(group["problem"]["text"]), response["token_ids"]
            with torch.no_grad():
                logits = policy.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
            probabilities = logits.softmax(-1)[len(prompt) - 1 : -1]
            p = probabilities.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()
            assert card["tokens"]["p"] == pytest.approx(p, rel=0.006)  # Three digits are shown.
            assert "".join(card["tokens"]["text"]) == response["text"] + "<eos>"


def test_rectified_tokens_are_those_that_training_counted(page, run):
    for metrics in run.metrics():
        groups = [g for g in embedded(page) if g["step"] == metrics["step"]]
        p = [p for g in groups if not g["flat"] for r in g["responses"] for p in r["tokens"]["p"]]
        assert len(p) == metrics["trained_tokens"]
        assert sum(value < 0.7 for value in p) / len(p) == pytest.approx(metrics["rectified"])


def embedded(page):
    """The groups in a page."""
    text = page.read_text().partition('<script type="application/json" id="data">')[2]
    return json.loads(text.partition("</script>")[0])


def test_colors_show_what_rectification_does(opened, page):
    shown = opened(page)
    cards = embedded(page)[0]["responses"]
    likely = [p >= 0.7 for card in cards for p in card["tokens"]["p"]]
    assert 0 < sum(likely) < len(likely)
    by_p = shown.styles(".t", "backgroundColor")
    shown.choose("mode", "C")
    by_c = shown.styles(".t", "backgroundColor")
    assert len({c for c, over in zip(by_c, likely, strict=True) if over}) == 1
    for p, c, over in zip(by_p, by_c, likely, strict=True):
        assert over or p == c
    lines = shown.styles(".t", "textDecorationLine")
    assert lines == ["none" if over else "underline" for over in likely]
    shown.choose("mode", "A·C")
    signs = {"up": 1, "down": -1, "even": 0}
    sides = [signs[name.split()[1]] for name in shown.each(".response", "e.className")]
    advantages = [card["advantage"] for card in cards]
    assert sides == [(a > 0) - (a < 0) for a in advantages]
    up, down = (set(shown.styles(f".{side} .t", "backgroundColor")) for side in ("up", "down"))
    assert len(up) > 1 and len(down) > 1 and not up & down


def test_tokens_are_colored_by_what_the_step_recorded(opened, page, run):
    [group, *_] = embedded(page)
    records = run.tokens(1)["groups"][0]["responses"]
    assert [r["ledger"] for r in group["responses"]] == records
    trained = [r for r in records if r]
    # p of the report's own pass and of the training step are of the same policy.
    for response, record in zip(group["responses"], records, strict=True):
        if record:
            p = [math.exp(value) for value in record["logprob"]]
            assert response["tokens"]["p"] == pytest.approx(p, rel=0.01)
    shown = opened(page)
    for name, figure in (
        ("coefficient", lambda r, i: r["coefficient"][i]),
        ("trainer - base", lambda r, i: r["logprob"][i] - r["base"][i]),
        ("trainer - engine", lambda r, i: r["engine"][i] and r["logprob"][i] - r["engine"][i]),
        ("advantage", lambda r, i: r["advantage"]),
    ):
        shown.choose("mode", name)
        values = [
            figure(record, i) if record else None
            for record, response in zip(records, group["responses"], strict=True)
            for i in range(len(response["tokens"]["p"]))
        ]
        classes = shown.each(".response .t", "e.className")
        signs = [("plus" in c.split()) - ("minus" in c.split()) for c in classes]
        if name == "trainer - base":  # Step 1 began with the base: no token has a side.
            assert not any(values)
            continue
        expected = [0 if v is None else 1 if v >= 0 else -1 for v in values]
        assert signs == expected
        colors = shown.styles(".response .t", "backgroundColor")
        assert len({c for c, v in zip(colors, values, strict=True) if v}) > 1
    shown.choose("mode", "log p, engine")
    colors = shown.styles(".response[data-source=expert] .t", "backgroundColor")
    assert len(set(colors)) == 1  # No engine sampled a demonstration.
    shown.choose("mode", "source")
    of_source = {r["source"]: set(shown.styles(f".t.{r['source']}", "backgroundColor"))
                 for r in trained}  # fmt: skip
    assert all(len(colors) == 1 for colors in of_source.values())
    assert len(set.union(*of_source.values())) == len(of_source) > 1
    assert shown.texts(".scale .t") == ["expert", "teacher", "self"]
    dark = opened(page, scheme="dark")
    dark.choose("mode", "source")
    assert not set(dark.styles(".t.self", "backgroundColor")) & of_source["self"]


def test_the_gradients_of_the_sources_are_shown(opened, page, run):
    shown = opened(page)
    found = [run.tokens(step)["gradients"] for step in (1, 2)]
    legends = shown.texts("#gradients .legend")
    assert len(legends) == 2
    for gradients, legend in zip(found, legends, strict=True):
        norms, total = gradients["norms"], sum(gradients["norms"].values())
        assert norms.keys() == {"expert", "teacher", "self"}
        for source, norm in norms.items():
            assert f"{source} {100 * norm / total:.1f}%, norm {norm:.3g}" in legend
        for pair, cosine in gradients["cosines"].items():
            assert f"cosine {pair}: {cosine + 0.0:+.2f}" in legend
    widths = shown.each("#gradients .bar:first-of-type span", "e.clientWidth")
    assert sum(widths[:3]) > 100


def test_a_ledger_needs_no_model_to_be_shown(opened, folder, run):
    out = write_report([run.path], folder / "ledger.html", tokens=False, console=QUIET)
    shown = opened(out)
    [group, *_] = embedded(out)
    trained = [r["ledger"] for r in group["responses"] if r["ledger"]]
    assert len(shown.texts(".t")) == sum(len(r["text"]) for r in trained)
    options = shown.each("select[name=mode] option", "[e.value, e.disabled]")
    assert [name for name, disabled in options if disabled] == ["p", "c", "ac"]


def test_a_token_tells_p_c_and_the_push(opened, page):
    from selenium.webdriver import ActionChains

    shown = opened(page)
    response = embedded(page)[0]["responses"][0]
    token = shown.browser.find_element("css selector", ".response .t")
    ActionChains(shown.browser).move_to_element(token).perform()
    p, c = response["tokens"]["p"][0], response["tokens"]["c"][0]
    [tip] = shown.texts("#tip")
    assert f"p {p:.4f}" in tip and f"C {c:.4f}" in tip
    assert f"A·C {response['advantage'] * c:+.3f}" in tip
    gap = "document.getElementById('tip').getBoundingClientRect().bottom"
    assert shown.each("#tip", "e.hidden") == [False]
    assert token.rect["y"] - shown.js(f"scrollY + {gap}") == pytest.approx(6, abs=1)
    ActionChains(shown.browser).move_to_element(
        shown.browser.find_element("css selector", "h1")).perform()  # fmt: skip
    assert shown.each("#tip", "e.hidden") == [True]


def test_filters_narrow_what_is_shown(opened, page_of_all):
    shown = opened(page_of_all)
    total = len(embedded(page_of_all))
    assert shown.place.startswith(f"group 1 of {total}: gft, step 1")
    shown.choose("step", "2")
    assert " of 4: gft, step 2" in shown.place
    shown.choose("run", "a$b$ <i>run")  # It has no step 2.
    assert "group 1 of 2: a$b$ <i>run, step 1, problem <b>id" in shown.place
    assert len(shown.texts(".response")) == 2
    shown.click("input[name=source][value=expert]")
    assert [text.split()[0] for text in shown.texts(".response")] == ["self"]
    shown.click("input[name=source][value=expert]")
    shown.choose("sign", "above 0")
    assert [text.split()[0] for text in shown.texts(".response")] == ["expert"]
    shown.choose("sign", "any")
    shown.choose("kind", "flat")
    assert "group 1 of 1" in shown.place and "second" in shown.place
    assert "nothing is learned" in shown.texts("#group")[0]
    shown.choose("kind", "all")
    shown.click("#next")
    assert "group 2 of 2" in shown.place
    shown.click("#previous")
    assert "group 1 of 2" in shown.place
    shown.write("WHAT?")
    assert "group 1 of 1" in shown.place and "second" in shown.place
    shown.write("nowhere")
    assert shown.place == "no group passes the filters"
    assert shown.texts(".response") == []


def test_hostile_text_stays_text(opened, page_of_all):
    shown = opened(page_of_all)
    shown.choose("run", "a$b$ <i>run")
    assert shown.js("window.harm === undefined")
    assert shown.texts(".problem") == [HOSTILE]
    assert shown.texts(".answer") == ["<u>7"]
    first, second = shown.texts(".response .text")
    assert first == HOSTILE
    assert second == "⟨U+202E⟩desrever␀␛[31m"
    assert shown.js("document.images.length") == 0
    assert "a$b$ <i>run" in shown.texts("h1")[0]
    assert "cut" in shown.texts(".response header")[1]


def test_a_sweep_is_a_plot_and_a_table(opened, page_of_all, swept):
    shown = opened(page_of_all)
    assert {"pass@1", "objective.tau", "rectified tokens"} <= set(
        shown.texts("svg[data-plot=sweep-tau] text")
    )
    rows = shown.texts("#sweeps tbody tr")
    for row, found in zip(rows[1:], swept.results()["settings"], strict=True):
        figures = found["figures"]["pass@1"]
        assert row.split()[:2] == [str(found["settings"]["objective.tau"]), "2"]
        mean, low, high = map(float, re.search(r"(\S+)% \[(\S+)%, (\S+)%\]", row).groups())
        assert mean == pytest.approx(100 * figures["mean"], abs=0.06)
        # Over seeds and problems: at least as wide as over the two seeds only, but for rounding.
        assert low <= 100 * figures["low"] + 0.06 and high >= 100 * figures["high"] - 0.06


def test_series_can_be_hidden(opened, page_of_all):
    shown = opened(page_of_all)
    labels = [text.strip() for text in shown.texts(".toggles label")]
    assert labels == ["gft", "a$b$ <i>run", "tau = 0.3", "tau = 0.7"]
    curve = ".by-series svg[data-plot=entropy] .curve-0"
    assert shown.styles(curve, "display") == ["inline"]
    shown.click("[data-series='0']")
    assert shown.styles(curve, "display") == ["none"]
    assert "inline" in shown.styles(".by-series svg[data-plot=entropy] .curve-2", "display")
    shown.click("[data-series='0']")
    assert shown.styles(curve, "display") == ["inline"]


# --- what may go wrong -----------------------------------------------------------------------


def test_without_the_base_all_else_is_shown(opened, folder, run):
    moved = folder / "moved"
    shutil.copytree(run.path, moved, ignore=shutil.ignore_patterns("tokens"))
    recipe = moved / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("model: lab", f"model: {folder / 'gone'}"))
    out = write_report([moved], folder / "moved.html", console=QUIET)
    shown = opened(out)
    assert "No p of the tokens" in shown.texts("#groups")[0]
    assert "policy.model" in shown.texts("#groups")[0]
    assert len(shown.texts(".response")) == 8
    assert shown.texts(".t") == []


def test_wrong_arguments_are_told(tmp_path, capsys, run):
    assert main(["report", str(tmp_path)]) == WRONG_INPUT
    assert "must be the folder of a run or of a sweep" in capsys.readouterr().err
    out = str(tmp_path / "page.html")
    assert main(["report", str(run.path), "--groups", "0", "--out", out]) == WRONG_INPUT
    errors = capsys.readouterr().err
    assert "--groups: must be a whole number from 1 to 1,000,000, got '0'" in errors
