"""The response cache: what names a response, and what a kill leaves of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gft_lite.evaluation.response_cache import ResponseCache, Sampler, response_key
from gft_lite.rollout.base import Request, Sampling
from gft_lite.types import Problem, Response

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


def test_a_context_that_cuts_a_response_short_is_part_of_its_key():
    request = Request((1, 2), (7, 8))

    def keys(context):
        return Sampler(None, BASE[2], context, 1).keys("model", request)

    assert keys(10) == keys(99) == [response_key(*BASE), response_key(*BASE[:3], 8)]
    assert not set(keys(9)) & set(keys(10))


def test_responses_come_back_as_they_were(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    first = Response((5, 6), "a\nb \u2028 é", "self", "length")
    cache = ResponseCache(path)
    cache.add({"k1": first})
    cache.add({"k2": Response((), "", "self")})
    for again in (cache, ResponseCache(path)):
        assert "k1" in again
        assert "k3" not in again
        assert again["k1"] == first
        [group] = again.groups([Problem("p", "?", "1")], [["k2", "k1"]])
        assert group.responses == (Response((), "", "self"), first)


def test_half_a_line_is_forgotten_and_spoils_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    ResponseCache(path).add({"k1": Response((5,), "a", "self")})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "k2", "token_ids": [1,')
    cache = ResponseCache(path)
    assert "k2" not in cache
    assert path.read_bytes() == whole
    cache.add({"k3": Response((6,), "c", "self")})
    assert ResponseCache(path)["k3"].text == "c"
    assert ResponseCache(path)["k1"].text == "a"


def test_a_file_that_is_only_half_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"key"')
    assert "key" not in ResponseCache(path)
    assert path.read_bytes() == b""
