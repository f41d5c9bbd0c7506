"""Shared fixtures: the lab's policy, real data, processes that need not import much."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from forked import LIBRARIES, ForkServer

from gft_lite.utils.paths import cache_folder

# Two busy OpenMP threads on two cores wait for each other; one is faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts background commands with SIGINT ignored, and they their own processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Bases of tests are not written to the user's cache, but a converted real model is kept there.
# Workers of xdist inherit the variables.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["GFT_LITE_KEPT_CACHE"] = str(cache_folder())
    os.environ["GFT_LITE_CACHE"] = tempfile.mkdtemp(prefix="gft-lite-tests-")
    atexit.register(shutil.rmtree, os.environ["GFT_LITE_CACHE"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """The slowest folder comes first, so that no worker is left alone with a long file."""
    items.sort(key=lambda item: item.path.parent.name != "real")


@pytest.fixture(autouse=True)
def _no_traces(tmp_path_factory):
    """A test leaves no module that it wrote, and no --verbose, to the next one of its process."""
    names = ("GFT_LITE_VERBOSE", "TRANSFORMERS_VERBOSITY", "VLLM_LOGGING_LEVEL")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)
    own = str(tmp_path_factory.getbasetemp())
    for name in [name for name in sys.modules if "." not in name]:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(own):
            del sys.modules[name]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real benchmark data next to the project; skips if it does not exist."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of a real pretrained chat model; skips if there is none and none was named."""
    from benchmarks.real_model import VARIABLE, find_real_model
    from gft_lite.utils.errors import UserError

    try:
        return find_real_model(Path(os.environ["GFT_LITE_KEPT_CACHE"]))
    except UserError as error:
        if os.environ.get(VARIABLE):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Starts commands in processes that need not import the large libraries."""
    server = ForkServer(tmp_path_factory.mktemp("processes"), LIBRARIES)
    yield server
    server.close()


@pytest.fixture(scope="session")
def save_random_models(tmp_path_factory):
    """Save a random model of each config, with the lab's tokenizer; returns the folders by name.

    The weights are large enough that attention matters.
    """

    def save(configs):
        import torch
        import transformers

        from gft_lite import lab

        tokenizer = transformers.AutoTokenizer.from_pretrained(lab.BASE)
        made = {}
        for name, config in configs.items():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.1)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made

    return save


@pytest.fixture(scope="module")
def one_thread():
    """One thread: several OpenMP threads on busy cores can slow tiny models a hundredfold."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lab_policy():
    """A fresh NF4 policy on the lab base, in fp32."""
    from gft_lite.policy.registry import load_policy
    from gft_lite.recipe.sections import PolicySettings

    policy = load_policy(PolicySettings(gradient_checkpointing=False))
    policy.model.train()
    return policy


@pytest.fixture
def full_distribution():
    """The exact next-token distributions at a micro-batch's targets, from full logits in fp64."""
    import torch

    def compute(policy, batch):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = policy.model(**inputs).logits.double().flatten(0, 1)[batch.predicts]
        return torch.distributions.Categorical(logits=logits)

    return compute
