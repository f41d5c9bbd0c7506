"""Checks of LoRA settings and of `policy.adapter` against the base, before its weights are loaded.

A skeleton is the base on torch's meta device: modules and shapes without data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from gft_lite.policy.adapter_config import CONFIG, WEIGHTS, lora_settings, read_adapter_config
from gft_lite.policy.load_errors import LOAD_ERRORS, describe_error
from gft_lite.policy.model_files import check_safetensors
from gft_lite.policy.registry import model_location
from gft_lite.policy.weight_checks import read_fitting_weights
from gft_lite.recipe.base import is_hub_id
from gft_lite.recipe.lora_section import LoraSettings, layer_of, matches_pattern
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError, nearest, short_repr

_UNSELECTED: dict[str, Any] = {"exclude_modules": [], "layers_to_transform": None}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # Values of init_lora_weights.
_log = logging.getLogger(__name__)


# --- target modules --------------------------------------------------------------------------


def check_lora(skeleton: Any, settings: PolicySettings) -> None:
    """Require that `policy.lora` selects linear modules of the base. Raises: RecipeError."""
    problems = _target_problems(skeleton, settings)
    if not problems:
        problems = _selection_problems(skeleton, settings)
    if problems:
        raise RecipeError(problems)


def _target_problems(skeleton: Any, settings: PolicySettings) -> list[str]:
    targets = settings.lora.target_modules
    if targets == "all-linear":
        return []
    rule = f"policy.lora.target_modules: must name linear modules of {settings.model}"
    linear = sorted({name.rpartition(".")[2] for name in _all_linear(skeleton)})
    advice = f"It has {', '.join(linear)}."
    problems = []
    for target in targets:
        matched = _matching(skeleton, target)
        other = [module for module in matched.values() if not _is_linear(module)]
        if not matched:
            close = nearest(target, linear)
            hint = f"Did you mean {close}? " if close else ""
            problems.append(f"{rule}, got {short_repr(target)}. {hint}{advice}")
        elif other:
            kind = type(other[0]).__name__
            problems.append(f"{rule}, got {short_repr(target)}, of type {kind}. {advice}")
    return problems


def _selection_problems(skeleton: Any, settings: PolicySettings) -> list[str]:
    """Errors of what selects among the target modules, and of ranks that a start can't have."""
    lora, model = settings.lora, settings.model
    modules = dict(skeleton.named_modules())
    everything = _targeted(skeleton, lora.model_copy(update=_UNSELECTED))
    problems = [
        f"policy.lora.exclude_modules: must name modules of {model}, got {short_repr(name)}."
        for name in lora.exclude_modules
        if not any(f".{path}".endswith(f".{name}") for path in modules)
    ]
    layers = sorted({number for path in everything if (number := layer_of(path)) is not None})
    beyond = sorted(set(lora.layers_to_transform or ()) - set(layers))
    if beyond:
        there = f"{layers[0]} to {layers[-1]}" if layers else "none"
        problems.append(f"policy.lora.layers_to_transform: must be layers of {model}, which has "
                        f"{there}, got {beyond[0]}.")  # fmt: skip
    targeted = _targeted(skeleton, lora)
    if not (problems or targeted):
        return [f"policy.lora: must adapt at least one module of {model}, got none that is left "
                "of target_modules."]  # fmt: skip
    for field in ("rank_pattern", "alpha_pattern"):
        problems += [
            f"policy.lora.{field}: must name adapted modules of {model} by the end of their path, "
            f"got {short_repr(pattern)}."
            for pattern in getattr(lora, field)
            if not any(matches_pattern(pattern, path) for path in targeted)
        ]
    if lora.init != "default":
        sides = {path: min(modules[path].weight.shape) for path in sorted(targeted)}
        ranks = {path: lora.rank_of(path) for path in sides}
        problems += [
            f"policy.lora.rank: must be at most {sides[path]} for {path} with policy.lora.init "
            f"{lora.init}, got {rank}. Lower it, or set it in rank_pattern."
            for path, rank in ranks.items()
            if rank > sides[path]
        ][:1]
    return problems


def lora_config(base: Any, lora: LoraSettings) -> LoraConfig:
    """peft's configuration of a new adapter; a selection of modules is a list of their paths."""
    lora = lora.trained
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(_targeted(base, lora)) if lora.selects else lora.target_modules,
        exclude_modules=never_adapted(base),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        task_type="CAUSAL_LM",
    )


