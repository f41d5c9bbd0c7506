"""The report's figures by hand: scores, curves, coefficients, sweeps, and what may be missing."""

from __future__ import annotations

import json
import re
import sys

import pytest

from gft_lite.data.token_texts import token_texts
from gft_lite.evaluation.metrics import likelihood, restrict
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.recipe.schema import Recipe
from gft_lite.report.curves import (
    Curve,
    Plot,
    evaluation_plots,
    pass_at_k_plots,
    step_plots,
    sweep_plot,
    sweep_units,
)
from gft_lite.report.group_browser import (
    Scores,
    TokenContext,
    coefficients,
    page_groups,
    select_steps,
)
from gft_lite.report.headline import (
    BestStep,
    best_of_sweep,
    best_scores,
    best_step_of,
    tokens_of,
)
from gft_lite.report.loading import Series, all_series, read_folders
from gft_lite.report.page import write_report
from gft_lite.report.plots import inline_svg
from gft_lite.report.summary import cost_of, facts_of, scores_of, seconds_of
from gft_lite.runs.folder import RunFolder
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.errors import UserError
from gft_lite.utils.statistics import mean_pass_at_k


def step(number, **changed):
    """The metrics of a step as training writes them."""
    return {
        "step": number, "trajectories": 8, "reward": {"expert": 1.0, "self": 0.25},
        "flat_groups": 0.5, "truncated": 0.0, "rollout_tokens": 100, "skipped": None,
        "trained_tokens": 300, "loss": -0.1, "grad_norm": 0.5, "entropy": 0.2, "rectified": 0.1,
        "seconds": {"rollout": 2.0, "train": 1.0, "sync": 0.5}, **changed,
    }  # fmt: skip


def figures(*correct, samples=4):
    """An evaluated set: how many of the samples of each problem were right."""
    named = {f"q{i}": right for i, right in enumerate(correct)}
    counts = [(samples, right) for right in correct]
    shares = {f"pass@{k}": mean_pass_at_k(counts, k) for k in range(1, samples + 1)}
    sizes = {"problems": len(correct), "samples": samples * len(correct)}
    return {**shares, **sizes, "correct": named}


def graded(**rewards):
    """An evaluated set without a rule that decides correctness: mean rewards by problem."""
    mean = sum(rewards.values()) / len(rewards)
    return {"problems": len(rewards), "samples": 2 * len(rewards), "mean_reward": mean,
            "mean_reward_interval": [0.0, 1.0], "rewards": rewards}  # fmt: skip


def make_run(path, *overrides, metrics=(), recipe="recipes/lab.yaml", **files):
    """A run's folder; `summary`, `base` and `trained` are left out where not given."""
    run = RunFolder(path)
    run.create(Recipe.load(recipe, overrides).to_yaml())
    for line in metrics:
        run.append_metrics(line)
    for name, value in files.items():
        run.write_json(f"eval/{name}.json" if name != "summary" else "summary.json", value)
    return run


def read(*paths):
    return read_folders(paths)[0]


def summary(kl=0.25, **seconds):
    return {"trained": {"pass@1": 0.5, "kl": kl}, "seconds": seconds}


# --- folders ---------------------------------------------------------------------------------


def test_every_wrong_folder_is_told_at_once(tmp_path):
    make_run(tmp_path / "run")
    with pytest.raises(UserError) as wrong:
        read(tmp_path / "run", tmp_path / "none", tmp_path)
    assert [text.partition(", got")[0] for text in wrong.value.problems] == [
        "RUN: must be the folder of a run or of a sweep"
    ] * 2


