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
from gft_lite.recipe.sections import LoraSettings, PolicySettings
from gft_lite.utils.errors import RecipeError, nearest, short_repr

CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # Values of init_lora_weights.
_log = logging.getLogger(__name__)


# --- target modules --------------------------------------------------------------------------


def check_targets(skeleton: Any, settings: PolicySettings) -> None:
    """Require that each target module names linear modules of the base. Raises: RecipeError."""
    targets = settings.lora.target_modules
    if targets == "all-linear":
        return
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
    if problems:
        raise RecipeError(problems)


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
    adapter, requested = str(settings.adapter), settings.lora.target_modules
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
    if targeted == adapted or _text(requested) == _text(own.target_modules):
        own = own.model_copy(update={"target_modules": requested})
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


def _targeted(skeleton: Any, targets: str | list[str]) -> set[str]:
    """The paths of the modules that `policy.lora.target_modules` names."""
    if isinstance(targets, str):
        found = _all_linear(skeleton)
    else:
        found = {name for target in targets for name in _matching(skeleton, target)}
    excluded = never_adapted(skeleton)
    return {name for name in found if not (excluded and re.fullmatch(excluded, name))}


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
    problems = []
    for name in LoraSettings.model_fields:
        want, got = getattr(own, name), getattr(settings.lora, name)
        if want != got:
            problems.append(
                f"policy.lora.{name}: must be {_text(want)}, as in {settings.adapter}, got "
                f"{_text(got)}. Set policy.lora.{name}={_text(want)}."
            )
    if problems:
        raise RecipeError(problems)


def _text(value: Any) -> str:
    """A value as the command line writes it."""
    return f"[{', '.join(sorted(value))}]" if isinstance(value, list) else str(value)
