"""The table of engines, the graded text of a sample, and vLLM's start-up failures in one line."""

from __future__ import annotations

import socket
import string
from importlib import import_module
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gft_lite.recipe.loader import RecipeError
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import ENGINE_NAMES
from gft_lite.rollout.base import RolloutEngine, RolloutError
from gft_lite.rollout.registry import ENGINES, find_engine
from gft_lite.rollout.sampling import graded_text
from gft_lite.rollout.vllm_failures import cause_in_log, start_failure
from gft_lite.rollout.vllm_launcher import free_port
from gft_lite.utils.errors import UserError


def test_the_table_has_exactly_the_names_that_a_recipe_accepts():
    assert tuple(ENGINES) == ENGINE_NAMES


@pytest.mark.parametrize("name", [name for name, entry in ENGINES.items() if entry])
def test_every_engine_has_the_methods_of_the_protocol(name):
    module, _, class_name = ENGINES[name].path.partition(":")
    engine = getattr(import_module(module), class_name)
    for method in ("sync", "generate", "score", "sleep", "wake", "close"):
        expected = get_type_hints(getattr(RolloutEngine, method))
        assert get_type_hints(getattr(engine, method)) == expected, method
    assert engine.name == name


def test_an_engine_whose_package_is_missing_is_a_recipe_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r'rollout\.engine: vllm is not installed\. pip install "'
    ):
        find_engine("vllm")
    assert find_engine("auto") == ENGINES["transformers"]


class Letters:
    """A format with a token per letter; token 0 is the end token."""

    def text(self, ids):
        return "".join(string.ascii_letters[i - 1] for i in ids if i)


def _ids(text):
    return [string.ascii_letters.index(letter) + 1 for letter in text]


@pytest.mark.parametrize(
    ("text", "stop", "graded"),
    [
        ("abcd", (), "abcd"),
        ("abcd", ("x",), "abcd"),
        ("abcd", ("cd",), "ab"),
        ("abcd", ("c",), "ab"),  # Inside the last token, which has more text after it.
        ("abcd", ("a",), ""),
        ("abcab", ("ab",), ""),  # The first occurrence.
        ("abcde", ("de", "bc"), "a"),  # Whichever comes first, not the order of the list.
        ("abcde", ("abcd", "c"), "ab"),  # `c` is complete before `abcd` is.
        ("abcde", ("c", "bc"), "a"),  # Complete at the same character: the longer one.
        ("abc", ("cd",), "abc"),  # Cut by the length limit inside the stop string.
    ],
)
def test_the_graded_text_ends_before_the_first_stop_string(text, stop, graded):
    assert graded_text(_ids(text), Letters(), stop) == graded
    assert graded_text([*_ids(text), 0], Letters(), stop) == graded


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_the_graded_text_does_not_depend_on_how_the_text_is_split(text, stop):
    """It is that of an engine that appends one character at a time and stops at once."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            expected = text[: end - max(map(len, found))]
            break
    else:
        expected = text
    assert graded_text(_ids(text), Letters(), stop) == expected


def test_an_empty_stop_string_is_a_recipe_error():
    with pytest.raises(RecipeError, match=r"rollout\.stop\.1: must have at least 1 char.*got ''"):
        Recipe.load("recipes/lab.yaml", ['rollout.stop=["x", ""]'])


MESSAGES = {  # As vLLM 0.32 and torch 2.13 write them.
    "ValueError: Free memory on device cuda:0 (1.2/79.1 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 71.2 GiB). Decrease GPU memory utilization or reduce GPU memory used "
    "by other processes.": "Lower rollout.gpu_memory",
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "Lower rollout.gpu_memory",
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` "
    "when initializing the engine.": "Raise rollout.gpu_memory",
    "ValueError: To serve at least one request with the models's max seq len (32768), (4.00 GiB KV "
    "cache is needed, which is larger than the available KV cache memory (1.10 GiB). Try "
    "increasing `gpu_memory_utilization` or decreasing `max_model_len`.": "Raise rollout.gpu",
    "ImportError: libcudart.so.12: cannot open shared object file: No such file": "reinstall it",
    "AttributeError: '_OpNamespace' '_C' object has no attribute 'rms_norm'": "reinstall it",
    "RuntimeError: Failed to infer device type": "reinstall it",
    "OSError: [Errno 98] Address already in use": "start the run again",
}


@pytest.mark.parametrize("cause", MESSAGES)
def test_a_known_start_failure_is_one_line_with_advice(cause):
    error = start_failure("vllm could not start", cause)
    assert isinstance(error, UserError)
    assert str(error).startswith(f"rollout.engine: vllm could not start ({cause[:100]}")
    assert MESSAGES[cause] in str(error)
    assert "\n" not in str(error)


def test_a_servers_port_is_free_and_below_those_of_outgoing_connections():
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10 and all(20_000 <= port < 32_000 for port in ports)
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.pop()))


def test_an_unknown_start_failure_is_one_short_line():
    error = start_failure("vllm could not start", "KeyError: 'a'\n  b\n" + 900 * "c ")
    assert isinstance(error, RolloutError)
    assert str(error).startswith("rollout.engine: vllm could not start (KeyError: 'a' b c c ")
    assert "\n" not in str(error) and len(str(error)) < 500


def test_the_cause_is_found_in_a_servers_log():
    log = """\
(APIServer pid=7) INFO 11-28 14:45:20 [api_server.py:10] starting
(EngineCore pid=9) ERROR 11-28 14:45:24 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-28 14:45:24 [core.py:1510]     raise ValueError(
(EngineCore pid=9) ERROR 11-28 14:45:24 [core.py:1510] ValueError: No available memory.
(APIServer pid=7)     raise RuntimeError(
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert cause_in_log(log) == "ValueError: No available memory."
    pydantic = """\
    s.__pydantic_validator__.validate_python(args)
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len (9) is too large.
    For further information visit https://errors.pydantic.dev
"""
    assert (
        cause_in_log(pydantic).splitlines()[1] == "  Value error, max_model_len (9) is too large."
    )
    assert cause_in_log("usage: x\napi_server.py: error: argument --a: invalid choice: 7") == (
        "api_server.py: error: argument --a: invalid choice: 7"
    )
    assert cause_in_log("all is well\nCould not find platform\n") is None
