"""The policy: a frozen base and a LoRA adapter on it, whoever loaded them, and token log-probs
that never hold a full `[tokens, vocabulary]` tensor."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gft_lite.policy import attention
from gft_lite.policy.base import Divergence, ServedBase, TokenScores, evaluating
from gft_lite.policy.batching import Layout, MicroBatch, Row, cut
from gft_lite.policy.serving_base import serving_base
from gft_lite.policy.weight_checks import fitting_weights
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.memory import LOGIT_CHUNK_BYTES

TRAINED, REFERENCE = "default", "reference"


class LoraPolicy:
    """A frozen base and a trainable adapter; the base alone is the adapter switched off."""

    def __init__(
        self,
        model: Any,  # A PeftModel; its attributes are torch's "Tensor or Module" to a checker.
        tokenizer: Any,
        settings: PolicySettings,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.dtype = dtype
        self.device = next(iter(self.parameters().values())).device  # The embedding may be away.
        causal_lm: Any = model.get_base_model()
        self._decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self._head = causal_lm.get_output_embeddings()
        self.config = causal_lm.config
        limit = getattr(self.config, "max_position_embeddings", None) or 1 << 30
        self.context = min(settings.context or limit, limit)
        eos = causal_lm.generation_config.eos_token_id
        listed = eos if isinstance(eos, list) else [eos]
        self.eos_ids = frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)
        vocabulary = causal_lm.get_input_embeddings().num_embeddings
        if beyond := [i for i in self.eos_ids if i >= vocabulary]:
            raise RecipeError(
                [f"policy.model: must have its EOS token among its {vocabulary} tokens, got "
                 f"{settings.model!r} with id {beyond[0]}. Set eos_token in tokenizer_config.json."]
            )  # fmt: skip
        pads = (tokenizer.pad_token_id, *self.eos_ids, 0)
        self.pad_id = next(i for i in pads if i is not None and i < vocabulary)
        # The fused head knows the gradient of a plain matrix only.
        plain = type(self._head) is nn.Linear and self._head.bias is None
        self._fused = settings.fused_head and plain
        self.layout: Layout = self._choose_layout()

    # --- adapter ---------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: the fp32 LoRA masters."""
        return {n: p for n, p in self.model.named_parameters() if f".{TRAINED}." in n}

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """The base alone, for the length of a `with`."""
        with self.model.disable_adapter():
            yield

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen reference: the base, or the adapter that training started from."""
        with contextlib.ExitStack() as stack:
            # Dropout would make it another reference every time.
            stack.enter_context(evaluating(self))
            if self.settings.reference == "base":
                stack.enter_context(self.base())
            else:
                stack.callback(self.model.set_adapter, TRAINED)
                self.model.set_adapter(REFERENCE, inference_mode=True)
            yield

    def save_adapter(self, folder: Path) -> Path:
        """Write the adapter as a plain PEFT adapter; the folder appears only when complete."""
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        # Embeddings are never trained; "auto" would ask the hub whether they were resized.
        self.model.save_pretrained(
            str(partial), selected_adapters=[TRAINED], save_embedding_layers=False
        )
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return folder

    def load_adapter(self, folder: Path) -> None:
        """Read the weights that `save_adapter` wrote into the adapter, in place.

        Raises: RecipeError for weights that are not exactly the adapter's.
        """
        state = fitting_weights(self.model, TRAINED, folder, "adapter")
        set_peft_model_state_dict(self.model, state, adapter_name=TRAINED)

    # --- layout ----------------------------------------------------------------------------

    def batches(self, rows: Sequence[Row], token_budget: int) -> list[MicroBatch]:
        """Rows as micro-batches in the policy's layout."""
        return cut(rows, token_budget, pad_id=self.pad_id, layout=self.layout)

    def _choose_layout(self) -> Layout:
        """The best layout, or the one asked for, that gives the states of padded rows."""
        base: Any = self.model.get_base_model()
        wanted = self.settings.layout
        known = {"full_attention", "sliding_attention"}
        plain = set(getattr(self.config, "layer_types", None) or []) <= known
        if wanted == "padded" or base._is_stateful or not plain:
            tried: tuple[Layout, ...] = ()
        else:
            tried = tuple(each for each in ("shared", "packed") if wanted in ("auto", each))
        if self.settings.attention == "sdpa" and base._supports_attention_backend:
            base.set_attn_implementation(attention.NAME)
            for layout in tried:
                if self._can(layout):
                    return layout
            base.set_attn_implementation("sdpa")
        # Packed rows that transformers tells apart by their position ids.
        if "packed" in tried and self._can("packed"):
            return "packed"
        if wanted in ("shared", "packed"):
            raise RecipeError(
                [f"policy.layout: must be one that {self.config.model_type} with attention "
                 f"{self.settings.attention} can do, got {wanted!r}. Use auto."]
            )  # fmt: skip
        return "padded"

    @torch.no_grad()
    def _can(self, layout: Layout) -> bool:
        """Whether the model gives the same states in this layout, found by trying it."""
        rows = [Row((1, 2, 3, 4), (5, 6, 7)), Row((1, 2, 3, 4), (8, 9)), Row((9, 8), (7, 6, 5))]

        def states(layout: Layout) -> Tensor:
            [batch] = (batch.to(self.device) for batch in cut(rows, 100, layout=layout))
            return self._hidden(batch)[batch.row.argsort(stable=True)].float()

        try:
            with evaluating(self):
                tried, padded = states(layout), states("padded")
        except attention.Unsupported:
            return False
        limit = 1e-4 if self.dtype == torch.float32 else 0.03
        return bool((tried - padded).norm() <= limit * padded.norm())

    # --- scoring ---------------------------------------------------------------------------

    def token_scores(self, batch: MicroBatch, *, reference_kl: bool = False) -> TokenScores:
        """Log-probs and, on request, KL to the reference, with gradient when grad mode is on,
        and entropy of the response tokens."""
        batch = batch.to(self.device)
        inputs = [self._hidden(batch), batch.targets]
        if reference_kl:
            inputs.append(self._reference_hidden(batch))
        return TokenScores(*self._over_chunks(self._score_chunk, *inputs))

    def backward(
        self, batch: MicroBatch, loss: Callable[[TokenScores, slice], Tensor], *,
        reference_kl: bool = False,
    ) -> tuple[float, TokenScores]:  # fmt: skip
        """Add the gradient of a loss to the adapter's; returns the loss and the scores.

        `loss` is called for slices of the micro-batch's tokens: it takes their scores and the
        slice and returns what they add to the loss, a scalar; the log-prob of a token (and, on
        request, its KL to the reference) counts in that token's share alone.
        """
        batch = batch.to(self.device)
        if reference_kl or not self._fused:
            scores = self.token_scores(batch, reference_kl=reference_kl)
            total = loss(scores, slice(None))
            total.backward()
            return total.item(), scores
        hidden = self._hidden(batch)
        value, gradient, scores = self._fused_head(hidden.detach(), batch.targets, loss)
        hidden.backward(gradient)
        return value, scores

    @torch.no_grad()
    def _fused_head(
        self, hidden: Tensor, targets: Tensor, loss: Callable[[TokenScores, slice], Tensor]
    ) -> tuple[float, Tensor, TokenScores]:
        """Loss, its gradient with respect to the hidden states, and scores, in one pass.

        With d log p_t / d logits = onehot(t) - softmax, a token's gradient follows from the slope
        of the loss in its own log-prob alone: two matrix products, no logits kept.
        """
        value, gradient, scores = 0.0, torch.empty_like(hidden), []
        rows = self._chunk_rows
        for span in (slice(i, i + rows) for i in range(0, len(targets), rows)):
            logits = self._logits(hidden[span])
            normaliser = logits.logsumexp(-1)
            pick = targets[span, None]
            logprobs = logits.gather(-1, pick)[:, 0] - normaliser
            probs = (logits - normaliser[:, None]).exp_()
            entropy = normaliser - torch.linalg.vecdot(probs, logits)
            with torch.enable_grad():
                part = TokenScores(logprobs.requires_grad_(), entropy)
                share = loss(part, span)
                [slope] = torch.autograd.grad(share, [logprobs])
            by_logits = probs.mul_(-slope[:, None]).scatter_add_(-1, pick, slope[:, None])
            with self._compute():
                gradient[span] = by_logits @ self._head.weight
            value += share.item()
            scores.append((logprobs.detach(), entropy))
            del logits, probs, by_logits  # Not beside those of the next slice.
        return value, gradient, TokenScores(*(torch.cat(c) for c in zip(*scores, strict=True)))

    @torch.no_grad()
    def divergence(self, batch: MicroBatch) -> Divergence:
        """How far the policy is from the reference, exactly, by swapping the adapter."""
        batch = batch.to(self.device)
        hidden, ref_hidden = self._hidden(batch), self._reference_hidden(batch)
        return Divergence(
            *self._over_chunks(self._compare_chunk, hidden, ref_hidden, batch.targets)
        )

    def next_token_logits(self, input_ids: Tensor, cache: Any, **kwargs: Tensor) -> Tensor:
        """fp32 logits [B, V] of the token after `input_ids` [B, S], continuing `cache`."""
        with self._compute():
            states = self._decoder(
                input_ids=input_ids, past_key_values=cache, use_cache=True, **kwargs
            ).last_hidden_state
            return self._head(states[:, -1]).float()

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, d] that predict the response tokens."""
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.segments:
            inputs["position_ids"] = batch.position_ids
            if self.config._attn_implementation == attention.NAME:
                inputs["segments"] = attention.SegmentAttention(batch.segments, self.device)
                # A ready mask, which segments have no use for, keeps transformers from making one.
                inputs["attention_mask"] = torch.empty(1, 1, 0, 0, device=self.device)
        with self._compute(), self._offload():
            states = self._decoder(
                input_ids=batch.input_ids, use_cache=False, **inputs
            ).last_hidden_state
        return states.flatten(0, 1)[batch.predicts]

    @torch.no_grad()
    def _reference_hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, d] of the reference, without gradient."""
        with self.reference():
            return self._hidden(batch)

    @property
    def _chunk_rows(self) -> int:
        """How many tokens' logits are held at a time."""
        return max(1, LOGIT_CHUNK_BYTES // (4 * self.config.vocab_size))

    def _over_chunks(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`function` over slices of tokens, recomputed in backward, so that no slice's logits
        outlive it."""
        parts = list(zip(*(x.split(self._chunk_rows) for x in inputs), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            outputs = [checkpoint(function, *part, use_reentrant=False) for part in parts]
        else:
            outputs = [function(*part) for part in parts]
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))

    def _score_chunk(
        self, hidden: Tensor, targets: Tensor, ref_hidden: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        logits = self._logits(hidden)
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
        with torch.no_grad():
            logp = logits - normaliser[:, None]
            entropy = -(logp.exp() * logp).sum(-1)
            if ref_hidden is None:
                return logprobs, entropy
            ref = self._logits(ref_hidden)
            # As for the policy, so that equal logits have a KL of exactly 0.
            ref = ref - ref.logsumexp(-1, keepdim=True)
        kl = (ref.exp() * (ref - (logits - normaliser[:, None]))).sum(-1)
        return logprobs, entropy, kl

    def _compare_chunk(
        self, hidden: Tensor, ref_hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        logp = self._logits(hidden).log_softmax(-1)
        ref = self._logits(ref_hidden).log_softmax(-1)
        forward = (ref.exp() * (ref - logp)).sum(-1)
        reverse = (logp.exp() * (logp - ref)).sum(-1)
        pick = targets[:, None]
        return logp.gather(-1, pick)[:, 0], ref.gather(-1, pick)[:, 0], forward, reverse

    def _logits(self, hidden: Tensor) -> Tensor:
        with self._compute():
            return self._head(hidden).float()

    def _compute(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast, so that fp32 LoRA masters compute in the base's dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _offload(self) -> contextlib.AbstractContextManager[Any]:
        """Checkpoints that wait for the backward in the CPU's memory, where the recipe says so."""
        if self.settings.offload_checkpoints is not True or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    def serving_base(self, kind: str) -> ServedBase:
        """What an engine should load to serve this policy's base; `kind` is `rollout.base`."""
        return serving_base(self, kind)
