# `make quickstart` and `make test` need Python >= 3.11 and nothing else; both
# make the virtual environment .venv the first time and reuse it after that.

PYTHON ?= python3
KERAS_BACKEND ?= jax
BACKENDS ?= jax torch tensorflow
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 \
    --dist loadfile --no-loadscope-reorder

export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: quickstart test test-slow test-packages audit matrix bench notebooks \
    docs docs-test lint clean

quickstart: .venv/installed-$(KERAS_BACKEND)
	KERAS_BACKEND=$(KERAS_BACKEND) $(BIN)/python recipes/quickstart.py

# The tests compile much and run little. JAX ends at a flag that it doesn't
# know, so these go with the versions in constraints.txt.
flags_jax := --xla_cpu_use_fusion_emitters=false \
    --xla_cpu_parallel_codegen_split_count=1
flags_tensorflow := --xla_backend_optimization_level=0
pytest = echo "== $(1)"; KERAS_BACKEND=$(1) \
    XLA_FLAGS="$(XLA_FLAGS) $(flags_$(1))" $(PYTEST)

test: .venv/installed-dev
	$(MAKE) lint
	@failed=0; marks="not slow"; $(foreach backend,$(BACKENDS), \
	    $(call pytest,$(backend)) -m "$$marks" $(ARGS) || failed=1; \
	    marks="not slow and not once";) exit $$failed

test-slow: .venv/installed-slow
	@$(foreach backend,$(BACKENDS), \
	    $(call pytest,$(backend)) -m slow || exit 1;)

# Half an hour, 10 GB; `ARGS="jax torch"` for some of the environments.
test-packages: .venv/installed-packages
	$(BIN)/python tests/packaging/try_packages.py $(ARGS)

# Known weaknesses of what constraints.txt names; SECURITY.md answers them.
audit: .venv/installed-packages
	$(BIN)/uv tool run pip-audit --strict --no-deps --disable-pip \
	    -r constraints.txt

# docs/architectures.md
matrix: .venv/installed-dev
	$(BIN)/python tests/make_matrix.py

BENCHMARKS := startup remat log_probs micro_batch train_step generation scaling \
    sharding plan tabular

bench: .venv/installed-bench
	for name in $(BENCHMARKS); do \
	    $(BIN)/python benchmarks/$$name.py || exit 1; \
	done
	$(BIN)/python benchmarks/table.py

notebooks: .venv/installed-dev
	$(BIN)/python notebooks/execute.py

# Into site/; a link that leads nowhere is an error.
docs: .venv/installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet

# The site, and every example of README, docs/ and docstrings.
docs-test: .venv/installed-dev
	$(BIN)/python -m mkdocs build --strict --quiet
	KERAS_BACKEND=jax $(BIN)/python -m pytest -q tests/test_docs.py \
	    tests/test_public_api.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One stamp for each extra of pyproject.toml.
.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$*]"
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "keras_iris needs Python 3.11 or newer: make PYTHON=python3.12"; \
	      exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build .jax_cache .smollm2 .vllm runs site
