"""`gft-lite doctor`: checks of versions, hardware, hub access, a training step and a hot-load."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from rich.table import Column, Table

from gft_lite.utils.imports import installed_version

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.policy.batching import Row


GIB = 1 << 30
DISK_WANTED, DISK_NEEDED = 20 * GIB, 1 * GIB  # A 7B base in bf16 is 15 GiB.
MEMORY_WANTED, MEMORY_NEEDED = 8 * GIB, 2 * GIB
HUB_SECONDS = 3.0
# Extras whose absence is a warning only.
OPTIONAL = ("vllm", "unsloth")
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check; `fail` is a defect that makes training impossible."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def run_checks(on_start: Callable[[str], None] = lambda _: None) -> list[Check]:
    """Run all checks in order; `on_start` gets the name of each before it starts."""
    found: list[Check] = []
    for name, check in CHECKS.items():
        on_start(name)
        try:
            found += check()
        # A broken installation may raise anything, and the command exists to report it.
        except Exception as error:
            reason = _first_line(f"{type(error).__name__}: {error}")
            advice = "Repair what stands above this line, else reinstall gft-lite in a new venv."
            found.append(Check(name, "fail", reason, advice))
    return found


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def all_required_pass(checks: Sequence[Check]) -> bool:
    """True if no check failed; warnings do not count."""
    return all(check.state != "fail" for check in checks)


def checks_table(checks: Sequence[Check]) -> Table:
    """The checks as a table for the terminal."""
    # Paths and commands are wrapped, not cut.
    found, advice = (Column(name, overflow="fold") for name in ("found", "what to do"))
    table = Table("check", "", found, advice, box=None, padding=(0, 2, 0, 0))
    for check in checks:
        state = f"[{_COLOURS[check.state]}]{check.state}[/]"
        texts = (text.replace("[", r"\[") for text in (check.found, check.advice))
        table.add_row(check.name, state, *texts)
    return table


# --- versions --------------------------------------------------------------------------------


def versions() -> Iterator[Check]:
    """Compare Python and the packages with the versions in the package's requirements."""
    python = ".".join(map(str, sys.version_info[:3]))
    about = metadata.metadata("gft-lite")
    wanted = Requirement(f"python{about['Requires-Python']}")
    yield _version(wanted, python, f"Make a venv with Python {wanted.specifier}.")
    requirements = [Requirement(text) for text in metadata.requires("gft-lite") or []]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _version(requirement, installed_version(requirement.name), _pip(requirement))
    for requirement in requirements:
        if requirement.name in OPTIONAL and requirement.marker:
            if version := installed_version(requirement.name):
                yield _version(requirement, version, _pip(requirement))
            else:
                advice = f"If you want it: pip install 'gft-lite[{requirement.name}]'."
                yield Check(requirement.name, "warn", "not installed", advice)


def _version(wanted: Requirement, found: str | None, advice: str) -> Check:
    if found is None:
        return Check(wanted.name, "fail", "not installed", advice)
    if wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, "ok", found)
    return Check(wanted.name, "fail", f"{found}, tested with {wanted.specifier}", advice)


