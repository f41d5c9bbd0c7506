"""What an evaluation is asked to evaluate: models, adapters, runs and their checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gft_lite.policy.base import Policy
from gft_lite.recipe.base import HUB_ID
from gft_lite.recipe.loader import merge
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.runs import checkpoint
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.paths import PACKAGE

_WEIGHTS = "adapter_model.safetensors"
# What an adapter_config.json says about where it was made, not about what it computes.
_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version",
           "auto_mapping", "task_type", "init_lora_weights", "lora_dropout")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One model to evaluate: a base, and the adapter on it if any; `label` is its name."""

    label: str
    policy: PolicySettings
    adapter: Path | None = None
    run: Path | None = None

    @property
    def base_settings(self) -> PolicySettings:
        """The base alone; the same for every target that can share it."""
        plain: dict[str, Any] = {"adapter": None, "lora": PolicySettings().lora}
        return self.policy.model_copy(update=plain)


def find_targets(texts: Sequence[str], policy: PolicySettings) -> list[Target]:
    """The targets in the order given; what `policy` sets comes before what a run's recipe says.

    Raises: RecipeError with every name that is none.
    """
    found: dict[str, Target] = {}
    problems: list[str] = []
    for text in texts:
        try:
            found |= {target.label: target for target in _resolve(text, policy)}
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return list(found.values())


def _resolve(text: str, policy: PolicySettings) -> Iterator[Target]:
    name, _, which = text.rpartition("@") if "@" in text else (text, "", "")
    path = Path(name).expanduser()
    label = text.rstrip("/")
    if (path / "recipe.yaml").is_file():
        settings = _over(Recipe.load(path / "recipe.yaml").policy, policy)
        for suffix, adapter in _adapters(path, which, text):
            yield _with_adapter(name.rstrip("/") + suffix, settings, adapter, path)
    elif which or not (path.is_dir() or name == "lab" or HUB_ID.fullmatch(name)):
        kinds = "lab, a hub id, or the folder of a model, an adapter or a run"
        raise RecipeError([f"TARGET: must be {kinds}, got {text!r}."])
    elif (path / "adapter_config.json").is_file():
        written = {"model": _base_of(path)}
        yield _with_adapter(label, _over(PolicySettings.model_validate(written), policy), path)
    elif path.is_dir() and not (path / "config.json").is_file():
        rule = "must hold a config.json, an adapter_config.json or a run's recipe.yaml"
        raise RecipeError([f"TARGET: {rule}, got {text!r}."])
    else:
        yield Target(label, _over(PolicySettings.model_validate({"model": name}), policy))


def _over(own: PolicySettings, asked: PolicySettings) -> PolicySettings:
    """The settings of an evaluation: the target's own under what the suite and the user set."""
    # Whatever it was trained with, it is read without, also where there is no GPU.
    own = own.model_copy(update={"backend": "transformers"})
    tree = merge(own.model_dump(), asked.model_dump(exclude_unset=True))
    fixed = {"adapter": None, "reference": "base", "gradient_checkpointing": False}
    return PolicySettings.model_validate(merge(tree, fixed))


def _adapters(run: Path, which: str, text: str) -> Iterator[tuple[str, Path]]:
    """(label's suffix, folder) of a run's final adapter or of the checkpoints asked for."""
    folder = RunFolder(run)
    if not which:
        if not (folder.adapter / _WEIGHTS).is_file():
            rule = "must be a finished run"
            raise RecipeError([f"TARGET: {rule}, got {text!r}. Its checkpoints: {text}@all."])
        yield "", folder.adapter
        return
    steps = {
        int(p.name.removeprefix("step-")): p
        for p in checkpoint.list_checkpoints(folder.checkpoints)
    }
    match = re.fullmatch(r"step-(\d+)", which)
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
    if not (adapter / _WEIGHTS).is_file():
        raise RecipeError([f"TARGET: must hold {_WEIGHTS}, got {str(adapter)!r}."])
    lora = settings.lora.model_copy(update={"rank": _config(adapter)["r"]})
    update = {"adapter": str(adapter), "lora": lora}
    return Target(label, settings.model_copy(update=update), adapter, run)


def _base_of(adapter: Path) -> str:
    """The base that an adapter names; the packaged one is known wherever it was installed."""
    name = str(_config(adapter).get("base_model_name_or_path") or "lab")
    packaged = os.path.join(PACKAGE.name, "lab", "base")
    return "lab" if name.endswith(packaged) else name


def _config(adapter: Path) -> dict[str, Any]:
    """An adapter's configuration. Raises: RecipeError if it is none of a LoRA."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        rule = "must hold a readable adapter_config.json"
        raise RecipeError([f"TARGET: {rule}, got {str(adapter)!r} ({error})."]) from error
    if not isinstance(config, dict) or not isinstance(config.get("r"), int):
        rule = "must be a LoRA adapter, with its rank r in adapter_config.json"
        raise RecipeError([f"TARGET: {rule}, got {str(adapter)!r}."])
    return config


def shape(adapter: Path) -> str:
    """What an adapter computes besides its weights; equal for adapters that can be swapped."""
    config = {k: v for k, v in _config(adapter).items() if k not in _ORIGIN}
    modules = config.get("target_modules")
    if isinstance(modules, list):
        config["target_modules"] = sorted(modules)
    return json.dumps(config, sort_keys=True)


def group_by_base(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets in groups that one loaded base can serve, bases alone joining the first."""
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
    """A hash of the base as loaded: its revision on the hub or its files, and its precision."""
    commit = getattr(policy.config, "_commit_hash", None)
    name = policy.config._name_or_path
    base = f"{name}@{commit}" if commit else content_hash(Path(name), "*.safetensors", "*.json")
    settings = policy.settings
    how = (settings.quantization, settings.double_quantization, str(policy.dtype))
    return _digest(base, *map(str, how))


def identity(base: str, adapter: Path | None) -> str:
    """A hash of what answers: the base, and the adapter's weights and shape."""
    if adapter is None:
        return base
    return _digest(base, content_hash(adapter, _WEIGHTS), shape(adapter))


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
