"""`gft-lite audit`: is the gradient of a step the one that the method states, however it is cut?

Two bugs that lowered published baselines (arXiv 2604.23747) are found here: a loss averaged per
micro-batch, and an optimiser that drops micro-batches.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gft_lite.policy.base import without_dropout
from gft_lite.policy.batching import Layout, Row
from gft_lite.recipe.schema import Recipe
from gft_lite.training.audit_files import read_gradient, write_step
from gft_lite.training.audit_reference import PlainStep, plain_step
from gft_lite.training.audit_subject import PROGRESS, Subject, move_adapter, prepare_subject
from gft_lite.training.learner import Learner
from gft_lite.training.optim import learning_rate
from gft_lite.utils.errors import RecipeError

MICRO_BATCHES = (2, 3, 7)
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
# Two computations in fp32 each have a rounding error of about that of the plain one.
ROUNDINGS = 4
SMALLEST_LIMIT = 2.0**-20  # 16 roundings of one fp32 number.
# A loss that is discontinuous, or badly conditioned, at the audit's tokens can't be audited.
MOST_ROUNDING = 1e-4
OPTIMIZER_STEPS = 2
WHOLE = 1 << 40  # As train.micro_batch_tokens: one micro-batch.
WORLD_SIZE = 2

MakeLearner = Callable[..., Learner]


@dataclass(frozen=True, slots=True)
class AuditCheck:
    """A check: the relative difference that it found, and its limit; `note` is a reason.

    The relative difference of gradients is `|a - b| / |b|` over all tensors of the adapter.
    """

    name: str
    difference: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """True if the difference is within the limit, or the check does not apply."""
        return self.difference is None or self.limit is None or self.difference <= self.limit


@dataclass(frozen=True)
class Audit:
    """The checks of a method, and what they were computed with."""

    title: str
    checks: Sequence[AuditCheck]


def audit(recipe: Recipe, *, make_learner: MakeLearner = Learner, processes: bool = True) -> Audit:
    """Audit a recipe's method on the CPU, in fp32.

    `make_learner(policy, recipe)` makes the learner that is audited; without `processes`, nothing
    is computed in two of them. Raises: RecipeError.
    """
    with tempfile.TemporaryDirectory(prefix="gft-lite-audit-") as folder:
        subject = prepare_subject(recipe, Path(folder))
        with without_dropout(subject.policy):
            auditor = _Auditor(subject, make_learner)
            return Audit(auditor.title, [*auditor.checks(Path(folder) if processes else None)])


class _Auditor:
    """Computes one step in every way, and compares.

    `step` are the rows of the step as the learner takes them, `all_rows` with those of advantage 0.
    """

    def __init__(self, subject: Subject, make_learner: MakeLearner) -> None:
        self.subject, self.make_learner = subject, make_learner
        self.policy = subject.policy
        self.learner = make_learner(subject.policy, subject.recipe)
        rows = _with_teacher(self.learner.rows(subject.groups), self.learner.method.needs)
        kept = subject.recipe.train.model_copy(update={"drop_zero_advantage": False})
        self.keeping = make_learner(
            subject.policy, subject.recipe.model_copy(update={"train": kept})
        )
        self.step = self.learner.prepare_rows(rows)
        self.all_rows = self.keeping.prepare_rows(rows)
        if not self.step:
            raise RecipeError(["method: must train on some rows of a step, got none of them."])
        # Where a loss compares with the start of the step, the policy has moved since.
        move_adapter(self.policy, 0.01)

    @property
    def title(self) -> str:
        """What is audited."""
        recipe = self.subject.recipe
        tokens = sum(len(row.response_ids) for row in self.all_rows)
        kind = self.policy.config.model_type
        size = sum(p.numel() for p in self.policy.model.parameters())
        return (
            f"{recipe.method}: {len(self.all_rows)} rows of {len(self.subject.groups)} groups, "
            f"{tokens:,} response tokens, {kind} with {size / 1e6:.1f} M weights in fp32"
        )

    def checks(self, folder: Path | None) -> Iterator[AuditCheck]:
        """All checks; `folder` is for the files of other processes, None without these."""
        exact, rounded = (
            plain_step(self.policy, self.subject.recipe, self.all_rows, PROGRESS, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        rounding = _gap(rounded.gradient, exact.gradient)
        yield AuditCheck("rounding: plain fp32 and fp64", rounding, MOST_ROUNDING)
        limit = max(ROUNDINGS * rounding, SMALLEST_LIMIT)
        yield from self._reduction(exact, limit)
        whole = self.gradient(self.step)
        for name, gradient in self._other_ways():
            yield AuditCheck(name, None if gradient is None else _gap(gradient, whole),
                             None if gradient is None else limit,
                             "" if gradient is not None else "not with this model")  # fmt: skip
        if folder:
            yield self._processes(folder, whole, limit)
        yield self._optimizer(rounding)
        yield _paged_optimizer(self.policy.parameters().values())

    def gradient(
        self, rows: Sequence[Row], tokens: int = WHOLE, learner: Learner | None = None
    ) -> Tensor:
        """The learner's gradient of a step."""
        learner = learner or self.learner
        learner.micro_batch_tokens = tokens
        learner.gradient(rows, PROGRESS)
        return flat_gradient(learner)

    def _reduction(self, exact: PlainStep, limit: float) -> Iterator[AuditCheck]:
        """One micro-batch against the loss as stated."""
        self.learner.micro_batch_tokens = WHOLE
        loss = self.learner.gradient(self.step, PROGRESS).loss
        stated = _stated(self.subject.recipe, self.learner)
        yield AuditCheck(stated, _gap(flat_gradient(self.learner), exact.gradient), limit)
        yield AuditCheck("the loss that is reported", abs(loss - exact.loss) / exact.size, limit)

    def _other_ways(self) -> Iterator[tuple[str, Tensor | None]]:
        """Name and gradient of the step cut, laid out and ordered otherwise."""
        for number in MICRO_BATCHES:
            tokens, batches = self._limit_for(number)
            yield f"{batches} micro-batches", self.gradient(self.step, tokens)
        own = self.policy.layout
        several = self._limit_for(2)[0]
        for layout in LAYOUTS:
            # A policy supports its own layout and those before it.
            self.policy.layout = layout
            works = LAYOUTS.index(layout) <= LAYOUTS.index(own)
            yield f"{layout} rows", self.gradient(self.step, several) if works else None
        self.policy.layout = own
        shuffled = list(self.step)
        random.Random(0).shuffle(shuffled)
        yield "rows in another order", self.gradient(shuffled, several)
        yield "zero-advantage rows kept", self.gradient(self.all_rows, learner=self.keeping)

    def _limit_for(self, number: int) -> tuple[int, int]:
        """The largest micro-batch limit that gives at least `number` micro-batches, and theirs."""
        low, high = 1, sum(map(len, self.step))
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.policy.batches(self.step, middle)) >= number:
                low = middle
            else:
                high = middle - 1
        return low, len(self.policy.batches(self.step, low))

    def _processes(self, folder: Path, whole: Tensor, limit: float) -> AuditCheck:
        """The gradient of two processes, as `torchrun` starts them."""
        name = f"{WORLD_SIZE} processes"
        write_step(folder, self.subject.recipe, self.step, self.policy)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(WORLD_SIZE), "-m", "gft_lite.training.audit_rank", str(folder),
        ]  # fmt: skip
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line]
            reason = (errors or ["torchrun failed"])[0].removeprefix("[rank0]:").strip()
            return AuditCheck(name, math.inf, limit, reason)
        found = read_gradient(folder)
        return AuditCheck(name, _gap(found, whole), limit)

    def _optimizer(self, rounding: float) -> AuditCheck:
        """Optimiser steps from micro-batches against AdamW in fp64 on the whole gradient."""
        settings = self.subject.recipe.optim
        parameters = list(self.policy.parameters().values())
        start = _flat(parameters)
        expected, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        tokens, batches = self._limit_for(MICRO_BATCHES[1])
        beta1, beta2 = settings.betas
        factors = [settings.lora_plus_ratio if "lora_B" in name or p.ndim == 1 else 1.0
                   for name, p in self.policy.parameters().items()]  # fmt: skip
        lr = learning_rate(PROGRESS, settings) * torch.cat(
            [start.new_full((p.numel(),), f) for p, f in zip(parameters, factors, strict=True)]
        )
        for step in range(1, OPTIMIZER_STEPS + 1):
            g = self.gradient(self.step)
            g *= min(1.0, settings.clip_norm / (g.norm().item() + 1e-6))
            if step == 1:  # Adam's step depends on the size of the gradient only beside epsilon.
                epsilon = g.square().mean().sqrt().item()
                for group in self.learner.optimizer.param_groups:
                    group["eps"] = epsilon
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
            mean, root = m / (1 - beta1**step), (v / (1 - beta2**step)).sqrt()
            expected = expected * (1 - lr * settings.weight_decay) - lr * mean / (root + epsilon)
            self.learner.micro_batch_tokens = tokens
            self.learner.update(self.step, PROGRESS)
        moved = expected - start
        # Each step also rounds the weights themselves.
        of_weights = OPTIMIZER_STEPS * 2.0**-24 * (start.norm() / moved.norm()).item()
        return AuditCheck(
            f"{OPTIMIZER_STEPS} steps of AdamW, {batches} micro-batches each",
            _gap(_flat(parameters) - start, moved),
            max(ROUNDINGS * (rounding + of_weights), SMALLEST_LIMIT),
        )


