"""TODO: gft_lite/rollout/sampling.py"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gft_lite.rollout.base import Request, RolloutEngine, Sampling
from gft_lite.types import Problem, Response

if TYPE_CHECKING:
    from gft_lite.data.prompts import PromptFormat


def sample_seed(*parts: object) -> int:
    """A 63-bit seed from the run's seed, step, problem and sample, the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def requests(
    problems: Sequence[Problem], counts: Sequence[int], seed_parts: tuple[object, ...]
) -> list[Request]:
    """What to ask an engine for: `counts[i]` samples of problem i, each with its own seed."""
    asked = []
    drawn: Counter[str] = Counter()
    for problem, count in zip(problems, counts, strict=True):
        # A problem that comes twice in one call goes on counting: no sample is drawn twice.
        numbers = range(drawn[problem.id], drawn[problem.id] + count)
        drawn[problem.id] += count
        seeds = tuple(sample_seed(*seed_parts, problem.id, number) for number in numbers)
        asked.append(Request(problem.prompt_ids, seeds))
    return asked


def sample(
    engine: RolloutEngine,
    format: PromptFormat,
    problems: Sequence[Problem],
    counts: Sequence[int],
    sampling: Sampling,
    seed_parts: tuple[object, ...],
) -> list[tuple[Response, ...]]:
    """Self responses from the engine, `counts[i]` of them for problem i."""
    return respond(engine, format, requests(problems, counts, seed_parts), sampling)


def respond(
    engine: RolloutEngine, format: PromptFormat, asked: Sequence[Request], sampling: Sampling
) -> list[tuple[Response, ...]]:
    """Self responses from the engine, one for each seed of each request."""
    wanted = [request for request in asked if request.seeds]
    done = iter(engine.generate(wanted, sampling) if wanted else [])
    return [
        tuple(
            Response(
                token_ids=c.token_ids,
                text=format.text(c.token_ids),
                source="self",
                finish_reason=c.finish_reason,
                logprobs=c.logprobs,
            )
            for c in (next(done) if request.seeds else ())
        )
        for request in asked
    ]
