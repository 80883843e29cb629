# Every target sets itself up: it needs python3, make and a package index, and installs the pinned set into .venv once.
# On Linux a plain index serves torch with CUDA, which is several GB; on a machine without a GPU, naming an index of CPU
# wheels in PIP_EXTRA_INDEX_URL saves most of that.

PYTHON ?= python3
# Of the demo: dpo, kto, grpo or dpo_lora.
OBJECTIVE ?= dpo
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: test lint demo bench clean

test: $(INSTALLED)
	$(BIN)/pytest tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(INSTALLED)
	$(BIN)/python demo/run.py $(OBJECTIVE)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The files an editable install copies from: when one changes, so must the environment.
$(INSTALLED): pyproject.toml constraints.txt humanline/_tune_plugin.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo]'
	touch $@
