"""The requests to a judge: several at a time, each kept on the disk, counted and with its price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from gft_lite.rewards.base import Grade, RewardError
from gft_lite.rewards.judge import JudgeRequest, JudgeSettings
from gft_lite.rewards.registry import JUDGE
from gft_lite.types import Group, Response
from gft_lite.utils.chat_model import ChatModel, ChatPlace, ChatResponse, price_of, token_count
from gft_lite.utils.errors import UserError, short_repr
from gft_lite.utils.jsonl import JsonlFile
from gft_lite.utils.openai_client import EndpointError

KEY = "GFT_LITE_JUDGE_KEY"
FILE = "judge.jsonl"
#: Consecutive failures after which a run stops; at least one per request in flight.
MAX_FAILURES = 8

Rows = Sequence[tuple[Group, Response]]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The scores of a request's answers, None if no reply could be read, and what they took."""

    key: str
    scores: tuple[float, ...] | None
    requests: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Judgement:
        """Read a stored judgement. Raises: KeyError, TypeError or ValueError for another value."""
        scores = entry["scores"]
        if scores is not None:
            scores = tuple(map(float, scores))
            if not all(0 <= score <= 1 for score in scores):
                raise ValueError("scores must be from 0 to 1")
        counts = (token_count(entry[field.name]) for field in fields(cls)[2:])
        return cls(str(entry["key"]), scores, *counts)


@dataclass
class JudgeUsage:
    """What judging took: requests sent, judgements that were known, failures and tokens."""

    requests: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, judgement: Judgement) -> None:
        """Count a judgement."""
        self.requests += judgement.requests
        self.failed += judgement.scores is None
        self.prompt_tokens += judgement.prompt_tokens
        self.completion_tokens += judgement.completion_tokens