def test_labels_are_as_long_as_it_takes_to_tell_folders_apart(tmp_path):
    paths = [tmp_path / "a" / "gft", tmp_path / "b" / "gft", tmp_path / "b" / "sft"]
    for path in paths:
        make_run(path)
    assert [run.label for run in read(*paths)] == ["a/gft", "b/gft", "b/sft"]
    assert [run.label for run in read(paths[0], paths[2], paths[2] / ".")] == ["gft", "sft"]
    trials = [tmp_path / f"tau={tau},seed=0" for tau in (0, 0.5)]
    for path in trials:
        make_run(path)
    assert [run.label for run in read(*trials)] == ["tau=0", "tau=0.5"]
    assert [run.label for run in read(trials[0])] == ["tau=0,seed=0"]
    assert [run.label for run in read(*trials, paths[0])] == [
        "tau=0,seed=0",
        "tau=0.5,seed=0",
        "gft",
    ]


def test_the_stages_of_a_staged_run_are_shown_one_by_one(tmp_path):
    make_run(tmp_path, metrics=[step(1, stage=1), step(1, stage=2)], summary=summary(total=1))
    make_run(tmp_path / "stages" / "1-sft", recipe="recipes/lab_sft.yaml")
    make_run(tmp_path / "stages" / "2-gft")
    runs = read(tmp_path)
    assert [run.label for run in runs] == [f"{tmp_path.name}/1-sft", f"{tmp_path.name}/2-gft"]
    assert [run.recipe.method for run in runs] == ["sft", "gft"]


def test_a_run_that_has_only_begun_makes_a_page(tmp_path):
    make_run(tmp_path / "begun", base={"test": figures(2, 2)})
    page = write_report([tmp_path / "begun"], tmp_path / "page.html", tokens=False).read_text()
    assert '<dd class="bad">unfinished</dd>' in page
    assert "50.0%" in page
    assert "No step was finished yet" in page
    assert "No groups were kept" in page


