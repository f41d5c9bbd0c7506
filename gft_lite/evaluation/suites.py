"""Suites: YAML files with named benchmarks and the protocol of sampling and grading them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gft_lite.data.problems import (
    Loaded,
    answer_errors,
    load_problems,
    with_usable_demonstrations,
)
from gft_lite.data.prompts import PromptFormat
from gft_lite.data.sources import FORMATS
from gft_lite.recipe.base import Settings, Temperature, read_settings
from gft_lite.recipe.loader import find_recipe, merge, read_overrides
from gft_lite.recipe.objective_sections import RewardSettings
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import (
    ColumnsSettings,
    DataSettings,
    PolicySettings,
    PromptSettings,
    RolloutSettings,
)
from gft_lite.rollout.base import Sampling
from gft_lite.utils.errors import RecipeError, nearest
from gft_lite.utils.paths import PACKAGE

_FOLDER = Path("configs") / "suites"
_DEFINITIONS = "benchmarks"  # The file that the shipped suites extend, not a suite itself.
# The columns of files in `--data-dir`; a row's own `answer_type` overrides its benchmark's.
_NORMALISED = ColumnsSettings(problem="problem", answer="answer", id="id")


class Benchmark(DataSettings):
    """One benchmark: its rows, its prompt and its type of answers.

    `prompt` is the suite's by default. `unverified` names what was not checked about a hub id.
    """

    source: str
    split: str = "test"
    title: str | None = None
    answer_type: Literal["math", "choice"] = "math"
    license: str | None = None
    unverified: str | None = None


class SuiteRollout(RolloutSettings):
    """The settings of training, with the paper's temperature and length."""

    temperature: Temperature = 0.5
    max_tokens: PositiveInt = 4096


class Suite(Settings):
    """Benchmarks and the protocol: accuracy is the mean over `samples` responses a problem.

    `k` of pass@k is by default every power of two up to `samples`. `limit` is the number of
    problems drawn from each benchmark by its `seed`; the KL is measured on `drift` problems of
    each.
    """

    name: str = "suite"
    benchmarks: list[str] = Field(default_factory=list)
    definitions: Annotated[dict[str, Benchmark], Field(min_length=1)]
    prompt: PromptSettings = PromptSettings()
    samples: PositiveInt = 16
    k: list[PositiveInt] = Field(default_factory=list)
    limit: PositiveInt | None = None
    drift: NonNegativeInt = 64
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    micro_batch_tokens: PositiveInt = 8192
    policy: PolicySettings = PolicySettings()
    rollout: SuiteRollout = SuiteRollout()
    reward: RewardSettings = Field(default_factory=RewardSettings)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        rules = [
            f"{where}: must have letters, digits, `_`, `-` and `.`, to name a file, not {name!r}"
            for where, name in [
                ("name", self.name),
                *(("definitions", d) for d in self.definitions),
            ]
            if not re.fullmatch(r"\w[\w.-]*", name)
        ]
        for name in self.benchmarks:
            if name not in self.definitions:
                close = nearest(name, self.definitions)
                hint = f" (did you mean {close}?)" if close else ""
                rules.append(f"benchmarks: must be among definitions, which lack {name}{hint}")
        if self.k and max(self.k) > self.samples:
            rules.append(f"k: must be at most samples, which is {self.samples}")
        if self.samples > 1 and self.rollout.is_greedy:
            rules.append(
                "samples: must be 1 at temperature 0, top_k 1 or top_p below 0.01: all are the same"
            )
        if rules:
            raise ValueError("\n".join(rules))
        return self

    @property
    def names(self) -> list[str]:
        """The benchmarks in order; all definitions by default."""
        return self.benchmarks or list(self.definitions)

    @property
    def ks(self) -> list[int]:
        """Every k of pass@k, including 1."""
        return sorted({1, *(self.k or (2**i for i in range(self.samples.bit_length())))})

    def title(self, name: str) -> str:
        """The name of a benchmark in tables."""
        return self.definitions[name].title or name

    def prompt_of(self, name: str) -> PromptSettings:
        """The prompt settings of a benchmark: its own, else the suite's."""
        own = self.definitions[name]
        return own.prompt if "prompt" in own.model_fields_set else self.prompt

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = ()) -> Suite:
        """A shipped suite by name or a user's file, with `key=value` overrides.

        Raises: RecipeError with every error found.
        """
        return read_settings(cls, _find(name), overrides)[0]

    @classmethod
    def of_data(cls, data: str, recipe: Recipe, overrides: Sequence[str] = ()) -> Suite:
        """A file or hub data set, evaluated by a run's own columns, prompt, reward and sampling.

        The source of a run's evaluation sets is evaluated as these sets are in the run.
        Raises: RecipeError with every error found.
        """
        name = re.sub(r"[^\w.-]+", "-", Path(data).stem).strip("-.") or "data"
        columns = recipe.data.columns.model_dump()
        if not recipe.reward.answer_rule(recipe.data.columns):  # Responses are graded.
            columns |= {"expert": [], "teacher": []}
        known = {n: own.model_dump() for n, own in recipe.eval.sets.items()
                 if os.path.abspath(own.source) == os.path.abspath(data)}  # fmt: skip
        changes = read_overrides(overrides)
        samples = changes.get("samples", recipe.eval.samples)
        tree = {
            "name": name,
            "definitions": known or {name: {"source": data, "columns": columns}},
            "prompt": recipe.data.prompt.model_dump(),
            "samples": recipe.eval.samples,
            "k": [k for k in recipe.eval.k if not isinstance(samples, int) or k <= samples],
            "seed": recipe.seed,
            "rollout": recipe.rollout.model_dump() | asdict(sampling_of(recipe)),
            "reward": recipe.reward.model_dump(),
        }
        return cls.from_tree(merge(tree, changes))


