"""Prompts and responses as token ids, on real fast tokenizers built here."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from gft_lite.data.base import Unusable
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.sections import PromptSettings
from gft_lite.utils.errors import RecipeError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS_TEMPLATE = "{{ bos_token }}" + CHATML
SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(
    template: str | None = None, *, bos: bool = False, closes: bool = False, **names
):
    """A real byte-level tokenizer; optionally it writes BOS before, or EOS after, every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    around = ("<bos> " if bos else "") + "$A" + (" <eos>" if closes else "")
    ids = [(t, tokenizer.token_to_id(t)) for t in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    names = {"eos_token": "<eos>", "bos_token": "<bos>" if bos else None} | names
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made


def ids_of(tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(t) for t in tokens]


def test_plain_template_is_filled_literally():
    format = PromptFormat(byte_tokenizer(), PromptSettings(template="Q{x}: {problem}\nA {0}:"))
    text = "Let {a} = {problem} {{b}} \\frac{1}{2}"
    assert format.render(text) == "Q{x}: " + text + "\nA {0}:"
    assert format.text(format.prompt_ids(text)) == format.render(text)


def test_plain_prompt_has_bos_once_and_no_eos():
    tokenizer = byte_tokenizer(bos=True, closes=True)
    (bos,) = ids_of(tokenizer, "<bos>")
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    assert PromptFormat(tokenizer, PromptSettings()).prompt_ids("a") == (bos, a)
    assert PromptFormat(tokenizer, PromptSettings(template="<bos>{problem}")).prompt_ids("a") == (
        bos,
        a,
    )


def test_chat_prompt_opens_the_assistants_turn_without_a_second_bos():
    tokenizer = byte_tokenizer(BOS_TEMPLATE, bos=True, closes=True)
    prompt = PromptSettings(
        style="chat", system="Be brief.", template="{problem} Box it: \\boxed{}"
    )
    format = PromptFormat(tokenizer, prompt)
    assert format.render("1+1?") == (
        "<bos><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1+1? Box it: \\boxed{}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = format.prompt_ids("1+1?")
    bos, eos, start = ids_of(tokenizer, "<bos>", "<eos>", "<|im_start|>")
    assert ids[:2] == (bos, start)
    assert ids.count(bos) == 1 and eos not in ids
    assert ids == tuple(
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "1+1? Box it: \\boxed{}"},
            ],
            add_generation_prompt=True,
            return_dict=False,
        )
    )


def test_demonstration_ends_with_eos_in_plain_style():
    tokenizer = byte_tokenizer(CHATML, bos=True, closes=True)
    format = PromptFormat(tokenizer, PromptSettings())
    ids, reason = format.response_ids("abc")
    assert list(ids) == [
        *tokenizer.encode("abc", add_special_tokens=False),
        *ids_of(tokenizer, "<eos>"),
    ]
    assert reason == "stop"
    assert format.text(ids) == "abc"
    assert format.stop_ids == tuple(ids_of(tokenizer, "<eos>"))


