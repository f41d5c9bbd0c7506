"""The engines against each other on the lab's base, with and without stop strings.

In a file of its own: a process has one vLLM engine at a time.
"""

from __future__ import annotations

import importlib.util

import pytest

from gft_lite.lab import rows
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, PromptSettings, RolloutSettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.registry import start_engine
from gft_lite.rollout.sampling import graded_text, make_prompt_format

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason='needs vllm: pip install "gft-lite[vllm]"'
    ),
    pytest.mark.usefixtures("one_thread"),
]


def test_transformers_and_vllm_agree_on_the_lab_base(tmp_path):
    """Greedy samples: equal tokens, equal ends, equal graded texts. See test_vllm_server, too."""
    policy = load_policy(PolicySettings(model="lab", dtype="float32", device="cpu", context=96))
    format = make_prompt_format(policy, PromptSettings())
    prompts = [tuple(policy.tokenizer.encode(row["problem"])) for row in rows("test", limit=8)]
    requests = [Request(prompt, (0,)) for prompt in prompts]
    found = {}
    for name in ("transformers", "vllm"):
        dtype = {"dtype": "float32"} if name == "vllm" else {}
        settings = RolloutSettings(engine=name, batch_size=64, kv_cache_mib=16, **dtype)
        engine = start_engine(settings, policy, tmp_path / name)
        for stop in ((), ("#",), (";", "#"), ("<",), ("#1", "#2", "#3")):
            groups = engine.generate(requests, Sampling(0.0, max_tokens=24, stop=stop))
            found[name, stop] = [
                (c.token_ids, c.finish_reason, graded_text(c.token_ids, format, stop))
                for [c] in groups
            ]
        engine.close()
    for (_, stop), samples in found.items():
        assert samples == found["transformers", stop]
        assert not [s for s in stop for *_, text in samples if s in text]
    assert "" in [text for *_, text in found["vllm", ("<",)]]
    assert found["vllm", ("#",)] != found["vllm", (";", "#")] != found["vllm", ()]
