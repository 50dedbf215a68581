# Two commands do everything: `make demo` runs the main job, `make test` the tests. Each sets itself up.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   NO_VENV=1           use $(PYTHON)'s own environment and install nothing (no network needed)

PYTHON ?= python3
VENV := .venv
TORCH := $(shell grep '^torch==' constraints.txt)
# Without an NVIDIA driver torch comes from its CPU index: a tenth of the size.
CPU_INDEX := $(if $(shell command -v nvidia-smi),,--index-url https://download.pytorch.org/whl/cpu)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -q

ifdef NO_VENV
RUN := $(PYTHON)
SETUP :=
else
RUN := $(VENV)/bin/python
SETUP := $(VENV)/installed
endif

.PHONY: demo test test-host test-train test-bench test-bench-cli test-kernels test-gpu bench campaign lint clean

demo: $(SETUP)
	$(RUN) -m sp_fast verify

# Two processes side by side, on one thread each: the long ones first, so that both cores end together.
test: $(SETUP) $(if $(NO_VENV),,lint)
	@$(MAKE) --no-print-directory -j 2 --output-sync=line test-kernels test-host test-train test-bench test-bench-cli

# Kernels need a process of their own: triton decides at its import whether they are interpreted.
test-kernels:
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/interpreter -m "not campaign" $(ARGS)

BENCH_CLI_TESTS := $(addprefix tests/test_bench_,cli.py static.py static_cli.py shipped.py sass.py)
TRAIN_TESTS := $(wildcard tests/test_train_*.py)
BENCH_TESTS := $(filter-out $(BENCH_CLI_TESTS),$(wildcard tests/test_bench_*.py)) tests/test_verify.py

test-host:
	$(RUN) -m pytest -m "not campaign and not gpu" $(addprefix --ignore=,$(TRAIN_TESTS) $(BENCH_TESTS) $(BENCH_CLI_TESTS)) $(ARGS)

test-train:
	$(RUN) -m pytest -m "not campaign" $(TRAIN_TESTS) $(ARGS)

test-bench:
	$(RUN) -m pytest -m "not campaign" $(BENCH_TESTS) $(ARGS)

test-bench-cli:
	$(RUN) -m pytest -m "not campaign" $(BENCH_CLI_TESTS) $(ARGS)

# Needs only a checkout and a python with torch, triton, safetensors and pytest.
test-gpu:
	PYTHONPATH=. $(if $(NO_VENV),$(PYTHON),$(if $(wildcard $(VENV)/installed),$(RUN),$(PYTHON))) -m pytest tests/test_gpu.py tests/test_gpu_training.py tests/test_gpu_model.py tests/test_gpu_train.py -m gpu $(ARGS)

bench: $(SETUP)
	$(RUN) -m pytest tests/bench_projector.py --benchmark-only $(ARGS)

campaign: $(SETUP)
	$(RUN) -m pytest -m campaign -s --timeout 0 $(ARGS)
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/interpreter -m campaign -s --timeout 0 $(ARGS)

lint: $(SETUP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("python 3.11 or newer is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel
	$(PIP) --retries 1 $(CPU_INDEX) $(TORCH) || $(PIP) $(TORCH)
	$(PIP) -c constraints.txt --no-build-isolation -e ".[dev,bench]"
	touch $@
