"""Model cards of adapters and merged models: data, method, results, use and limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from gft_lite.data.sources import FORMATS
from gft_lite.objective.methods import METHODS
from gft_lite.policy.adapter_config import lora_settings, read_adapter_config
from gft_lite.recipe.base import is_hub_id
from gft_lite.recipe.figures import compared, label_of
from gft_lite.recipe.loader import Dumper
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.export import read_end_tokens
from gft_lite.runs.folder import RunFolder, stage_folder
from gft_lite.runs.folder_forms import Evaluation
from gft_lite.utils.files import write_text_atomic
from gft_lite.version import __version__

_PATH_FIELDS = ("model", "adapter", "source")  # Fields that may hold a path.


def write_card(run: RunFolder) -> None:
    """Write the card of a finished run to its adapter's folder, in place of peft's generic card."""
    recipe = Recipe.load(run.path / "recipe.yaml")
    base = known_as(recipe.policy.model)
    lines = [
        _front_matter(base, recipe, library_name="peft", tags=["lora", *_tags(recipe)]),
        f"# {recipe.name}",
        f"A LoRA adapter of {_link(base)}, trained by gft-lite {__version__}.",
        *_training(run),
        "## Use",
        *_use(base, recipe, run.adapter),
        *_limits(recipe),
        *_recipe(recipe),
    ]
    write_text_atomic(run.adapter / "README.md", "\n\n".join(lines) + "\n")


def merged_card(base: str, adapter: str, run: RunFolder | None, figures: str) -> str:
    """The card of a merged model.

    `adapter` is the adapter's name, `run` the run that trained it if that is known, `figures` the
    result of the comparison with the unmerged policy. Raises: UserError for damaged files of a run.
    """
    recipe = Recipe.load(run.path / "recipe.yaml") if run else None
    # A run that was killed at its very end has its adapter, and no results yet.
    finished = run is not None and "@" not in adapter and (run.path / "summary.json").exists()
    lines = [
        _front_matter(base, recipe, library_name="transformers", tags=_tags(recipe)),
        f"# {_folder_name(adapter)}, merged",
        f"The LoRA adapter `{_folder_name(adapter)}`, merged by gft-lite {__version__} into "
        f"{_link(base)}: a plain model for transformers, vLLM and converters.",
        figures,
        *(["The sections below describe the adapter before merging."] if run else []),
        *(_training(run) if run and finished else []),
        *(_limits(recipe) if recipe else []),
        *(_recipe(recipe) if recipe else []),
    ]
    return "\n\n".join(lines) + "\n"


def known_as(model: str) -> str:
    """A model's name without the folders of this machine."""
    return model if _on_hub(model) else _folder_name(model)


def _folder_name(path: str) -> str:
    """The last part of a path."""
    return Path(path).name or path


def _on_hub(name: str) -> bool:
    local = Path(name).exists() or Path(name).suffix in FORMATS
    return is_hub_id(name) and not local


def _link(base: str) -> str:
    if base == "lab":
        return "`lab`, the tiny base that ships with gft-lite"
    return f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"`{base}`"


def _tags(recipe: Recipe | None) -> list[str]:
    methods = [s.method for s in recipe.stages] or [recipe.method] if recipe else []
    return ["gft-lite", *(m for m in methods if m in METHODS)]


def _front_matter(base: str, recipe: Recipe | None, **fields: Any) -> str:
    """The metadata for the hub; unknown entries, such as the licence, are left out."""
    source = recipe.data.source if recipe else ""
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[source] if _on_hub(source) else None,
        pipeline_tag="text-generation",
        **fields,
    )
    return f"---\n{data.to_yaml()}\n---"


# --- sections --------------------------------------------------------------------------------


def _training(run: RunFolder) -> list[str]:
    """Method, data and results of a finished run, as Markdown."""
    recipe, summary = Recipe.load(run.path / "recipe.yaml"), run.summary()
    return [
        "## Method",
        _method(recipe, run.adapter),
        "## Data",
        _data(recipe, summary),
        "## Results",
        _results(recipe, summary, _sets(recipe, run)),
        _effort(summary),
    ]


def _method(recipe: Recipe, adapter: Path) -> str:
    settings = [recipe.stage(i) for i in range(len(recipe.stages))] or [recipe]
    lines = []
    for each in settings:
        method = METHODS.get(each.method)
        loss = f": loss of a token `{method.formula}` ({method.citation})" if method else ""
        own = {name: getattr(each.objective, name) for name in method.parameters} if method else {}
        values = "".join(f", {name} {value:g}" for name, value in own.items())
        lines.append(f"- `{each.method}`{loss}{values}, learning rate {each.optim.rate:g}")
    base = {"nf4": "an NF4-quantised", "int8": "an int8-quantised", "none": "an unquantised"}
    lora = lora_settings(read_adapter_config(adapter))
    quantized = base[recipe.policy.quantization]
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    lines.append(f"- {kind} of rank {lora.rank}, alpha {lora.alpha:g}, on {quantized} base")
    return "\n".join(lines)