def sampling_of(recipe: Recipe) -> Sampling:
    """How the evaluations of a run are sampled: `rollout.top_k` is of training alone."""
    return Sampling(
        recipe.eval.temperature,
        recipe.eval.top_p,
        max_tokens=recipe.eval.max_tokens or recipe.rollout.max_tokens,
        stop=tuple(recipe.rollout.stop),
    )


def shipped() -> dict[str, Path]:
    """The files of the suites in the package, by name."""
    files = [f for root in (PACKAGE.parent, PACKAGE / "shipped") for f in root.glob(f"{_FOLDER}/*")]
    return {f.stem: f for f in sorted(files) if f.suffix == ".yaml" and f.stem != _DEFINITIONS}


def _find(name: str) -> Path:
    known = shipped()
    if name in known and not os.path.isfile(name):
        return known[name]
    if os.path.isfile(name) or Path(name).suffix:
        return find_recipe(name)
    close = nearest(name, known)
    hint = f" Did you mean {close}?" if close else ""
    rule = f"must be {', '.join(known)} or a file"
    raise RecipeError([f"--suite: {rule}, got {name!r}.{hint}"])


def load_benchmark(
    suite: Suite, name: str, format: PromptFormat, context: int, data_dir: Path | None
) -> Loaded:
    """A benchmark's problems, from its file in `data_dir` if there is one.

    At most half of the model's context is reserved for the response; longer prompts are left out
    and counted. Each problem has its `answer_type`. Without answers, demonstrations that are longer
    than a response are left out.
    Raises: RecipeError without any row, or with neither answers nor demonstrations.
    """
    benchmark = suite.definitions[name]
    field = f"definitions.{name}"
    settings: DataSettings = benchmark
    file = find_file(data_dir, name)
    if file is not None:
        local = {"source": str(file), "file": None, "revision": None, "columns": _NORMALISED}
        settings, field = benchmark.model_copy(update=local), f"--data-dir {file.name}"
    if suite.limit:
        least = min(suite.limit, benchmark.problems or suite.limit)
        settings = settings.model_copy(update={"problems": least})
    reserve = min(suite.rollout.max_tokens, context // 2) + 1
    try:
        loaded = load_problems(settings, format, context=context, reserve=reserve, field=field)
    except RecipeError as error:
        hints = [] if file is not None else [_hint(benchmark, name)]
        raise RecipeError([*error.problems, *filter(None, hints)]) from None
    if errors := answer_errors(field, loaded.columns, loaded.problems, suite.reward):
        raise RecipeError(errors)
    if suite.reward.answer_rule(loaded.columns):
        loaded = with_usable_demonstrations(loaded, format, reserve - 1, field)
    kind = {"answer_type": benchmark.answer_type}
    problems = (replace(p, columns={**kind, **p.columns}) for p in loaded.problems)
    return replace(loaded, problems=tuple(problems))


def find_file(data_dir: Path | None, name: str) -> Path | None:
    """The file of a benchmark in `data_dir`. Raises: RecipeError if that is not a folder."""
    if data_dir is None:
        return None
    if not os.path.isdir(data_dir):
        raise RecipeError([f"--data-dir: must be a folder with NAME.jsonl, got {str(data_dir)!r}."])
    files = (data_dir / f"{name}{suffix}" for suffix in FORMATS)
    return next((file for file in files if file.is_file()), None)


def _hint(benchmark: Benchmark, name: str) -> str:
    """How to replace a benchmark that does not load."""
    if benchmark.source == "lab" or os.path.exists(benchmark.source):
        return ""
    doubt = f"{benchmark.unverified} could not be checked by us; " if benchmark.unverified else ""
    return f"definitions.{name}: {doubt}{name}.jsonl in --data-dir DIR takes the hub's place."
