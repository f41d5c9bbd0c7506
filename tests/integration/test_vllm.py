"""The real vLLM engine against transformers + peft on an NF4 base, in fp32 on the CPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout import vllm_engine
from gft_lite.rollout.base import Request, RolloutError, Sampling
from gft_lite.rollout.restarting_engine import RestartingEngine
from gft_lite.rollout.vllm_common import engine_options, sampling_requests
from gft_lite.rollout.vllm_engine import VllmEngine
from gft_lite.utils.errors import RecipeError, UserError

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason='needs vllm: pip install "gft-lite[vllm]"'
    ),
    pytest.mark.usefixtures("one_thread"),
]

CONTEXT = 96
EOS = 1
GAP = 3e-4  # In nats; fp32 on both sides: of 20 random adapters, 1.3e-4 at most.
GREEDY = Sampling(temperature=0, max_tokens=12)
# Both begin with the same 64 tokens, two blocks of vLLM's prefix cache.
PREFIX = tuple(2 + (7 * i) % 90 for i in range(64))
PROMPTS = ((*PREFIX, 5, 6), (*PREFIX, 40))
COMPLETION = (9, 33, 71, 4, 50, 12, 28, 66)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return _policy(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(policy, tmp_path_factory):
    """The shared engine, and the process state before and after its start."""
    _ = random.random(), np.random.rand(), torch.rand(1)  # To states that no seeding gives.
    before = _trace()
    engine = VllmEngine(_settings(), policy, tmp_path_factory.mktemp("engine"))
    yield engine, before, _trace()
    engine.close()


@pytest.fixture(scope="module")
def engine(start):
    return start[0]


@pytest.fixture(scope="module")
def publish(policy, tmp_path_factory):
    """Give the policy a new random adapter, save it under a fresh path, return that and a version.

    The scale makes every adapter move log-probs by far more than GAP.
    """
    folder, versions = tmp_path_factory.mktemp("adapters"), itertools.count(1)

    def publish(scale=0.3):
        version = next(versions)
        generator = torch.Generator().manual_seed(version)
        for parameter in policy.parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        return policy.save_adapter(folder / f"v{version}"), version

    return publish


def _policy(folder, **settings):
    """A tiny random Qwen2 with one token per ASCII character, loaded as the recipe would."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    names = ["<pad>", "<|endoftext|>", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(names), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        eos_token_id=EOS, pad_token_id=0, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    defaults = {"model": str(folder), "dtype": "float32", "device": "cpu", "context": CONTEXT}
    lora = {"rank": 4, "alpha": 8}
    return load_policy(PolicySettings(**(defaults | {"lora": lora} | settings)))


def _trace():
    """The process state that the engine must not change."""
    places = [
        torch.Event, torch.Tensor.pin_memory, torch.set_num_threads, torch.accelerator.synchronize,
        torch.accelerator.empty_cache, torch.cuda.Stream, torch.cuda.current_stream,
    ]  # fmt: skip
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return places, states, torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ)


def _settings(**settings):
    return RolloutSettings(**({"engine": "vllm", "dtype": "float32"} | settings))


@torch.no_grad()
def _logprobs(policy, prompt, completion):
    """The trainer's log-probs [T] of a completion, from one forward over all of it."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist()


@torch.no_grad()
def _greedy(policy, prompt, length=GREEDY.max_tokens):
    ids = list(prompt)
    while len(ids) < len(prompt) + length:
        ids.append(int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return tuple(ids[len(prompt) :])


def _requests(seeds=(0,)):
    return [Request(prompt, tuple(seeds)) for prompt in PROMPTS]


def _gap(ours, theirs):
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _assert_serves(engine, policy):
    """Greedy tokens and log-probs are the trainer's, and so is the score of another completion."""
    for prompt, [served] in zip(PROMPTS, engine.generate(_requests(), GREEDY), strict=True):
        assert served.token_ids == _greedy(policy, prompt)
        assert _gap(served.logprobs, _logprobs(policy, prompt, served.token_ids)) <= GAP
        assert _gap(engine.score(prompt, COMPLETION), _logprobs(policy, prompt, COMPLETION)) <= GAP


def test_the_first_start_of_vllm_leaves_the_process_state_alone(start):
    _, before, after = start
    assert before == after


