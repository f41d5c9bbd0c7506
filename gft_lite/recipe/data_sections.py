"""The section `data`, which the sets of `eval.sets` have too: rows, columns and the prompt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    create_model,
    model_validator,
)

from gft_lite.recipe.base import ONE_OR_MORE, Settings
from gft_lite.recipe.effects import EVERYTHING, TRAINING


class ColumnsSettings(Settings):
    """The columns of the data set: each field but `answer_from` and `clean` is the name of one.

    `a.b` is field `b` of a nested column `a`. A list that is written as text (JSON or Python
    notation, as in CSV files) is read as a list. Where no column is named, and the data have no
    column `problem`, columns `messages`, `conversations`, or TRL's `prompt` and `completion` or
    `chosen`, are found by their names; the answers are then in `answer` if that exists.
    """

    problem: str | list[str] = "problem"
    """Text of the problem. Several columns are joined by line breaks, a list in one of them as
    options without letters; a list of messages is a conversation to continue."""
    messages: str | None = None
    """Conversations, lists of {role, content} or {from, value}: the prompt is all up to the last
    user turn, an assistant turn after it an expert demonstration. null: no conversations."""
    choices: str | None = None
    """Options of a multiple-choice problem, appended to it as (A), (B), ...; null: none."""
    answer: str | None = "answer"
    """Answer that rewards compare with; rows without one are skipped. Of a choice it is, in this
    order, a label of the data set (`x.label` beside `choices: x.text`, as in ARC), its number from
    0, its letter or its text; rows with another are skipped. null: there are no answers."""
    answer_from: Literal["plain", "boxed", "hash"] = "plain"
    """Part of the column that is the answer: all of it, the content of its last box (`boxed`), or
    what follows `####` (`hash`)."""
    expert: Annotated[list[str], ONE_OR_MORE] = []
    """Expert demonstrations: solutions by humans or of the data set, a text or a list in each."""
    teacher: Annotated[list[str], ONE_OR_MORE] = []
    """Teacher demonstrations: solutions by a stronger model, as `gft-lite distill` writes them."""
    id: str | None = None
    """Name of a problem in files and reports; null: the number of its row from 1."""
    clean: Literal["gsm8k"] | None = None
    """`gsm8k` removes `<<48/2=24>>` from demonstrations and boxes their `#### 24` line; null keeps
    them as they are."""

    @model_validator(mode="after")
    def _one_source_of_problems(self) -> ColumnsSettings:
        if self.messages is not None and (self.choices or self.problem != "problem"):
            raise ValueError("messages: must be null with columns.problem or columns.choices")
        return self

    @property
    def found_by_name(self) -> bool:
        """True if no column of problems or demonstrations is named."""
        return self.messages is None and not (
            self.choices or self.expert or self.teacher or self.problem != "problem"
        )

    @property
    def may_demonstrate(self) -> bool:
        """True if rows may have demonstrations: in named columns, or in conversations."""
        return bool(self.expert or self.teacher or self.messages or self.found_by_name)


# Arguments of transformers' apply_chat_template, and what it passes to the template itself.
_TEMPLATE_ARGUMENTS = {
    "conversation", "conversations", "messages", "tools", "documents", "chat_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "self",
}  # fmt: skip


class PromptSettings(Settings):
    """The prompt of a problem: plain text, or a user turn in the chat template."""

    style: Literal["plain", "chat"] = "plain"
    """`chat` applies the model's chat template, for chat models and conversations; `plain` does
    without one, for base models."""
    template: str = "{problem}"
    """Text around a problem, such as an instruction; `{problem}` stands for it. It is applied to
    every user turn."""
    system: str | None = None
    """System message of the chat; that of a conversation takes its place. null: that of the chat
    template, if it has one."""
    chat_template_kwargs: dict[str, JsonValue] = {}
    """Variables of the chat template, such as `enable_thinking: false`."""

    @model_validator(mode="after")
    def _template_has_problem(self) -> PromptSettings:
        if "{problem}" not in self.template:
            raise ValueError("template: must contain {problem}")
        if self.system is not None and self.style == "plain":
            raise ValueError("system: needs prompt.style: chat")
        if self.chat_template_kwargs and self.style == "plain":
            raise ValueError("chat_template_kwargs: needs prompt.style: chat")
        if own := sorted(_TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys()):
            rule = "must be a variable of the chat template, not an argument of its rendering"
            raise ValueError(f"chat_template_kwargs.{own[0]}: {rule}")
        return self


class DataSettings(Settings):
    """A source of problems, and how its rows become prompts."""

    source: Annotated[str, EVERYTHING] = "lab"
    """The rows: a .jsonl, .json, .csv or .parquet file, a folder of them, a folder that `datasets`
    has saved, a hub data set as owner/name, or `lab`, the built-in task."""
    file: Annotated[str | None, EVERYTHING] = None
    """One file of a hub data set whose files are not assigned to splits; null: all files."""
    config: Annotated[str | None, EVERYTHING] = None
    """Configuration (subset) of a hub data set; null: its default."""
    split: Annotated[str, EVERYTHING] = "train"
    """Split of the lab or a data set; in a folder, the files that have this word in their names,
    or all where no name has that of a split. Without effect on a single file."""
    revision: Annotated[str | None, EVERYTHING] = None
    """Branch, tag or commit of a hub data set; null: its default branch."""
    columns: Annotated[ColumnsSettings, EVERYTHING] = ColumnsSettings()
    """Which columns hold problems, answers and demonstrations; the lab has its own."""
    prompt: Annotated[PromptSettings, EVERYTHING] = PromptSettings()
    """How a problem is written to the model. Evaluation sets without a prompt have that of
    `data.prompt`."""
    max_prompt_tokens: Annotated[PositiveInt | None, EVERYTHING] = None
    """Rows with longer prompts are left out, as always are those whose prompt and
    `rollout.max_tokens` do not fit into the context together; null: only these."""
    problems: Annotated[PositiveInt | None, EVERYTHING] = None
    """Number of usable rows to take, after those of `skip`, held-out ones included; null: all."""
    skip: Annotated[NonNegativeInt, EVERYTHING] = 0
    """Number of usable rows to leave out at the start of the order, and all copies of their
    problems, such as those that an evaluation set of the same source takes."""
    shuffle: Annotated[bool, EVERYTHING] = True
    """Take the rows in a random order of `seed`; false: in the order of the file. It decides which
    rows `skip`, `problems` and `holdout` take; training shuffles every epoch anyway."""
    seed: Annotated[int, EVERYTHING] = 0
    """Seed of the order of the rows; it does not depend on the recipe's `seed`."""


