"""What libraries log and warn of, with and without --verbose."""

from __future__ import annotations

import logging
import os
import warnings

import pytest

from gft_lite.cli import main
from gft_lite.cli.entry_point import make_parser
from gft_lite.utils.library_output import VERBOSE, hide_library_messages, is_verbose

LOGGERS = ("bitsandbytes", "torch.utils.flop_counter", "torch.distributed", "vllm",
           "huggingface_hub.utils._http")  # fmt: skip
VARIABLES = ("TORCH_CPP_LOG_LEVEL", "TRANSFORMERS_VERBOSITY", "VLLM_LOGGING_LEVEL")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """The environment, loggers and filters as at the start of a process, restored afterwards."""
    for name in (VERBOSE, *VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    caches = [logging.getLogger(name)._cache for name in LOGGERS]  # type: ignore[attr-defined]
    for cache in caches:
        cache.clear()
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield
    for cache in caches:
        cache.clear()


def warned(category: type[Warning], module: str) -> bool:
    """True if a warning of a module is shown."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn_explicit("text", category, "file.py", 1, module=module)
    return bool(shown)


def logged(name: str, level: int, text: str = "text") -> bool:
    """True if a message of a logger is shown."""
    logger = logging.getLogger(name)
    record = logger.makeRecord(name, level, "file.py", 1, text, (), None)
    return logger.isEnabledFor(level) and bool(logger.filter(record))


def test_what_a_user_can_do_nothing_about_is_hidden():
    hide_library_messages()
    hide_library_messages()
    assert not warned(FutureWarning, "torch.jit") and not warned(DeprecationWarning, "user")
    assert not warned(UserWarning, "peft.tuners.lora") and not warned(UserWarning, "vllm")
    assert not logged("vllm", logging.WARNING) and not logged("bitsandbytes", logging.WARNING)
    advertisement = "Warning: You are sending unauthenticated requests to the HF Hub."
    assert not logged("huggingface_hub.utils._http", logging.WARNING, advertisement)
    assert {name: os.environ[name] for name in VARIABLES} == {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def test_errors_and_genuine_warnings_are_shown():
    hide_library_messages()
    assert warned(UserWarning, "torch.cuda") and warned(UserWarning, "my_reward")
    assert warned(RuntimeWarning, "vllm")
    assert logged("vllm", logging.ERROR) and logged("bitsandbytes", logging.ERROR)
    assert logged("huggingface_hub.utils._http", logging.WARNING, "Retrying in 1s")
    assert logged("gft_lite.policy", logging.WARNING)


def test_verbose_shows_everything(monkeypatch, capsys):
    assert main(["train", "recipes/lab.yaml", "--dry-run", "--verbose"]) == 0
    capsys.readouterr()
    assert is_verbose()
    assert warned(FutureWarning, "torch.jit") and warned(UserWarning, "peft.tuners.lora")
    assert logged("bitsandbytes", logging.WARNING)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ


def test_the_users_own_levels_are_kept(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    hide_library_messages()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.parametrize(
    "command",
    ["train r", "eval t --suite lab", "groups r", "merge t --out o", "chat t", "sweep r", "doctor",
     "distill r --teacher t", "lab compare", "lab study"],
)  # fmt: skip
def test_every_command_that_loads_a_model_has_the_flag(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_parser().parse_args([*command.split(), "--verbose"]).verbose
