# `make demo` and `make test` need only Python 3.11+ with venv; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# where torch comes from: an index's URL, or a folder of wheels; empty: pip's own, which on Linux has the CUDA build
TORCH_INDEX ?=
# of `make test`: processes that run tests side by side, each with a broker of its own
WORKERS ?= 2
# of `make faults`: how many faults, and the seed of the random choices (the time if not given)
N ?= 100
SEED ?=
# of `make soak` and `make fuzz`
MINUTES ?= 30

.PHONY: demo test test-slow test-containers test-debian-13 faults soak fuzz one-member bench lint clean rabbitmq prometheus

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

# Images, compose.yaml under faults, the Helm chart, the systemd units. Needs a Docker engine with compose, and systemd.
# RABBITMQ_VERSIONS="3 4": over both.
test-containers: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[containers]'
	$(BIN)/python -m pytest -m containers -v $(ARGS) tests/containers

# `make test` in a container, with Debian 13's Python 3.13 and RabbitMQ 4.
test-debian-13:
	sh tests/containers/suite.sh -n $(WORKERS) --dist worksteal $(ARGS)

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

# torch first: which build it is decides whether this takes one gigabyte or six.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python deploy/install_torch.py --index "$(TORCH_INDEX)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[node,evaluate]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache demo-out
