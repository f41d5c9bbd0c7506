"""The learner: scored groups to rows, micro-batches, the loss, and the optimiser step."""

from __future__ import annotations

import contextlib
import gc
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from gft_lite.objective.methods import find_method
from gft_lite.policy.base import Policy, TokenScores, without_dropout
from gft_lite.policy.batching import MicroBatch, Row
from gft_lite.recipe.schema import Recipe
from gft_lite.runs import checkpoint
from gft_lite.training.optim import learning_rate, make_optimizer, set_rate
from gft_lite.training.rows import make_rows
from gft_lite.training.step_loss import OF_ROWS, StepLoss, engine_gaps
from gft_lite.training.teacher_model import TeacherModel
from gft_lite.training.updates import Mean, MicroBatchResult, Update, add_means
from gft_lite.types import SOURCES, Problem, ScoredGroup
from gft_lite.utils.distributed import SINGLE_PROCESS, Distributed
from gft_lite.utils.progress import track

# Inputs of a loss that take a pass over the rows before the first update.
_AT_START = {"row_entropy", "entropy_quantile"}
_FIRST_STEP = 0.02  # Of `budget.seconds`, before a step has been timed.


class Learner:
    """Trains the policy on scored groups.

    It owns the optimiser, the current micro-batch limit in tokens (halved when memory runs out),
    the response tokens trained on so far, which a budget in tokens is measured by, the number of
    non-finite steps in a row, and the factor by which rollbacks have lowered the learning rate.
    """

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        distributed: Distributed = SINGLE_PROCESS,
        console: Console | None = None,
        teacher: TeacherModel | None = None,
    ) -> None:
        self.policy, self.recipe, self.teacher = policy, recipe, teacher
        self.distributed = distributed
        self.console = console or Console(quiet=True)
        self.optimizer = make_optimizer(policy, recipe.optim)
        self.method = find_method(recipe.method)
        self.loss = StepLoss(policy, recipe)
        self.micro_batch_tokens = int(recipe.train.micro_batch_tokens)
        self.response_tokens = 0
        self.step_seconds: list[float] = []
        self.bad_steps = 0
        self.lr_scale = 1.0
        # Both passes that a ratio compares must be the same function of the weights.
        compared = "old_logprobs" in self.method.needs or self.loss.importance.mode != "none"
        self._compares = compared and recipe.train.updates_per_rollout > 1
        if self._compares and recipe.policy.lora.dropout:
            self.console.print(
                f"policy.lora.dropout: off, as {recipe.method} compares log-probs of two passes"
            )

    # --- a step --------------------------------------------------------------------------------

    def train_on(self, step: int, groups: Sequence[ScoredGroup]) -> list[Update]:
        """The optimiser steps on one rollout, `train.updates_per_rollout` of them."""
        parts = _split(groups, self.recipe.train.updates_per_rollout)
        # All rows first: old log-probs are those of the policy before the first update.
        prepared = [self.prepare_rows(self.rows(part)) for part in parts]
        tokens = sum(len(response.token_ids) for scored in groups for response, _ in scored)
        updates = []
        for i, rows in enumerate(prepared):
            middle = (i + 0.5) / len(prepared)
            progress = self.budget_fraction(step - 1 + middle, middle * tokens)
            update = self.update(rows, progress)
            if i and not self._compares:  # The policy has moved since the rollout.
                update = replace(update, gaps=torch.empty(0))
            updates.append(update)
        self.response_tokens += tokens
        finite = all(update.skipped != "non_finite" for update in updates)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        return updates

    def budget_fraction(self, steps: float, tokens: float = 0) -> float:
        """The share of the budget that is spent after `steps`, or after `tokens` more tokens."""
        if self.recipe.budget.tokens:
            return (self.response_tokens + tokens) / self.recipe.budget.tokens
        if self.recipe.budget.seconds:
            # A step is taken to be as long as those before it; before any, a share of the budget,
            # since a warm-up would begin with a rate of 0.
            whole = self.recipe.budget.seconds
            per_step = fmean(self.step_seconds) if self.step_seconds else _FIRST_STEP * whole
            return steps * per_step / whole
        return steps / (self.recipe.steps or 1)

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """The rows that one update trains on, weighted by the reduction of each part."""
        return make_rows(self.recipe, groups)

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that go through the model, with the inputs that take a pass of their own.

        Rows that add nothing to loss and gradient are left out; the reduction has counted them.
        """
        if self.recipe.train.drop_zero_advantage:
            rows = [row for row in rows if self._has_gradient(row)]
        rows = [row for row in rows if row.response_ids]
        if (
            self._compares
            or _AT_START & set(self.method.needs)
            or self.loss.importance.mode == "sequence_mask"
        ):
            rows = self._with_scores_at_start(rows)
        if self.teacher:
            rows = self.teacher.score(rows, self.micro_batch_tokens)
        return list(rows)

    def _has_gradient(self, row: Row) -> bool:
        """False for a row that adds nothing to loss and gradient, as its advantage is 0."""
        objective = self.recipe.objective
        ignored = self.method.ignores_flat(SOURCES[row.source]) and (
            not row.prefix or self.method.ignores_flat("expert")
        )
        return bool(objective.kl or objective.entropy or row.advantage or not ignored)

    def update(self, rows: Sequence[Row], progress: float) -> Update:
        """One optimiser step on `rows` with one denominator.

        `progress` is the share of the budget that is spent half way through the step.
        """
        lr = self.lr_scale * learning_rate(progress, self.recipe.optim)
        if not any(map(self._has_gradient, rows)):
            return Update(lr, self.micro_batch_tokens, skipped="flat")
        done = self.gradient(rows, progress)
        parameters = self.policy.parameters().values()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.optim.clip_norm)
        finite = math.isfinite(done.loss) and bool(norm.isfinite())
        if finite:
            set_rate(self.optimizer, lr)
            self.optimizer.step()
            if self.teacher:
                self.teacher.follow()
        self.policy.model.zero_grad(set_to_none=True)
        return replace(done, lr=lr, grad_norm=norm.item(), skipped=None if finite else "non_finite")

    # --- the gradient --------------------------------------------------------------------------

    def gradient(
        self, rows: Sequence[Row], progress: float = 0.0, distributed: Distributed | None = None
    ) -> Update:
        """The gradient of all rows, in smaller micro-batches when memory runs out.

        The processes share the micro-batches; each gets the whole gradient.

        Raises: MemoryError if the longest row alone does not fit.
        """
        distributed = distributed or self.distributed
        while True:
            self.policy.model.zero_grad(set_to_none=True)
            batches = self.make_micro_batches(rows, distributed.world_size)
            parts = self._backward_micro_batches(distributed.shard(batches), progress)
            if not distributed.any(parts is None):
                break
            self._halve_micro_batches(rows, batches)
        self._all_reduce_gradients(distributed)
        whole = distributed.all_gather(parts or [])
        return Update(
            lr=0.0,
            micro_batch_tokens=self.micro_batch_tokens,
            tokens=sum(batch.targets.numel() for batch in batches),
            forwarded=sum(batch.input_ids.numel() for batch in batches),
            loss=sum(result.loss for result in whole),
            metrics=add_means([result.metrics for result in whole]),
            gaps=torch.cat([result.gaps for result in whole] or [torch.empty(0)]),
        )

    def make_micro_batches(self, rows: Sequence[Row], at_least: int = 1) -> list[MicroBatch]:
        """Micro-batches within the limit, `at_least` so many where there are rows for them."""
        limit = self.micro_batch_tokens
        while True:
            batches = self.policy.batches(rows, limit)
            if len(batches) >= min(at_least, len(rows)):
                return batches
            limit = max(batch.input_ids.numel() for batch in batches) // 2

    def dry_step(self, problems: Sequence[Problem]) -> None:
        """Forward and backward of the largest micro-batch that can come, to settle its size."""
        recipe = self.recipe
        longest = max((problem.prompt_ids for problem in problems), key=len)
        response = (self.policy.pad_id,) * recipe.rollout.max_tokens
        # Prompts that differ in their first token: only the rows of a group share one.
        inputs = {name: 0.0 for name in self.method.needs if name in OF_ROWS}
        rows = [
            Row((number, *longest[1:]), response, loss_inputs=inputs | {"importance": 1.0})
            for number in range(recipe.train.problems_per_step)
            for _ in range(recipe.group.size)
        ]
        batches = self.policy.batches(rows, self.micro_batch_tokens)
        largest = max(batches, key=lambda batch: batch.input_ids.numel())
        rows = [rows[i] for i in largest.row.unique().tolist()]
        # Every process by itself, on its own GPU.
        self.gradient(rows, distributed=SINGLE_PROCESS)
        self.micro_batch_tokens = min(self.distributed.all_gather([self.micro_batch_tokens]))
        self.policy.model.zero_grad(set_to_none=True)

    def _backward_micro_batches(
        self, batches: Sequence[MicroBatch], progress: float
    ) -> list[MicroBatchResult] | None:
        """The result of each micro-batch; None if memory ran out."""
        try:
            with without_dropout(self.policy) if self._compares else contextlib.nullcontext():
                steps = track(batches, "micro-batches")
                return [self._backward(batch, progress) for batch in steps]
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                return None  # Outside of the except: the error keeps the step's tensors alive.
            raise

    def _backward(self, batch: MicroBatch, progress: float) -> MicroBatchResult:
        """Add a micro-batch's gradient; returns its share of the loss and its metrics."""
        batch = batch.to(self.policy.device)
        reference = self.loss.reference_logprobs(batch)
        values: dict[str, list[Tensor]] = defaultdict(list)

        def loss(scores: TokenScores, span: slice) -> Tensor:
            output = self.loss(batch, scores, span, reference=reference, progress=progress)
            for name, metric in output.metrics.items():
                values[name].append(metric.detach())
            return (batch.weights[..., span] * output.per_token).sum()

        total, scores = self.policy.backward(
            batch,
            loss,
            reference_kl="reference_kl" in self.method.needs,
            entropy_gradient=bool(self.recipe.objective.entropy),
        )
        # Once per micro-batch and not per slice: every mean waits for the GPU.
        means = {name: Mean.of(torch.cat(parts)) for name, parts in values.items()}
        gaps = engine_gaps(batch, scores)
        return MicroBatchResult(
            total,
            {**means, "entropy": Mean.of(scores.entropy)},
            torch.empty(0) if gaps is None else gaps[gaps.isfinite()].cpu(),
        )

    @torch.no_grad()
    def _with_scores_at_start(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with log-probs and entropies of the policy before the step's first update."""
        own: dict[int, dict[str, Any]] = {}
        batches = self.policy.batches(rows, self.micro_batch_tokens)
        for batch in self.distributed.shard(batches):
            with without_dropout(self.policy):
                scores = self.policy.token_scores(batch)
            entropies = batch.by_row(scores.entropy.cpu())
            for i, logprobs in batch.by_row(scores.logprobs.cpu()).items():
                entropy = entropies[i]
                own[i] = {
                    "row_entropy": entropy.mean().item(),
                    "entropy_quantile": _quantiles(entropy, rows[i].prefix),
                    "old_logprobs": logprobs,
                    "importance": self._importance_of_row(rows[i], logprobs),
                }
        found = {i: v for shard in self.distributed.all_gather([own]) for i, v in shard.items()}
        wanted: set[str] = {name for name in self.method.needs if name != "old_logprobs"}
        if self._compares:
            wanted.add("old_logprobs")
        if self.loss.importance.mode == "sequence_mask":
            wanted.add("importance")
        return [
            replace(row, loss_inputs={
                **row.loss_inputs, **{n: v for n, v in found[i].items() if n in wanted}
            })
            for i, row in enumerate(rows)
        ]  # fmt: skip

    def _importance_of_row(self, row: Row, logprobs: Tensor) -> float:
        """The weight of a whole row, from the trainer's log-probs [R] at the start of the step."""
        engine = row.loss_inputs.get("engine_logprobs")
        if engine is None:
            return 1.0
        gap = logprobs - torch.as_tensor(engine)
        return self.loss.importance.weights(gap.nansum()).item()

    def _halve_micro_batches(self, rows: Sequence[Row], batches: Sequence[MicroBatch]) -> None:
        gc.collect()
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batches) == len(rows):
            raise MemoryError(
                f"train.micro_batch_tokens: out of memory with one row of "
                f"{max(map(len, rows))} tokens. Lower rollout.max_tokens, or see gft-lite plan."
            )
        before = self.micro_batch_tokens
        # From the largest micro-batch: the limit may be far above what there was to cut.
        self.micro_batch_tokens = min(before, max(b.input_ids.numel() for b in batches)) // 2
        self.console.print(
            f"out of memory: train.micro_batch_tokens lowered from {before:,} to "
            f"{self.micro_batch_tokens:,}, the step repeated"
        )

    def _all_reduce_gradients(self, distributed: Distributed) -> None:
        """Replace the gradients of this process's micro-batches by those of all."""
        if distributed.world_size == 1:
            return
        parameters = self.policy.parameters().values()
        for parameter in parameters:
            if parameter.grad is None:  # This process had no micro-batch.
                parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce_sum_([p.grad for p in parameters if p.grad is not None])

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self, folder: Path, step: int, protected: Collection[int] = ()) -> None:
        """Write a checkpoint of adapter, optimiser and counters below `folder`.

        The checkpoints of the steps in `protected` are kept beside the newest.
        """
        checkpoint.save(
            folder, step, self.policy, self.optimizer, self.recipe.checkpoint.keep,
            self.teacher.state if self.teacher else None, protected, bad_steps=self.bad_steps,
        )  # fmt: skip

    def restore(self, saved: Path) -> int:
        """Read what `save` wrote; returns its step."""
        step, counters = checkpoint.restore(saved, self.policy, self.optimizer)
        self.bad_steps = counters["bad_steps"]
        if self.teacher and self.teacher.state:
            self.teacher.load_state(load_file(saved / checkpoint.TEACHER))
        return step


def _quantiles(entropy: Tensor, prefix: int) -> Tensor:
    """The share of the prefix's tokens, or of the others, with no higher entropy. [R] -> [R]."""
    parts = [part for part in (entropy[:prefix], entropy[prefix:]) if len(part)]
    return torch.cat([(part[None] <= part[:, None]).float().mean(1) for part in parts])


def _split(items: Sequence[ScoredGroup], parts: int) -> list[Sequence[ScoredGroup]]:
    """`items` in `parts` nearly equal portions, empty ones left out."""
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(bounds) if b > a]