def test_without_matplotlib_it_names_the_extra(tmp_path, monkeypatch):
    make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "gft_lite.report.plots")
    with pytest.raises(UserError, match=r"gft-lite\[report\]"):
        write_report([tmp_path], tmp_path / "page.html")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": ""}, "--out: must be a file that can be written to, got ''"),
        ({"out": "folder"}, "--out: must be a file that can be written to, got 'folder'"),
        ({"out": "run/recipe.yaml/x.html"}, "--out: must be a file that can be written to"),
        ({"out": "x" * 256}, "--out: must be a file that can be written to"),
        ({"plots": "run/recipe.yaml"}, "--plots: must be a folder that can be written to"),
        ({"plots": ""}, "--plots: must be a folder that can be written to, got ''"),
        ({"groups": 0}, "--groups: must be at least 1, got 0"),
    ],
)
def test_outputs_are_checked_before_the_work(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    make_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as wrong:
        write_report(["run"], **options)
    assert str(wrong.value).startswith(message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("eval/base.json", "{"), ("eval/trained.json", '{"test": 5}'), ("summary.json", "[]"),
        ("metrics.jsonl", "not JSON\n"), ("eval/base.json", "\udcff"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(name, text, tmp_path):
    make_run(tmp_path / "run", metrics=[step(1)], base={"test": figures(1)})
    (tmp_path / "run" / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / 'run' / name))}"):
        write_report([tmp_path / "run"], tmp_path / "page.html", tokens=False)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"trials": [], "settings": [], "interval": ""}', '{"trials": [{}]}']
)
def test_damaged_results_of_a_sweep_are_named(text, tmp_path):
    path = make_sweep(tmp_path / "tau", "objective.tau", {0.3: [0.4]})
    (path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json.*Run the sweep again"):
        read_folders([path])
    with pytest.raises(UserError, match=r"results\.json.*Run the sweep again"):
        SweepFolder(path).results()


# --- figures ---------------------------------------------------------------------------------


def test_scores_are_pass_at_k_with_paired_gains(tmp_path):
    make_run(tmp_path, "eval.k=[2]", base={"test": figures(0, 0)}, trained={"test": figures(1, 3)})
    scores = scores_of(*read(tmp_path))
    assert list(scores) == ["test, pass@1", "test, pass@2"]
    one, two = scores.values()
    assert one.base.value == 0 and one.base.interval == (0, 0)
    assert one.trained.value == pytest.approx((1 / 4 + 3 / 4) / 2)
    # A resample of two problems is either twice the first, or twice the second, or both.
    assert one.trained.interval == pytest.approx((0.25, 0.75))
    # pass@2 is 1 - C(3, 2) / C(4, 2) = 1/2 with one right of four, and 1 with three.
    assert two.trained.value == pytest.approx((1 / 2 + 1) / 2)
    assert two.difference.value == pytest.approx(0.75)
    assert two.difference.interval == pytest.approx((0.5, 1.0))


def test_without_a_rule_for_correctness_scores_are_mean_rewards(tmp_path):
    make_run(tmp_path / "run", base={"test": graded(a=-0.5, b=0.0)},
             trained={"test": graded(a=0.25, b=1.25)})  # fmt: skip
    [run] = read(tmp_path / "run")
    [(name, score)] = scores_of(run).items()
    assert (name, score.unit) == ("test, mean reward", "number")
    assert (score.base.value, score.trained.value) == (-0.25, 0.75)
    assert score.difference.value == pytest.approx(1.0)
    assert score.difference.interval == pytest.approx((0.75, 1.25))
    assert pass_at_k_plots([Series("run", (run,))]) == []
    page = write_report([tmp_path / "run"], tmp_path / "page.html", tokens=False).read_text()
    card = page[page.index('<div class="card">') :].partition("</div>")[0]
    assert '<span class="from">-0.25 &rarr;</span> 0.75' in card
    assert "gain +1 <small>[+0.75, +1.25]</small>" in card
    assert "%" not in card and "points" not in card


def test_the_likelihood_of_demonstrations_is_better_where_it_is_lower(tmp_path):
    sizes = {"problems": 2, "samples": 0}
    base, first, best, last = (
        {"held_out": {**likelihood({"a": nll, "b": 3 * nll}, {"a": 1, "b": 3}), **sizes}}
        for nll in (1.25, 0.75, 0.25, 0.5)
    )
    files = {f"step-{n:06}": sets for n, sets in enumerate((base, first, best, last))}
    run = make_run(tmp_path / "run", metrics=[step(1), step(2), step(3)], base=base, trained=last)
    for name, sets in files.items():
        run.write_json(f"eval/{name}.json", {"adapter": "", "sets": sets})
    make_run(tmp_path / "other", base=base, trained=first)
    runs = read(tmp_path / "run", tmp_path / "other")
    scores = [scores_of(one) for one in runs]
    assert best_scores(scores) == {"held_out, nll": 0.5}
    assert best_step_of(runs[0]) == BestStep(2, "held_out, nll", 0.25, "number")
    page = write_report([tmp_path / "run"], tmp_path / "page.html", tokens=False).read_text()
    card = page[page.index('<div class="card">') :].partition("</div>")[0]
    assert '<span class="from">1.25 &rarr;</span> 0.5' in card
    assert "difference -0.75 <small>[-0.75, -0.75]</small>" in card and "gain" not in card


def test_seconds_that_no_phase_counted_are_other(tmp_path):
    run = make_run(tmp_path, metrics=[step(1), step(2)])
    assert seconds_of(*read(tmp_path)) == {"rollout": 4.0, "train": 2.0, "sync": 1.0}
    run.write_json("summary.json", summary(total=12.0, eval=3.0))
    assert seconds_of(*read(tmp_path))["other"] == pytest.approx(12 - 4 - 2 - 1 - 3)
    run.write_json("summary.json", summary(total=5.0, eval=3.0))  # Of a resumed run's last part.
    assert "other" not in seconds_of(*read(tmp_path))


def test_cost_and_facts(tmp_path):
    memory = [step(1, peak_memory=2**30), step(2, peak_memory=3 * 2**29, skipped="flat")]
    make_run(tmp_path, "train.steps=5", metrics=memory)
    [run] = read(tmp_path)
    assert cost_of(run) == {
        "trajectories": "16", "tokens trained on": "600", "rollout tokens/s": "50",
        "train tokens/s": "300", "peak memory": "1.50 GiB",
    }  # fmt: skip
    assert tokens_of(run) == {"trained": 600, "sampled": 200}
    facts = facts_of(run)
    assert facts["state"] == "unfinished"
    assert facts["steps"] == "2 of 5"
    assert facts["steps with nothing to learn"] == "1"
    assert facts["group"] == "1 expert + 3 teacher + 4 self"


def test_differing_settings_are_a_table_of_their_own(tmp_path):
    make_run(tmp_path / "a", "objective.tau=0.3")
    make_run(tmp_path / "b")
    out = tmp_path / "page.html"
    page = write_report([tmp_path / "a", tmp_path / "b"], out, tokens=False).read_text()
    table = page[page.index('<section id="recipes">') :].partition("</table>")[0]
    assert table.count('<th scope="row">') == 1
    assert '<th scope="row">objective.tau</th><td>0.3</td><td>0.7</td>' in table


# --- curves ----------------------------------------------------------------------------------


def test_one_run_has_its_sources_together_and_gaps_where_nothing_was(tmp_path):
    kl = {"held_out": {"forward": 0.02}, "rollouts": {"reverse": 0.03}}
    skipped = step(2, skipped="flat", grad_norm=None, loss=None, rectified=None, kl=kl)
    make_run(tmp_path, metrics=[step(1), skipped, step(3)])
    plots = {plot.name: plot for plot in step_plots([Series("a", tuple(read(tmp_path)))])}
    assert [(c.label, c.y) for c in plots["reward"].curves] == [
        ("expert", [1.0, 1.0, 1.0]), ("self", [0.25, 0.25, 0.25]),
    ]  # fmt: skip
    assert plots["gradient-norm"].curves[0].y == [0.5, None, 0.5]
    held_out, own = plots["kl"].curves
    assert (held_out.x, held_out.y, own.y) == ([2], [0.02], [0.03])
    assert [curve.y[0] for curve in plots["speed"].curves] == [50, 300]
    assert "memory" not in plots


def test_several_series_share_plots_and_have_the_range_over_seeds(tmp_path):
    for seed, reward in ((0, 0.2), (1, 0.6)):
        metrics = [step(1, reward={"self": reward}, rectified=None)]
        make_run(tmp_path / str(seed), f"seed={seed}", metrics=metrics)
    make_run(tmp_path / "sft", recipe="recipes/lab_sft.yaml", metrics=[step(1, rectified=None)])
    *gft, sft = read(tmp_path / "0", tmp_path / "1", tmp_path / "sft")
    plots = step_plots([Series("gft", tuple(gft)), Series("sft", (sft,))])
    by_name = {plot.name: plot for plot in plots}
    reward = by_name["reward"]
    assert reward.title == "Reward by source (self solid, expert dashed)" and reward.by_series
    assert [(c.label, c.color, c.dash) for c in reward.curves] == [
        ("gft, self", 0, 0), ("sft, self", 1, 0), ("gft, expert", 0, 1), ("sft, expert", 1, 1),
    ]  # fmt: skip
    mean, single, of_demonstrations, _ = reward.curves
    assert (mean.y, mean.low, mean.high) == ([pytest.approx(0.4)], [0.2], [0.6])
    assert (single.y, single.low) == ([0.25], None)
    assert of_demonstrations.y == [None]
    # One demonstration alone is no flat group; and nobody rectifies here.
    assert by_name["flat-groups"].curves[1].y == [None]
    assert "rectified" not in by_name


def test_every_metric_that_a_loss_reports_has_a_curve(tmp_path):
    """Those of the package have titles and units, a user's own appear by their names."""
    own = {"rectified": 0.25, "My own: sharpness": 3.5, "clip_fraction": None}
    metrics = [step(1, rectified=0.25, objective=own), step(2, skipped="flat", objective={})]
    make_run(tmp_path / "new", metrics=metrics)
    make_run(tmp_path / "old", metrics=[step(1, rectified=0.5)])
    new, old = read(tmp_path / "new", tmp_path / "old")
    plots = {p.name: p for p in step_plots([Series("new", (new,))])}
    assert (plots["rectified"].title, plots["rectified"].unit) == (
        "Rectified tokens (p < tau)", "share",
    )  # fmt: skip
    assert plots["rectified"].curves[0].y == [0.25, 0.1]
    assert (plots["my-own-sharpness"].title, plots["my-own-sharpness"].unit) == (
        "My own: sharpness", "number",
    )  # fmt: skip
    assert plots["my-own-sharpness"].curves[0].y == [3.5, None]
    assert "clip-fraction" not in plots
    both = {p.name: p for p in step_plots([Series("new", (new,)), Series("old", (old,))])}
    assert [curve.y for curve in both["rectified"].curves] == [[0.25, 0.1], [0.5]]
    assert [curve.y for curve in both["my-own-sharpness"].curves] == [[3.5, None], [None]]


def evaluation(**sets):
    return {"adapter": "", "sets": sets}


def test_evaluations_while_training_have_the_interval_of_one_run_or_the_range_of_several(tmp_path):
    for seed, right in ((0, 2), (1, 4)):
        for_step = {
            "step-000000": evaluation(test=restrict(figures(1, 1), ["q0", "q1"], [1])),
            "step-000010": evaluation(test=restrict(figures(right, 0), ["q0", "q1"], [1]),
                                      open=graded(a=0.5)),
        }  # fmt: skip
        make_run(tmp_path / str(seed), f"seed={seed}", **for_step)
    make_run(tmp_path / "none")
    one, two, none = read(tmp_path / "0", tmp_path / "1", tmp_path / "none")
    first, second = evaluation_plots([Series("a", (one,))])
    [curve] = first.curves
    assert (first.name, first.y_label, first.unit) == ("evaluation-test", "pass@1", "share")
    assert (curve.x, curve.y, curve.low, curve.high) == ([0, 10], [0.25, 0.25], [0.25, 0.0],
                                                         [0.25, 0.5])  # fmt: skip
    assert (second.y_label, second.unit, second.curves[0].x) == ("mean reward", "number", [10])
    both, _ = evaluation_plots([Series("a", (one, two)), Series("b", (none,))])
    [curve] = both.curves
    assert (curve.y, curve.low, curve.high) == ([0.25, 0.375], [0.25, 0.25], [0.25, 0.5])


def test_alarms_an_early_end_and_the_final_policy_are_facts(tmp_path):
    course = [
        step(1, guard={"alarms": ["kl"], "action": "rollback", "restored": 0}),
        step(2, guard={"alarms": ["reward", "kl"], "action": "stop"}, stopped="guard"),
    ]
    made = ["eval.every=1", "checkpoint.best={metric: test/pass@1}", "checkpoint.adapter=best"]
    make_run(tmp_path / "a", *made, metrics=course,
             summary={**summary(total=9.0, eval=1.0), "policy_of_step": 1})  # fmt: skip
    make_run(tmp_path / "b", metrics=[step(1)])
    facts, quiet = (facts_of(run) for run in read(tmp_path / "a", tmp_path / "b"))
    assert facts["collapse guard"] == "kl at step 1, back to step 0; reward, kl at step 2"
    assert facts["training ended by"] == "guard at step 2"
    assert facts["final policy"] == "of step 1, the best by test/pass@1"
    assert not {"collapse guard", "training ended by", "final policy"} & quiet.keys()


def test_pass_at_k_has_the_powers_of_two_that_the_samples_allow(tmp_path):
    make_run(
        tmp_path, base={"test": figures(1, samples=6)}, trained={"test": figures(3, samples=6)}
    )
    [plot] = pass_at_k_plots([Series("run", tuple(read(tmp_path)))])
    base, trained = plot.curves
    assert base.x == trained.x == [1, 2, 4]
    # 1 - C(5, k) / C(6, k) = k / 6, and 1 - C(3, k) / C(6, k).
    assert base.y == pytest.approx([1 / 6, 2 / 6, 4 / 6])
    assert trained.y == pytest.approx([3 / 6, 1 - 3 / 15, 1.0])


def test_a_plot_shows_names_as_they_are_and_is_the_same_every_time():
    curve = Curve("$a_1$ <b>", 1, [1, 2], [0.1, None])
    plot = Plot("name", "Title", "step", "share", (curve, Curve("c", 0, [1, 2], [0.3, 0.2])))
    svg = inline_svg(plot)
    assert "$a_1$ &lt;b&gt;" in svg
    assert 'class="curve-1"' in svg and 'id="curve-1"' not in svg
    assert "var(--ink)" in svg and "#1d2430" not in svg
    assert inline_svg(plot) == svg


# --- sweeps ----------------------------------------------------------------------------------


def make_sweep(path, field, points, **recipes):
    """A sweep's results: `points` maps a value to the trained pass@1 of each seed, None failed."""
    trials, settings = [], []
    for value, scores in points.items():
        for seed, score in enumerate(scores):
            failed = score is None
            trials.append({
                "name": f"{field}={value},seed={seed}", "settings": {field: value}, "seed": seed,
                "folder": f"trials/{value}-{seed}", "state": "failed" if failed else "done",
                "reason": "out of <b>memory</b>" if failed else None,
                "summary": None if failed else {"base": {"pass@1": 0.2}},
            })  # fmt: skip
        done = [score for score in scores if score is not None]
        mean = {"mean": sum(done) / len(done), "low": None, "high": None} if done else None
        row = {"pass@1": mean, "rectified": {**mean, "mean": 0.1}} if done else {}
        settings.append({"settings": {field: value}, "done": len(done), "figures": row})
    path.mkdir()
    (path / "sweep.yaml").write_text("name: sweep\n")
    results = {"interval": "95%", "trials": trials, "settings": settings}
    (path / "results.json").write_text(json.dumps(results))
    return path


def test_accuracy_stands_against_a_numeric_field_in_its_order(tmp_path):
    make_sweep(tmp_path / "tau", "objective.tau", {1: [0.4], 0: [0.3], 0.7: [0.6]})
    [sweep] = read_folders([tmp_path / "tau"])[1]
    plot = sweep_plot(sweep)
    assert (plot.x_label, plot.log_x) == ("objective.tau", False)
    assert plot.curves[0].x == [0, 0.7, 1]
    assert plot.curves[0].y == [0.3, 0.6, 0.4]
    assert plot.second.y == [0.1, 0.1, 0.1]
    make_sweep(tmp_path / "lr", "optim.lr", {1e-4: [0.4], 1e-2: [0.3]})
    assert sweep_plot(read_folders([tmp_path / "lr"])[1][0]).log_x


def test_figures_of_a_sweep_have_their_units(tmp_path):
    path = make_sweep(tmp_path / "tau", "objective.tau", {0.3: [0.4], 0.7: [0.6]})
    results = json.loads((path / "results.json").read_text())
    for row, reward in zip(results["settings"], (-0.5, 1.5), strict=True):
        row["figures"] = {
            "mean_reward": {"mean": reward, "low": None, "high": None},
            "hard": {"mean": 2 * reward, "low": None, "high": None},
            "kl": {"mean": 0.5, "low": None, "high": None},
            "rectified": {"mean": 0.25, "low": None, "high": None},
            "sharpness": {"mean": 0.75, "low": None, "high": None},
        }
    (path / "results.json").write_text(json.dumps(results))
    make_run(path / "trials" / "0.3-0", metrics=[step(1, objective={"sharpness": 0.75})])
    [sweep] = read_folders([path])[1]
    assert sweep_units(sweep) == {
        "mean_reward": "number", "hard": "number", "kl": "number", "rectified": "share",
        "sharpness": "number",
    }  # fmt: skip
    # Neither a KL nor what a loss reports is better where it is higher.
    assert best_of_sweep(sweep) == {"mean_reward": 1.5, "hard": 3.0}
    plot = sweep_plot(sweep)
    assert (plot.title, plot.y_label, plot.unit) == ("Mean reward by tau", "mean reward", "number")
    assert plot.curves[0].y == [-0.5, 1.5]
    page = write_report([path], tmp_path / "page.html", tokens=False).read_text()
    row = re.search(r"<tr>\s*<th scope=\"row\">0.7</th>(.*?)</tr>", page, re.DOTALL)[1]
    assert re.findall(r"<td[^>]*>([^<]*)", row) == ["1", "1.5", "3", "0.5", "25.0%", "0.75"]


def test_scores_of_a_sweep_have_intervals_over_problems(tmp_path):
    """One seed: Student's t over problems; 1/4, 1 and 1/2 of four samples were right."""
    path = make_sweep(tmp_path / "tau", "objective.tau", {0.3: [7 / 12, None], 0.7: [0.6]})
    evaluated = {"test": {**figures(1, 4, 2), "pass@1": 7 / 12}, "hard": figures(1)}
    make_run(path / "trials" / "0.3-0", trained=evaluated)
    make_run(path / "trials" / "0.3-1", trained={"test": figures(0, 0, 0)})  # It failed later.
    [first, second] = read_folders([path])[1][0].points
    found = first.figures["pass@1"]
    values = [0.25, 1.0, 0.5]
    half = 4.302653 * (sum((v - 7 / 12) ** 2 for v in values) / 2 / 3) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((7 / 12 - half, 7 / 12 + half))
    assert first.figures["rectified"]["low"] is None  # Not of problems.
    assert second.figures["pass@1"]["low"] is None  # Its run has no evaluation.


def test_ratios_are_a_table_and_failed_trials_are_shown(tmp_path):
    make_sweep(tmp_path / "ratio", "group", {"6:2": [0.25, None], "0:8": [0.5, 0.5]})
    [sweep] = read_folders([tmp_path / "ratio"])[1]
    assert sweep_plot(sweep) is None
    page = write_report([tmp_path / "ratio"], tmp_path / "page.html").read_text()
    assert "demonstrations : self" in page
    assert '<td data-value="1">1, <span class="bad">seed 1 failed</span></td>' in page
    assert "<li>group=6:2,seed=1: out of &lt;b&gt;memory&lt;/b&gt;</li>" in page
    assert "<b>memory" not in page


def test_a_point_is_one_series_with_its_seeds(tmp_path):
    path = make_sweep(tmp_path / "tau", "objective.tau", {0.3: [0.4, 0.5], 0.7: [0.6, None]})
    for name in ("0.3-0", "0.3-1", "0.7-0"):
        make_run(path / "trials" / name, metrics=[step(1)])
    runs, sweeps = read_folders([path])
    found = {one.label: [run.label for run in one.runs] for one in all_series(runs, sweeps)}
    assert found == {
        "tau = 0.3": ["tau/objective.tau=0.3,seed=0", "tau/objective.tau=0.3,seed=1"],
        "tau = 0.7": ["tau/objective.tau=0.7,seed=0"],
    }


# --- groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("gft", [0.2, 0.69, 1.0, 1.0]), ("gft_no_gal", [0.2, 0.69, 1.0, 1.0]),
        ("gft_no_dcr", [1.0] * 4), ("sft", [1.0] * 4), ("dft", [0.2, 0.69, 0.71, 0.9]),
        ("asft", [0.2, 0.69, 0.71, 0.9]), ("grpo", [1.0] * 4), ("psft", [1.0] * 4),
    ],
)  # fmt: skip
def test_the_coefficient_is_what_the_loss_makes_of_p(method, expected):
    recipe = Recipe.from_tree({"method": method})
    scores = Scores([0.2, 0.69, 0.71, 0.9], [1.0] * 4)
    assert coefficients(recipe, scores) == pytest.approx(expected, abs=1e-12)