def test_each_of_twenty_adapters_is_served_and_none_is_stale(engine, policy, publish):
    old, before = None, engine.score(PROMPTS[0], COMPLETION)
    for _ in range(20):
        adapter, version = publish()
        engine.sync(adapter, version)
        if old is not None:
            shutil.rmtree(old)
        _assert_serves(engine, policy)
        after = engine.score(PROMPTS[0], COMPLETION)
        assert _gap(after, before) > 100 * GAP
        old, before = adapter, after


def test_the_same_version_may_be_synced_twice(engine, policy, publish):
    for _ in range(2):
        adapter, _ = publish()
        engine.sync(adapter, 7)
        _assert_serves(engine, policy)


def test_none_serves_the_base(engine, policy, publish):
    engine.sync(*publish())
    engine.sync(None, 0)
    with policy.base():
        _assert_serves(engine, policy)
    assert _gap(engine.score(PROMPTS[0], COMPLETION),
                _logprobs(policy, PROMPTS[0], COMPLETION)) > 100 * GAP  # fmt: skip


def test_base_and_adapter_in_turn_are_never_stale(engine, policy, publish):
    adapter, version = publish()
    for _ in range(2):
        engine.sync(None, 0)
        with policy.base():
            _assert_serves(engine, policy)
        engine.sync(adapter, version)
        _assert_serves(engine, policy)


def _sample_base(engine):
    """A request to the bare base while an adapter is loaded, as another user of vLLM might send."""
    loaded, engine._lora = engine._lora, None
    found = engine.generate(_requests(), GREEDY)
    engine._lora = loaded
    return found


def test_requests_without_adapter_and_dummy_batches_leave_its_slot_alone(engine, policy, publish):
    """vLLM is reported to empty a slot that no request of a batch uses, and not to fill it again.

    The prefix cache is on, so that the base's and the adapter's blocks are in it side by side.
    """
    with policy.base():
        base = [_greedy(policy, prompt) for prompt in PROMPTS]
    for _ in range(4):
        engine.sync(*publish())
        for _ in range(2):
            _assert_serves(engine, policy)
            assert [sample.token_ids for [sample] in _sample_base(engine)] == base
            assert _cached_tokens(engine) == 64
            engine._llm.collective_rpc("execute_dummy_batch")
            _assert_serves(engine, policy)
            engine._llm.reset_prefix_cache()
    engine.sync(None, 0)
    engine.generate(_requests(), GREEDY)
    engine.sync(*publish())
    _assert_serves(engine, policy)


def _cached_tokens(engine):
    """How many tokens of a prompt came from the prefix cache."""
    [request] = sampling_requests([Request(PROMPTS[0], (0,))], GREEDY, CONTEXT, [EOS])
    found = []
    engine._run(
        [request], lambda _, output: found.append(output.num_cached_tokens), detokenize=False
    )
    return found[0]


def test_calls_while_asleep_are_errors_and_wake_serves_the_adapter_from_an_empty_cache(
    engine, policy, publish
):
    engine.sync(*publish())
    _assert_serves(engine, policy)
    assert _cached_tokens(engine) == 64
    engine.sleep()
    engine.sleep()
    for call in (lambda: engine.generate(_requests(), GREEDY), lambda: engine.sync(None, 1),
                 lambda: engine.score(PROMPTS[0], COMPLETION)):  # fmt: skip
        with pytest.raises(RolloutError, match="asleep"):
            call()
    engine.wake()
    engine.wake()
    assert _cached_tokens(engine) == 0
    _assert_serves(engine, policy)


def test_the_callback_gets_each_completion_once_and_the_shortest_first(engine):
    order, sampling = [], Sampling(max_tokens=20)
    long, short = Request(PROMPTS[0], (1, 2)), Request((5,) * (CONTEXT - 3), (3,))
    found = engine.generate([long, short], sampling, lambda *call: order.append(call))
    assert order[0] == (short.prompt_ids, 3, found[1][0])
    assert sorted(order[1:]) == [(PROMPTS[0], 1, found[0][0]), (PROMPTS[0], 2, found[0][1])]


def test_scores_do_not_depend_on_what_is_cached(engine, policy, publish):
    # Most of the long completion lies in blocks that the generate puts into the prefix cache.
    prompt, completion = PROMPTS[0][:8], PROMPTS[0][8:]
    for _ in range(2):
        engine.sync(*publish())
        for _ in range(3):
            scores = engine.score(prompt, completion)
            assert _gap(scores, _logprobs(policy, prompt, completion)) <= GAP
            engine.generate(_requests(), GREEDY)


