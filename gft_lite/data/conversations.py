"""Conversations of a data set: OpenAI's messages, ShareGPT's, and TRL's prompts of messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gft_lite.data.base import Unusable
from gft_lite.data.chat_rendering import END_THINK, THINK
from gft_lite.recipe.sections import ColumnsSettings

# Names of the three roles: OpenAI's and ShareGPT's.
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
# Columns of whole conversations, the first one that a data set has.
_WHOLE = ("messages", "conversations")
# Columns of what follows TRL's `prompt`; without one, `chosen` is a whole conversation.
_COMPLETIONS = ("completion", "chosen")
_TOOLS = ("tool_calls", "function_call")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation up to its last user turn, and the assistant turn after it, if any.

    `history` has the (user, assistant) turns before `question`.
    """

    question: str
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    demonstration: str | None = None


def find_columns(columns: ColumnsSettings, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of conversations or of TRL's prompts, by their names; empty if there are none.

    The first row decides that has one of them, or a column `problem`.
    """
    if not columns.found_by_name:
        return {}
    found: dict[str, Any] = {}
    for row in rows:
        if "problem" in row:
            return {}
        if whole := next((name for name in _WHOLE if name in row), None):
            found = {"messages": whole}
        elif "prompt" in row:
            experts = [name for name in _COMPLETIONS if name in row]
            found = {"problem": "prompt", "expert": experts[:1]}
        elif "chosen" in row and "rejected" in row:
            found = {"messages": "chosen"}
        if found:
            return found if columns.answer in (None, *row) else {**found, "answer": None}
    return {}


def is_message(value: Any) -> bool:
    """True for a mapping that has a role and a content, by either pair of names."""
    return isinstance(value, Mapping) and (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    )


def read_conversation(value: Any, name: str) -> Conversation:
    """The conversation of a list of messages in column `name`.

    Raises: Unusable for messages that are no alternating user and assistant turns of text.
    """
    if not isinstance(value, list) or not value:
        raise Unusable(f"no list of messages in column {name!r}")
    turns = [_turn(message, name) for message in value]
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    for number, (role, _) in enumerate(turns):
        if role == ("user", "assistant")[number % 2]:
            continue
        if role == "system":
            raise Unusable(f"a system message that is not the first in column {name!r}")
        if number == 0:
            raise Unusable(f"a conversation that the assistant begins in column {name!r}")
        raise Unusable(f"two {role} turns in a row in column {name!r}")
    if not turns:
        raise Unusable(f"no user turn in column {name!r}")
    demonstration = turns.pop()[1] if len(turns) % 2 == 0 else None
    texts = [text for _, text in turns]
    history = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    return Conversation(texts[-1], history, system, demonstration)


def last_answer(messages: Sequence[Any], name: str) -> str | None:
    """The text of the assistant turn that answers a prompt, None if there is none.

    Raises: Unusable for several turns, whose others would be lost.
    """
    *others, (role, text) = [_turn(message, name) for message in messages]
    if others:
        raise Unusable(f"several turns in column {name!r}")
    return text if role == "assistant" else None


def _turn(message: Any, name: str) -> tuple[str, str]:
    """Role and text of a message; thoughts in a field of their own are put before the text."""
    if not is_message(message):
        raise Unusable(f"a message without role or content in column {name!r}")
    if any(message.get(field) for field in _TOOLS):
        raise Unusable(f"tool calls in column {name!r}")
    ours = "role" in message
    role, content = (message[n] for n in (("role", "content") if ours else ("from", "value")))
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        shown = repr(role) if isinstance(role, str) and len(role) <= 20 else "another kind"
        raise Unusable(f"a role other than system, user and assistant ({shown}) in column {name!r}")
    text = _content(content, name)
    if not text.strip():
        raise Unusable(f"an empty message in column {name!r}")
    thoughts = message.get("reasoning_content")
    if known == "assistant" and isinstance(thoughts, str) and thoughts.strip():
        text = f"{THINK}\n{thoughts.strip()}\n{END_THINK}\n\n{text}"
    return known, text


def _content(content: Any, name: str) -> str:
    """The text of a message, which may be in parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None
             for p in parts]  # fmt: skip
    if not all(isinstance(text, str) for text in texts):
        raise Unusable(f"a message that is not text in column {name!r}")
    joined = "".join(map(str, texts))
    try:
        joined.encode()
    except UnicodeEncodeError:
        raise Unusable(f"broken Unicode in column {name!r}") from None
    return joined
