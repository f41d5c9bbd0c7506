"""Samples of problems from an engine, each with a seed of its own."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gft_lite.data.prompts import PromptFormat
from gft_lite.rollout.base import Completion, OnCompletion, Request, RolloutEngine, Sampling
from gft_lite.types import Problem, Response
from gft_lite.utils.progress import report_progress

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import PromptSettings


def make_prompt_format(
    policy: Policy, prompt: PromptSettings, field: str = "data.prompt"
) -> PromptFormat:
    """The prompt format of `prompt` in the policy's tokens; both then have the same end tokens.

    `field` is the recipe's path of `prompt`, for error texts. Raises: RecipeError.
    """
    format = PromptFormat(policy.tokenizer, prompt, field, policy.eos_ids)
    policy.eos_ids |= set(format.stop_ids)
    return format


def sample_seed(*parts: object) -> int:
    """A 63-bit seed from any parts (run seed, step, problem, sample), equal on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class Draw:
    """`count` samples of a problem; `seed_parts` and the problem's id give each its own seed.

    `prefix` are tokens that each of them begins with, put before what is sampled.
    """

    problem: Problem
    count: int
    seed_parts: tuple[object, ...]
    prefix: tuple[int, ...] = ()


def make_requests(draws: Iterable[Draw]) -> list[Request]:
    """A request with `count` seeds for each draw."""
    found = []
    drawn: Counter[tuple[object, ...]] = Counter()
    for draw in draws:
        # A problem that is drawn twice with equal parts continues counting: no equal samples.
        key = (*draw.seed_parts, draw.problem.id)
        numbers = range(drawn[key], drawn[key] + draw.count)
        drawn[key] += draw.count
        seeds = tuple(sample_seed(*key, number) for number in numbers)
        found.append(Request(draw.problem.prompt_ids + draw.prefix, seeds))
    return found


def sample(
    engine: RolloutEngine, format: PromptFormat, draws: Iterable[Draw], sampling: Sampling
) -> list[tuple[Response, ...]]:
    """The self responses of each draw, cut to `sampling.max_tokens` with their prefix."""
    draws = list(draws)
    requests = make_requests(draws)
    sent = [request for request in requests if request.seeds]
    done = iter(engine.generate(sent, sampling) if sent else [])
    return [
        tuple(
            _response(draw.prefix, completion, format, sampling)
            for completion in (next(done) if request.seeds else ())
        )
        for draw, request in zip(draws, requests, strict=True)
    ]


def _response(
    prefix: tuple[int, ...], completion: Completion, format: PromptFormat, sampling: Sampling
) -> Response:
    limit, count = sampling.max_tokens, len(prefix) + len(completion.token_ids)
    ids = (prefix + completion.token_ids)[:limit]
    return Response(
        token_ids=ids,
        text=graded_text(ids, format, sampling.stop),
        source="self",
        finish_reason="length" if count > limit else completion.finish_reason,
        logprobs=((0.0,) * len(prefix) + completion.logprobs)[:limit],
        prefix=len(prefix),
    )


def report_completions(total: int) -> OnCompletion:
    """Report how many of `total` completions there are to the phase that is shown."""
    finished = itertools.count(1)

    def report(_: tuple[int, ...], seed: int, completion: Completion) -> None:
        report_progress(next(finished), total, "responses", len(completion.token_ids))

    return report


def graded_text(token_ids: Sequence[int], format: PromptFormat, stop: Sequence[str]) -> str:
    """The text of a response that is graded: it ends before the end token and the stop string.

    The tokens of both stay in the response and are trained. Of several stop strings, the one that
    is completed first counts, as if the text was sampled character by character.
    """
    text = format.text(token_ids)
    found = [(start + len(s), start) for s in stop if (start := text.find(s)) >= 0]
    return text[: min(found)[1]] if found else text
