# Two commands do everything on a fresh machine: `make run` and `make test`. `make help` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find retrieval_node/native -type f 2>/dev/null)
STUBS := longreach/v1

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.PHONY: run
run: install ## Start a local cluster, store a long document, answer questions over it (VERIFY=1: compare with full attention).
	$(BIN)/python -m longreach.quickstart $(if $(VERIFY),--verify) $(RUN_FLAGS)

.PHONY: test
test: install ## Run the tests (PYTEST_FLAGS=... are passed on).
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/scenarios $(PYTEST_FLAGS)
	$(if $(PYTEST_FLAGS),,$(MAKE) scenarios)

.PHONY: scenarios
scenarios: install ## Run the scenario suite alone: whole clusters under faults want the CPUs to themselves.
	$(BIN)/python -m pytest -v tests/scenarios

.PHONY: lint
lint: install ## Style, types, protocol lint, breaking changes and stub drift.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	$(BIN)/buf format --diff --exit-code proto
	$(BIN)/buf breaking proto --against proto/released.binpb
	$(BIN)/python deploy/helm/settings.py --check
	$(BIN)/python deploy/observability/dashboards.py --check
	$(MAKE) proto-check

.PHONY: install
install: $(VENV)/installed ## Create .venv with pinned packages and build the native kernel.

$(VENV)/packages: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: install python3.11 and its venv module"; exit 1; }
	@command -v c++ >/dev/null || { echo "A C++ compiler is needed for the native kernel: install g++ (Debian: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	# CUDA builds of torch bring their own Triton; elsewhere its interpreter runs the kernels in tests.
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install --quiet triton==3.7.1
	# What the kernel and hnswlib (sources only on PyPI) build with: without build isolation it must be here first.
	$(PIP) install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja setuptools numpy pybind11
	@touch $@

$(VENV)/installed: $(VENV)/packages $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[worker,dev]'
	@touch $@

define GENERATE
$(BIN)/python -m grpc_tools.protoc -Iproto \
  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
  proto/longreach/v1/*.proto
endef

.PHONY: proto
proto: install ## Regenerate the protocol stubs in longreach/v1.
	$(call GENERATE,.)

.PHONY: proto-check
proto-check: install ## Fail when the committed stubs differ from proto/.
	rm -rf build/stubs && mkdir -p build/stubs
	$(call GENERATE,build/stubs)
	diff -r -x __init__.py -x __pycache__ build/stubs/$(STUBS) $(STUBS)

-include retrieval_node/native/sanitize.mk

.PHONY: test-containers
test-containers: install ## Build the images and run docker-compose.yml for real (needs Docker, root).
	bash tests/deploy/containers.sh

.PHONY: chaos
MINUTES ?= 1
SEED ?= 7
chaos: install ## Random faults on a cluster of real processes under load (MINUTES=1 SEED=7); writes chaos-report.json.
	$(BIN)/python -m tests.scenarios.chaos --minutes $(MINUTES) --seed $(SEED) --report chaos-report.json

.PHONY: bench
bench: install ## Run every benchmark in full and write docs/benchmarks/*.json with plots.
	$(BIN)/python -m benchmarks --output docs/benchmarks $(BENCH_FLAGS)

.PHONY: clean
clean: ## Remove build products and the local cluster's data; .venv stays.
	rm -rf build dist .longreach run-report.json chaos-report.json
