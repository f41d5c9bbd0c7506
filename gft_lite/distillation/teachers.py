"""The protocol of teacher back ends, their settings, requests and responses."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.recipe.base import Settings, Share
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PromptSettings
from gft_lite.types import Problem
from gft_lite.utils.chat_model import MAX_TOKEN_COUNT, ChatResponse
from gft_lite.utils.errors import UserError

MAX_CONCURRENCY = 1024  # A thread each.
MIN_PER_MINUTE = 1e-3  # Longer pauses overflow time.sleep.
Price = Annotated[float, Field(ge=0, le=1e6)]


class TeacherSettings(Settings):
    """How to sample from a teacher: `samples` responses for each of the first `limit` problems.

    `max_tokens` and `system` default to the recipe's; `timeout` limits a request to an endpoint in
    total, in seconds; prices are in dollars per million tokens; `column` is the name of the new
    column.
    """

    model: str | None = None
    samples: PositiveInt = 3
    temperature: NonNegativeFloat = 0.7
    top_p: Share = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    system: str | None = None
    limit: PositiveInt | None = None
    concurrency: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] = 8
    timeout: PositiveFloat = 600.0
    requests_per_minute: Annotated[float, Field(ge=MIN_PER_MINUTE)] | None = None
    price_in: Price | None = None
    price_out: Price | None = None
    column: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "teacher"

    @model_validator(mode="after")
    def _check_samples_differ(self) -> TeacherSettings:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples: must be 1 at temperature 0, where all are the same")
        return self


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One sample of one problem; `prompt` is chat messages or token ids.

    `key` identifies teacher, prompt, sampling settings and seed in the answer store.
    """

    problem: Problem
    prompt: Sequence[Any]
    seed: int
    key: str


TeacherResponse = ChatResponse  # Of a local model as well.
OnResponse = Callable[[TeacherRequest, TeacherResponse], None]
Log = Callable[[str], None]
# A batch of finished requests: each with its response, or with the reason of its failure.
Results = list[tuple[TeacherRequest, TeacherResponse | str]]


class TeacherError(RuntimeError):
    """The teacher stopped responding during the distillation."""


class Teacher(Protocol):
    """A back end that answers problems; `name` is written to the data set."""

    name: str

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """Load what is needed; returns the identity that the keys of stored responses contain."""

    def prompt(self, problem: Problem) -> Sequence[Any]:
        """The prompt of a problem as JSON-compatible values."""

    def generate(
        self, requests: Sequence[TeacherRequest], on_response: OnResponse, has_answered: bool
    ) -> Generator[Results, None, None]:
        """Yield results in batches; `on_response` gets each response as soon as it arrives.

        `has_answered` is True if the store holds a response of this teacher: a failure is then
        not a sign that all requests will fail.
        """


def is_endpoint(teacher: str, settings: TeacherSettings) -> bool:
    """True for the address of an endpoint, False for a model on this machine.

    Raises: UserError for the latter with the name of an endpoint's model.
    """
    if teacher.startswith(("http://", "https://")):
        return True
    if settings.model is not None:
        raise UserError([f"model: must be left out for {teacher!r}, which is no address."])
    return False


def prompt_settings(recipe: Recipe, settings: TeacherSettings, style: str) -> PromptSettings:
    """The recipe's prompt settings in the teacher's style, with the teacher's system prompt.

    Raises: UserError for a system prompt that a plain prompt cannot hold.
    """
    own = recipe.data.prompt
    system = (own.system if settings.system is None else settings.system) or None
    if style == "plain" and system is not None:
        raise UserError(["system: must be empty for a teacher without a chat template."])
    variables = own.chat_template_kwargs if style == "chat" else {}
    return PromptSettings.model_validate(
        {"style": style, "template": own.template, "system": system,
         "chat_template_kwargs": variables}
    )  # fmt: skip
