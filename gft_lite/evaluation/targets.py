"""Targets of an evaluation: models, adapters, runs and their checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gft_lite.policy.adapter_config import WEIGHTS, lora_settings, read_adapter_config
from gft_lite.policy.base import Policy
from gft_lite.policy.model_files import check_safetensors
from gft_lite.recipe.base import is_hub_id
from gft_lite.recipe.loader import merge
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.runs import checkpoint
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import RecipeError, UserError, short_repr
from gft_lite.utils.paths import PACKAGE

# Entries of adapter_config.json without effect on what the adapter computes.
_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version",
           "auto_mapping", "task_type", "init_lora_weights", "lora_dropout")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One model to evaluate: a base with or without an adapter; `label` is its name."""

    label: str
    policy: PolicySettings
    adapter: Path | None = None
    run: Path | None = None

    @property
    def base_settings(self) -> PolicySettings:
        """The settings of the base alone, equal for targets that can share it."""
        plain: dict[str, Any] = {"adapter": None, "lora": PolicySettings().lora}
        return self.policy.model_copy(update=plain)


def find_targets(texts: Sequence[str | Target], policy: PolicySettings) -> list[Target]:
    """The targets in the order given; fields set in `policy` override those of a run's recipe.

    The base of a run is loaded as in that run, so that only the adapter differs. A target that was
    found before stays as it is.

    Raises: RecipeError with every name that is not a target.
    """
    found: dict[str, Target] = {}
    problems: list[str] = []
    for text in texts:
        try:
            targets = [text] if isinstance(text, Target) else _resolve(text, policy)
            found |= {target.label: target for target in targets}
        except UserError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    bases = {t.policy.model: t.base_settings for t in reversed(found.values()) if t.run}
    for label, target in found.items():
        policy = bases.get(target.policy.model, target.policy)
        if target.adapter is None and policy != target.policy:
            found[label] = replace(target, policy=policy)
    return list(found.values())


def find_adapter(text: str) -> Target:
    """The one adapter that `text` names. Raises: UserError for anything else."""
    found = find_targets([text], PolicySettings())
    if len(found) != 1 or found[0].adapter is None:
        rule = "must be one run, RUN@step-N, or the folder of one adapter"
        raise UserError([f"TARGET: {rule}, got {text!r}. Only an adapter can be merged."])
    return found[0]


def _resolve(text: str, policy: PolicySettings) -> Iterator[Target]:
    name, _, which = text.rpartition("@") if "@" in text else (text, "", "")
    path = Path(os.path.expanduser(name))
    label = text.rstrip("/")
    # os.path, unlike pathlib, finds nothing at a name that is too long.
    is_folder = os.path.isdir(path)
    if os.path.isfile(path / "recipe.yaml"):
        settings = _merge_settings(Recipe.load(path / "recipe.yaml").policy, policy)
        for suffix, adapter in _adapters(path, which, text):
            yield _with_adapter(name.rstrip("/") + suffix, settings, adapter, path)
    elif which or not (is_folder or name == "lab" or is_hub_id(name)):
        kinds = "lab, a hub id, or the folder of a model, an adapter or a run"
        raise RecipeError([f"TARGET: must be {kinds}, got {short_repr(text)}."])
    elif is_folder and (path / "adapter_config.json").is_file():
        written = {"model": _base_of(path), "revision": _config(path).get("revision")}
        yield _with_adapter(
            label, _merge_settings(PolicySettings.model_validate(written), policy), path
        )
    elif is_folder and not (path / "config.json").is_file():
        if any(path.glob("*.gguf")):
            check_safetensors(path, "*.safetensors", "TARGET")
        rule = "must hold a config.json, an adapter_config.json or a run's recipe.yaml"
        raise RecipeError([f"TARGET: {rule}, got {text!r}."])
    else:
        yield Target(label, _merge_settings(PolicySettings.model_validate({"model": name}), policy))


def _merge_settings(own: PolicySettings, given: PolicySettings) -> PolicySettings:
    """The target's own settings, overridden by those that the suite and the user set."""
    # The transformers backend loads every adapter, also without a GPU.
    own = own.model_copy(update={"backend": "transformers"})
    tree = merge(own.model_dump(), given.model_dump(exclude_unset=True))
    fixed = {"adapter": None, "reference": "base", "gradient_checkpointing": False}
    return PolicySettings.model_validate(merge(tree, fixed))


