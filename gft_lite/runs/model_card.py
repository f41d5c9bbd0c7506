"""The model card: what a reader of an adapter, or of a merged model, should know of its making."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from gft_lite.data.sources import FORMATS
from gft_lite.objective.methods import METHODS
from gft_lite.recipe.base import HUB_ID
from gft_lite.recipe.loader import Dumper
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder, stage_folder
from gft_lite.utils.files import write_text_atomic
from gft_lite.version import __version__

_PLACES = ("model", "adapter", "source")  # Fields that may hold a path.


def write_card(run: RunFolder) -> None:
    """Put the card of a finished run into its adapter's folder, in place of peft's general one."""
    recipe = Recipe.load(run.path / "recipe.yaml")
    base = known_as(recipe.policy.model)
    lines = [
        _front_matter(base, recipe, library_name="peft", tags=["lora", *_tags(recipe)]),
        f"# {recipe.name}",
        f"A LoRA adapter of {_shown(base)}, trained by gft-lite {__version__}.",
        *_story(run),
        "## Use",
        _use(base, recipe),
        *_limits(recipe),
        *_recipe(recipe),
    ]
    write_text_atomic(run.adapter / "README.md", "\n\n".join(lines) + "\n")


def write_merged_card(
    folder: Path, base: str, adapter: str, run: RunFolder | None, figures: str
) -> None:
    """Put the card of a merged model into its folder.

    `adapter` is its name, `run` where it was trained if that is known, `figures` what the
    comparison with the unmerged policy found.
    """
    recipe = Recipe.load(run.path / "recipe.yaml") if run else None
    finished = run is not None and "@" not in adapter
    lines = [
        _front_matter(base, recipe, library_name="transformers", tags=_tags(recipe)),
        f"# {_folder_name(adapter)}, merged",
        f"The LoRA adapter `{_folder_name(adapter)}`, merged by gft-lite {__version__} into "
        f"{_shown(base)}: a plain model for transformers, vLLM and converters.",
        figures,
        *(["What follows tells of the adapter, before merging."] if run else []),
        *(_story(run) if run and finished else []),
        *(_limits(recipe) if recipe else []),
        *(_recipe(recipe) if recipe else []),
    ]
    write_text_atomic(folder / "README.md", "\n\n".join(lines) + "\n")


def known_as(model: str) -> str:
    """A model's name without where it lies on this machine."""
    return model if _on_hub(model) else _folder_name(model)


def _folder_name(path: str) -> str:
    """The last part of a path."""
    return Path(path).name or path


def _on_hub(name: str) -> bool:
    local = Path(name).exists() or Path(name).suffix in FORMATS
    return bool(HUB_ID.fullmatch(name)) and not local


def _shown(base: str) -> str:
    if base == "lab":
        return "`lab`, the tiny base that ships with gft-lite"
    return f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"`{base}`"


def _tags(recipe: Recipe | None) -> list[str]:
    methods = [s.method for s in recipe.stages] or [recipe.method] if recipe else []
    return ["gft-lite", *(m for m in methods if m in METHODS)]


def _front_matter(base: str, recipe: Recipe | None, **fields: Any) -> str:
    """What the hub reads; what is not known, such as the licence, is left out."""
    source = recipe.data.source if recipe else ""
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[source] if _on_hub(source) else None,
        pipeline_tag="text-generation",
        **fields,
    )
    return f"---\n{data.to_yaml()}\n---"


# --- sections --------------------------------------------------------------------------------


def _story(run: RunFolder) -> list[str]:
    """Method, data and results of a finished run, as Markdown."""
    recipe, summary = Recipe.load(run.path / "recipe.yaml"), run.summary()
    return [
        "## Method",
        _method(recipe),
        "## Data",
        _data(recipe, summary),
        "## Results",
        _results(recipe, summary, _sets(recipe, run)),
        _effort(summary),
    ]


def _method(recipe: Recipe) -> str:
    settings = [recipe.stage(i) for i in range(len(recipe.stages))] or [recipe]
    lines = []
    for each in settings:
        method = METHODS.get(each.method)
        told = f": loss of a token `{method.formula}` ({method.citation})" if method else ""
        own = {name: getattr(each.objective, name) for name in method.parameters} if method else {}
        values = "".join(f", {name} {value:g}" for name, value in own.items())
        lines.append(f"- `{each.method}`{told}{values}, learning rate {each.optim.lr:g}")
    policy = recipe.policy
    base = {"nf4": "an NF4-quantised", "int8": "an int8-quantised", "none": "an unquantised"}
    lines.append(f"- LoRA of rank {policy.lora.rank}, alpha {policy.lora.alpha}, "
                 f"on {base[policy.quantization]} base")  # fmt: skip
    return "\n".join(lines)


