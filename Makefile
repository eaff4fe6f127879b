# Two commands set everything up on a machine with Python 3.10 or newer and make:
#   make demo   the notebook on its embedded data, with the result table
#   make test   the test suite
# The environment lies in $(VENV), and changes only when pyproject.toml does: the demo installs what it needs, the others add
# what they need. By uv where there is one, else by pip.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
UV := $(shell command -v uv)
INSTALL := $(if $(UV),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install)

GPU_BENCH := $(BIN)/python benchmarks/run.py --rounds 6 --layer-rounds 9

.PHONY: demo test lint docs notebook hosts bench gpu package versions clean

demo: $(DEMO)
	$(BIN)/python examples/run_notebook.py --output build

test: $(READY)
	$(BIN)/pytest -n auto --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Execute the notebook and commit what comes out.
notebook: $(READY)
	$(BIN)/python examples/run_notebook.py --output build --in-place

$(DEMO): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "'$(PYTHON)' is not on the PATH: install Python 3.10 or newer, or call make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, this is $$($(PYTHON) --version): call make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv module is missing (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(if $(UV),,$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1")
	@echo "Installing gaussmask with torch, timm, transformers and open_clip into $(VENV): minutes, several GB with CUDA"
	@$(INSTALL) --quiet $(PIP_ARGS) --editable ".[all]" || { echo "The installation failed: see the message above. It needs a network (or an index of your own, in PIP_ARGS) and about 7 GB of disk"; exit 1; }
	@touch $@

$(READY): $(DEMO)
	@echo "Installing what tests, linters and docs need"
	@$(INSTALL) --quiet $(PIP_ARGS) --editable ".[all]" --group dev || { echo "The installation failed: see the message above"; exit 1; }
	@touch $@

# The documentation, into build/site; a broken link or an undocumented argument is an error. Then a browser looks at it, if
# there is one.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	$(BIN)/python docs/check_site.py

# Write docs/hosts.md anew: three minutes.
hosts: $(READY)
	$(BIN)/python docs/write_hosts.py

# Measure what dropping patches costs and saves on this machine, into build/benchmarks: leave it alone meanwhile.
bench: $(READY)
	$(BIN)/python benchmarks/run.py

# What only a GPU can show: the tests marked cuda, and then a benchmark of at most 8 minutes on an H100, into build/gpu.
gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch $$($(BIN)/python -c 'import torch; print(torch.__version__)') sees no GPU here. What a CPU can rehearse of the tests: $(BIN)/pytest -m cuda --device cpu"; exit 1; }
	$(BIN)/pytest -m cuda tests/test_cuda.py
	$(GPU_BENCH) --parts step overhead layer clip --modes eager --minutes 4.5 --output build/gpu
	$(GPU_BENCH) --parts step --modes compiled --models vit_base_patch16_224 --ratios 0.75 --stages pixels --no-unmasked \
		--output build/gpu/compiled

# Build the wheel and the sdist into dist/ and check them: contents, metadata, types, and each extra alone in an empty
# environment.
package: $(READY)
	$(BIN)/nox -s build core extras

# The test suite with the oldest and the newest versions, and all of `make package`.
versions: $(READY)
	$(BIN)/nox

clean:
	rm -rf build dist $(VENV)
