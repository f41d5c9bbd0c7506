"""Stop strings in the engines, against the rule applied to a whole text afterwards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, PromptSettings, RolloutSettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.registry import start_engine
from gft_lite.rollout.sampling import graded_text, make_prompt_format

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 0
LENGTH = 24
SAMPLING = Sampling(max_tokens=LENGTH)
REQUESTS = [Request((70, 71, 72), tuple(range(120)))]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
NEEDS_VLLM = pytest.mark.skipif(not HAS_VLLM, reason='needs vllm: pip install "gft-lite[vllm]"')
# test_vllm_server.py holds the server to the same texts; a start of its own takes too long here.
ENGINES = ["transformers", pytest.param("vllm", marks=NEEDS_VLLM)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random model whose tokens are bytes, words and pieces of characters of several bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<turn>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    words = ["Question: what is 1+2?\n\nAnswer: ####", "Schritt für Schritt 🙂🙃 → 3"]
    inner.train_from_iterator(words * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<turn>"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        eos_token_id=EOS, pad_token_id=EOS, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return _load(str(folder))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, policy, tmp_path_factory):
    engine = _start(request.param, policy, tmp_path_factory.mktemp("engine"))
    yield engine
    engine.close()


def _load(model):
    settings = PolicySettings(
        model=model, dtype="float32", device="cpu", context=96, gradient_checkpointing=False
    )
    return load_policy(settings)


def _start(name, policy, scratch):
    dtype = {"dtype": "float32"} if name == "vllm" else {}
    settings = RolloutSettings(engine=name, batch_size=64, kv_cache_mib=16, **dtype)
    return start_engine(settings, policy, Path(scratch))


def _expected(ids, stop, tokenizer):
    """The tokens up to the first one after which the text contains a stop string.

    A text whose last character is incomplete is not searched, as vLLM does.
    """
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if ids[end - 1] == EOS:
            return ids[:end], "stop"
        if not text.endswith("\ufffd") and any(s in text for s in stop):
            return ids[:end], "stop"
    return ids, "length"


def _check(engine, policy, stop):
    """Compare all samples with the rule applied to samples without stop; returns how many end."""
    [free] = engine.generate(REQUESTS, SAMPLING)
    [stopped] = engine.generate(REQUESTS, Sampling(max_tokens=LENGTH, stop=stop))
    ends = 0
    for whole, completion in zip(free, stopped, strict=True):
        ids, reason = _expected(whole.token_ids, stop, policy.tokenizer)
        assert (completion.token_ids, completion.finish_reason) == (ids, reason)
        assert len(completion.logprobs) == len(ids)
        ends += len(ids) < len(whole.token_ids)
    return ends


def _samples(engine, policy):
    """The texts of the samples without a stop string, the longest first."""
    [free] = engine.generate(REQUESTS, SAMPLING)
    texts = [policy.tokenizer.decode([i for i in c.token_ids if i != EOS]) for c in free]
    return sorted(texts, key=len, reverse=True)


def test_a_stop_string_ends_a_sample_wherever_it_lies_in_the_tokens(engine, policy):
    """Whole tokens, parts of tokens and sequences of tokens, taken from the samples themselves."""
    text = next(t for t in _samples(engine, policy) if "\ufffd" not in t[:12])
    for stop in (text[2:3], text[3:6], text[1:11]):
        assert _check(engine, policy, (stop,)) >= 1


def test_several_stop_strings_and_one_that_never_occurs(engine, policy):
    first, second, *_ = _samples(engine, policy)
    assert _check(engine, policy, ("never sampled", second[4:6], first[5:9])) >= 1
    assert _check(engine, policy, ("never sampled",)) == 0


def test_stop_strings_of_several_bytes_in_one_character(engine, policy):
    """Their characters take up to four tokens each."""
    wide = {c for text in _samples(engine, policy) for c in text if c > "\x7f" and c != "\ufffd"}
    assert max(len(c.encode()) for c in wide) > 2
    assert _check(engine, policy, tuple(sorted(wide))) >= 20


def test_a_special_token_can_be_a_stop_string(engine, policy):
    assert _check(engine, policy, ("<turn>",)) >= 1


def _adds_text(tokenizer, ids):
    """Whether the sixth token completes two characters that are new in the text."""
    five, six = (tokenizer.decode(ids[:count]) for count in (5, 6))
    whole = len(ids) > 6 and "\ufffd" not in six and EOS not in ids
    return whole and len(six) > len(five) and six[-2:] not in five


def test_the_last_token_allowed_may_complete_the_stop_string(engine, policy):
    """Then the response is complete, not truncated; a beginning of a stop string is no end."""
    [free] = engine.generate(REQUESTS, SAMPLING)
    whole, seed = next(
        (c, seed) for c, seed in zip(free, REQUESTS[0].seeds, strict=True)
        if _adds_text(policy.tokenizer, c.token_ids)
    )  # fmt: skip
    text = policy.tokenizer.decode(whole.token_ids[:6])
    request = Request(REQUESTS[0].prompt_ids, (seed,))
    for stop, reason in ((text[-2:], "stop"), (text[-2:] + "\x00", "length")):
        [[cut]] = engine.generate([request], Sampling(max_tokens=6, stop=(stop,)))
        assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:6], reason)


def test_the_graded_text_has_neither_stop_string_nor_end_token(engine, policy):
    format = make_prompt_format(policy, PromptSettings())
    stop = ("<turn>", "1", "e", " ")
    [group] = engine.generate(REQUESTS, Sampling(max_tokens=LENGTH, stop=stop))
    for completion in group:
        text = graded_text(completion.token_ids, format, stop)
        assert not [s for s in (*stop, "<|endoftext|>") if s in text]
        whole = policy.tokenizer.decode(completion.token_ids)
        assert whole.startswith(text)
        if completion.finish_reason == "length" and not whole.endswith("\ufffd"):
            assert whole == text


def test_every_end_token_of_the_model_ends_the_graded_text(policy, monkeypatch):
    """A generation config may list more than the tokenizer's EOS, as Llama 3's does."""
    monkeypatch.setattr(policy, "eos_ids", frozenset({EOS, 1}))
    format = make_prompt_format(policy, PromptSettings())
    assert policy.eos_ids == set(format.stop_ids)
    text = policy.tokenizer.decode([70, 71])
    for end in ((), (EOS,), (1,)):
        assert graded_text((70, 71, *end), format, ()) == text
    assert format.demonstration(text, "expert").token_ids[-1] == EOS
