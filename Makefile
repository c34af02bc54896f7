# `make demo` and `make test` need only Python 3.11+ with venv; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# of `make test`: processes that run tests side by side, each with a broker of its own
WORKERS ?= 2
# of `make faults`: how many faults, and the seed of the random choices (the time if not given)
N ?= 100
SEED ?=
# of `make soak` and `make fuzz`
MINUTES ?= 30

.PHONY: demo test test-slow faults soak fuzz one-member bench lint clean rabbitmq prometheus

demo: $(VENV)/.installed
	$(BIN)/shared-encoder demo $(ARGS)

test: $(VENV)/.installed-dev rabbitmq prometheus
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# What is left out of `make test`, or has a short version in it. No limit of time for the many interleavings.
test-slow: $(VENV)/.installed-dev rabbitmq
	$(BIN)/python -m pytest -m slow $(ARGS)
	FAULT_EXAMPLES=5000 $(BIN)/python -m pytest --timeout 0 tests/faults/test_interleavings.py
	$(MAKE) faults
	$(MAKE) one-member
	$(MAKE) fuzz MINUTES=4 ARGS="--rabbitmq 10000"

faults: $(VENV)/.installed-dev rabbitmq
	$(BIN)/python -m tests.faults -n $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)

# Receipts of honest nodes beside one that means ill; below 80 % of the undisturbed rate this fails.
one-member: $(VENV)/.installed-dev rabbitmq
	$(BIN)/python -m tests.benchmarks.one_member $(ARGS)

# What communication costs, beside raw pika; tables here, JSON in bench.json. ARGS="--runs 5": medians of five.
bench: $(VENV)/.installed-dev rabbitmq
	$(BIN)/python -m tests.benchmarks $(ARGS)

soak: $(VENV)/.installed-dev rabbitmq
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

# Strangers write to a federation; ARGS="--rabbitmq 100000": so many messages more over RabbitMQ.
fuzz: $(VENV)/.installed-dev rabbitmq
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Debian's package is installed without starting the system's own service; the tests start a private one.
rabbitmq:
	@sh deploy/ensure_rabbitmq.sh

prometheus:
	@sh deploy/ensure_prometheus.sh

# The constraints pin torch: an unpinned one brings gigabytes of CUDA that most nodes do not need.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache demo-out