def test_demonstration_ends_with_the_turn_end_in_chat_style():
    tokenizer = byte_tokenizer(CHATML)
    format = PromptFormat(tokenizer, PromptSettings(style="chat"))
    end, eos = ids_of(tokenizer, "<|im_end|>", "<eos>")
    assert format.response_ids("abc")[0][-1] == end != eos
    assert format.stop_ids == (end, eos)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("{{ m.content }}<|im_end|><eos>\n", "<|im_end|>"),
        ("{{ m.content | trim }} <eos>", "<eos>"),
        ("{{ m.content }}\n", "<eos>"),  # nothing ends the turn: EOS stands in
    ],
)
def test_the_turn_end_is_what_the_template_writes_after_the_answer(ending, expected):
    template = "{% for m in messages %}<|im_start|>" + ending + "{% endfor %}"
    tokenizer = byte_tokenizer(template + "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    format = PromptFormat(tokenizer, PromptSettings(style="chat"))
    assert format.end_id == ids_of(tokenizer, expected)[0]


@pytest.mark.parametrize(
    ("limit", "kept", "reason"), [(4, 4, "stop"), (3, 3, "length"), (1, 1, "length")]
)
def test_long_demonstrations_are_cut_without_an_end(limit, kept, reason):
    tokenizer = byte_tokenizer()
    format = PromptFormat(tokenizer, PromptSettings())
    whole, _ = format.response_ids("abc")
    ids, got = format.response_ids("abc", limit)
    assert (ids, got) == (whole[:kept], reason)
    assert (ids[-1] == tokenizer.eos_token_id) == (reason == "stop")


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<eos>", " <eos><eos> "])
def test_an_end_token_written_in_the_data_is_not_doubled(style, end):
    # The EOS of a chat model is often another token than its end of turn; both stop it.
    names = {} if style == "chat" else {"eos_token": "<|im_end|>"}
    end = end if style == "chat" else end.replace("<eos>", "<|im_end|>")
    format = PromptFormat(byte_tokenizer(CHATML, **names), PromptSettings(style=style))
    assert format.response_ids("abc" + end) == format.response_ids("abc" + end[: end.find("<")])


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_demonstration_with_an_end_token_inside_is_unusable(style):
    format = PromptFormat(byte_tokenizer(CHATML), PromptSettings(style=style))
    for text in ("abc<eos>def", "<eos>def<eos>"):
        with pytest.raises(Unusable, match="an end token inside its text"):
            format.response_ids(text)


def test_text_keeps_spaces_and_all_tokens_but_the_end():
    # A tokenizer that would decode " , " to "," by default.
    tokenizer = byte_tokenizer(
        CHATML,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )
    format = PromptFormat(tokenizer, PromptSettings(style="chat"))
    ids, _ = format.response_ids(" a , b . \u00e9\n")
    assert format.text([*ids, tokenizer.eos_token_id]) == " a , b . \u00e9\n"
    start, end, eos = ids_of(tokenizer, "<|im_start|>", "<|im_end|>", "<eos>")
    assert format.text([start, ids[1], eos, start, end, eos]) == "<|im_start|>a<eos><|im_start|>"
    assert format.text([end, eos]) == format.text([]) == ""


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("special", [True, False])
def test_a_demonstration_and_a_sample_of_equal_tokens_have_equal_texts(style, special):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_tokens([AddedToken(t, special=special) for t in ("<think>", "</think>")])
    format = PromptFormat(tokenizer, PromptSettings(style=style))
    demonstration = format.demonstration("<think>1+1</think>It is 2.", "expert")
    assert demonstration.text == "<think>1+1</think>It is 2."
    assert format.text(demonstration.token_ids) == demonstration.text
    assert (demonstration.source, demonstration.finish_reason) == ("expert", "stop")
    assert tokenizer.convert_tokens_to_ids("</think>") in demonstration.token_ids


def test_a_text_that_the_tokenizer_changes_is_graded_as_it_is_trained_on():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    demonstration = PromptFormat(tokenizer, PromptSettings()).demonstration(
        "x\u00b2 \uff11", "teacher"
    )
    assert demonstration.text == "x2 1"


@pytest.mark.parametrize(("limit", "fits"), [(4, True), (3, False), (1, False), (1000, True)])
def test_whether_a_demonstration_fits_counts_its_end(limit, fits):
    format = PromptFormat(byte_tokenizer(CHATML), PromptSettings(style="chat"))
    assert len(format.response_ids("abc")[0]) == 4
    assert format.fits("abc", limit) is fits


def test_a_turn_end_that_is_not_marked_special_is_dropped_from_the_text():
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "<|turn|>"))
    tokenizer.add_tokens([AddedToken("<|turn|>", special=False)])
    format = PromptFormat(tokenizer, PromptSettings(style="chat"))
    ids, _ = format.response_ids("abc")
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|turn|>")
    assert format.text(ids) == "abc"


def test_chat_style_without_a_template_names_the_field():
    with pytest.raises(RecipeError, match=r"^eval\.sets\.hard\.prompt\.style: must be plain"):
        PromptFormat(byte_tokenizer(), PromptSettings(style="chat"), "eval.sets.hard.prompt")
    assert PromptFormat(byte_tokenizer(), PromptSettings()).prompt_ids("1+1?")


def test_no_eos_is_an_error_only_where_a_response_must_end():
    format = PromptFormat(byte_tokenizer(eos_token=None), PromptSettings())
    assert format.prompt_ids("a")
    with pytest.raises(RecipeError, match=r"^policy\.model: must have a tokenizer with an EOS"):
        format.response_ids("a")
    chat = PromptFormat(byte_tokenizer(CHATML, eos_token=None), PromptSettings(style="chat"))
    assert chat.stop_ids == (chat.end_id,)
    assert chat.response_ids("a")[1] == "stop"


def test_the_labs_tokenizer_reads_its_own_rows():
    lab = pytest.importorskip("gft_lite.lab")
    if not (lab.BASE / "tokenizer.json").is_file():
        pytest.skip("the lab's base is not built yet")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(lab.BASE)
    format = PromptFormat(tokenizer, PromptSettings())
    for row in lab.rows("train")[:50]:
        ids = format.prompt_ids(row["problem"])
        assert format.text(ids) == row["problem"]
        assert tokenizer.unk_token_id not in ids
        for text in [*row["expert"], *row["teacher"]]:
            demonstration, reason = format.response_ids(text)
            assert (format.text(demonstration), reason) == (text, "stop")
            assert demonstration[-1] == tokenizer.eos_token_id


def test_importing_is_light():
    code = (
        "import sys, gft_lite.data.problems, gft_lite.data.prompts;"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
