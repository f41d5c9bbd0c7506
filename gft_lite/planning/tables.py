"""Tables of a memory plan for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from gft_lite.planning.memory import MemoryModel
from gft_lite.planning.planner import Plan
from gft_lite.utils.memory import GIB
from gft_lite.utils.tables import Table

_NAMES = {
    "base": "base", "lora": "LoRA", "optimiser": "optimiser", "checkpoints": "checkpoints",
    "activations": "activations", "head": "output head", "kv_cache": "KV cache",
    "engine": "engine", "context": "CUDA context", "process": "libraries, tokenizer",
    "file": "weight file", "fragmentation": "fragmentation",
}  # fmt: skip


def headline(model: MemoryModel) -> str:
    """One line about the model, its adapter and its longest row."""
    shape = model.shape
    parameters = shape.linear_parameters + shape.plain_parameters
    return (
        f"{model.recipe.policy.model}: {parameters / 1e6:,.1f}M parameters in {shape.layers} "
        f"layers, adapter of {model.lora_parameters / 1e6:.1f}M, "
        f"rows of up to {model.longest_row:,} tokens"
    )


def assumptions(model: MemoryModel) -> str | None:
    """One line about what the sizes of a model without formulas assume."""
    assumed = model.shape.assumptions
    return f"an estimate: {'; '.join(assumed)}" if assumed else None


def components(plan: Plan) -> Table:
    """GiB by component at the peak of each phase."""

    def line(name: str, *sizes: int) -> tuple[str, ...]:
        return (name, *(f"{size / GIB:.2f}" if size else "-" for size in sizes))

    loading = plan.model.loading(plan.choice)  # Only on a CPU.
    phases = (*([loading] if loading else []), plan.training, plan.rollout)
    rows = [
        line(title, *(phase.get(name, 0) for phase in phases))
        for name, title in _NAMES.items()
        if any(phase.get(name) for phase in phases)
    ]
    rows.append(line("peak", *(sum(phase.values()) for phase in phases)))
    title = f"GiB at the peak, on {plan.where} with {plan.limit / GIB:.4g}"
    names = (*(["loading"] if loading else []), "training", "rollout")
    return Table(title, ("", *names), tuple(rows))


def overrides(plan: Plan) -> str:
    """The settings of a plan as they are written on the command line."""
    return " ".join(f"{name}={_as_yaml(value)}" for name, value in plan.settings.items())


def settings(plan: Plan) -> Table:
    """Each setting that memory depends on, with the reason for its value."""
    rows = [
        (name, _as_yaml(value), _reason(plan, name) if name in plan.chosen else "the recipe's")
        for name, value in plan.settings.items()
    ]
    if plan.model.sleeps and plan.model.shares_device(plan.choice):
        waiting = f"in training, {plan.model.engine_weights / GIB:.1f} GiB wait in RAM"
        rows.append(("rollout.sleep", "true", waiting))
    return Table("settings", ("field", "value", "why"), tuple(rows), labels=3)


def cards(plans: Sequence[Plan], sizes: Sequence[int]) -> Table:
    """The choice on each card if every field is `auto`."""
    rows = []
    for plan, size in zip(plans, sizes, strict=True):
        c = plan.choice
        away = ["checkpoints"] * c.offload_checkpoints + ["embedding"] * c.offload_embedding
        fits = (f"{c.micro_batch_tokens:,}", f"{c.gradient_checkpointing}/"
                f"{plan.model.shape.layers}", ", ".join(away) or "-", c.engine,
                str(c.batch_size))  # fmt: skip
        row = ("no", *("-" * 5)) if plan.problems else ("yes", *fits)
        rows.append((f"{size} GiB", *row, f"{plan.peak / GIB:.1f}"))
    header = ("card", "fits", "tokens", "redone", "offloaded", "engine", "rows", "GiB")
    title = "what would fit if the recipe left it to the plan (redone: layers recomputed)"
    return Table(title, header, tuple(rows), labels=2)


def _cache_holds_all_rows(plan: Plan) -> bool:
    """True if vLLM's KV cache holds all rows; its share of the card is rounded down."""
    cache = plan.rollout.get("kv_cache", 0) + plan.model.card / 10_000
    return cache >= plan.model.largest_cache(plan.choice.batch_size)


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _reason(plan: Plan, name: str) -> str:
    """The reason for the plan's value of a field."""
    if plan.problems:
        return "nothing fits; this takes least"
    c, model = plan.choice, plan.model
    layers = model.shape.layers
    reasons = {
        "train.micro_batch_tokens": "the longest row, at least; more where that costs less time",
        "policy.gradient_checkpointing": (
            f"as few of {layers} layers recomputed as fit" if c.gradient_checkpointing
            else "all activations fit"
        ),
        "policy.offload_checkpoints": (
            "recomputing every layer is not enough" if c.offload_checkpoints else "not needed"
        ),
        "policy.offload_embedding": (
            "its memory is needed" if c.offload_embedding
            else "it is the output head as well" if model.shape.tied else "not needed"
        ),
        "rollout.engine": (
            "the faster one, and it fits" if c.engine == "vllm"
            else "no second copy of the base"
        ),
        "rollout.batch_size": "the most rows that fit",
        "rollout.gpu_memory": (
            "its KV cache can hold all rows" if _cache_holds_all_rows(plan)
            else "what the trainer leaves"
        ),
    }  # fmt: skip
    return reasons[name]
