"""Responses of an evaluation on the disk: sampled once, read ever after."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gft_lite.data.prompts import PromptFormat
from gft_lite.rollout.base import Request, RolloutEngine, Sampling
from gft_lite.rollout.sampling import Draw, make_requests
from gft_lite.types import FinishReason, Group, Problem, Response
from gft_lite.utils.files import whole_lines


class ResponseCache:
    """One model's responses to one benchmark by key, a JSON line each, appended as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Token ids as arrays: a large benchmark has tens of millions of them.
        self._known: dict[str, tuple[array[int], str, FinishReason]] = {}
        for line in whole_lines(path):
            entry = json.loads(line)
            ids = array("I", entry["token_ids"])
            self._known[entry["key"]] = ids, entry["text"], entry["finish_reason"]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Response:
        ids, text, finish_reason = self._known[key]
        return Response(tuple(ids), text, "self", finish_reason)

    def groups(self, problems: Sequence[Problem], keys: Sequence[Sequence[str]]) -> list[Group]:
        """Problems with the responses that the keys name."""
        return [
            Group(problem, tuple(self[key] for key in named))
            for problem, named in zip(problems, keys, strict=True)
        ]

    def add(self, responses: Mapping[str, Response]) -> None:
        """Keep a chunk of responses; they survive whatever ends the process afterwards."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for key, r in responses.items():
                entry = {"key": key, "token_ids": r.token_ids, "text": r.text,
                         "finish_reason": r.finish_reason}  # fmt: skip
                file.write(json.dumps(entry) + "\n")
                self._known[key] = array("I", r.token_ids), r.text, r.finish_reason


def response_key(model: str, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> str:
    """The name of one response: who answers, what is asked, how it is sampled, by which seed."""
    how = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens, sampling.stop)
    text = json.dumps([model, list(prompt_ids), how, seed])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Sampler:
    """Asks an engine for what a cache does not have yet, in chunks of `chunk` responses.

    `sampled` and `reused` count responses; `on_chunk` hears (done, total) after each chunk.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: Sampling,
        context: int,
        chunk: int,
        on_chunk: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.engine = engine
        self.sampling = sampling
        self.context = context
        self.chunk = chunk
        self.on_chunk = on_chunk
        self.sampled = self.reused = 0

    def keys(self, model: str, request: Request) -> list[str]:
        """The key of each of a request's responses."""
        # Where the context cuts a response short, a longer one would be another response.
        room = min(self.sampling.max_tokens, self.context - len(request.prompt_ids))
        how = replace(self.sampling, max_tokens=room)
        return [response_key(model, request.prompt_ids, how, seed) for seed in request.seeds]

    def respond(
        self,
        model: str,
        format: PromptFormat,
        problems: Sequence[Problem],
        samples: int,
        seed_parts: tuple[object, ...],
        cache: ResponseCache,
    ) -> tuple[list[Group], list[list[str]]]:
        """`samples` unscored responses to each problem, and their keys; new ones are kept."""
        asked = make_requests(Draw(problem, samples, seed_parts) for problem in problems)
        keys = [self.keys(model, request) for request in asked]
        new = [
            (request.prompt_ids, key, seed)
            for request, named in zip(asked, keys, strict=True)
            for key, seed in zip(named, request.seeds, strict=True)
            if key not in cache
        ]
        total = samples * len(problems)
        self.sampled += len(new)
        self.reused += total - len(new)
        for start in range(0, len(new), self.chunk):
            cache.add(dict(self._sample(format, new[start : start + self.chunk])))
            self.on_chunk(total - len(new) + min(start + self.chunk, len(new)), total)
        return cache.groups(problems, keys), keys

    def _sample(
        self, format: PromptFormat, wanted: Sequence[tuple[tuple[int, ...], str, int]]
    ) -> Iterator[tuple[str, Response]]:
        asked = [Request(prompt_ids, (seed,)) for prompt_ids, _, seed in wanted]
        done = self.engine.generate(asked, self.sampling)
        for (_, key, _), [c] in zip(wanted, done, strict=True):
            yield key, Response(c.token_ids, format.text(c.token_ids), "self", c.finish_reason)