def test_seeds_alone_decide_the_samples(engine, publish):
    engine.sync(*publish(0.1))
    sampling = Sampling(max_tokens=16)
    seeds = (3, 4, 5, 2**63 - 1, 2**40 + 3)
    first, second = engine.generate(_requests(seeds), sampling)
    assert len({c.token_ids for c in first}) == len(seeds)
    backwards = [Request(PROMPTS[1], seeds[::-1]), Request(PROMPTS[0], seeds[::-1])]
    assert _ids(engine.generate(backwards, sampling)) == [_ids([second[::-1]])[0],
                                                          _ids([first[::-1]])[0]]  # fmt: skip
    for seed, completion in zip(seeds, first, strict=True):
        assert _ids(engine.generate([Request(PROMPTS[0], (seed,))], sampling)) == [
            [completion.token_ids]
        ]


def _ids(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def test_seeds_beyond_64_bits_are_folded_and_minus_one_is_a_seed(engine):
    sampling = Sampling(max_tokens=16)
    for seed, folded in [(2**63, 0), (2**63 + 5, 5), (-1, 2**63 - 1)]:
        [pair] = engine.generate([Request(PROMPTS[0], (seed, folded))], sampling)
        assert pair[0].token_ids == pair[1].token_ids


def test_logprobs_are_untempered_whatever_the_sampling(engine, policy, publish):
    engine.sync(*publish(0.1))
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=20, max_tokens=16)
    for prompt, group in zip(PROMPTS, engine.generate(_requests((1, 2)), sampling), strict=True):
        for completion in group:
            expected = _logprobs(policy, prompt, completion.token_ids)
            assert _gap(completion.logprobs, expected) <= GAP


def test_top_k_and_top_p_narrow_the_choice_to_the_greedy_one(engine):
    greedy = _ids(engine.generate(_requests(), GREEDY))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert _ids(engine.generate(_requests((11,)), Sampling(max_tokens=12, **narrow))) == greedy


def test_a_response_ends_with_its_first_eos(engine):
    seeds = tuple(range(48))
    [group] = engine.generate([Request((5, 6), seeds)], Sampling(temperature=2, max_tokens=60))
    for completion in group:
        assert EOS not in completion.token_ids[:-1]
        assert len(completion.token_ids) == len(completion.logprobs)
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == EOS)
    assert {c.finish_reason for c in group} == {"stop", "length"}


def test_a_response_ends_with_its_first_stop_string(engine, policy):
    [[whole]] = engine.generate([Request(PROMPTS[0], (5,))], Sampling(max_tokens=20))
    text = policy.tokenizer.decode(whole.token_ids)
    stop = text[6:9]
    end = text.index(stop) + len(stop)
    sampling = Sampling(max_tokens=20, stop=("never written", stop))
    [[cut]] = engine.generate([Request(PROMPTS[0], (5,))], sampling)
    assert cut.token_ids == whole.token_ids[:end]
    assert cut.logprobs == pytest.approx(whole.logprobs[:end], abs=GAP)
    assert (cut.finish_reason, whole.finish_reason) == ("stop", "length")


def test_max_tokens_is_cut_to_the_room_left(engine):
    long = tuple(itertools.islice(itertools.cycle(PREFIX), CONTEXT - 3))
    short = Request(PROMPTS[0], (1,))
    sampling = Sampling(max_tokens=10)
    [[cut], [free]] = engine.generate([Request(long, (1,)), short], sampling)
    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")
    assert len(free.token_ids) == 10


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 40])
def test_a_prompt_that_fills_the_context_is_an_error_with_its_length(engine, length):
    with pytest.raises(RolloutError, match=rf"1 to {CONTEXT - 1} tokens, got {length}\b"):
        engine.generate([*_requests(), Request((5,) * length, (1,))], GREEDY)
    assert len(engine.generate(_requests(), GREEDY)) == len(PROMPTS)


def test_a_score_that_fills_the_context_and_an_unknown_token_are_errors(engine):
    assert len(engine.score(PROMPTS[0], (5,) * (CONTEXT - 1 - len(PROMPTS[0])))) == 29
    with pytest.raises(RolloutError, match=f"got {CONTEXT}"):
        engine.score(PROMPTS[0], (5,) * (CONTEXT - len(PROMPTS[0])))
    with pytest.raises(RolloutError, match="rejected"):
        engine.generate([*_requests(), Request((5, 100_000), (1,))], GREEDY)
    with pytest.raises(RolloutError, match=r"temperature must be in \[0, 2\]"):
        engine.generate(_requests(), Sampling(temperature=3))
    assert len(engine.generate(_requests(), GREEDY)) == len(PROMPTS)


