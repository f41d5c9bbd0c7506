"""Chat templates of known families, and broken ones: what is trained on, token for token."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from test_prompts import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from gft_lite.data.base import Unusable
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.sections import PromptSettings
from gft_lite.utils.errors import RecipeError

QUESTION, ANSWER, SYSTEM = "What is 2+2?", "It is 4.", "Be brief."
THOUGHTS = "<think>\n2 and 2\n</think>\n\nIt is 4."


@dataclass(frozen=True)
class Family:
    """A chat template, and by hand what its prompt and its response to QUESTION are.

    `system` is the rendering of the prompt with the system message, None where there is none.
    """

    template: str
    prompt: str
    response: str
    system: str | None
    tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    thoughts: str | None = field(default=None)  # the response THOUGHTS, None if it is unusable
    bos: str | None = None
    eos: str = "<eos>"


GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
CHATML = TURNS + GENERATE
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a model.<|im_end|>\n"
    "{% endif %}"
)
PARTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}",
)
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thoughts = '' %}"
    "{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + GENERATE
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set content = m.content %}{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{% set messages = messages[1:] if system else messages %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last or loop.index == messages | length - 1 %}"
    "{{ system + '\n\n' if system else '' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_ALWAYS_OPEN = LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}"
    "{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MIXED = (  # the system message as text, the others as parts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'system' %}{{ m.content + '' }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}" + GENERATE
)
LAST_TURN_OPEN = (  # the end of turn is written only before something else
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}" + GENERATE
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)

USER = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"
WITH_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n" + USER + OPEN
IT = "It is 4.<|im_end|>"
THOUGHT = "<think>\n2 and 2\n</think>\n\nIt is 4.<|im_end|>"
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
LLAMA3_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"

FAMILIES = {
    "chatml": Family(CHATML, USER + OPEN, IT, WITH_SYSTEM, thoughts=THOUGHT),
    "qwen2.5": Family(
        DEFAULT_SYSTEM + CHATML,
        "<|im_start|>system\nYou are a model.<|im_end|>\n" + USER + OPEN,
        IT, WITH_SYSTEM, thoughts=THOUGHT, eos="<|im_end|>",
    ),
    "content in parts": Family(PARTS, USER + OPEN, IT, WITH_SYSTEM, thoughts=THOUGHT),
    "some content in parts": Family(MIXED, USER + OPEN, IT, WITH_SYSTEM, thoughts=THOUGHT),
    "qwen3": Family(
        QWEN3, USER + OPEN, "<think>\n\n</think>\n\n" + IT, WITH_SYSTEM, thoughts=THOUGHT,
        tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    ),
    "qwen3 thinking": Family(
        QWEN3.replace(GENERATE, GENERATE.replace("assistant\n", "assistant\n<think>\n")),
        USER + OPEN + "<think>\n", "\n</think>\n\n" + IT, WITH_SYSTEM + "<think>\n",
        thoughts="2 and 2\n</think>\n\n" + IT,
    ),
    "llama 2": Family(
        LLAMA2, "<s>[INST] What is 2+2? [/INST]", " It is 4. </s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2+2? [/INST]",
        thoughts=" " + THOUGHTS + " </s>", tokens=(), bos="<s>", eos="</s>",
    ),
    "mistral": Family(
        MISTRAL, "<s>[INST]What is 2+2?[/INST]", " It is 4.</s>",
        "<s>[INST]Be brief.\n\nWhat is 2+2?[/INST]",
        thoughts=" " + THOUGHTS + "</s>", tokens=("[INST]", "[/INST]"), bos="<s>", eos="</s>",
    ),
    "llama 3": Family(
        LLAMA3, "<bos>" + LLAMA3_USER + LLAMA3_OPEN, "It is 4.<|eot_id|>",
        "<bos>" + LLAMA3_SYSTEM + LLAMA3_USER + LLAMA3_OPEN,
        thoughts=THOUGHTS + "<|eot_id|>", tokens=LLAMA3_TOKENS, bos="<bos>",
    ),
    "llama 3, always open": Family(
        LLAMA3_ALWAYS_OPEN, "<bos>" + LLAMA3_USER + LLAMA3_OPEN, "It is 4.<|eot_id|>",
        "<bos>" + LLAMA3_SYSTEM + LLAMA3_USER + LLAMA3_OPEN,
        thoughts=THOUGHTS + "<|eot_id|>", tokens=LLAMA3_TOKENS, bos="<bos>",
    ),
    "gemma": Family(
        GEMMA, "<bos><start_of_turn>user\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n",
        "It is 4.<end_of_turn>", None, thoughts=THOUGHTS + "<end_of_turn>",
        tokens=("<start_of_turn>", "<end_of_turn>"), bos="<bos>",
    ),
    "phi 3": Family(
        PHI3, "<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n", "It is 4.<|end|>",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n",
        thoughts=THOUGHTS + "<|end|>", tokens=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "zephyr": Family(
        ZEPHYR, "<|user|>\nWhat is 2+2?</s>\n<|assistant|>\n", "It is 4.</s>",
        "<|system|>\nBe brief.</s>\n<|user|>\nWhat is 2+2?</s>\n<|assistant|>\n",
        thoughts=THOUGHTS + "</s>", tokens=(), eos="</s>",
    ),
    "harmony": Family(
        HARMONY, "<|start|>user<|message|>What is 2+2?<|end|><|start|>assistant",
        "<|channel|>final<|message|>It is 4.<|return|>",
        "<|start|>developer<|message|>Be brief.<|end|><|start|>user<|message|>What is 2+2?<|end|>"
        "<|start|>assistant",
        thoughts="<|channel|>final<|message|>" + THOUGHTS + "<|return|>",
        tokens=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    ),
    "last turn open": Family(
        LAST_TURN_OPEN, USER + OPEN, IT, WITH_SYSTEM, thoughts=THOUGHT,
    ),
    "last turn open, default system": Family(
        DEFAULT_SYSTEM + LAST_TURN_OPEN,
        "<|im_start|>system\nYou are a model.<|im_end|>\n" + USER + OPEN,
        IT, WITH_SYSTEM, thoughts=THOUGHT,
    ),
    "turns without an end": Family(  # EOS, not the start of the next turn
        "{{ bos_token }}" + TURNS.replace("<|im_end|>", "") + GENERATE,
        "<bos><|im_start|>user\nWhat is 2+2?\n" + OPEN, "It is 4.<eos>",
        "<bos><|im_start|>system\nBe brief.\n<|im_start|>user\nWhat is 2+2?\n" + OPEN,
        thoughts=THOUGHTS + "<eos>", bos="<bos>",
    ),
    "alpaca": Family(  # writes no end of turn: EOS
        ALPACA, "### Instruction:\nWhat is 2+2?\n\n### Response:\n", "It is 4.<eos>",
        "Be brief.\n\n### Instruction:\nWhat is 2+2?\n\n### Response:\n",
        thoughts=THOUGHTS + "<eos>", tokens=(),
    ),
}  # fmt: skip


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    made = byte_tokenizer(None, eos_token=family.eos, bos_token=family.bos)
    made.add_tokens([AddedToken(t, special=True) for t in family.tokens])
    made.chat_template = family.template
    return made


def conversation(question: str, answer: str, system: str | None, parts: bool = False):
    texts = {"system": system, "user": question, "assistant": answer}
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
        for role, text in texts.items()
        if text is not None
    ]


@pytest.mark.parametrize(
    ("name", "system"),
    [(n, s) for n, family in FAMILIES.items() for s in (None, SYSTEM) if not s or family.system],
)
def test_prompt_and_response_are_the_templates_own_conversation(name, system):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    format = PromptFormat(tokenizer, PromptSettings(style="chat", system=system))
    prompt, response = format.prompt_ids(QUESTION), format.response_ids(ANSWER)[0]
    assert tokenizer.decode(prompt) == (family.system if system else family.prompt)
    assert tokenizer.decode(response) == family.response
    assert format.end_id == response[-1]
    if name == "some content in parts":
        return  # no rendering of equal messages to compare with
    whole = tokenizer.apply_chat_template(
        conversation(QUESTION, ANSWER, system, parts=name == "content in parts"), return_dict=False
    )
    if not name.startswith(("alpaca", "last turn open", "turns without an end")):
        assert whole[: len(prompt) + len(response)] == [*prompt, *response]
    else:  # which write no end of turn after the last
        assert whole[: len(prompt) + len(response) - 1] == [*prompt, *response[:-1]]


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_written_where_the_template_has_them(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    format = PromptFormat(tokenizer, PromptSettings(style="chat"))
    ids, _ = format.response_ids(THOUGHTS)
    assert tokenizer.decode(ids) == family.thoughts
    # And the graded text is that of the same tokens, sampled.
    assert format.text(ids) + tokenizer.decode(format.end_id) == family.thoughts


def test_a_tokenizer_that_marks_the_start_of_a_text_gives_the_conversations_tokens():
    # As in SentencePiece's: a text begins with a space, which would be doubled in " It".
    words = ["<s>", "</s>", "[INST]", "[/INST]", "It", "is", "4.", "2+2", "\u2581", "<unk>"]
    vocab = {word: i for i, word in enumerate([*words, *(f"\u2581{w}" for w in words)])}
    model = models.Unigram([(word, -1.0 if len(word) > 1 else -9.0) for word in vocab], 9)
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in words[:2]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = LLAMA2
    format = PromptFormat(tokenizer, PromptSettings(style="chat"))
    prompt, (response, _) = format.prompt_ids("2+2 is"), format.response_ids("It is 4.")
    own = tokenizer.apply_chat_template(conversation("2+2 is", "It is 4.", None), return_dict=False)
    assert [*prompt, *response] == own
    assert tokenizer.convert_ids_to_tokens(response) == [
        "\u2581It", "\u2581is", "\u25814.", "\u2581", "</s>",
    ]  # fmt: skip


# --- templates that can't be used ------------------------------------------------------------

SYSTEM_DROPPED = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
BROKEN = {
    "no generation prompt": (
        TURNS, None,
        r"style: .* writes '\|>user\\nQzQuestionZq<\|im_end\|>\\n<\|im_start\|>assistant\\n' "
        r"before an answer, but '\|>user\\nQzQuestionZq<\|im_end\|>\\n' as its generation prompt",
    ),
    "another family's generation prompt": (
        TURNS + "{% if add_generation_prompt %}### Assistant:\n{% endif %}", None,
        r"style: .*<\|im_start\|>assistant\\n' before an answer, but '.*### Assistant:\\n' as its",
    ),
    "a generation prompt with a typing error": (
        TURNS + "{% if add_generation_prompt %}<|im_start|>assistent\n{% endif %}", None,
        r"style: .*assistant\\n' before an answer, but '.*assistent\\n' as its generation prompt",
    ),
    "question left out": (
        CHATML.replace("{{ m['content'] }}", "{{ m['contents'] }}"), None,
        r"style: .* which leaves the problem out of the prompt '<\|im_start\|>user\\n<\|im_end\|>",
    ),
    "system message left out": (
        SYSTEM_DROPPED, SYSTEM,
        r"system: .* which leaves the system message out of the prompt '<\|im_start\|>user",
    ),
    "system message forbidden": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHATML, SYSTEM,
        r"system: must suit the model's chat template, which says: no system role\. Leave system",
    ),
    "answer left out": (
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m.role != 'assistant' }}"), None,
        r"style: .* writes the conversation as '.*assistant\\n<\|im_end\|>\\n'",
    ),
    "answer twice": (
        CHATML.replace("{{ m['content'] }}", "{{ m.content }}<|im_start|>{{ m.content }}"), None,
        r"style: .* writes the conversation as",
    ),
    "messages reversed": (
        CHATML.replace("in messages", "in messages | reverse"), None,
        r"style: .* writes the conversation as '<\|im_start\|>assistant",
    ),
    "parts printed as a list": (
        CHATML.replace("{{ m['content'] }}", "{{ m.content if m.content is not string }}"), None,
        r"style: .* which leaves the problem out",
    ),
    "end of turn that is no token": (
        CHATML.replace("<|im_end|>", "<|turn_end|>"), None,
        r"style: must have an end of turn that is a token, got '<\|turn_end\|>\\n' as text",
    ),
    "not a template": ("{% for m in messages %}", None, r"style: .* which says: "),
    "an error of Python": (
        "{{ messages[5].content }}" + CHATML, None, r"style: .* which says: .*no element 5",
    ),
    "an operation on a missing value": ("{{ none + 1 }}" + CHATML, None, r"style: .*unsupported"),
    "a division by zero": ("{{ 1 / 0 }}" + CHATML, None, r"style: .* division by zero"),
    "a macro without end": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHATML, None, r"style: .* recursion",
    ),
    "content in capitals": (
        CHATML.replace("{{ m['content'] }}", "{{ m.content | upper }}"), None,
        r"style: .* which leaves the problem out of the prompt '.*QZQUESTIONZQ",
    ),
    "content in small letters": (
        CHATML.replace("{{ m['content'] }}", "{{ m.content | lower }}"), None,
        r"style: .* which leaves the problem out of the prompt '.*qzquestionzq",
    ),
    "a system message that is cut": (
        CHATML.replace("{{ m['content'] }}", "{{ m.content[:12] }}"), "Answer in one sentence.",
        r"system: .* which changes the system message to '.*system\\nAnswer in on<\|im_end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_unusable_template_is_one_error_that_shows_the_difference(name):
    template, system, expected = BROKEN[name]
    prompt = PromptSettings(style="chat", system=system)
    with pytest.raises(RecipeError, match=r"^data\.prompt\." + expected) as caught:
        PromptFormat(byte_tokenizer(template), prompt)
    [line] = caught.value.problems
    assert "\n" not in line and len(line) < 600


def test_without_a_system_message_a_template_need_not_have_one():
    for template in (SYSTEM_DROPPED, GEMMA):
        tokenizer = tokenizer_of(FAMILIES["gemma"])
        tokenizer.chat_template = template
        assert PromptFormat(tokenizer, PromptSettings(style="chat")).prompt_ids(QUESTION)


# --- answers that can't follow the prompt ----------------------------------------------------

THINK = CHATML.replace("assistant\n", "assistant\n<think>\n")


def chat_format(chat_template: str, **settings) -> PromptFormat:
    tokens = ("<|User|>", "<|Assistant|>", "<|end|>")
    tokenizer = tokenizer_of(
        Family(chat_template, "", "", None, (*FAMILIES["chatml"].tokens, *tokens))
    )
    return PromptFormat(tokenizer, PromptSettings(style="chat", **settings))


def test_thoughts_that_the_prompt_opens_are_not_opened_twice():
    format = chat_format(THINK)
    prompt, (response, _) = format.prompt_ids(QUESTION), format.response_ids(THOUGHTS)
    assert format.text(prompt + response) == USER + OPEN + THOUGHTS
    with pytest.raises(Unusable, match="no <think> block, which the prompt opens"):
        format.response_ids(ANSWER)


def test_a_template_that_trims_changes_only_the_spaces_around_an_answer():
    format = chat_format(CHATML.replace("{{ m['content'] }}", "{{ m.content | trim }}"))
    assert format.text(format.response_ids("\n It  is\n4. \n")[0]) == "It  is\n4."


def test_a_template_that_escapes_an_answer_cannot_write_it():
    format = chat_format(CHATML.replace("{{ m['content'] }}", "{{ m.content | e }}"))
    assert format.text(format.response_ids(ANSWER)[0]) == ANSWER
    with pytest.raises(Unusable, match="text that the chat template leaves out"):
        format.response_ids("1 < 2")


@pytest.mark.parametrize("change", ["content[:12]", "content | e", "content | tojson"])
def test_a_problem_that_the_template_changes_is_unusable(change):
    format = chat_format(CHATML.replace("{{ m['content'] }}", f"{{{{ m.{change} }}}}"))
    assert format.prompt_ids("short")
    with pytest.raises(Unusable, match="a problem that the chat template changes"):
        format.prompt_ids('Is "1 < 2" right?\nSay why.')


def test_a_text_that_the_template_rejects_is_unusable():
    check = "{% if '###' in messages[-1].content %}{{ raise_exception('no headings') }}{% endif %}"
    format = chat_format(check + CHATML)
    for use in (format.prompt_ids, format.response_ids):
        with pytest.raises(Unusable, match=r"the chat template rejects \(no headings\)"):
            use("### 2+2?")


def test_earlier_turns_come_before_the_question():
    for name, plain in (("chatml", CHATML), ("content in parts", PARTS)):
        format = chat_format(plain, template="Solve: {problem}")
        ids = format.prompt_ids("1+1?", [("2+2?", "4"), ("3+3?", "6")])
        assert format.text(ids) == (
            "<|im_start|>user\nSolve: 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
            "<|im_start|>user\nSolve: 3+3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
            "<|im_start|>user\nSolve: 1+1?<|im_end|>\n<|im_start|>assistant\n"
        ), name


def test_a_template_with_todays_date_can_be_used_beyond_midnight(monkeypatch):
    class Clock(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 5, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    day = 1
    format = chat_format("{{ strftime_now('%d %B') }}\n" + CHATML)
    day = 2
    assert format.render(QUESTION) == "02 May\n" + USER + OPEN
    assert format.text(format.response_ids(ANSWER)[0]) == ANSWER