def _is_linear(module: nn.Module) -> bool:
    """True for the modules that are adapted; GPT-2's linear layers are of type Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def _matching(skeleton: nn.Module, target: str) -> dict[str, nn.Module]:
    """The modules that peft adapts for a target: those whose path is the target or ends in it."""
    return {
        name: module
        for name, module in skeleton.named_modules()
        if name == target or name.endswith(f".{target}")
    }


def _all_linear(skeleton: Any) -> set[str]:
    """The paths of the modules that peft adapts for `all-linear`, which leaves out the head."""
    head = skeleton.get_output_embeddings()
    return {n for n, m in skeleton.named_modules() if _is_linear(m) and m is not head}


def never_adapted(base: Any) -> str | None:
    """A pattern of the modules beside the text decoder, such as Gemma 3's vision tower.

    Training on text does not run them. None: there are none.
    """
    inner, decoder = getattr(base, base.base_model_prefix), base.get_decoder()
    if decoder is inner:
        return None
    others = [name for name, module in inner.named_children() if module is not decoder]
    return rf"(.*\.)?({'|'.join(others)})\..*"


# --- policy.adapter --------------------------------------------------------------------------


def check_adapter(skeleton: Any, settings: PolicySettings) -> Path:
    """Require that `policy.adapter` fits the base and has the LoRA settings of the recipe.

    Returns the adapter's folder, downloaded if the recipe gives a hub id; `skeleton` has the
    adapter afterwards. Raises: RecipeError.
    """
    adapter, requested = str(settings.adapter), settings.lora
    base = dict(skeleton.named_modules())
    targeted = _targeted(skeleton, requested)
    rule = f"policy.adapter: must be a PEFT adapter of {settings.model}, got {adapter!r}"
    try:
        folder = _find_folder(adapter)
        written = read_adapter_config(folder)
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"its peft_type is {written.get('peft_type')}, not LORA")
        if str(written.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
            raise ValueError(f"init_lora_weights {written['init_lora_weights']} changes the base")
        _check_base(written, settings)
        config.base_model_name_or_path = None  # peft would warn of another name.
        config.init_lora_weights = False  # The weights are read, not initialised.
        model = get_peft_model(skeleton, config)
        adapted = {name for name, m in skeleton.named_modules() if isinstance(m, LoraLayer)}
        if other := sorted(name for name in adapted if not _is_linear(base[name])):
            raise ValueError(f"it adapts {other[0]} of type {type(base[other[0]]).__name__}")
    except LOAD_ERRORS as error:
        raise RecipeError([f"{rule} ({describe_error(error)}). Give another adapter."]) from error
    read_fitting_weights(model, "default", folder, "policy.adapter")
    own = lora_settings(written)
    if targeted == adapted or (
        not requested.selects and _text(requested.target_modules) == _text(own.target_modules)
    ):
        same = ("target_modules", "exclude_modules", "layers_to_transform")
        own = own.model_copy(update={name: getattr(requested, name) for name in same})
    else:
        last = {name.rpartition(".")[2] for name in adapted}
        short = {name for name in base if name.rpartition(".")[2] in last} == adapted
        own = own.model_copy(update={"target_modules": sorted(last if short else adapted)})
    _check_settings(settings, own)
    return folder


def _find_folder(adapter: str) -> Path:
    """The folder of a PEFT adapter without pickles, downloaded if `adapter` is a hub id."""
    folder = Path(adapter)
    if not folder.is_dir():
        folder = Path(snapshot_download(adapter, allow_patterns=[CONFIG, WEIGHTS]))
    check_safetensors(folder, WEIGHTS, "policy.adapter")
    return folder


def _targeted(skeleton: Any, lora: LoraSettings) -> set[str]:
    """The paths of the modules that `policy.lora` selects."""
    if isinstance(lora.target_modules, str):
        found = _all_linear(skeleton)
    else:
        found = {name for target in lora.target_modules for name in _matching(skeleton, target)}
    excluded = never_adapted(skeleton)
    kept = {name for name in found if not (excluded and re.fullmatch(excluded, name))}
    return {name for name in kept if lora.keeps(name)}


def _check_base(config: Mapping[str, Any], settings: PolicySettings) -> None:
    """Compare the base that an adapter's config names with the recipe's.

    Weights of an adapter of another base of the same shape would load. Two hub ids must be equal;
    of a folder, only the name is known, and another one logs a warning. Raises: RecipeError.
    """
    named, model = str(config.get("base_model_name_or_path")), settings.model
    if named in (model, model_location(model), "None", ""):
        return
    named_on_hub = is_hub_id(named) and not Path(named).exists()
    if named_on_hub and not Path(model).exists():
        raise RecipeError(
            [f"policy.adapter: must be an adapter of {model}, got {settings.adapter!r} of {named}. "
             f"Set policy.model, or base_model_name_or_path in its {CONFIG}."]
        )  # fmt: skip
    if Path(named).name != Path(model_location(model)).name:
        _log.warning("policy.adapter: %s names %s as its base, not %s. The run continues on %s.",
                     settings.adapter, named, model, model)  # fmt: skip


def _check_settings(settings: PolicySettings, own: LoraSettings) -> None:
    """Require the adapter's `own` LoRA settings in the recipe. Raises: RecipeError."""
    problems, trained = [], settings.lora.trained
    for name in LoraSettings.model_fields:
        want, got = getattr(own, name), getattr(trained, name)
        if want == got:
            continue
        advice = f"Set policy.lora.{name}={_text(want)}."
        if trained is not settings.lora:
            advice = f"It is twice the recipe's with policy.lora.init {settings.lora.init}."
        problems.append(
            f"policy.lora.{name}: must be {_text(want)}, as in {settings.adapter}, got "
            f"{_text(got)}. {advice}"
        )
    if problems:
        raise RecipeError(problems)


def _text(value: Any) -> str:
    """A value as the command line writes it."""
    return f"[{', '.join(sorted(value))}]" if isinstance(value, list) else str(value)
