# Every target works on a fresh checkout, alone and again: what it needs is set up first, in .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# cpu or cuda: which lock file fills .venv
DEVICE ?= cpu
# the interpreter .venv is made with: the first of python3.11, python3.12, python3 that is 3.11 or 3.12
PYTHON ?=
# options of make bench, such as BENCH='--rows 200 --only batchinfer'
BENCH ?=
# options of make fuzz
FUZZ ?= --cases 10000 --seed 1

LOCK := requirements/$(DEVICE).lock
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq --no-deps
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# A finished set-up is named after what it was made from; the folder is in it because scripts hold its path.
STAMP := .venv/.setup-$(DEVICE)-$(shell { cat $(LOCK) pyproject.toml; echo '$(CURDIR)'; } | sha256sum | cut -c1-16)

.PHONY: help setup run check format test test-fast test-avx2 fuzz test-gpu bench bench-peers-setup schema clean

help:  ## show this help
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## make .venv from the pinned lock file (DEVICE=cpu or cuda)
	@:

run: setup  ## run the demo job on the CPU
	.venv/bin/batchinfer run jobs/summarize.yaml

check: setup  ## linters and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup  ## repair what the linter can
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

test-fast: setup  ## the tests that start no engine, no S3 server and no other process
	$(PY) -m pytest --fast -r fE --numprocesses 2 --ignore tests/end_to_end -m 'not (gpu or real_engine or s3 or slow)'

test: setup check  ## check, then every test that needs no GPU
	$(PY) -m pytest --numprocesses 2 --dist loadgroup

test-avx2: setup  ## the CPU tests as on a machine without AVX-512, with vLLM's library for those
	$(PY) -m tests.support.cpus avx2 pytest --numprocesses 2 --dist loadgroup

fuzz: setup  ## odd inputs and job files through the command line (FUZZ='--cases 10000 --seed 1')
	$(PY) -m tests.fuzz $(FUZZ)

test-gpu: setup  ## the tests that need a GPU (with DEVICE=cuda)
	$(PY) -m pytest -m gpu

bench: setup  ## throughput and losses beside LLM.generate, vllm run-batch and other peers
	benchmarks/peers/setup.sh server || echo "bench: no vllm run-batch in the table" >&2
	$(PY) -m benchmarks.peers $(BENCH)

bench-peers-setup: setup  ## environments of the peers that make bench compares with
	benchmarks/peers/setup.sh server ray datatrove

schema: setup  ## write schemas/ anew
	.venv/bin/batchinfer schema --write

clean:  ## remove .venv and caches, keep outputs
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build

$(STAMP):
	@mkdir -p .cache
	exec 9>.cache/setup.lock
	flock 9  # a second make waits here, and then finds the work done
	if [ -e $@ ]; then exit 0; fi
	is_supported() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }
	python='$(PYTHON)'
	for candidate in python3.11 python3.12 python3; do
	    if [ -z "$$python" ] && is_supported "$$candidate"; then python=$$candidate; fi
	done
	if [ -z "$$python" ] || ! is_supported "$$python"; then
	    echo "setup: needs Python 3.11 or 3.12 and found neither; name one: make setup PYTHON=/path/to/python3.11" >&2
	    exit 1
	fi
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
	    echo "setup: $$python has no venv or ensurepip module; on Debian and Ubuntu install the package python3-venv" >&2
	    exit 1
	fi
	# Without a stamp of this device .venv is absent, another device's or half finished: start over.
	if ! compgen -G '.venv/.setup-$(DEVICE)-*' >/dev/null; then
	    echo "setup: making .venv with $$python from $(LOCK) (some minutes, some gigabytes)" >&2
	    "$$python" -m venv --clear .venv
	else
	    echo "setup: bringing .venv up to date with $(LOCK)" >&2
	fi
	rm -f .venv/.setup-*
	if [ $(DEVICE) = cpu ]; then
	    # First and by its full version: the index's own torch may be the CUDA build, of gigabytes.
	    torch=$$(grep '^torch==' $(LOCK))
	    $(PIP) "$$torch" 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) "$$torch"
	fi
	$(PIP) -r $(LOCK)
	$(PIP) --no-build-isolation -e .
	touch $@
	echo "setup: done" >&2
