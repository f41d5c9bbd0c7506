"""The response cache: keys of responses, incomplete and damaged lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gft_lite.evaluation.response_cache import CachedSampler, ResponseCache, response_key
from gft_lite.rollout.base import Completion, Request, Sampling
from gft_lite.types import FinishReason, Problem, Response
from gft_lite.utils.errors import UserError

BASE = ("model", (1, 2), Sampling(0.5, max_tokens=8), 7)


@pytest.mark.parametrize(
    "other",
    [
        ("other", *BASE[1:]),
        ("model", (1, 2, 3), *BASE[2:]),
        ("model", (12,), *BASE[2:]),
        *(
            (*BASE[:2], replace(BASE[2], **change), 7)
            for change in (
                {"temperature": 0.6}, {"top_p": 0.9}, {"top_k": 5}, {"max_tokens": 9},
                {"stop": ("x",)},
            )
        ),
        (*BASE[:3], 8),
    ],
)  # fmt: skip
def test_whatever_changes_the_response_changes_its_key(other):
    assert response_key(*BASE) == response_key(*BASE)
    assert response_key(*other) != response_key(*BASE)


def test_a_context_that_limits_a_response_is_part_of_its_key():
    request = Request((1, 2), (7, 8))

    def keys(context):
        return CachedSampler(None, BASE[2], context, 1).keys("model", request)

    assert keys(10) == keys(99) == [response_key(*BASE), response_key(*BASE[:3], 8)]
    assert not set(keys(9)) & set(keys(10))


def completion(*ids: int, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(ids, (0.0,) * len(ids), finish_reason)


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_responses_come_back_as_they_were(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    first = Response((97, 0x2028, 233), "a\u2028é", "self", "length")
    cache = ResponseCache(path)
    cache.add({"k1": completion(97, 0x2028, 233, finish_reason="length")}, text_of)
    cache.add({"k2": completion()}, text_of)
    for again in (cache, ResponseCache(path)):
        assert "k1" in again
        assert "k3" not in again
        assert again.response("k1") == again.response("k1", text_of) == first
        [group] = again.groups([Problem("p", "?", "1")], [["k2", "k1"]])
        assert group.responses == (Response((), "", "self"), first)
        [group] = again.groups([Problem("p", "?", "1")], [["k1"]], lambda ids: f"{len(ids)} ids")
        assert group.responses[0].text == "3 ids"


@pytest.mark.parametrize("tail", [b'{"key": "k2", "token_ids": [1,', b'{"key"'])
def test_an_incomplete_line_is_no_response_and_the_next_ones_are_whole(tail: bytes, tmp_path):
    path = tmp_path / "a.jsonl"
    ResponseCache(path).add({"k1": completion(97)}, text_of)
    path.write_bytes(path.read_bytes() + tail)
    cache = ResponseCache(path)
    assert "k2" not in cache
    cache.add({"k3": completion(99)}, text_of)
    assert ResponseCache(path).response("k3").text == "c"
    assert ResponseCache(path).response("k1").text == "a"


GOOD = {"key": "k", "token_ids": [1], "text": "a", "finish_reason": "stop"}


@pytest.mark.parametrize(
    "line",
    [{}, {**GOOD, "token_ids": [-1]}, {**GOOD, "token_ids": 3}, {**GOOD, "token_ids": [1.5]},
     {**GOOD, "key": 1}, {**GOOD, "text": None}, {**GOOD, "finish_reason": "length "}],
)  # fmt: skip
def test_a_damaged_line_is_named(line: dict[str, object], tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(line)}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        ResponseCache(path)
    [text] = caught.value.problems
    assert text.startswith(f"{path}:2: must be a response with its key, got ")
    assert text.endswith("Remove the line: its response is then sampled again.")
