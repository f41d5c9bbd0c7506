"""QLoRA (arXiv 2305.14314): a frozen NF4, int8 or plain base from transformers, a LoRA adapter
from peft, and token log-probs that never hold a full `[tokens, vocabulary]` tensor."""

from __future__ import annotations

import contextlib
import copy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gft_lite.batching import MicroBatch
from gft_lite.policy import Divergence, TokenScores, evaluating
from gft_lite.recipe import PACKAGE, PolicySettings, RecipeError

TRAINED, REFERENCE = "default", "reference"
LOGIT_CHUNK_BYTES = 64 << 20


class QLoraPolicy:
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
        self.device = next(model.parameters()).device
        causal_lm: Any = model.get_base_model()
        self._decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self._head = causal_lm.get_output_embeddings()
        self.config = causal_lm.config
        limit = getattr(self.config, "max_position_embeddings", None) or 1 << 30
        self.context = min(settings.context or limit, limit)
        eos = causal_lm.generation_config.eos_token_id
        listed = eos if isinstance(eos, list) else [eos]
        self.eos_ids = frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)
        self.pad_id = next(i for i in (tokenizer.pad_token_id, *self.eos_ids, 0) if i is not None)

    @classmethod
    def load(cls, settings: PolicySettings, seed: int = 0) -> QLoraPolicy:
        """Load base, tokenizer and adapter. Raises: RecipeError when a name or rank is wrong."""
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = _dtype(settings.dtype, device)
        where = model_location(settings.model)
        common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **common)
            base: Any = transformers.AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                device_map={"": device},
                quantization_config=_quantization(settings, dtype),
                attn_implementation=settings.attention,
                use_safetensors=True,
                **common,
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(
                [f"policy.model: must be a model folder or hub id that loads, "
                 f"got {settings.model!r} ({reason})"]
            ) from error  # fmt: skip
        _refuse_unknown_heads(base.config)
        for module in base.modules():
            if isinstance(module, Linear4bit):
                # An eval() forward would repack the weights to a bf16 kernel that rounds them.
                module.support_avx512bf16_for_cpu = False
        model = _adapt(base, settings, seed)
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model, tokenizer, settings, dtype)

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
        """Read the weights that `save_adapter` wrote into the adapter, in place."""
        state = load_file(folder / "adapter_model.safetensors")
        result: Any = set_peft_model_state_dict(self.model, state, adapter_name=TRAINED)
        if result.unexpected_keys:
            raise ValueError(
                f"{folder}: must fit the policy, got keys {result.unexpected_keys[:3]}"
            )

    # --- scoring ---------------------------------------------------------------------------

    def token_scores(self, batch: MicroBatch, *, reference_kl: bool = False) -> TokenScores:
        """Log-probs and, on request, KL to the reference, with gradient when grad mode is on,
        and entropy of the response tokens."""
        batch = batch.to(self.device)
        inputs = [self._hidden(batch), batch.targets]
        if reference_kl:
            inputs.append(self._reference_hidden(batch))
        return TokenScores(*self._over_chunks(self._score_chunk, *inputs))

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
        with self._compute():
            states = self._decoder(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        return states[batch.before_targets]

    @torch.no_grad()
    def _reference_hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, d] of the reference, without gradient."""
        with self.reference():
            return self._hidden(batch)

    def _over_chunks(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`function` over slices of tokens, recomputed in backward, so that no slice's logits
        outlive it."""
        rows = max(1, LOGIT_CHUNK_BYTES // (4 * self.config.vocab_size))
        parts = list(zip(*(x.split(rows) for x in inputs), strict=True))
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

    # --- the base for a rollout engine -------------------------------------------------------

    def serving_base(self, kind: str, scratch: Path) -> str:
        """The model that an engine without the trainer's quantisation should load.

        "nf4_dequantised" writes the very numbers that the trainer computes with, once, to
        `scratch/base`; "original" is the model as published.
        """
        if kind == "original" or self.settings.quantization == "none":
            return model_location(self.settings.model)
        folder = scratch / "base"
        if not folder.exists():
            partial = scratch / "base.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_torch_state_dict(self._dequantised(), partial)
            config = copy.deepcopy(self.config)
            del config.quantization_config
            config.save_pretrained(partial)
            self.model.get_base_model().generation_config.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            partial.rename(folder)
        return str(folder)

    def _dequantised(self) -> dict[str, Tensor]:
        """The base's weights in the compute dtype, under their original names."""
        modules = dict(self.model.get_base_model().named_modules())
        state: dict[str, Tensor] = {}
        for name, weight in self.model.get_base_model().named_parameters():
            owner, _, leaf = name.rpartition(".")
            if ".lora_" not in name:
                plain = _plain(modules[owner], weight) if leaf == "weight" else weight
                name = name.replace(".base_layer", "")
                state[name] = plain.detach().to(self.dtype).contiguous()
        return state


def _plain(module: nn.Module, weight: Any) -> Tensor:
    """A weight as the module's forward uses it, without quantisation."""
    if isinstance(module, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(module, Linear8bitLt):
        # bitsandbytes moves the scales to the module's state at the first forward.
        scales: Any = weight.SCB if weight.SCB is not None else module.state.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    return weight


def model_location(model: str) -> str:
    """The folder or hub id behind a recipe's `policy.model`; `lab` is the packaged base."""
    return str(PACKAGE / "lab" / "base") if model == "lab" else model


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(torch, name)


def _quantization(
    settings: PolicySettings, dtype: torch.dtype
) -> transformers.BitsAndBytesConfig | None:
    if settings.quantization == "none":
        return None
    if settings.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _adapt(base: Any, settings: PolicySettings, seed: int) -> PeftModel:
    """Put the adapter on the base: a fresh one drawn from `seed`, or the one to start from."""
    model: PeftModel
    if settings.adapter is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(
                r=settings.lora.rank,
                lora_alpha=settings.lora.alpha,
                lora_dropout=settings.lora.dropout,
                target_modules=settings.lora.target_modules,
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(base, config)
    else:
        model = _start_from(base, settings.adapter, settings)
    for name, parameter in model.named_parameters():
        if f".{TRAINED}." in name:
            parameter.data = parameter.data.float()
    return model


def _start_from(base: Any, adapter: str, settings: PolicySettings) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        if settings.reference == "adapter":
            model.load_adapter(adapter, adapter_name=REFERENCE)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            [f"policy.adapter: must be a PEFT adapter of {settings.model}, "
             f"got {adapter!r} ({reason})"]
        ) from error  # fmt: skip
    rank = getattr(model.peft_config[TRAINED], "r", None)
    if rank != settings.lora.rank:
        raise RecipeError(
            [f"policy.lora.rank: must be {rank}, the rank of {adapter}, "
             f"got {settings.lora.rank}"]
        )  # fmt: skip
    return model


def _refuse_unknown_heads(config: transformers.PretrainedConfig) -> None:
    """Some architectures rescale their logits after the head, which the chunks would miss."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise RecipeError(
                [f"policy.model: must have a plain output head, got {config.model_type} "
                 f"with {name}"]
            )  # fmt: skip
