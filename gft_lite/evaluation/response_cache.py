"""Sampled responses of an evaluation on the disk, so that none is sampled twice."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from gft_lite.data.prompts import PromptFormat
from gft_lite.rollout.base import Completion, OnCompletion, Request, RolloutEngine, Sampling
from gft_lite.rollout.sampling import Draw, graded_text, make_requests, report_completions
from gft_lite.types import FinishReason, Group, Problem, Response
from gft_lite.utils.jsonl import JsonlFile

# Token ids as an array: a large benchmark has tens of millions of them.
_Stored: TypeAlias = "tuple[array[int], str, FinishReason]"
TextOf = Callable[[Sequence[int]], str]


class ResponseCache:
    """The responses of one model to one benchmark by key, in a JSON-lines file.

    Raises: UserError for a damaged line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        advice = "Remove the line: its response is then sampled again."
        self._file = JsonlFile(path, _stored, "must be a response with its key", advice)
        self._responses: dict[str, _Stored] = dict(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._responses

    def response(self, key: str, text_of: TextOf | None = None) -> Response:
        """The response with that key and the text of its token ids, by default the stored text."""
        ids, stored, finish_reason = self._responses[key]
        return Response(tuple(ids), text_of(ids) if text_of else stored, "self", finish_reason)

    def groups(
        self,
        problems: Sequence[Problem],
        keys: Sequence[Sequence[str]],
        text_of: TextOf | None = None,
    ) -> list[Group]:
        """Each problem with the responses of its keys."""
        return [
            Group(problem, tuple(self.response(key, text_of) for key in names))
            for problem, names in zip(problems, keys, strict=True)
        ]

    def add(self, completions: Mapping[str, Completion], text_of: TextOf) -> None:
        """Append completions to the file and sync it to the disk."""
        new: dict[str, _Stored] = {
            key: (array("I", c.token_ids), text_of(c.token_ids), c.finish_reason)
            for key, c in completions.items()
        }
        self._file.append(
            {"key": key, "token_ids": ids.tolist(), "text": text, "finish_reason": finish_reason}
            for key, (ids, text, finish_reason) in new.items()
        )
        self._responses |= new


def _stored(line: dict[str, Any]) -> tuple[str, _Stored]:
    if not all(isinstance(line[name], str) for name in ("key", "text")):
        raise TypeError("key or text")
    if line["finish_reason"] not in ("stop", "length"):
        raise ValueError("finish_reason")
    return line["key"], (array("I", line["token_ids"]), line["text"], line["finish_reason"])


def response_key(model: str, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> str:
    """A hash of everything that determines a response: model, prompt, sampling and seed."""
    how = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens, sampling.stop)
    text = json.dumps([model, list(prompt_ids), how, seed])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class BenchmarkDraw:
    """`samples` responses of `model` to each problem; `seed_parts` are those of `Draw`."""

    model: str
    format: PromptFormat
    problems: Sequence[Problem]
    samples: int
    seed_parts: tuple[object, ...]


class CachedSampler:
    """Samples the responses that a cache lacks, in chunks of `chunk` responses.

    `sampled` and `reused` count responses.
    """

    def __init__(self, engine: RolloutEngine, sampling: Sampling, context: int, chunk: int) -> None:
        self.engine = engine
        self.sampling = sampling
        self.context = context
        self.chunk = chunk
        self.sampled = self.reused = 0

    def keys(self, model: str, request: Request) -> list[str]:
        """The key of each of a request's responses."""
        # A longer context would give another response where it limits this one.
        limit = min(self.sampling.max_tokens, self.context - len(request.prompt_ids))
        how = replace(self.sampling, max_tokens=limit)
        return [response_key(model, request.prompt_ids, how, seed) for seed in request.seeds]

    def respond(
        self, draw: BenchmarkDraw, cache: ResponseCache
    ) -> tuple[list[Group], list[list[str]]]:
        """The ungraded responses to each problem, and their keys; new ones join the cache."""
        requests = make_requests(Draw(p, draw.samples, draw.seed_parts) for p in draw.problems)
        keys = [self.keys(draw.model, request) for request in requests]
        new = [
            (Request(request.prompt_ids, (seed,)), key)
            for request, names in zip(requests, keys, strict=True)
            for key, seed in zip(names, request.seeds, strict=True)
            if key not in cache
        ]
        total = draw.samples * len(draw.problems)
        self.sampled += len(new)
        self.reused += total - len(new)
        text_of = partial(graded_text, format=draw.format, stop=self.sampling.stop)
        report = report_completions(len(new))
        for start in range(0, len(new), self.chunk):
            cache.add(self._sample(new[start : start + self.chunk], report), text_of)
        return cache.groups(draw.problems, keys, text_of), keys

    def _sample(
        self, new: Sequence[tuple[Request, str]], on_completion: OnCompletion
    ) -> dict[str, Completion]:
        requests = [request for request, _ in new]
        done = self.engine.generate(requests, self.sampling, on_completion)
        return {key: completion for (_, key), [completion] in zip(new, done, strict=True)}
