"""The dry step before the first rollout, and the record of those that fitted into memory.

It takes as long as a large micro-batch, over a minute for a small model on a CPU, and always ends
alike for the same inputs. A step for which memory runs out later, since other programs use it now,
is repeated with smaller micro-batches, as any other step.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from pathlib import Path

import torch

from gft_lite.objective.methods import METHODS
from gft_lite.training.setup import TrainingRun
from gft_lite.utils.files import INVALID, write_text_atomic
from gft_lite.utils.imports import installed_version
from gft_lite.utils.paths import cache_folder
from gft_lite.utils.progress import show_phase
from gft_lite.version import __version__

# Sections of a recipe without an effect on the dry step; a new one has one until it is listed.
_NO_EFFECT = {
    "name", "seed", "data", "reward", "optim", "budget", "stages", "monitor", "eval", "checkpoint",
    "early_stop", "guard", "log",
}  # fmt: skip
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "vllm")


def dry_step(run: TrainingRun) -> None:
    """Settle the size of micro-batches by the largest that can come, unless it is known to fit."""
    learner, record = run.learner, _record(run)
    date = _read(record) if record else None
    if all(run.distributed.all_gather([date is not None])):
        run.print(
            f"dry step: skipped, as micro-batches of {learner.micro_batch_tokens:,} tokens fitted "
            f"on {date}"
        )
        return
    text = "dry step: forward and backward of the largest micro-batch"
    limit = learner.micro_batch_tokens
    with run.engine.asleep(), show_phase(run.console, text):
        learner.dry_step(run.builder.problems)
    if record and learner.micro_batch_tokens == limit:
        today = datetime.date.today().isoformat()
        with contextlib.suppress(OSError):  # A later run repeats the step then.
            write_text_atomic(record, json.dumps({"fitted": today}))


def _record(run: TrainingRun) -> Path | None:
    """The file of a dry step with the same inputs; None where code of others may change them."""
    recipe, policy = run.recipe, run.policy
    if recipe.method not in METHODS or recipe.policy.trust_remote_code or run.learner.teacher:
        return None
    values = recipe.model_dump(mode="json", exclude=_NO_EFFECT)
    del values["train"]["steps"]
    gpu = policy.device.type == "cuda"
    card = torch.cuda.get_device_properties(policy.device) if gpu else None
    inputs = {
        "recipe": values,
        "config": policy.config.to_json_string(),
        "adapter": [tuple(p.shape) for p in policy.parameters().values()],
        "prompt": max(len(problem.prompt_ids) for problem in run.builder.problems),
        "micro_batch_tokens": run.learner.micro_batch_tokens,
        "processes": run.distributed.world_size,
        "device": [card.name, card.total_memory] if card else ["cpu", os.sysconf("SC_PHYS_PAGES")],
        "versions": [__version__, *map(installed_version, _PACKAGES)],
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "dry_steps" / f"{key}.json"


def _read(record: Path) -> datetime.date | None:
    """The day on which the step fitted, None if it did not run or the file is damaged."""
    try:
        return datetime.date.fromisoformat(json.loads(record.read_bytes())["fitted"])
    except (OSError, *INVALID):
        return None
