"""Who answers `gft-lite distill`: an OpenAI-compatible endpoint, or a model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from gft_lite.recipe.base import Settings, Share
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PromptSettings
from gft_lite.recipe.validation_errors import explain
from gft_lite.types import FinishReason, Problem
from gft_lite.utils.errors import RecipeError


class TeacherSettings(Settings):
    """How a teacher is asked: `samples` answers to each problem, of the first `limit` problems.

    `max_tokens` and `system` are the recipe's where they are not given; prices are dollars per
    million tokens; `column` is the name of the new column.
    """

    model: str | None = None
    samples: PositiveInt = 3
    temperature: NonNegativeFloat = 0.7
    top_p: Share = 1.0
    max_tokens: PositiveInt | None = None
    system: str | None = None
    limit: PositiveInt | None = None
    concurrency: PositiveInt = 8
    requests_per_minute: PositiveFloat | None = None
    price_in: NonNegativeFloat | None = None
    price_out: NonNegativeFloat | None = None
    column: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "teacher"

    @model_validator(mode="after")
    def _samples_differ(self) -> TeacherSettings:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples: must be 1 at temperature 0, where all are the same")
        return self

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> TeacherSettings:
        """Check what the user gave. Raises: RecipeError with every error found."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(explain(error, cls, {})) from None


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One of the answers that a problem is to get; `prompt` is messages or token ids."""

    problem: Problem
    prompt: Sequence[Any]
    seed: int
    key: str


@dataclass(frozen=True, slots=True)
class TeacherResponse:
    """What a teacher said; `finish_reason` is "length" for all that is no whole answer."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


Keep = Callable[[TeacherRequest, TeacherResponse], None]
Say = Callable[[str], None]
Events = Generator[list[tuple[TeacherRequest, TeacherResponse | str]], None, None]


class TeacherError(RuntimeError):
    """The teacher went away while it was asked."""


class Teacher(Protocol):
    """Who can be asked; `name` is what the data set says of who answered."""

    name: str

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """Make ready to answer; returns what tells this teacher's answers from all others'."""

    def prompt(self, problem: Problem) -> Sequence[Any]:
        """How a problem is put to this teacher, as JSON."""

    def answers(self, questions: Sequence[TeacherRequest], keep: Keep, proven: bool) -> Events:
        """Ask; answers are kept as they come, then told, and so is why there is none.

        `proven` says that such a question has been answered before.
        """


def prompt_text(recipe: Recipe, asking: TeacherSettings, style: str) -> PromptSettings:
    """The recipe's prompt in the teacher's style."""
    own = recipe.data.prompt
    # An empty one is none.
    system = (own.system if asking.system is None else asking.system) or None
    if style == "plain" and system is not None:
        raise RecipeError(["system: must be empty for a teacher without a chat template."])
    return PromptSettings.model_validate(
        {"style": style, "template": own.template, "system": system}
    )
