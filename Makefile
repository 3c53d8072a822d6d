# make demo    create .venv, install, pretrain the candidates, run the digits campaign, write its report
# make test    add the test extras, run the whole suite
# make check   what CI runs before the demo: lint, strict types, tests
# make bench   the measured table of the README
# make proto   write the site's control messages anew from client/control.proto

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLAN ?= plans/digits.toml
JOBS ?= 2
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1

# uv installs in seconds where it is to be had; it takes local wheels from where pip does. Plain pip is the fallback.
define install
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
	  UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/python -m uv pip install -q --python $(BIN)/python -c constraints.txt $(1) \
	  || $(BIN)/python -m pip install -q -c constraints.txt $(1); \
	else $(BIN)/python -m pip install -q -c constraints.txt $(1); fi
endef

.PHONY: demo test check lint types bench proto clean

demo: $(VENV)/installed
	$(BIN)/urna models pretrain
	$(BIN)/urna run $(PLAN)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: lint types test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy
	$(BIN)/basedpyright

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.run campaign_digits
	$(BIN)/python -m benchmarks.run demo
	$(BIN)/python -m benchmarks.run secure_sum
	$(BIN)/python -m benchmarks.run server_memory
	$(BIN)/python -m benchmarks.run secure_sum_scale
	$(BIN)/python -m benchmarks.run round_overhead
	$(BIN)/python -m benchmarks.run ledger
	$(BIN)/python -m benchmarks.run site_message
	$(BIN)/python -m benchmarks.run noise
	$(BIN)/python -m benchmarks.run feature_cache
	$(BIN)/python -m benchmarks.run dp_step
	$(call install,-e ".[benchmark]")
	$(BIN)/python -m benchmarks.run dp_accuracy
	$(BIN)/python -m benchmarks.table

proto: $(VENV)/installed-dev
	$(BIN)/python -m grpc_tools.protoc -I.links --python_out=.links --pyi_out=.links --grpc_python_out=.links urna/client/control.proto

$(VENV)/python-ok:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: expected Python 3.11 or newer, found $$($(PYTHON) -V); try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -c constraints.txt uv || echo "uv is not to be had; pip will do"
	@touch $@

$(VENV)/installed: $(VENV)/python-ok pyproject.toml constraints.txt
	$(call install,-e .)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(call install,-e ".[dev]")
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
