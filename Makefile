# `make demo` and `make test` do everything from a fresh clone; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
ALSO ?=
LOCK := $(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-annotate \
	--custom-compile-command "make lock" pyproject.toml

.PHONY: help setup demo test check unit broker bench test-train train train-logprob evaluate lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/.done: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

setup: .venv/.done ## the environment in .venv, so that .venv/bin/tidegate is the command

demo: setup ## the whole system on this machine, on sample conversations
	@$(BIN)/tidegate demo

check: setup ## formatting, lint, types, imports, compose file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

unit: setup ## the tests that need no broker
	$(BIN)/pytest -m "not train" tests/unit tests/property tests/models

broker: setup ## the tests on a real broker
	$(BIN)/pytest -m "not train" tests/broker

test: check ## everything that proves it: checks, then all tests
	$(BIN)/pytest -m "not train" tests

bench: setup ## the benchmarks, peers beside ours
	$(BIN)/tidegate bench

.venv-train/.done: requirements/train.txt requirements/bases.txt
	$(PYTHON) -m venv .venv-train
	.venv-train/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements/train.txt
	.venv-train/bin/pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/bases.txt
	@touch $@

test-train: .venv-train/.done ## the tests that need torch: export and its parity, in .venv-train
	.venv-train/bin/python -m pytest -m train tests/models

MORE := $(if $(ALSO),--also $(ALSO))
TRAIN := .venv-train/bin/python -m training.classifier --data $(DATA) $(MORE)

train: .venv-train/.done ## detectors from data to models/: make train DATA=folder [ALSO=your.jsonl]
	@test -n "$(DATA)" || { echo "say where the data is: make train DATA=folder"; exit 2; }
	.venv-train/bin/python -m training.hard --data $(DATA) --threads 2 --out runs/hard.jsonl
	$(TRAIN) --base mpnet --frozen 4 --rows 14000 --steps 330 --learning-rate 4e-5 --seed 19 --out runs/teacher
	$(TRAIN) --rows 25000 --no-own --out runs/first
	$(TRAIN) --rows 9000 --seed 23 --learning-rate 8e-5 --start-from runs/first/model.pt --teacher runs/teacher --out runs/student
	$(TRAIN) --rows 18000 --steps 700 --seed 31 --learning-rate 7e-5 --patience 8 --hard runs/hard.jsonl --start-from runs/student/model.pt --out runs/later
	.venv-train/bin/python -m training.average --runs runs/student runs/later --out runs/averaged
	$(TRAIN) --base mpnet --layers 9 --frozen 2 --rows 28000 --steps 1200 --seed 59 --learning-rate 5e-5 --patience 8 --hard runs/hard.jsonl --out runs/larger
	.venv-train/bin/python -m export --checkpoint runs/averaged --data $(DATA) --out models
	.venv-train/bin/python -m export --checkpoint runs/larger --views context_large --data $(DATA) --out models
	.venv-train/bin/python -m training.words --data $(DATA) $(MORE) --out runs/words
	.venv-train/bin/python -m export.words --run runs/words --data $(DATA) --out models/words
	.venv-train/bin/python -m export.combined --models models/toxicity models/context --name encoders --data $(DATA)
	.venv-train/bin/python -m export.combined --models models/toxicity models/words models/context --name small --first 2 --data $(DATA)
	.venv-train/bin/python -m export.combined --models models/toxicity models/words models/context models/context_large --first 2 3 --data $(DATA)

train-logprob: .venv-train/.done ## the language model of the second look, and its band: make train-logprob DATA=folder
	@test -n "$(DATA)" || { echo "say where the data is: make train-logprob DATA=folder"; exit 2; }
	.venv-train/bin/python -m training.logprob --data $(DATA) --out runs/logprob
	.venv-train/bin/python -m export.causal --hf runs/logprob/model --start 0 --only --out models/logprob
	.venv-train/bin/python -m export.causal --hf $$(.venv-train/bin/python -m training.causal_base) --start 0 --only --out runs/untuned
	.venv-train/bin/python -m training.second --model models/logprob --data $(DATA)
	.venv-train/bin/python -m training.second --model models/logprob --detectors toxicity words context --name small --untuned runs/untuned --data $(DATA) --out docs/evaluation

evaluate: .venv-train/.done ## every figure of what is in models/: make evaluate DATA=folder
	@test -n "$(DATA)" || { echo "say where the data is: make evaluate DATA=folder"; exit 2; }
	.venv-train/bin/python -m training.evaluate --data $(DATA) --out docs/evaluation

lock: setup ## pin the newest versions that pyproject.toml allows
	$(BIN)/pip install -q uv
	$(LOCK) --extra cpu -o requirements/run.txt
	$(LOCK) --extra gpu -o requirements/gpu.txt
	$(LOCK) --extra cpu --extra local --extra dev -o requirements/dev.txt
	$(LOCK) --extra cpu --extra train -o requirements/train.txt

clean: ## what was built here
	rm -rf .venv .venv-train .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info dist
