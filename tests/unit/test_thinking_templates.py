"""Templates that strip, add or open a block of thoughts: what is trained, token for token."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import trl
from test_chat_templates import CHATML, GENERATE, LLAMA3, QWEN3, R1
from test_prompts import byte_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from gft_lite.data.base import Unusable
from gft_lite.data.problems import load_problems
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.sections import DataSettings, PromptSettings
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError

QUESTION, PLAIN = "What is 2+2?", "It is 4."
THOUGHTS = "<think>\n2 and 2\n</think>\n\nIt is 4."
NO_THINKING = {"enable_thinking": False}
ON, OFF = (f" (set chat_template_kwargs.enable_thinking: {v})" for v in ("true", "false"))

EMPTY = "<think>\n\n</think>\n\n"
QWEN3_SWITCHED = QWEN3 + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
QWQ = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    + GENERATE.replace("assistant\n", "assistant\n<think>\n")
)
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% set block = '' if enable_thinking else '<think>\n\n</think>\n' %}"
    "<|im_start|>system\nReasoning Mode: {{ '/think' if enable_thinking else '/no_think' }}"
    "<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ block + m.content.lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ block }}{% endif %}"
)
ALWAYS_EMPTY = CHATML.replace(  # a block that only the conversation has, before any answer
    "{{ m['content'] }}",
    "{{ '<think></think>' if m.role == 'assistant' else '' }}{{ m['content'] }}",
)

END, EOT = "<|im_end|>", "<|eot_id|>"
CLOSED = "2 and 2\n</think>\n\nIt is 4."
BLOCK = "a <think> block after the empty one of the prompt"
MISSING = "no <think> block, which the prompt opens"
# Template, variables, the prompt's end, and the responses PLAIN and THOUGHTS, or why they can't be.
CASES = {
    "qwen3": (QWEN3_SWITCHED, {}, "assistant\n", EMPTY + PLAIN + END, THOUGHTS + END),
    "qwen3, off": (
        QWEN3_SWITCHED, NO_THINKING, f"assistant\n{EMPTY}", PLAIN + END, Unusable(BLOCK + ON),
    ),
    "qwen3 2507 thinking": (
        QWEN3.replace(GENERATE, GENERATE.replace("assistant\n", "assistant\n<think>\n")), {},
        "assistant\n<think>\n", "\n</think>\n\nIt is 4." + END, CLOSED + END,
    ),
    "qwq": (
        QWQ, {}, "assistant\n<think>\n", Unusable(MISSING), CLOSED + END,
    ),
    "r1": (
        R1, {}, "<|Assistant|><think>\n", Unusable(MISSING),
        CLOSED + "<|end|>",
    ),
    "r1 at first": (
        R1.replace("<think>\n", ""), {}, "<|Assistant|>", PLAIN + "<|end|>", THOUGHTS + "<|end|>",
    ),
    "smollm3": (SMOLLM3, {}, "assistant\n", PLAIN + END, THOUGHTS + END),
    "smollm3, off": (
        SMOLLM3, NO_THINKING, "assistant\n<think>\n\n</think>\n", PLAIN + END, Unusable(BLOCK + ON),
    ),
    "no thoughts": (LLAMA3, {}, "<|end_header_id|>\n\n", PLAIN + EOT, THOUGHTS + EOT),
    "always an empty block": (
        ALWAYS_EMPTY, {}, "assistant\n", "<think></think>" + PLAIN + END,
        Unusable("a <think> block that the chat template doubles"),
    ),
}  # fmt: skip
# Templates of trl: the files that models are published with.
PUBLISHED = {
    "qwen3": ({}, "assistant\n", EMPTY + PLAIN + END, THOUGHTS + END),
    "qwen3, off": (NO_THINKING, f"assistant\n{EMPTY}", PLAIN + END, Unusable(BLOCK + ON)),
    "qwen3_5_think": (
        {}, "assistant\n<think>\n", "\n</think>\n\nIt is 4." + END, CLOSED + END,
    ),
    "qwen3_5_think, off": (NO_THINKING, f"assistant\n{EMPTY}", PLAIN + END, Unusable(BLOCK + ON)),
    "qwen3_8": ({}, "assistant\n<think>\n", "\n</think>\n\nIt is 4." + END, CLOSED + END),
    "deepseek_r1_distill": (
        {}, "<\uff5cAssistant\uff5c><think>\n", Unusable(MISSING),
        CLOSED + "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "nemotron_3_nano": ({}, "assistant\n<think>\n", Unusable(MISSING + OFF), CLOSED + END),
    "nemotron_3_nano, off": (
        NO_THINKING, "assistant\n<think></think>", PLAIN + END, Unusable(BLOCK + ON),
    ),
    "glm4moe": (
        {}, "<|assistant|>", "\n<think></think>\nIt is 4.", "\n<think>2 and 2</think>\nIt is 4.",
    ),
    "glm4moe, off": (
        NO_THINKING, "<|assistant|>\n<think></think>", "\nIt is 4.", Unusable(BLOCK + ON),
    ),
    "qwen2_5": ({}, "assistant\n", PLAIN + END, THOUGHTS + END),
    "qwen3_instruct_2507": ({}, "assistant\n", PLAIN + END, THOUGHTS + END),
}  # fmt: skip
TOKENS = (
    "<|User|>", "<|Assistant|>", "<|end|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<\uff5cAssistant\uff5c>", "<\uff5cUser\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|system|>", "<|user|>", "<|assistant|>",
    "<think>", "</think>",
)  # fmt: skip


def published(name: str) -> str:
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def tokenizer_of(template: str):
    made = byte_tokenizer(template, bos="bos_token" in template)
    made.add_tokens([AddedToken(token, special=token[:3] != "<th") for token in TOKENS])
    return made


def format_of(template: str, variables: dict | None = None) -> PromptFormat:
    prompt = PromptSettings(style="chat", chat_template_kwargs=variables or {})
    return PromptFormat(tokenizer_of(template), prompt)


def check(format: PromptFormat, opening: str, plain, thoughts) -> None:
    assert format.render(QUESTION).endswith(opening)
    for answer, expected in ((PLAIN, plain), (THOUGHTS, thoughts)):
        if isinstance(expected, Unusable):
            with pytest.raises(Unusable) as caught:
                format.response_ids(answer)
            assert str(caught.value) == str(expected)
        else:
            ids, _ = format.response_ids(answer)
            # glm writes no end of turn: EOS stands in.
            assert format.tokenizer.decode(ids).removesuffix("<eos>") == expected


@pytest.mark.parametrize("name", CASES)
def test_answers_with_and_without_thoughts(name):
    template, variables, *expected = CASES[name]
    check(format_of(template, variables), *expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(name):
    variables, *expected = PUBLISHED[name]
    check(format_of(published(name.partition(",")[0]), variables), *expected)


@pytest.mark.parametrize(
    ("template", "variables"),
    [(QWEN3_SWITCHED, {}), (QWEN3_SWITCHED, NO_THINKING), (SMOLLM3, {}), (SMOLLM3, NO_THINKING),
     (published("qwen3"), {}), (published("qwen3"), NO_THINKING),
     (published("qwen3_5_think"), {}), (published("qwen3_5_think"), NO_THINKING)],
)  # fmt: skip
@pytest.mark.parametrize("history", [(), (("1+1?", "<think>\n1 and 1\n</think>\n\n2"),)])
def test_prompt_and_response_are_the_templates_own_conversation(template, variables, history):
    format = format_of(template, variables)
    problem = Problem("p", QUESTION, None, history=history)
    prompt = list(format.problem_ids(problem))
    messages = problem.messages
    own = {"return_dict": False, **variables}
    apply = format.tokenizer.apply_chat_template
    assert prompt == apply(messages, add_generation_prompt=True, **own)
    answer = PLAIN if variables else THOUGHTS
    response = format.response_ids(answer)[0]
    whole = apply([*messages, {"role": "assistant", "content": answer}], **own)
    assert [*prompt, *response] == whole[: len(prompt) + len(response)]
    assert format.response_text(answer, problem) == format.response_text(answer)


@pytest.mark.parametrize("template", [R1, QWQ, published("deepseek_r1_distill")])
def test_thoughts_of_earlier_turns_are_left_to_the_template(template):
    format = format_of(template)
    history = (("1+1?", "<think>\n1 and 1\n</think>\n\n2"),)
    problem = Problem("p", QUESTION, None, history=history)
    text = format.tokenizer.decode(format.problem_ids(problem))
    assert "1 and 1" not in text and "1+1?" in text and text.endswith("<think>\n")
    assert format.response_text(THOUGHTS, problem) == format.response_text(THOUGHTS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2 and 2\n</think>\n\nIt is 4.", "2 and 2\n</think>\n\nIt is 4."),  # as it was sampled
        ("<think>2 and 2</think>It is 4.", "2 and 2</think>It is 4."),
        ("<think>\n\n2 and 2\n</think>\nIt is 4.\n", "\n2 and 2\n</think>\nIt is 4."),
    ],
)
@pytest.mark.parametrize("template", [R1, QWQ])
def test_what_the_prompt_opens_is_not_repeated(template, answer, expected):
    text = format_of(template).response_text(answer)
    assert text.removesuffix("<|end|>").removesuffix(END).rstrip("\n") == expected


def test_thoughts_without_a_start_need_a_prompt_that_opens_them():
    with pytest.raises(Unusable, match="text that the chat template leaves out"):
        format_of(R1.replace("<think>\n", "")).response_ids("2 and 2\n</think>\n\nIt is 4.")


def test_the_start_of_thoughts_that_a_prompt_opens():
    opened = {name: format_of(*CASES[name][:2]).opened_thoughts for name in CASES}
    assert {n for n, text in opened.items() if text} == {"qwen3 2507 thinking", "qwq", "r1"}
    assert opened["qwq"] == "<think>\n"
    assert PromptFormat(tokenizer_of(QWQ), PromptSettings()).opened_thoughts == ""


def test_empty_blocks_that_are_trained_are_counted(tmp_path):
    rows = tmp_path / "x.jsonl"
    problem = {"problem": "2+2", "answer": "4"}
    texts = (PLAIN, "It's 4.", THOUGHTS)
    rows.write_text("".join(json.dumps(problem | {"expert": t}) + "\n" for t in texts))
    data = DataSettings(source=str(rows), columns={"expert": "expert"}, prompt={"style": "chat"})
    loaded = load_problems(data, format_of(QWEN3_SWITCHED), max_response_tokens=999)
    assert loaded.notes == (
        "data.prompt: 2 of 3 demonstrations have no <think> block; the chat template writes an "
        "empty one, which is trained (set chat_template_kwargs.enable_thinking: false)",
    )
    off = format_of(QWEN3_SWITCHED, NO_THINKING)
    loaded = load_problems(data, off, max_response_tokens=999)
    assert loaded.notes == ()
    assert loaded.unusable_demonstrations == {BLOCK + ON: 1}
    with pytest.raises(RecipeError, match=r"data\.columns: .* got 2 that can't: 2 with no <think>"):
        plain = DataSettings(**data.model_dump() | {"problems": 2, "shuffle": False})
        load_problems(plain, format_of(QWQ), max_response_tokens=999)


# --- variables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("enable_thinkin", " Did you mean enable_thinking?"),
        ("ENABLE_THINKING", " Did you mean enable_thinking?"),
        ("zzz", ""),
    ],
)
@pytest.mark.parametrize("template", [SMOLLM3, QWEN3_SWITCHED, published("qwen3")])
def test_a_variable_that_the_template_does_not_use_is_one_line(template, name, hint):
    [line] = format_of(template, {name: False}).notes
    rule = "the model's chat template has no such variable"
    assert line == f"data.prompt.chat_template_kwargs.{name}: {rule}.{hint}"
    assert format_of(template, NO_THINKING).notes == ()


def test_the_variables_of_a_template_with_tags_of_transformers():
    content = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = CHATML.replace("{{ m['content'] }}", content)
    assert len(format_of(template, {"mood": 1}).notes) == 1
    assert format_of("{{ mood and '' }}" + template, {"mood": 1}).notes == ()


def test_no_argument_of_the_rendering_can_be_a_variable():
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    names = {*parameters} - {"self", "kwargs"} | {"messages", "conversations"}
    assert len(names) > 14
    for name in names:
        with pytest.raises(ValueError, match=rf"kwargs\.{name}: must be a variable of the chat"):
            PromptSettings(style="chat", chat_template_kwargs={"x": 1, name: 1})


def test_a_variable_that_breaks_the_template_is_its_own_error():
    template = "{% if mode is defined %}{{ mode.upper() and '' }}{% endif %}" + CHATML
    assert format_of(template, {"mode": "x"}).render(QUESTION)
    expected = r"^data\.prompt\.chat_template_kwargs: must suit .* template, which says: 'int"
    with pytest.raises(RecipeError, match=expected):
        format_of(template, {"mode": 5})


def test_a_template_that_reads_thoughts_from_their_own_field():
    format = format_of(published("qwen3_8"))
    history = (("1+1?", "<think>\n1 and 1\n</think>\n\n2"),)
    text = format.render(QUESTION, history)
    assert text.count("<think>") == 1 + text.count("1 and 1") and "\n2<|im_end|>" in text