def _pip(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"


# --- the machine -----------------------------------------------------------------------------


def gpu() -> Iterator[Check]:
    """The GPU and its free memory."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        found = f"{name}, CUDA {torch.version.cuda}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Check("gpu", "ok", found)
        else:
            advice = "Set policy.dtype=float16: this card has no bfloat16."
            yield Check("gpu", "warn", found, advice)
    elif shutil.which("nvidia-smi"):
        found = f"none that torch {torch.__version__} can use"
        advice = "See whether nvidia-smi runs; update the driver, or install torch with CUDA."
        yield Check("gpu", "fail", found, advice)
    else:
        advice = "A CPU trains the lab in a minute, a model of 135M in hours."
        yield Check("gpu", "warn", "none", advice)


def memory() -> Iterator[Check]:
    """Free RAM."""
    from gft_lite.utils.memory import free_ram

    advice = "Close what else runs, or see `gft-lite plan RECIPE`."
    yield _check_amount("memory", free_ram(), MEMORY_NEEDED, MEMORY_WANTED, "free", advice)


def disk() -> Iterator[Check]:
    """Free disk space for runs and for the hub's cache."""
    from huggingface_hub import constants

    for name, folder, advice in (
        ("disk: runs", Path.cwd(), "Make room, or train elsewhere with --out DIR."),
        ("disk: hub", Path(constants.HF_HUB_CACHE), "Make room, or set HF_HOME to another disk."),
    ):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        yield _check_amount(name, free, DISK_NEEDED, DISK_WANTED, f"free at {folder}", advice)
        if not os.access(existing, os.W_OK):
            yield Check(name, "fail", f"{existing} can't be written to", advice)


def _check_amount(
    name: str, amount: int, needed: int, wanted: int, what: str, advice: str
) -> Check:
    """Fail below `needed` bytes, warn below `wanted`."""
    found = f"{amount / GIB:.1f} GiB {what}"
    if amount < needed:
        return Check(name, "fail", found, advice)
    return Check(name, "ok", found) if amount >= wanted else Check(name, "warn", found, advice)


def hub() -> Iterator[Check]:
    """Access to the Hugging Face hub, which local models and data do not need."""
    import httpx
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    host = urlsplit(constants.ENDPOINT).hostname  # The rest of the URL may hold a password.
    if constants.HF_HUB_OFFLINE:
        yield Check("hub", "warn", "HF_HUB_OFFLINE is set", "Unset it to fetch models and data.")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        advice = "Fine for what is on the disk; else see your network, proxy or HF_ENDPOINT."
        yield Check("hub", "warn", f"no answer from {host} ({type(error).__name__})", advice)
        return
    token = "a token is set" if get_token() else "no token, which gated models such as Llama need"
    yield Check("hub", "ok", f"{host} answers; {token}")


# --- training --------------------------------------------------------------------------------


def training() -> Iterator[Check]:
    """An optimizer step on the lab's base in NF4, and a hot-load of its adapter."""
    from gft_lite.policy.registry import load_policy
    from gft_lite.recipe.sections import PolicySettings
    from gft_lite.rollout.base import RolloutError
    from gft_lite.utils.errors import UserError

    policy = load_policy(PolicySettings(gradient_checkpointing=False))
    row = _lab_row(policy)
    started = time.perf_counter()
    before, after, base_changed = _step(policy, row)
    seconds = time.perf_counter() - started
    found = f"log p of an answer {before:.2f} to {after:.2f} nats in {seconds:.1f} s"
    if after > before and not base_changed:
        yield Check("4-bit step", "ok", found)
    else:
        advice = "Reinstall bitsandbytes; a step must raise log p and leave the base alone."
        yield Check("4-bit step", "fail", found + ", base moved" * base_changed, advice)
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    try:
        started = time.perf_counter()
        gap, noise = _hot_load(policy, row, engine)
    except (RolloutError, UserError, ImportError, OSError) as error:
        reason = _first_line(str(error)) or type(error).__name__
        advice = "Set rollout.engine=transformers meanwhile, or reinstall vllm."
        yield Check(f"hot-load: {engine}", "fail", reason, advice)
    else:
        seconds = time.perf_counter() - started
        found = (
            f"new adapter served: log-prob gap {gap:.1g} nats, base {noise:.1g}, {seconds:.0f} s"
        )
        yield Check(f"hot-load: {engine}", "ok", found)


def _lab_row(policy: Policy) -> Row:
    """A problem of the lab with its expert's response."""
    from gft_lite import lab
    from gft_lite.data.prompts import PromptFormat
    from gft_lite.policy.batching import Row
    from gft_lite.recipe.sections import PromptSettings

    [row] = lab.rows("train", limit=1)
    format = PromptFormat(policy.tokenizer, PromptSettings())
    return Row(format.prompt_ids(row["problem"]), format.response_ids(row["expert"][0])[0])


def _step(policy: Policy, row: Row) -> tuple[float, float, bool]:
    """Train one step on the row; returns log p before and after, and whether the base changed."""
    import torch

    from gft_lite.recipe.training_sections import OptimSettings
    from gft_lite.training.optim import make_optimizer

    [batch] = policy.batches([row], 1)

    @torch.no_grad()
    def log_p() -> torch.Tensor:
        return policy.token_scores(batch).logprobs.sum()

    before = log_p().item()
    with policy.base():
        base = log_p()
    optimizer = make_optimizer(policy, OptimSettings())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    policy.backward(batch, lambda scores, _: -scores.logprobs.sum())
    optimizer.step()
    with policy.base():
        base_changed = not torch.equal(base, log_p())
    return before, log_p().item(), base_changed


def _hot_load(policy: Policy, row: Row, engine: str) -> tuple[float, float]:
    """Log-prob gaps between trainer and engine in nats, with the new adapter and with the base."""
    from gft_lite.recipe.sections import RolloutSettings
    from gft_lite.rollout.policy_engine import PolicyEngine
    from gft_lite.rollout.registry import start_engine

    settings = RolloutSettings(engine=engine, kv_cache_mib=64, batch_size=4, eager=True)
    with tempfile.TemporaryDirectory(prefix="gft-lite-doctor-") as scratch:
        serving = start_engine(settings, policy, Path(scratch))
        try:
            served = PolicyEngine(serving, policy, Path(scratch) / "adapters")
            noise = served.start_checks(row, settings.probe_limit)
            return served.sync(1), noise
        finally:
            serving.close()


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "versions": versions,
    "gpu": gpu,
    "memory": memory,
    "disk": disk,
    "hub": hub,
    "training": training,
}