def _adapters(run: Path, which: str, text: str) -> Iterator[tuple[str, Path]]:
    """(suffix of the label, folder) of a run's final adapter or of the selected checkpoints."""
    folder = RunFolder(run)
    if not which:
        if not (folder.adapter / WEIGHTS).is_file():
            rule = "must be a finished run"
            raise RecipeError([f"TARGET: {rule}, got {text!r}. Its checkpoints: {text}@all."])
        yield "", folder.adapter
        return
    steps = {checkpoint.step_of(p): p for p in checkpoint.list_checkpoints(folder.checkpoints)}
    match = re.fullmatch(r"step-(\d{1,18})", which)
    wanted = list(steps) if which == "all" else [int(match[1])] if match else []
    if not wanted or not set(wanted) <= steps.keys():
        there = ", ".join(f"@step-{n}" for n in steps) or "none"
        raise RecipeError(
            [f"TARGET: must end in @all or a checkpoint's @step-N, got {text!r}. There: {there}."]
        )
    for step in wanted:
        yield f"@step-{step}", steps[step] / "adapter"


def _with_adapter(
    label: str, settings: PolicySettings, adapter: Path, run: Path | None = None
) -> Target:
    if not (adapter / WEIGHTS).is_file():
        raise RecipeError([f"TARGET: must hold {WEIGHTS}, got {str(adapter)!r}."])
    update = {"adapter": str(adapter), "lora": lora_settings(_config(adapter))}
    return Target(label, settings.model_copy(update=update), adapter, run)


def _base_of(adapter: Path) -> str:
    """The base that an adapter names; `lab` for the packaged base of any installation."""
    name = str(_config(adapter).get("base_model_name_or_path") or "lab")
    packaged = os.path.join(PACKAGE.name, "lab", "base")
    return "lab" if name.endswith(packaged) else name


def _config(adapter: Path) -> dict[str, Any]:
    """An adapter's configuration. Raises: RecipeError if it is not that of a LoRA adapter."""
    try:
        return read_adapter_config(adapter)
    except ValueError as error:
        raise RecipeError([f"TARGET: must hold {error}."]) from error


def shape(adapter: Path) -> str:
    """The configuration of an adapter as text, equal for adapters that can be swapped."""
    config = {k: v for k, v in _config(adapter).items() if k not in _ORIGIN}
    modules = config.get("target_modules")
    if isinstance(modules, list):
        config["target_modules"] = sorted(modules)
    return json.dumps(config, sort_keys=True)


def group_by_base(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets in groups that one loaded base can serve; bases alone join the first group."""
    groups: dict[tuple[str, str], list[Target]] = {}
    for target in sorted(targets, key=lambda t: t.adapter is None):
        base = target.base_settings.model_dump_json()
        fitting = [key for key in groups if key[0] == base]
        if target.adapter is not None:
            key = (base, shape(target.adapter))
        else:
            key = fitting[0] if fitting else (base, "")
        groups.setdefault(key, []).append(target)
    place = {target.label: i for i, target in enumerate(targets)}
    return [sorted(group, key=lambda t: place[t.label]) for group in groups.values()]


# --- identity --------------------------------------------------------------------------------


def base_identity(policy: Policy) -> str:
    """A hash of the loaded base: its hub revision or its files, and its precision."""
    commit = getattr(policy.config, "_commit_hash", None)
    name = policy.config._name_or_path
    base = f"{name}@{commit}" if commit else content_hash(Path(name), "*.safetensors", "*.json")
    settings = policy.settings
    how = (settings.quantization, settings.double_quantization, str(policy.dtype))
    return _digest(base, *map(str, how))


def identity(base: str, adapter: Path | None) -> str:
    """A hash of the base and of the adapter's weights and configuration."""
    if adapter is None:
        return base
    return _digest(base, content_hash(adapter, WEIGHTS), shape(adapter))


def content_hash(folder: Path, *patterns: str) -> str:
    """A hash of the names and contents of a folder's files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