OWN_METHOD = """
from gft_lite.objective.losses import LossOutput
from gft_lite.objective.methods import Method

def loss(inputs, *, sharpness: float = 2.0):
    weight = sharpness * inputs.entropy + inputs.source + 10 * inputs.success_share
    return LossOutput(-(weight + 100 * inputs.progress) * inputs.logprobs)

def broken(inputs):
    raise SystemExit("no such luck")

METHOD = Method(loss, ("self",), "nobody", "-w log p",
                needs=("entropy", "source", "success_share", "progress"))
BROKEN = Method(broken, ("self",), "nobody")
"""


class TestAUsersOwnMethod:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "own_loss.py").write_text(OWN_METHOD)
        monkeypatch.syspath_prepend(tmp_path)
        yield "own_loss"
        sys.modules.pop("own_loss", None)

    def test_its_coefficients_are_those_of_its_inputs(self, module):
        """3 x entropy + 2 for self + 10 x 0.5 + 100 x 0.25."""
        tree = {"method": "own_loss:METHOD", "objective": {"sharpness": 3.0}}
        scores = Scores([0.2, 0.9], [0.5, 0.125])
        found = coefficients(Recipe.from_tree(tree), scores, TokenContext("self", 0.5, 0.25))
        assert found == pytest.approx([33.5, 32.375])

    def test_its_errors_are_the_users(self, module):
        recipe = Recipe.from_tree({"method": "own_loss:BROKEN"})
        with pytest.raises(UserError, match="method: own_loss:BROKEN: SystemExit: no such luck"):
            coefficients(recipe, Scores([0.5], [0.1]))

    def test_a_page_without_tokens_does_not_import_it(self, tmp_path):
        make_run(tmp_path / "run", "method=no_such_module:METHOD", "objective.sharpness=3",
                 metrics=[step(1)])  # fmt: skip
        page = write_report([tmp_path / "run"], tmp_path / "page.html", tokens=False).read_text()
        assert "no_such_module:METHOD" in page
        assert "<div><dt>sharpness</dt><dd>3</dd></div>" in page