class Judge:
    """The judge of a scorer; asks the server once for each problem with the same answers.

    `failures` has the reasons of answers without a grade, until it is emptied.
    """

    def __init__(
        self, settings: JudgeSettings, *, concurrency: int, log: Callable[[str], None]
    ) -> None:
        """Find the model and send one request. Raises: UserError if that fails."""
        self._concurrency = concurrency
        place = ChatPlace("reward 'judge': url", settings.url, KEY, "reward 'judge': model")
        self._model = ChatModel(place, settings.model, settings.timeout, log)
        try:
            probe = [{"role": "user", "content": "Reply with the word ready."}]
            self._model.respond(probe, {"max_tokens": 16}, max_retries=1)
        except EndpointError as error:
            self._model.close()
            raise place.unusable(error) from error
        self._settings = replace(settings, model=self._model.name)
        self.failures: list[str] = []
        self._known: dict[str, Judgement] = {}
        self._file: JsonlFile[Judgement] | None = None
        self._used = JudgeUsage()
        self._failed_in_a_row = 0

    def keep(self, file: Path) -> None:
        """Read the judgements of a run so far, and write new ones to the file as they arrive.

        Raises: UserError for a damaged file.
        """
        self._file = JsonlFile(
            file, Judgement.from_json, "must be a judgement", "Remove the line to ask again."
        )
        stored = {judgement.key: judgement for judgement in self._file}
        if new := [asdict(j) for key, j in self._known.items() if key not in stored]:
            self._file.append(new)
        self._known |= stored

    def grade(self, rows: Rows) -> list[Grade | None]:
        """The grade of each response. Raises: RewardError after too many consecutive failures."""
        requests: dict[str, JudgeRequest] = {}
        places: list[tuple[str, int]] = []  # of each response: the request and its answer there
        for _, part in groupby(rows, lambda row: id(row[0])):
            members = list(part)
            for request, i in self._requests(members):
                requests[request.key] = request
                places.append((request.key, i))
        new = [request for key, request in requests.items() if key not in self._known]
        new = [request for request in new if not self._is_alone(request)]
        self._used.cached += len(requests) - len(new)
        failed = self._ask(new)
        return [self._grade_of(requests[key], i, failed) for key, i in places]

    def take_usage(self) -> dict[str, Any]:
        """What judging took since the last call."""
        used, self._used = self._used, JudgeUsage()
        return self._with_cost(used)

    def totals(self) -> dict[str, Any]:
        """What all judgements took that are kept, those of earlier starts of a run included."""
        used = JudgeUsage()
        for judgement in self._known.values():
            used.add(judgement)
        found = self._with_cost(used)
        del found["cached"]
        return found

    def close(self) -> None:
        """Close the connections."""
        self._model.close()

    def _requests(self, members: Rows) -> Iterator[tuple[JudgeRequest, int]]:
        """For each response of a group the request that judges it, and its place in it."""
        problem = members[0][0].problem
        texts = [response.text for _, response in members]
        if self._settings.mode == "score":
            for text in texts:
                yield JudgeRequest(problem, (text,), self._settings), 0
        else:
            answers = tuple(sorted(set(texts)))
            request = JudgeRequest(problem, answers, self._settings)
            yield from ((request, answers.index(text)) for text in texts)

    def _is_alone(self, request: JudgeRequest) -> bool:
        """True for a ranking of one answer, which needs no judge."""
        return self._settings.mode == "rank" and len(request.answers) == 1

    def _grade_of(self, request: JudgeRequest, i: int, failed: Mapping[str, str]) -> Grade:
        if self._is_alone(request):
            return Grade(0.5)
        if request.key in failed:
            self.failures.append(failed[request.key])
            return Grade(None, "error")
        scores = self._known[request.key].scores
        if scores is None:
            self.failures.append(_unread(self._settings))
            return Grade(None, "unparsed")
        return Grade(scores[i])

    def _ask(self, requests: Sequence[JudgeRequest]) -> dict[str, str]:
        """Send requests, and keep their judgements; returns the reasons of failures by key."""
        failed: dict[str, str] = {}
        # After an interrupt, leaving the pool waits for the requests in flight: they are kept.
        with ThreadPoolExecutor(self._concurrency) as pool:
            running = {pool.submit(self._judge, request): request for request in requests}
            try:
                for future in as_completed(running):
                    outcome = future.result()
                    if isinstance(outcome, Judgement):
                        self._known[outcome.key] = outcome
                        self._used.add(outcome)
                        reason = _unread(self._settings) if outcome.scores is None else None
                    else:
                        failed[running[future].key] = reason = f"reward 'judge': {outcome}."
                        self._used.failed += 1
                    self._count(reason)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return failed

    def _count(self, reason: str | None) -> None:
        """Raises: RewardError after too many failures in a row."""
        self._failed_in_a_row = self._failed_in_a_row + 1 if reason else 0
        if reason and self._failed_in_a_row >= max(MAX_FAILURES, self._concurrency):
            rule = f"{reason} This is failure {self._failed_in_a_row} in a row"
            raise RewardError(f"{rule}. Once it is solved, the run can be resumed.")

    def _judge(self, request: JudgeRequest) -> Judgement | EndpointError:
        """Ask for a judgement, once more after a reply that can't be read, and write it."""
        sampling = {
            "temperature": self._settings.temperature, "max_tokens": self._settings.max_tokens
        }  # fmt: skip
        replies: list[ChatResponse] = []
        scores = None
        try:
            while scores is None and len(replies) < 2:
                last = replies[-1].text if replies else None
                messages = request.messages() if last is None else request.reminder(last)
                replies.append(self._model.respond(messages, sampling))
                if replies[-1].finish_reason == "stop":
                    scores = request.read(replies[-1].text)
        except EndpointError as error:
            return error
        judgement = Judgement(
            request.key, scores, len(replies), sum(r.prompt_tokens for r in replies),
            sum(r.completion_tokens for r in replies),
        )  # fmt: skip
        if self._file is not None:
            self._file.append([asdict(judgement)])
        return judgement

    def _with_cost(self, used: JudgeUsage) -> dict[str, Any]:
        prices = self._settings.price_in, self._settings.price_out
        cost = price_of(used.prompt_tokens, used.completion_tokens, *prices)
        return asdict(used) | ({} if cost is None else {"cost": cost})


class Judges:
    """The judges of a scorer by the names of their functions; what they take is added up."""

    def __init__(
        self, settings: Mapping[str, JudgeSettings], *, concurrency: int, log: Callable[[str], None]
    ) -> None:
        """Find the models. Raises: UserError if that fails."""
        self.by_name: dict[str, Judge] = {}
        try:
            for name, each in settings.items():
                self.by_name[name] = Judge(each, concurrency=concurrency, log=log)
        except UserError:
            self.close()
            raise

    def keep(self, file: Path) -> None:
        """Keep the judgements in `file`, such as judge.jsonl, or judge-style.jsonl beside it.

        Raises: UserError for a damaged file.
        """
        for name, judge in self.by_name.items():
            judge.keep(file.with_name(file.name.replace(JUDGE, name, 1)))

    def take_usage(self) -> dict[str, Any]:
        """What judging took since the last call."""
        return _added(judge.take_usage() for judge in self.by_name.values())

    def totals(self) -> dict[str, Any]:
        """What all judgements took that are kept, those of earlier starts of a run included."""
        return _added(judge.totals() for judge in self.by_name.values())

    def close(self) -> None:
        """Close the connections."""
        for judge in self.by_name.values():
            judge.close()


def _added(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of counts by name; of costs, of those that are known."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)  # Unlike +, keeps zeros.
    return dict(total)


def _unread(settings: JudgeSettings) -> str:
    form = "SCORE: X" if settings.mode == "score" else "RANKING: 2 > 1 > ..."
    return f"reward 'judge': must end its replies with a line {short_repr(form)}, got others."