def _data(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    source = known_as(recipe.data.source)
    sources = summary.get("sources", {})
    counts = ", ".join(f"{count:,} {name}" for name, count in sources.items())
    responses = f"{summary['trajectories']:,} responses" + (f" ({counts})" if counts else "")
    return f"{summary['problems']:,} problems of `{source}`; trained on {responses}."


def _sets(recipe: Recipe, run: RunFolder) -> dict[str, Evaluation]:
    """The results of the base and of the trained policy by set."""
    first = last = run
    if recipe.stages:
        first, last = (stage_folder(recipe, run, i) for i in (0, len(recipe.stages) - 1))
    return {"base": first.evaluation("base"), "trained": last.evaluation("trained")}


def _results(recipe: Recipe, summary: Mapping[str, Any], sets: Mapping[str, Evaluation]) -> str:
    """A table with the results of the base and of the trained policy."""
    lines = ["| | base | trained |", "|---|---|---|"]
    for name, figures in sets["trained"].items():
        for figure in compared(figures):
            cells = (_cell(sets[model].get(name, {}), figure) for model in ("base", "trained"))
            lines.append(f"| {name}, {label_of(figure)} | {' | '.join(cells)} |")
    kl = summary["trained"]["kl"]
    last = recipe.stages[-1].reference if recipe.stages else recipe.policy.reference
    reference = "the base" if last == "base" else "the adapter it started from"
    lines.append(f"| KL to {reference}, nats per token | 0 | {kl:z.3f} |")
    problems = {name: figures["problems"] for name, figures in sets["trained"].items()}
    measured = ", ".join(f"{count:,} problems of {name}" for name, count in problems.items())
    if measured:
        intervals = "in brackets 95% bootstrap intervals over problems"
        lines.append(f"\nMeasured on {measured}; {intervals}.")
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


def _use(base: str, recipe: Recipe, adapter: Path) -> list[str]:
    """How to load the adapter with peft, to generate with it, and to serve it with vLLM."""
    ends = read_end_tokens(adapter)
    served = "gft_lite/lab/base" if base == "lab" else base
    # vLLM takes ranks from 8 up, powers of two.
    lora = lora_settings(read_adapter_config(adapter))
    rank = max(8, 1 << (lora.largest_rank - 1).bit_length())
    needed: dict[str, Any] = {"stop_token_ids": list(ends)} if ends else {}
    needed |= {"stop": recipe.rollout.stop} if recipe.rollout.stop else {}
    variables = recipe.data.prompt.chat_template_kwargs
    needed |= {"chat_template_kwargs": variables} if variables else {}
    return [
        "With this folder as `ADAPTER`:",
        f"```python\n{_example(base, recipe, ends)}```",
        f"```\nvllm serve {served} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {recipe.name}=ADAPTER\n```",
        *([f"Requests to vLLM need `{json.dumps(needed)[1:-1]}`."] if needed else []),
    ]


def _example(base: str, recipe: Recipe, ends: Mapping[int, str]) -> str:
    """Python code that answers a problem with the prompts and the end tokens of training."""
    model = "str(BASE)" if base == "lab" else repr(base)
    import_base = "from gft_lite.lab import BASE\n" if base == "lab" else ""
    prompt = recipe.data.prompt
    question = f"{prompt.template!r}.replace('{{problem}}', 'What is 12 * 7?')"
    chat = prompt.style == "chat"
    if chat:
        system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        turns = "".join(f"{turn}, " for turn in system)
        variables = prompt.chat_template_kwargs
        given = f", **{variables!r}" if variables else ""
        rendered = (
            f'messages = [{turns}{{"role": "user", "content": {question}}}]\n'
            "prompt = tokenizer.apply_chat_template(\n"
            f"    messages, add_generation_prompt=True, tokenize=False{given}\n)\n"
        )
    else:
        rendered = f"prompt = {question}\n"
    tokenizer, listed = model, "end_tokens = tokenizer.eos_token_id\n"
    if ends:
        tokenizer = '"ADAPTER"'
        listed = f"end_tokens = {list(ends)}  # {', '.join(ends.values())}\n"
    stop = (
        f", stop_strings={recipe.rollout.stop}, tokenizer=tokenizer" if recipe.rollout.stop else ""
    )
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{import_base}\n"
        f'base = AutoModelForCausalLM.from_pretrained({model}, dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, "ADAPTER")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n\n"
        f"{rendered}"
        f'inputs = tokenizer(prompt, add_special_tokens={not chat}, return_tensors="pt")\n'
        f"{listed}"
        "output = model.generate(\n"
        "    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask,\n"
        f"    max_new_tokens={recipe.rollout.max_tokens}, do_sample=False, "
        f"eos_token_id=end_tokens{stop},\n)\n"
        "response = output[0, inputs.input_ids.shape[1] :]\n"
        "print(tokenizer.decode(response, skip_special_tokens=True))\n"
    )


def _limits(recipe: Recipe) -> list[str]:
    lines = ["One run with one seed, measured only on the sets above."]
    if recipe.policy.quantization != "none":
        lines.append(
            f"Trained on the base in {recipe.policy.quantization}: with the base in another "
            "precision, log-probs differ from those that were trained and measured."
        )
    rules = ", ".join(f"`{f.name}`" for f in recipe.reward.functions)
    lines.append(
        f"The reward was a rule ({rules}), which checks only what it was written to check. "
        "Biases and errors of the base and the data were not addressed."
    )
    return ["## Limits", "\n".join(f"- {line}" for line in lines)]


def _recipe(recipe: Recipe) -> list[str]:
    """The resolved recipe, without the folders of this machine."""
    tree = _without_folders(recipe.model_dump())
    text = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    fence = "````"  # Templates and system prompts may contain three backquotes.
    return ["## Recipe", f"<details>\n\n{fence}yaml\n{text}{fence}\n\n</details>"]


def _without_folders(value: Any, field: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(v, key) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v, field) for v in value]
    if field == "servers":
        return "http://server"
    path = Path(value).expanduser() if isinstance(value, str) else Path()
    # A system prompt may begin with a slash too.
    if path.is_absolute() and (field in _PATH_FIELDS or path.exists()):
        return _folder_name(value)
    return value