def test_a_response_without_a_reward_is_shown_and_no_group_of_one_is_mixed(tmp_path):
    run = make_run(tmp_path)
    graded = Response((5, 1), "x", "self", reward=1.0, verdict="ok")
    none = Response((6, 1), "y", "self", reward=None, verdict="not_applicable")
    group = Group(Problem("q", "?", "x"), (graded, none))
    run.write_groups(1, [ScoredGroup(group, (0.0, 0.0))])
    [shown] = page_groups(select_steps(*read(tmp_path), groups=8))
    assert [response["reward"] for response in shown["responses"]] == [1.0, None]
    assert shown["flat"] is True


def test_steps_shown_are_those_whose_policy_is_there_and_the_last(tmp_path):
    run = make_run(tmp_path)
    response = Response((5, 1), "x", "self", reward=1.0, verdict="ok")
    groups = [ScoredGroup(Group(Problem(f"q{i}", "?", "x"), (response,)), (1.0,)) for i in range(3)]
    for number in range(1, 6):
        run.write_groups(number, groups)
    for number in (2, 3):
        (run.checkpoints / f"step-{number:06d}").mkdir(parents=True)
    shown = select_steps(*read(tmp_path), groups=2)
    place = run.checkpoints
    assert [(m.step, m.adapter, len(m.groups)) for m in shown] == [
        (1, None, 2),
        (3, place / "step-000002" / "adapter", 2),
        (4, place / "step-000003" / "adapter", 2),
        (5, place / "step-000003" / "adapter", 2),
    ]
    assert "where step 4 began" in shown[2].policy
    assert "not kept" in shown[3].policy


def test_tokens_are_their_own_part_of_the_text():
    from transformers import AutoTokenizer

    from gft_lite.utils.paths import PACKAGE

    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "lab" / "base")
    ids = [*tokenizer.encode("a 3世\n", add_special_tokens=False), tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "a 3世\n<eos>"
    assert texts[-3:] == ["世", "\n", "<eos>"]
    assert texts[:2] == ["a", " "]