# A class body can't have a field named `from`.
_FROM: dict[str, Any] = {
    "from": (
        str,
        Field(
            min_length=1,
            description="Folder of `gft-lite groups`, or of `gft-lite eval` with one model, that "
            "has answers to the training problems.",
        ),
    )
}
_Answers = create_model("_Answers", __base__=Settings, **_FROM)


class DifficultySettings(_Answers):  # type: ignore[valid-type, misc]
    """The problems to train on, by the success share of answers that were sampled before.

    Problems without sampled answers are left out; held-out problems are not selected.
    """

    low: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Least success share of a problem; raise it to leave out hopeless ones."""
    high: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Greatest success share of a problem; lower it to leave out solved ones."""

    @model_validator(mode="after")
    def _low_is_low(self) -> DifficultySettings:
        if self.low > self.high:
            raise ValueError(f"low: must be at most high, {self.high:g}")
        return self

    @property
    def folder(self) -> str:
        """The value of `from`."""
        return str(getattr(self, "from"))


class TrainingDataSettings(DataSettings):
    """The training data, a part of which is held out for monitoring."""

    holdout: Annotated[NonNegativeInt, EVERYTHING] = 64
    """Number of problems, at most a fifth of them, that are not trained on but used for the KL and,
    without `eval.sets`, for the evaluation."""
    difficulty: Annotated[DifficultySettings | None, TRAINING] = None
    """Selection of problems by the success share of sampled answers; null: all problems."""
    curriculum: Annotated[Literal["easy_first", "mixed"] | None, TRAINING] = None
    """Order of each epoch by success share: `easy_first`, or `mixed`, where each step has problems
    of all shares. Needs `data.difficulty`. null: random."""

    @model_validator(mode="after")
    def _curriculum_knows_difficulty(self) -> TrainingDataSettings:
        if self.curriculum and self.difficulty is None:
            raise ValueError("curriculum: needs data.difficulty, by which problems are ordered")
        return self
