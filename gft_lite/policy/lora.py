"""LoraPolicy: a frozen base with a LoRA adapter, independent of the library that loaded them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from gft_lite.policy import attention
from gft_lite.policy.base import Divergence, ServedBase, TokenScores, evaluating
from gft_lite.policy.batching import Layout, MicroBatch, Row, cut
from gft_lite.policy.model_checks import find_eos_ids, longest_context
from gft_lite.policy.registry import model_location
from gft_lite.policy.scoring import Loss, OutputHead, autocast
from gft_lite.policy.serving_base import serving_base
from gft_lite.policy.weight_checks import read_fitting_weights
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.memory import bound_product_caches, keep_freed_memory

TRAINED, REFERENCE = "default", "reference"  # Names of the adapters in the PeftModel.


class LoraPolicy:
    """A frozen base with a trainable adapter; disabling the adapter gives the base."""

    def __init__(
        self,
        model: Any,  # A PeftModel, whose attributes mypy takes for "Tensor or Module".
        tokenizer: Any,
        settings: PolicySettings,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.dtype = dtype
        # Not the embedding's device, which policy.offload_embedding may have moved to the CPU.
        self.device = next(iter(self.parameters().values())).device
        if self.device.type == "cpu":
            keep_freed_memory()
            bound_product_caches()
        causal_lm: Any = model.get_base_model()
        self._decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self.config = causal_lm.config
        limit = longest_context(self.config)
        self.context = min(settings.context or limit, limit)
        vocabulary = causal_lm.get_input_embeddings().num_embeddings
        self.eos_ids = find_eos_ids(
            causal_lm.generation_config, tokenizer, vocabulary, settings.model
        )
        pads = (tokenizer.pad_token_id, *self.eos_ids, 0)
        self.pad_id = next(i for i in pads if i is not None and i < vocabulary)
        self.head = OutputHead(
            causal_lm.get_output_embeddings(), vocabulary, self.device, self.dtype
        )
        self.layout: Layout = self._choose_layout()
        self._describe_adapter()

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
        """The frozen reference (the base, or the adapter at the start), without dropout."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self))
            if self.settings.reference == "base":
                stack.enter_context(self.base())
            else:
                stack.callback(self.model.set_adapter, TRAINED)
                self.model.set_adapter(REFERENCE, inference_mode=True)
            yield

    def _describe_adapter(self) -> None:
        """Make the adapter's config name this base, and write its sets in one order."""
        config = self.model.peft_config[TRAINED]
        config.base_model_name_or_path = model_location(self.settings.model)
        config.revision = self.settings.revision
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))
        # PEFT would write an empty form; a run writes a card of its own.
        self.model.create_or_update_model_card = lambda folder: None

    def save_adapter(
        self, folder: Path, *, with_tokenizer: bool = False, dtype: torch.dtype | None = None
    ) -> Path:
        """Write the adapter as a plain PEFT adapter; the folder appears only when complete."""
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        weights = {name: p.detach().to(dtype or p.dtype) for name, p in self.parameters().items()}
        # Embeddings are never trained; "auto" would query the hub whether they were resized.
        self.model.save_pretrained(
            str(partial), selected_adapters=[TRAINED], save_embedding_layers=False,
            state_dict=weights,
        )  # fmt: skip
        if with_tokenizer:
            self.tokenizer.save_pretrained(str(partial))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return folder

    def load_adapter(self, folder: Path) -> None:
        """Read the weights that `save_adapter` wrote into the adapter, in place.

        Raises: RecipeError if their names or shapes differ from the adapter's.
        """
        state = read_fitting_weights(self.model, TRAINED, folder, "adapter")
        set_peft_model_state_dict(self.model, state, adapter_name=TRAINED)

    # --- layout ----------------------------------------------------------------------------

    def batches(self, rows: Sequence[Row], token_budget: int) -> list[MicroBatch]:
        """Rows as micro-batches in the policy's layout."""
        return cut(rows, token_budget, pad_id=self.pad_id, layout=self.layout)

    def _choose_layout(self) -> Layout:
        """The first supported layout, or the one that the recipe names. Raises: RecipeError."""
        base: Any = self.model.get_base_model()
        wanted = self.settings.layout
        known = {"full_attention", "sliding_attention"}
        layers = getattr(self.config.get_text_config(), "layer_types", None) or []
        plain = set(layers) <= known
        if wanted == "padded" or base._is_stateful or not plain:
            tried: tuple[Layout, ...] = ()
        else:
            tried = tuple(each for each in ("shared", "packed") if wanted in ("auto", each))
        if self.settings.attention == "sdpa" and base._supports_attention_backend:
            base.set_attn_implementation(attention.NAME)
            for layout in tried:
                if self._supports(layout):
                    return layout
            base.set_attn_implementation("sdpa")
        # transformers separates packed rows by their position ids.
        if "packed" in tried and self._supports("packed"):
            return "packed"
        if wanted in ("shared", "packed"):
            raise RecipeError(
                [f"policy.layout: must be one that {self.config.model_type} with attention "
                 f"{self.settings.attention} supports, got {wanted!r}. Use auto."]
            )  # fmt: skip
        return "padded"

    @torch.no_grad()
    def _supports(self, layout: Layout) -> bool:
        """True if three rows in this layout give the hidden states of padded rows.

        Sliding windows are made shorter than the rows, so that they count as well.
        """
        rows = [Row((1, 2, 3, 4), (5, 6, 7)), Row((1, 2, 3, 4), (8, 9)), Row((9, 8), (7, 6, 5))]

        def states(layout: Layout) -> Tensor:
            [batch] = (batch.to(self.device) for batch in cut(rows, 100, layout=layout))
            return self._hidden(batch)[batch.row.argsort(stable=True)].float()

        try:
            with evaluating(self), attention.short_windows(self.model):
                tried, padded = states(layout), states("padded")
        except attention.Unsupported:
            return False
        limit = 1e-4 if self.dtype == torch.float32 else 0.03
        return bool((tried - padded).norm() <= limit * padded.norm())

    # --- scoring ---------------------------------------------------------------------------

    def token_scores(
        self, batch: MicroBatch, *, reference_kl: bool = False, entropy_gradient: bool = False
    ) -> TokenScores:
        """Scores of the response tokens, with gradient if grad mode is on."""
        batch = batch.to(self.device)
        hidden = self._hidden(batch)
        reference = self._reference_hidden(batch) if reference_kl else None
        return self.head.scores(hidden, batch.targets, reference, entropy_gradient=entropy_gradient)

    def backward(
        self, batch: MicroBatch, loss: Loss, *, reference_kl: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[float, TokenScores]:  # fmt: skip
        """Add the gradient of a loss to the adapter's gradient; see `Policy.backward`."""
        batch = batch.to(self.device)
        if reference_kl or not (self.settings.fused_head and self.head.fused):
            scores = self.token_scores(
                batch, reference_kl=reference_kl, entropy_gradient=entropy_gradient
            )
            total = loss(scores, slice(None))
            total.backward()
            return total.item(), scores
        hidden = self._hidden(batch)
        value, gradient, scores = self.head.loss_gradient(
            hidden.detach(), batch.targets, loss, entropy_gradient=entropy_gradient
        )
        hidden.backward(gradient)
        return value, scores

    @torch.no_grad()
    def divergence(self, batch: MicroBatch) -> Divergence:
        """The exact KLs between policy and reference, from one forward pass of each."""
        batch = batch.to(self.device)
        hidden, reference = self._hidden(batch), self._reference_hidden(batch)
        return self.head.divergence(hidden, reference, batch.targets)

    def next_token_logits(self, input_ids: Tensor, cache: Any, **kwargs: Tensor) -> Tensor:
        """fp32 logits [B, V] of the token after `input_ids` [B, S], continuing `cache`."""
        with autocast(self.device, self.dtype):
            states = self._decoder(
                input_ids=input_ids, past_key_values=cache, use_cache=True, **kwargs
            ).last_hidden_state
        return self.head.logits(states[:, -1])

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, d] that predict the response tokens."""
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.segments:
            inputs["position_ids"] = batch.position_ids
            if self.config._attn_implementation == attention.NAME:
                inputs["segments"] = attention.SegmentAttention(batch.segments, self.device)
                # Segments need no mask; given one of this shape, transformers builds none.
                inputs["attention_mask"] = torch.empty(1, 1, 0, 0, device=self.device)
        with autocast(self.device, self.dtype), self._offload():
            states = self._decoder(
                input_ids=batch.input_ids, use_cache=False, **inputs
            ).last_hidden_state
        return states.flatten(0, 1)[batch.predicts]

    @torch.no_grad()
    def _reference_hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, d] of the reference, without gradient."""
        with self.reference():
            return self._hidden(batch)

    def _offload(self) -> contextlib.AbstractContextManager[Any]:
        """Keep activation checkpoints in the CPU's memory until the backward pass, if set."""
        if self.settings.offload_checkpoints is not True or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    def serving_base(self, kind: str, dtype: torch.dtype | None = None) -> ServedBase:
        """The model that an engine loads to serve this base; `kind` is `rollout.base`.

        `dtype` is the engine's precision, by default the policy's.
        """
        return serving_base(self, kind, dtype)