def test_empty_requests(engine):
    assert engine.generate([], GREEDY) == []
    assert engine.generate([Request((5,), ())], GREEDY) == [[]]
    assert engine.score((5,), ()) == []


def _edit(change):
    """A damage that rewrites the adapter's tensors."""

    def damage(adapter):
        file = adapter / "adapter_model.safetensors"
        save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file)

    return damage


def _nan(tensors):
    tensors[max(tensors)][0, 0] = float("nan")
    return tensors


def _rank(tensors, rank):
    """The tensors padded or cut to another rank."""
    return {
        n: torch.nn.functional.pad(t, (0, 0, 0, rank - 4) if "lora_A" in n else (0, rank - 4))
        for n, t in tensors.items()
    }


def _dora(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))


DAMAGES = {
    "missing folder": (shutil.rmtree, "must be a folder with a PEFT adapter"),
    "missing config": (lambda a: (a / "adapter_config.json").unlink(), "must load in vllm"),
    "cut file": (
        lambda a: os.truncate(a / "adapter_model.safetensors", 500),
        "must be a folder with a PEFT adapter",
    ),
    "nan": (_edit(_nan), "must be finite"),
    "wrong prefix": (_edit(lambda t: {f"x.{n}": v for n, v in t.items()}), "policy's modules"),
    "other module": (
        _edit(lambda t: {n.replace("q_proj", "z_proj"): v for n, v in t.items()}),
        "policy's modules",
    ),
    "missing module": (_edit(lambda t: dict(list(t.items())[2:])), "2 tensors differ"),
    "rank over the limit": (_edit(lambda t: _rank(t, 16)), "policy's modules and rank"),
    "truncated tensor": (_edit(lambda t: _rank(t, 3)), "policy's modules and rank"),
    "dora": (_dora, "must load in vllm"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_adapter_is_an_error_and_the_old_one_stays(engine, policy, publish, name):
    damage, message = DAMAGES[name]
    bad, version = publish()
    damage(bad)
    good, _ = publish()
    engine.sync(good, version)
    with pytest.raises(RolloutError, match=message):
        engine.sync(bad, version + 1)
    _assert_serves(engine, policy)


def test_the_trainer_still_trains(engine, policy, publish):
    engine.sync(*publish())
    engine.generate(_requests(), GREEDY)
    ids = torch.tensor([PROMPTS[0]])
    policy.model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in policy.parameters().values()]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    policy.model.zero_grad()


def test_scores_are_those_of_vllms_own_lora_functions(engine, policy, publish, monkeypatch):
    from vllm.lora.ops import torch_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from gft_lite.rollout.vllm_cpu_lora import REPLACEMENTS

    assert all(getattr(punica_cpu, f.__name__) is f for f in REPLACEMENTS)
    engine.sync(*publish())
    prompts = [Request(prompt, (1, 2)) for prompt in PROMPTS]
    found = engine.score(PROMPTS[0], COMPLETION), engine.generate(prompts, GREEDY)
    for function in REPLACEMENTS:
        monkeypatch.setattr(punica_cpu, function.__name__, getattr(torch_ops, function.__name__))
    expected = engine.score(PROMPTS[0], COMPLETION), engine.generate(prompts, GREEDY)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert _ids(found[1]) == _ids(expected[1])


def test_settings_outside_vllms_limits_are_recipe_errors(policy, tmp_path, monkeypatch):
    wide = _policy(tmp_path / "wide", lora={"rank": 600, "alpha": 8}, context=400)
    with pytest.raises(RecipeError, match=r"policy\.lora\.rank: must be at most 512.*got 600"):
        VllmEngine(_settings(), wide, tmp_path)
    with pytest.raises(RecipeError, match=r"rollout\.temperature: must be at most 2 .*got 2\.5"):
        VllmEngine(_settings(temperature=2.5), policy, tmp_path)
    # 2 (K and V) x 2 layers x 1 head x 32 x 4 bytes = 512 bytes a token; 5000 and one block.
    monkeypatch.setattr(policy, "context", 5000)
    with pytest.raises(RecipeError, match=r"rollout\.kv_cache_mib: must be at least 3 .*got 2"):
        VllmEngine(_settings(kv_cache_mib=2), policy, tmp_path)


def _fail_at(step, monkeypatch):
    """Make one step of vLLM fail; returns the ids of the requests that are added afterwards."""
    from vllm.v1.engine.llm_engine import LLMEngine

    plain_step, plain_add, calls, added = LLMEngine.step, LLMEngine.add_request, [], []

    def failing(self):
        calls.append(1)
        if len(calls) == step:
            added.clear()
            raise RuntimeError("out of luck")
        return plain_step(self)

    def recorded(self, request_id, *args, **kwargs):
        added.append(request_id)
        return plain_add(self, request_id, *args, **kwargs)

    monkeypatch.setattr(LLMEngine, "step", failing)
    monkeypatch.setattr(LLMEngine, "add_request", recorded)
    return added


def test_a_crash_loses_only_the_unfinished_samples(engine, policy, tmp_path, monkeypatch):
    """Closes the engine that the others share, as does the test after this one."""
    engine.sync(None, 0)
    requests = [Request(PROMPTS[0], tuple(range(12))), Request(PROMPTS[1], tuple(range(12)))]
    sampling = Sampling(max_tokens=10)
    expected = engine.generate(requests, sampling)
    engine.close()
    output = StringIO()
    restarting = RestartingEngine(
        lambda: VllmEngine(_settings(batch_size=4), policy, tmp_path), Console(file=output)
    )
    added = _fail_at(25, monkeypatch)
    found = restarting.generate(requests, sampling)
    restarting.close()
    assert "vllm failed. RuntimeError: out of luck Starting it again." in output.getvalue()
    # In 24 steps, each of the four places has finished at least two responses of ten tokens.
    assert 4 <= len(added) <= 24 - 8
    assert _ids(found) == _ids(expected)
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert _gap(ours.logprobs, theirs.logprobs) <= GAP


def _interrupt(engine):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            while True:
                engine.generate([Request((5,), tuple(range(64)))], Sampling(max_tokens=90))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _demanding_options(settings, policy):
    """More memory than is free, which vLLM checks on a CPU, too."""
    options = {"gpu_memory_utilization": 0.9999, "kv_cache_memory_bytes": None}
    return engine_options(settings, policy) | options


def test_a_second_engine_leaves_the_process_state_alone(
    engine, policy, publish, tmp_path, monkeypatch
):
    """The last test of this file, since it closes the engine that the others share."""
    engine.close()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = VllmEngine(_settings(), policy, tmp_path)
    engine.sync(*publish())
    assert len(list(tmp_path.glob("vllm_dist_*"))) == 1
    with pytest.raises(RolloutError, match="close the other vllm engine"):
        VllmEngine(_settings(), policy, tmp_path)
    _assert_serves(engine, policy)
    _interrupt(engine)
    for call in (lambda: engine.generate(_requests(), GREEDY), lambda: engine.sync(None, 1)):
        with pytest.raises(RolloutError, match="closed"):
            call()
    weights = Path(policy.settings.model) / "model.safetensors"
    weights.rename(tmp_path / weights.name)
    with pytest.raises(RolloutError, match="could not start") as caught:
        VllmEngine(_settings(base="original"), policy, tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / weights.name).rename(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "engine_options", _demanding_options)
        with pytest.raises(UserError, match=r"Lower rollout\.gpu_memory") as caught:
            VllmEngine(_settings(), policy, tmp_path)
    assert "less than desired CPU memory utilization (0.999" in str(caught.value)
    assert "\n" not in str(caught.value)
    torch.set_num_threads(2)
    trace = _trace()
    second = VllmEngine(_settings(kv_cache_mib=1, base="original"), policy, tmp_path)
    assert _trace() == trace
    torch.set_num_threads(1)
    with policy.base():
        exact = _logprobs(policy, PROMPTS[0], COMPLETION)
    # This one serves the numbers before the quantisation.
    assert _gap(second.score(PROMPTS[0], COMPLETION), exact) > 10 * GAP
    adapter, version = publish()
    trace = _trace()
    second.sync(adapter, version)
    second.generate(_requests((1, 2)), Sampling(max_tokens=8))
    assert _trace() == trace
    second.close()
    second.close()
    assert _trace() == trace
    assert not list(tmp_path.glob("vllm_dist_*"))