def _data(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    source = known_as(recipe.data.source)
    sources = summary.get("sources", {})
    counts = ", ".join(f"{count:,} {name}" for name, count in sources.items())
    responses = f"{summary['trajectories']:,} responses" + (f" ({counts})" if counts else "")
    return f"{summary['problems']:,} problems of `{source}`; trained on {responses}."


def _sets(recipe: Recipe, run: RunFolder) -> dict[str, dict[str, Any]]:
    """What the base and the trained policy scored on each set, if the run kept it."""
    last = len(recipe.stages) - 1
    homes = {"base": run, "trained": run}
    if recipe.stages:
        homes = {"base": stage_folder(recipe, run, 0), "trained": stage_folder(recipe, run, last)}
    return {
        name: json.loads((home.path / "eval" / f"{name}.json").read_text(encoding="utf-8"))
        for name, home in homes.items()
    }


def _results(
    recipe: Recipe, summary: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]]
) -> str:
    """A table of the base beside the trained policy."""
    lines = ["| | base | trained |", "|---|---|---|"]
    for name, figures in sets["trained"].items():
        for figure in (key for key in figures if re.fullmatch(r"pass@\d+", key)):
            cells = (_cell(sets[model].get(name, {}), figure) for model in ("base", "trained"))
            lines.append(f"| {name}, {figure} | {' | '.join(cells)} |")
    kl = summary["trained"]["kl"]
    last = recipe.stages[-1].reference if recipe.stages else recipe.policy.reference
    reference = "the base" if last == "base" else "the adapter it started from"
    lines.append(f"| KL to {reference}, nats per token | 0 | {kl:z.3f} |")
    problems = {name: figures["problems"] for name, figures in sets["trained"].items()}
    told = ", ".join(f"{count:,} problems of {name}" for name, count in problems.items())
    if told:
        lines.append(f"\nMeasured on {told}; in brackets 95% bootstrap intervals over problems.")
    return "\n".join(lines)


def _cell(figures: Mapping[str, Any], name: str) -> str:
    if name not in figures:
        return "-"
    interval = figures.get(f"{name}_interval")
    around = " [{:.3f}, {:.3f}]".format(*interval) if interval else ""
    return f"{figures[name]:.3f}{around}"


def _effort(summary: Mapping[str, Any]) -> str:
    return (
        f"{summary['steps']:,} steps, {summary['trained_tokens']:,} trained tokens, seed "
        f"{summary['seed']}, {summary['seconds']['total']:,.0f} seconds in all."
    )


def _use(base: str, recipe: Recipe) -> str:
    """How to load the adapter with peft and to serve it with vLLM."""
    model = "str(BASE)" if base == "lab" else repr(base)
    given = "from gft_lite.lab import BASE\n" if base == "lab" else ""
    served = "gft_lite/lab/base" if base == "lab" else base
    # vLLM takes ranks from 8 up, powers of two.
    rank = max(8, 1 << (recipe.policy.lora.rank - 1).bit_length())
    return (
        "With this folder as `ADAPTER`:\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{given}\n"
        f'base = AutoModelForCausalLM.from_pretrained({model}, dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, "ADAPTER")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({model})\n"
        "```\n\n"
        "```\n"
        f"vllm serve {served} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {recipe.name}=ADAPTER\n"
        "```\n\n"
        f"Prompts were written in {recipe.data.prompt.style} style, see `data.prompt` below."
    )


def _limits(recipe: Recipe) -> list[str]:
    lines = ["One run with one seed; measured on nothing but the sets above."]
    if recipe.policy.quantization != "none":
        lines.append(
            f"Trained on the base in {recipe.policy.quantization}: on the base in another "
            "precision its log-probs are not quite those that were trained and measured."
        )
    rules = ", ".join(f"`{f.name}`" for f in recipe.reward.functions)
    lines.append(
        f"The reward was a rule ({rules}), which sees no more of an answer than it was "
        "written to see. Nothing was done about the biases and errors of base and data."
    )
    return ["## Limits", "\n".join(f"- {line}" for line in lines)]


def _recipe(recipe: Recipe) -> list[str]:
    """The resolved recipe, without the places of this machine."""
    tree = _without_places(recipe.model_dump())
    text = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    fence = "````"  # Templates and system prompts may hold the usual one.
    return ["## Recipe", f"<details>\n\n{fence}yaml\n{text}{fence}\n\n</details>"]


def _without_places(value: Any, field: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_places(v, key) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_places(v, field) for v in value]
    if field == "servers":
        return "http://server"
    path = Path(value).expanduser() if isinstance(value, str) else Path()
    # A system prompt may begin with a slash as well.
    if path.is_absolute() and (field in _PLACES or path.exists()):
        return _folder_name(value)
    return value
