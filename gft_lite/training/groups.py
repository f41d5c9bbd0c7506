"""Group composition: which demonstrations a problem contributes and how many self samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gft_lite.recipe.sections import GroupSettings
from gft_lite.rollout.base import RolloutEngine, Sampling
from gft_lite.rollout.sampling import sample
from gft_lite.types import Group, Problem, Response, Source

if TYPE_CHECKING:
    from gft_lite.data.prompts import PromptFormat


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
