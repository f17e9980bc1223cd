# `make` shows what there is. PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
PYTEST_ARGS ?=
EXPERIMENT ?=
BENCH_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo studio test lint bench bench-quick base clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(INSTALLED) ## create .venv and install what is needed, once

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "Python 3.11, 3.12 or 3.13 is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1);" \
			"name one of them, as in: make demo PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(INSTALLED) ## photos in, one picture out: the main job on the embedded base, into out/demo
	$(BIN)/spectral-diffusion demo --out out/demo

studio: $(INSTALLED) ## open the studio: photos to exported file in one web page
	$(BIN)/spectral-diffusion studio --folder out/studio

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED) ## check the code's style
	$(BIN)/ruff check .

bench: $(INSTALLED) ## the method against its rivals, into out/bench; EXPERIMENT=fusion for one, BENCH_ARGS=--full on a GPU
	$(BIN)/python -m benchmarks.lab $(EXPERIMENT) $(BENCH_ARGS)

bench-quick: $(INSTALLED) ## a training step against PEFT's LoRA, a few minutes on 2 cores, into out/bench
	$(BIN)/python -m benchmarks.speed --width 0.1 --rounds 2 --json out/bench/speed-quick.json

base: $(INSTALLED) ## train the embedded base anew (hours on a CPU; goes on where it was stopped)
	$(BIN)/python -m spectral_diffusion.toyworld.recipe

clean: ## remove .venv and caches; out/ stays
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