def flat_gradient(learner: Learner) -> Tensor:
    """The gradient of the adapter as one vector in fp64."""
    parameters = learner.policy.parameters().values()
    return _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def _gap(found: Tensor, expected: Tensor) -> float:
    """The relative difference; infinite where the two are not finite or the gradient is 0."""
    gap = ((found - expected).norm() / expected.norm()).item()
    return gap if math.isfinite(gap) else math.inf


def _stated(recipe: Recipe, learner: Learner) -> str:
    own = recipe.objective.reduction
    parts = [
        f"{part.reduction or own} over {', '.join(part.sources)}" for part in learner.method.parts
    ]
    return f"1 micro-batch; {'; '.join(parts) or own}"


def _with_teacher(rows: Sequence[Row], needs: Sequence[str]) -> list[Row]:
    """The rows, with invented log-probs where the method needs those of a teacher."""
    if "teacher_logprobs" not in needs:
        return list(rows)
    generator = torch.Generator().manual_seed(11)
    return [
        replace(row, loss_inputs={
            **row.loss_inputs,
            "teacher_logprobs": -3 * torch.rand(len(row.response_ids), generator=generator),
        })
        for row in rows
    ]  # fmt: skip


def _paged_optimizer(parameters: Any) -> AuditCheck:
    """The paged optimiser against the resident one on equal gradients; both exist with CUDA."""
    name = "paged AdamW in 8 bits, beside resident"
    if not torch.cuda.is_available():
        return AuditCheck(name, note="not without CUDA")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return AuditCheck(name, optimizer_gap(PagedAdamW8bit, AdamW8bit, parameters, "cuda"), 0.0)


def optimizer_gap(one: Any, other: Any, parameters: Any, device: str) -> float:
    """The relative difference of the weights after steps of two optimisers on equal gradients."""
    ends = []
    for make in (one, other):
        generator = torch.Generator().manual_seed(5)
        # Copies of a size that bitsandbytes keeps in 8 bits.
        weights = [torch.nn.Parameter(p.detach().repeat(8, 1).to(device)) for p in parameters]
        optimizer = make(weights, lr=1e-2)
        for _ in range(3):
            for weight in weights:
                noise = torch.randn(weight.shape, generator=generator)
                weight.grad = noise.to(device)
            optimizer.step()
        ends.append(_flat(weights).cpu())
    return _gap(*ends)
