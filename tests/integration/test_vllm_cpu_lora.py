"""vLLM on a CPU: our LoRA functions against vLLM's own, its precision and its KV cache."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from safetensors.torch import load_file

from gft_lite import lab
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout import vllm_common
from gft_lite.rollout.base import RolloutError
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.vllm_engine import VllmEngine

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason='needs vllm: pip install "gft-lite[vllm]"'
    ),
    pytest.mark.usefixtures("one_thread"),
]

TOKENS, INPUTS, RANK, SLOTS = 23, 40, 8, 3
# Slots 0 and 1 have adapters; the last one is empty, which is where vLLM looks for index -1.
INDICES = {
    "one adapter": [1] * TOKENS,
    "several": [0] * 9 + [1] * 5 + [0] * 9,
    "alternating": [0, 1] * 11 + [0],
    "some without": [-1] * 4 + [0] * 9 + [-1] * 3 + [1] * 7,
    "none": [-1] * TOKENS,
}


def _weights(rows, columns, dtype, dimensions):
    weights = torch.randn(SLOTS, rows, columns).to(dtype)
    weights[-1] = 0
    return weights if dimensions == 3 else weights[:, None]


def _runs(indices):
    """What vLLM passes to the functions for batches with prompts."""
    from vllm.lora.punica_wrapper.utils import compute_meta

    starts, lengths, slots, number, longest, tokens, _ = compute_meta(indices)
    return starts, lengths, slots, number, longest, tokens


def _pair(name, inputs, weights, output, *arguments):
    """The outputs of vLLM's function and of ours."""
    from vllm.lora.ops import torch_ops

    from gft_lite.rollout import vllm_cpu_lora

    expected, found = output.clone(), output.clone()
    getattr(torch_ops, name)(inputs, weights, expected, *arguments)
    getattr(vllm_cpu_lora, name)(inputs, weights, found, *arguments)
    assert not torch.equal(expected, output)
    return expected, found


