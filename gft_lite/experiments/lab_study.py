"""The lab study: the paper's comparisons on the lab task, with tuned rates and several bases."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console

from gft_lite.experiments.lab_bases import lab_base, make_lab_bases
from gft_lite.experiments.sweep_config import MAX_RUNS, Sweep
from gft_lite.experiments.sweep_runner import sweep
from gft_lite.experiments.tuning import best_rate, check_correctness, stages
from gft_lite.recipe.loader import Dumper, find_recipe
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import check_output_path, write_text_atomic
from gft_lite.utils.jsonl import JsonlFile
from gft_lite.utils.progress import stderr_console

Figures = Mapping[str, float]
Runs = dict[tuple[str, int], Figures]  # By base and seed: runs that share both are paired.

FOLDER = "recipes/study"
TUNE_SET = {"source": "lab", "split": "tune", "problems": 64}
FINAL_SETS = {
    "test": {"source": "lab", "split": "test", "problems": 100},
    "retention": {"source": "lab", "split": "retention", "problems": 60},
}


@dataclass(frozen=True)
class Design:
    """The settings of the study; methods are recipes of `recipes/study`.

    `rates` are the learning rates tried with every method; if the best one is the lowest or the
    highest, the rate of `beyond` at that end is tried as well. `bases` are pretraining seeds; 0 is
    the shipped base. Tuning uses seed 0, the compared runs use `seeds` other ones. `ratios` and
    `taus` are run besides those of the main GFT runs, 4:4 and 0.7.
    """

    methods: tuple[str, ...] = (
        "sft", "sft_few", "sft_mix", "dft", "asft", "psft", "grpo",
        "gft", "gft_no_gal", "gft_no_dcr", "gft_no_mix",
    )  # fmt: skip
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    beyond: tuple[float, float] = (5e-4, 8e-3)
    bases: tuple[int, ...] = (0, 1, 2)
    seeds: int = 2
    stages: tuple[tuple[str, str], ...] = (("sft", "grpo"), ("gft", "grpo"))
    ratios: tuple[str, ...] = ("8:0", "6:2", "2:6", "0:8")
    taus: tuple[float, ...] = (0, 0.3, 1)
    tune_eval: Mapping[str, Any] = field(
        default_factory=lambda: {"samples": 4, "k": [1], "sets": {"tune": TUNE_SET}}
    )
    eval: Mapping[str, Any] = field(
        default_factory=lambda: {"samples": 16, "k": [1, 4, 16], "sets": FINAL_SETS}
    )


@dataclass(frozen=True)
class Results:
    """The results of the study.

    `tuning` has the mean pass@1 on the tune split by method and rate, `rates` the chosen rates,
    `runs` the figures of every setting, such as `gft` or `tau 0.3`, and of `base`. `sources` counts
    the responses of one run by method and source, `costs` CPU and wall-clock seconds by part.
    `failed` names the failed runs.
    """

    design: Design
    recipe: Recipe
    tuning: dict[str, dict[float, float]]
    rates: dict[str, float]
    runs: dict[str, Runs]
    sources: dict[str, dict[str, int]]
    costs: dict[str, dict[str, float]]
    failed: list[str]


def study(
    out: str | Path, design: Design | None = None, *, jobs: int = 2,
    overrides: Sequence[str] = (), console: Console | None = None,
) -> Results:  # fmt: skip
    """Run the unfinished parts of the study and return the results of all.

    Raises: UserError for wrong options, overrides or the folder of another study;
    KeyboardInterrupt after all runs have stopped.
    """
    design = design or Design()
    check_output_path(out)
    recipe = _check(design, jobs, overrides)
    work = _Study(Path(out), design, jobs, overrides, console or stderr_console())
    with work.measured("bases"):
        work.make_bases()
    tuning = work.tune()
    if untuned := [method for method, scores in tuning.items() if not scores]:
        failures = "\n".join(work.failed)
        raise RuntimeError(f"no run to tune {', '.join(untuned)} succeeded:\n{failures}")
    rates = {method: best_rate(scores) for method, scores in tuning.items()}
    tuned = {method: work.write_tuned(method, rate) for method, rate in rates.items()}
    work.run_part("main", list(tuned.values()))
    if design.stages:
        work.run_part("stages", [work.write_staged(tuned, *pair) for pair in design.stages])
    if design.ratios:
        # A problem has three teachers; filling up with self samples would change the ratio.
        repeat = {"group": {"shortfall": "repeat"}}
        work.run_part("ratio", [tuned["gft"]], {"group": list(design.ratios)}, repeat)
    if design.taus:
        work.run_part("tau", [tuned["gft"]], {"objective.tau": list(design.taus)})
    for name in ("ratio 4:4", "tau 0.7"):
        if "gft" in work.runs:
            work.runs[name] = work.runs["gft"]
    return Results(
        design, recipe, tuning, rates, work.runs, work.sources, work.costs(), work.failed
    )


def _check(design: Design, jobs: int, overrides: Sequence[str]) -> Recipe:
    """The recipe of the first method. Raises: UserError, before bases are pretrained."""
    problems = [
        f"--{name}: must be at least 1, got {value}."
        for name, value in (("jobs", jobs), ("seeds", design.seeds)) if value < 1
    ]  # fmt: skip
    runs = len(design.methods) * len(design.bases) * design.seeds
    if runs > MAX_RUNS:
        rule = f"--seeds: must give at most {MAX_RUNS:,} runs of the methods, got {design.seeds:,}"
        problems.append(f"{rule}, which are {runs:,}.")
    if problems:
        raise UserError(problems)
    recipe = Recipe.load(_shipped(design.methods[0]), overrides)
    check_correctness(recipe)
    return recipe


def _shipped(method: str) -> Path:
    return find_recipe(f"{FOLDER}/{method}.yaml")


@dataclass
class _Study:
    """A running study: its folder and the results so far."""

    out: Path
    design: Design
    jobs: int
    overrides: Sequence[str]
    console: Console
    runs: dict[str, Runs] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def tune(self) -> dict[str, dict[float, float]]:
        """The mean pass@1 over the bases on the tune split, by method and rate."""
        design = self.design
        scores: dict[str, dict[float, float]] = {method: {} for method in design.methods}
        self._try_rates("tune", design.methods, design.rates, scores)
        ends = (min(design.rates), max(design.rates))
        for end, further in zip(ends, design.beyond, strict=True):
            at_end = [m for m in design.methods if scores[m] and best_rate(scores[m]) == end]
            if at_end and further not in design.rates:
                self._try_rates(f"tune-{further:g}", at_end, [further], scores)
        return scores

    def _try_rates(
        self, name: str, methods: Sequence[str], rates: Sequence[float],
        scores: dict[str, dict[float, float]],
    ) -> None:  # fmt: skip
        """Run methods at some rates and add their scores to `scores`."""
        files = [_shipped(method) for method in methods]
        overrides = {"seed": 0, "eval": dict(self.design.tune_eval)}
        trials = self._sweep(name, files, {"optim.lr": list(rates)}, overrides, seeds=1)
        found: dict[tuple[str, float], list[float]] = {}
        for trial in trials:
            key = trial["settings"]["recipe"], trial["settings"]["optim.lr"]
            found.setdefault(key, []).append(trial["summary"]["trained"]["pass@1"])
        for (method, rate), values in found.items():
            if len(values) == len(self.design.bases):  # Rates with a failed run don't count.
                scores[method][rate] = fmean(values)

    def run_part(
        self, name: str, files: Sequence[Path], grid: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Run settings on every base with every seed and record their figures."""
        common = {"seed": 1, "eval": dict(self.design.eval), **(overrides or {})}
        for trial in self._sweep(name, files, grid or {}, common, self.design.seeds):
            summary, settings = trial["summary"], trial["settings"]
            run = str(settings["policy.model"]), trial["seed"]
            self.runs.setdefault(setting_name(settings), {})[run] = summary["trained"]
            self.runs.setdefault("base", {})[run] = summary["base"]
            if name == "main":
                self.sources[settings["recipe"]] = summary["sources"]

    def _sweep(
        self, name: str, files: Sequence[Path], grid: Mapping[str, Any],
        overrides: Mapping[str, Any], seeds: int,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Run a sweep, whose file is kept in the study's folder; returns the finished trials."""
        tree = {
            "name": name,
            "recipe": str(files[0].resolve()),
            "overrides": {"name": "study", **overrides},
            "grid": {
                "recipe": [str(file.resolve()) for file in files],
                "policy.model": [self._base(seed) for seed in self.design.bases],
                **grid,
            },
            "seeds": seeds,
        }
        file = self._write(f"{name}.yaml", tree)
        plan = Sweep.load(file, [f"overrides.{text}" for text in self.overrides])
        with self.measured(name):
            folder = sweep(plan, self.out / name, jobs=self.jobs, console=self.console)
        trials = folder.results()["trials"]
        self.failed += [f"{name}/{t['name']}: {t['reason']}" for t in trials if not t["summary"]]
        return [trial for trial in trials if trial["summary"]]

    # --- files -------------------------------------------------------------------------------

    def write_tuned(self, method: str, rate: float) -> Path:
        """Write the recipe of a method with the chosen rate; returns its path."""
        tree = {"extends": [str(_shipped(method).resolve())], "optim": {"lr": rate}}
        return self._write(f"recipes/{method}.yaml", tree)

    def write_staged(self, tuned: Mapping[str, Path], first: str, second: str) -> Path:
        """Write a recipe of two stages, each at its tuned rate, with the steps of one run."""
        recipe = Recipe.load(tuned[first], self.overrides)
        steps = recipe.train.steps // 2
        layers = [
            {"method": first, "optim": {"lr": recipe.optim.lr}, "train": {
                "steps": steps, "problems_per_step": recipe.train.problems_per_step}},
            {"method": second, "train": {"steps": recipe.train.steps - steps}},
        ]  # fmt: skip
        base = {"extends": [str(tuned[second].resolve())]}
        return self._write(
            f"recipes/{first}_then_{second}.yaml", {**base, "stages": stages(layers)}
        )

    def _write(self, name: str, tree: Mapping[str, Any]) -> Path:
        file = self.out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, yaml.dump(tree, Dumper=Dumper, sort_keys=False))
        return file

    # --- bases -------------------------------------------------------------------------------

    def _base(self, seed: int) -> str:
        return lab_base(seed, self.out / "bases")

    def make_bases(self) -> None:
        """Pretrain the missing bases."""
        make_lab_bases(self.design.bases, self.out / "bases", self.jobs, self.console)

    # --- costs -------------------------------------------------------------------------------

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        """Append the CPU and wall-clock seconds of a part to costs.jsonl, also if it fails."""
        began, before = time.perf_counter(), _cpu_seconds()
        try:
            yield
        finally:
            cpu, wall = _cpu_seconds() - before, time.perf_counter() - began
            if cpu:  # 0 if every run was finished before.
                self._cost_file.append([{"part": part, "cpu": cpu, "wall": wall}])

    @property
    def _cost_file(self) -> JsonlFile[tuple[str, float, float]]:
        return JsonlFile(
            self.out / "costs.jsonl", _parse_cost, "must be a part and its seconds",
            "Delete the line: only the table of costs has it.",
        )  # fmt: skip

    def costs(self) -> dict[str, dict[str, float]]:
        """CPU and wall-clock seconds by part, summed over all starts of the study."""
        total: dict[str, dict[str, float]] = {}
        for part, cpu, wall in self._cost_file:
            sums = total.setdefault(part, {"cpu": 0.0, "wall": 0.0})
            sums["cpu"] += cpu
            sums["wall"] += wall
        return total


def _parse_cost(line: Mapping[str, Any]) -> tuple[str, float, float]:
    return str(line["part"]), float(line["cpu"]), float(line["wall"])


def setting_name(settings: Mapping[str, Any]) -> str:
    """The name of a trial's setting in `Results.runs`."""
    if "group" in settings:
        return f"ratio {settings['group']}"
    if "objective.tau" in settings:
        return f"tau {settings['objective.tau']:g}"
    return settings["recipe"].replace("_then_", " > ")


def _cpu_seconds() -> float:
    """CPU seconds of all ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
