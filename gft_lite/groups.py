"""Group composition: which demonstrations a problem contributes and how many self samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gft_lite.recipe import GroupSettings
from gft_lite.rollout import Request, RolloutEngine, Sampling
from gft_lite.types import Group, Problem, Response, Source

if TYPE_CHECKING:
    from gft_lite.prompts import PromptFormat


@dataclass(frozen=True, slots=True)
class Composition:
    """The demonstrations of one group, as texts, and the number of self samples beside them."""

    experts: tuple[str, ...]
    teachers: tuple[str, ...]
    self_samples: int


def compose(problem: Problem, settings: GroupSettings, visit: int = 0) -> Composition | None:
    """What goes into the problem's group on its `visit`-th turn; None drops the problem.

    A problem with more demonstrations than wanted offers others at each visit. With fewer,
    `group.shortfall` decides: `self` samples fill up, the ones there are `repeat`ed, or the
    problem is `drop`ped; nothing to repeat drops it too.
    """
    taken, missing = [], 0
    for pool, wanted in (
        (problem.experts, settings.expert),
        (problem.teachers, settings.teacher),
    ):
        short = max(wanted - len(pool), 0)
        if short and (
            settings.shortfall == "drop" or (settings.shortfall == "repeat" and not pool)
        ):
            return None
        missing += short if settings.shortfall == "self" else 0
        count = wanted if settings.shortfall == "repeat" else wanted - short
        taken.append(tuple(pool[(visit * wanted + i) % len(pool)] for i in range(count)))
    return Composition(taken[0], taken[1], settings.self + missing)


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


def demonstrations(
    composition: Composition, format: PromptFormat, max_tokens: int
) -> tuple[Response, ...]:
    """The composition's experts and teachers as tokenised responses, cut at `max_tokens`."""
    pairs: list[tuple[Source, str]] = [
        *(("expert", text) for text in composition.experts),
        *(("teacher", text) for text in composition.teachers),
    ]
    return tuple(_demonstration(text, source, format, max_tokens) for source, text in pairs)


def _demonstration(text: str, source: Source, format: PromptFormat, max_tokens: int) -> Response:
    token_ids, finish_reason = format.response_ids(text, max_tokens)
    # A cut demonstration is graded as it is trained on: without the part that is gone.
    graded = text if finish_reason == "stop" else format.text(token_ids)
    return Response(token_ids, graded, source, finish_reason)


def build(
    problems: Sequence[Problem],
    settings: GroupSettings,
    visit: int,
    engine: RolloutEngine,
    format: PromptFormat,
    sampling: Sampling,
    seed_parts: tuple[object, ...],
) -> list[Group]:
    """The unscored groups of one step; problems that the shortfall rule drops are left out."""
    composed = [(p, c) for p in problems if (c := compose(p, settings, visit)) is not None]
    selves = sample(
        engine,
        format,
        [p for p, _ in composed],
        [c.self_samples for _, c in composed],
        sampling,
        seed_parts,
    )
    return [
        Group(problem, demonstrations(composition, format, sampling.max_tokens) + own)
        for (problem, composition), own in zip(composed, selves, strict=True)
    ]
