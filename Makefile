# Set-up, checks and runs. `make run` and `make test` install what they need into .venv first.

PYTHON ?= python3
# Installed before anything that depends on it. To choose a build: make run TORCH='torch==2.13.0 --index-url …'
TORCH ?= torch==2.13.0
# Launcher flags: make run ARGS='--model-id /models/my-model --port 8080'
ARGS ?=

BIN := .venv/bin
TGI_CLIENT := .venv-tgi-client
FRAMEWORKS := .venv-frameworks
# The folder `kernels/` must never be imported as Hugging Face's package of that name.
export PYTHONSAFEPATH := 1

.PHONY: install install-dev run test integration-tests soak guided-corpus frameworks schemathesis check format format-check lint types bench bench-peers bench-kernels bench-quantisation bench-adapters bench-prefix bench-speculation bench-router bench-guidance eval-sim eval-live eval-validate demo-model clean

install: .venv/.installed
install-dev: .venv/.installed-dev $(TGI_CLIENT)/.installed

.venv/.installed: pyproject.toml kernels/build_native.py $(wildcard kernels/bros_kernels/native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# TGI's own client needs an older huggingface_hub than we do: it gets an environment of its own.
$(TGI_CLIENT)/.installed:
	$(PYTHON) -m venv $(TGI_CLIENT)
	$(TGI_CLIENT)/bin/python -m pip install --quiet --disable-pip-version-check 'text-generation==0.7.0'
	touch $@

# Clients that bring hundreds of megabytes, which `make test` does without.
$(FRAMEWORKS)/.installed:
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check \
		'langchain-openai>=1' 'langchain-huggingface>=1' 'litellm>=1.80' 'llama-index-llms-huggingface-api>=0.8'
	touch $@

run: install
	$(BIN)/text-generation-launcher $(ARGS)

test: install-dev
	$(BIN)/python -m pytest -q router/tests shard/tests kernels/tests benchmarks/tests integration-tests

integration-tests: install-dev
	$(BIN)/python -m pytest -q integration-tests

soak: install-dev
	BROS_SOAK_REQUESTS=10000 $(BIN)/python -m pytest -q -s integration-tests/test_soak.py

guided-corpus: install-dev
	BROS_GUIDED_EXAMPLES=63 $(BIN)/python -m pytest -q integration-tests/test_guidance.py -k match

frameworks: install-dev $(FRAMEWORKS)/.installed
	$(BIN)/python -m pytest -q integration-tests/test_frameworks.py

schemathesis: install-dev
	BROS_SCHEMATHESIS_CASES=5000 $(BIN)/python -m pytest -q -s integration-tests/test_description.py

check: format-check lint types

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: install-dev
	$(BIN)/ruff format --check .

lint: install-dev
	$(BIN)/ruff check .

types: install-dev
	$(BIN)/mypy

bench-kernels: install-dev
	$(BIN)/python -m bros_benchmarks.operations
	$(BIN)/python -m bros_benchmarks.kernels

bench-quantisation: install-dev
	$(BIN)/python -m bros_benchmarks.quantisation

bench: install-dev
	$(BIN)/python -m bros_benchmarks.serving

# Installs the peers first: gigabytes. ARGS='--peers bros vllm --rounds 2' for less.
bench-peers: install-dev
	$(BIN)/python -m bros_benchmarks.peers $(ARGS)

bench-adapters: install-dev
	$(BIN)/python -m bros_benchmarks.adapters

bench-prefix: install-dev
	$(BIN)/python -m bros_benchmarks.prefix

bench-speculation: install-dev
	$(BIN)/python -m bros_benchmarks.speculation

bench-router: install-dev
	$(BIN)/python -m bros_benchmarks.router_alone

bench-guidance: install-dev
	$(BIN)/python -m bros_benchmarks.guidance

# The evaluation of docs/evaluation.md. ARGS=--quick for minutes instead of an hour or more.
eval-sim: install-dev
	$(BIN)/python -m bros_benchmarks.evaluation.simulated $(ARGS)

eval-live: install-dev
	$(BIN)/python -m bros_benchmarks.evaluation.live $(ARGS)

eval-validate: install-dev
	$(BIN)/python -m bros_benchmarks.evaluation.validate $(ARGS)

demo-model: install
	$(BIN)/python -m bros_shard.demo_model.train

clean:
	rm -rf .venv $(TGI_CLIENT) $(FRAMEWORKS) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