def _assert_equal_to_rounding(found, expected, dtype):
    # One rounding of a result of size 10: 2^-8 and 2^-24 relative.
    torch.testing.assert_close(
        found, expected, rtol=0, atol=10 * (2**-8 if dtype == torch.bfloat16 else 2**-22)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dimensions", [3, 4])
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_results_are_those_of_vllm_to_rounding(dtype, dimensions, indices):
    torch.manual_seed(0)
    indices = torch.tensor(indices)
    runs = _runs(indices)
    x, buffer = torch.randn(TOKENS, INPUTS).to(dtype), torch.randn(TOKENS, RANK)
    a = _weights(RANK, INPUTS, dtype, dimensions) / INPUTS**0.5
    b = _weights(INPUTS, RANK, dtype, dimensions) / RANK**0.5
    y = torch.randn(TOKENS, 2 * INPUTS).to(dtype)
    narrow = torch.randn(TOKENS, INPUTS - 3).to(dtype)  # The model pads less than the adapter.
    for name, where in (("bgmv", (indices,)), ("sgmv", runs)):
        expected, found = _pair(f"{name}_shrink", x, a, buffer, *where, 0.5)
        _assert_equal_to_rounding(found, expected, torch.float32)
        for add in (True, False):
            for output in (y, narrow):
                if add and set(indices.tolist()) == {-1}:
                    continue  # Adds nothing; see the next test.
                expected, found = _pair(f"{name}_expand", buffer, b, output, *where, add)
                _assert_equal_to_rounding(found, expected, dtype)
                arguments = (*where, 20, INPUTS, add)
                if output is y:
                    expected, found = _pair(f"{name}_expand_slice", buffer, b, y, *arguments)
                    _assert_equal_to_rounding(found, expected, dtype)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_linears_are_vllms_and_follow_changes_of_the_adapter(dtype, counted):
    from vllm.lora.punica_wrapper import punica_cpu

    from gft_lite.rollout import vllm_cpu_lora as ours

    torch.manual_seed(0)
    sizes, fused = (30, 10, 10), []
    wrapper = punica_cpu.PunicaWrapperCPU(TOKENS, TOKENS, "cpu")
    wrapper.is_prefill = True
    with torch.inference_mode(mode=not counted):
        a = tuple(_weights(RANK, INPUTS, dtype, 4) / INPUTS**0.5 for _ in sizes)
        b = tuple(_weights(size, RANK, dtype, 4) / RANK**0.5 for size in sizes)
    for indices in (*INDICES.values(), INDICES["one adapter"]):
        wrapper.indices_len[0] = TOKENS
        wrapper._token_lora_indices[:TOKENS] = torch.tensor(indices)
        wrapper._update_prefill_metadata(torch.tensor(indices))
        x, y = torch.randn(TOKENS, INPUTS).to(dtype), torch.randn(TOKENS, 50).to(dtype)
        expected, found = y.clone(), y.clone()
        ours.VLLMS_LINEAR(wrapper, expected, x, a, b, 1.0, sizes)
        ours.add_lora_linear(wrapper, found, x, a, b, 1.0, sizes)
        _assert_equal_to_rounding(found, expected, dtype)
        assert torch.equal(found, y) == (set(indices) == {-1})
        fused.append(ours.fused(a, b, 1)[0])
        with torch.inference_mode():  # As vLLM loads the next adapter.
            a[2][1, 0, :4].copy_(torch.full((4, INPUTS), 0.2))
    assert not torch.equal(fused[0], fused[-1])
    assert (ours.fused(a, b, 1)[0] is ours.fused(a, b, 1)[0]) == counted


def test_rows_without_adapter_get_none():
    """vLLM's functions take the last slot for index -1, an adapter if all slots are used."""
    from gft_lite.rollout import vllm_cpu_lora as ours

    indices = torch.tensor([-1, 0, -1])
    x, weights = torch.ones(3, 4), torch.ones(1, 2, 4)
    buffer = torch.full((3, 2), 9.0)
    ours.bgmv_shrink(x, weights, buffer, indices, 0.5)
    assert buffer.tolist() == [[0, 0], [2, 2], [0, 0]]
    y = torch.full((3, 3), 5.0)
    ours.sgmv_expand_slice(buffer, torch.ones(1, 1, 1, 2), y, *_runs(indices), 1, 1, True)
    assert y.tolist() == [[5, 5, 5], [5, 9, 5], [5, 5, 5]]
    ours.bgmv_expand(buffer, torch.ones(1, 1, 1, 2), y, indices, False)
    assert y.tolist() == [[0, 5, 5], [4, 9, 5], [0, 5, 5]]


def test_every_function_that_vllms_wrapper_calls_is_replaced():
    from vllm.lora.punica_wrapper import punica_cpu

    from gft_lite.rollout.vllm_cpu_lora import REPLACEMENTS

    called = {name for name in vars(punica_cpu) if name.startswith(("bgmv_", "sgmv_"))}
    assert {function.__name__ for function in REPLACEMENTS} == called


@pytest.mark.parametrize(("version", "replaced"), [("0.32.7", True), ("0.33.0", False)])
def test_another_vllm_keeps_its_own_functions(version, replaced, monkeypatch, caplog):
    monkeypatch.setattr(vllm_common, "installed_version", {"vllm": version}.get)
    with caplog.at_level(logging.DEBUG, "gft_lite"):
        options = vllm_common.lora_worker()
    assert ("worker_cls" in options, len(caplog.messages)) == (replaced, not replaced)
    assert all(f"vLLM is {version}" in message for message in caplog.messages)


# --- an engine in bfloat16 beside a trainer in fp32 --------------------------------------------


def test_an_engine_in_bf16_is_described_and_checked_beside_a_trainer_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_common, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(vllm_common, "free_ram", lambda: 1 << 40)
    policy = load_policy(PolicySettings(dtype="float32", device="cpu", context=100))
    [example] = lab.rows("retention", limit=1)
    row = Row(*(tuple(policy.tokenizer.encode(example[k])) for k in ("problem", "answer")))
    engine = VllmEngine(RolloutSettings(engine="vllm", batch_size=6), policy, tmp_path / "engine")
    try:
        assert engine.base.endswith(" in bfloat16 (rollout.dtype: auto; the policy is in float32)")
        [wrapper] = {m.punica_wrapper for m in _modules(engine) if hasattr(m, "punica_wrapper")}
        assert type(wrapper).add_lora_linear.__module__ == "gft_lite.rollout.vllm_cpu_lora"
        cache = engine._llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks == 6 * 4 + 1  # 100 tokens take 4 blocks; vLLM reserves one.
        served = PolicyEngine(engine, policy, tmp_path / "adapters")
        noise = served.start_checks(row, limit=0.2)
        assert 1e-4 < noise < 0.1
        for version in (1, 2):
            _step(policy, 1e-3)
            assert served.sync(version) < 0.2
        _assert_adapters_are_in_bf16(engine, policy, row, tmp_path)
        before = engine.score(row.prompt_ids, row.response_ids)
        _step(policy, 1e-3)
        monkeypatch.setattr(engine, "sync", lambda adapter, version: None)
        with pytest.raises(RolloutError, match="must serve the new adapter, got the previous"):
            served.sync(3)
        assert engine.score(row.prompt_ids, row.response_ids) == before
    finally:
        engine.close()


def _modules(engine):
    return engine._llm.llm_engine.model_executor.driver_worker.worker.get_model().modules()


def _assert_adapters_are_in_bf16(engine, policy, row, folder):
    """Half the bytes, and the same log-probs to the last bit as from a file in fp32."""
    served = engine.score(row.prompt_ids, row.response_ids)
    exact = policy.save_adapter(folder / "exact")
    files = [x / "adapter_model.safetensors" for x in (folder / "adapters" / "v2", exact)]
    small, large = (load_file(file) for file in files)
    assert {x.dtype for x in small.values()} == {torch.bfloat16}
    assert {x.dtype for x in policy.parameters().values()} == {torch.float32}
    for name, weight in large.items():
        assert torch.equal(weight.bfloat16(), small[name])
    assert any(not torch.equal(weight, small[name].float()) for name, weight in large.items())
    engine.sync(exact, 9)
    assert engine.score(row.prompt_ids, row.response_ids) == served


@torch.no_grad()
def _step(policy, size):
    for name, parameter in policy.parameters().items():
        if "lora_B" in name:
            parameter.add_(size)
