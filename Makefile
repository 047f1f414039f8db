# The only list of commands. Every target sets up what it needs in $(VENV); override any variable:
#   make test VENV=~/env PYTHON=python3.12 TORCH="torch==2.11.0" PIP="--index-url ..."
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PIP    ?=
BUILD  ?= auto
QM7B   ?= $(wildcard ../shared/data/qm7b.npz)
CONFIG ?= qm7b_small_abp
ARGS   ?=
DEVICE ?= cuda
MINUTES ?= 9
JOBS   ?= 2

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP)
# pip must not replace the torch that is there, and that the library is built against
KEEP    := "torch==$$($(BIN)/python -c 'from importlib.metadata import version as v; print(v("torch"))')"
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help docs bench report train zoo test test-fast test-portable fuzz test-gpu bench-gpu lint format aot triton-matrix versions arm mutation accuracy soak faults wheel clean

help:
	@sed -n 's/^## //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes before the build: the library is compiled against the installed one.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) "$(TORCH)" numpy "setuptools>=77" wheel ninja
	$(INSTALL) numpy "setuptools>=77" wheel ninja
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	ATTNPOOL_BUILD=$(BUILD) $(INSTALL) --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "import torch; from attnpool_kernels.impl import cpu; \
	  print('attnpool_kernels:', cpu.load() or torch.ops.attnpool.build_info())"
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	$(INSTALL) $(KEEP) "attnpool-kernels[bench]"
	@touch $@

# schnetpack pins a sympy that torch cannot use, so it comes without its dependencies.
$(VENV)/.zoo: $(VENV)/.package
	$(INSTALL) $(KEEP) "attnpool-kernels[zoo,schnetpack]"
	$(INSTALL) --no-deps schnetpack==2.1.1
	@touch $@

# The interpreter of Triton 3.6 uses what numpy 2.4 removed.
$(VENV)/.test: $(VENV)/.bench $(VENV)/.zoo Makefile
	$(INSTALL) $(KEEP) "attnpool-kernels[test,metatrain,periodic,parquet]"
	! $(BIN)/python -m pip show triton | grep -q "^Version: 3.6" || $(INSTALL) "numpy<2.4"
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	$(INSTALL) $(KEEP) "attnpool-kernels[lint]"
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	$(INSTALL) $(KEEP) "attnpool-kernels[docs]"
	@touch $@

## make bench      the scaling benchmark on this machine: table, CSV and figure under benchmarks/out
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run $(if $(QM7B),--qm7b $(QM7B)) $(ARGS)

## make report     benchmarks/results/report.html from the committed results
report: $(VENV)/.bench
	$(BIN)/python -m benchmarks.report $(ARGS)

## make train      trains CONFIG=qm7b_small_abp or another that `make zoo` lists
train: $(VENV)/.zoo
	$(BIN)/python -m attnpool_kernels.zoo fit --config $(CONFIG) \
	  $(if $(findstring qm7b,$(CONFIG)),$(addprefix --data.path ,$(QM7B))) $(ARGS)

## make zoo        the command line of the models: ARGS="predict molecules.xyz runs/..."
zoo: $(VENV)/.zoo
	$(BIN)/python -m attnpool_kernels.zoo $(or $(ARGS),configs)

## make test       everything that can be proved without a GPU, in JOBS=2 processes
test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

## make test-fast  the part that takes a minute
test-fast: $(VENV)/.test
	$(BIN)/python -m pytest tests --ignore=tests/impl --ignore=tests/benchmarks $(ARGS)

## make test-portable  what depends on the arithmetic of a machine, with other instructions, threads
##                 and seeds, beside busy processes: 18 combinations, ARGS=--sample two of them
test-portable: $(VENV)/.test
	$(BIN)/python tests/tools/portable.py $(ARGS)

## make fuzz       drawn inputs for MINUTES=30: operator, modules, readers, command line, and the C++
##                 operators under sanitizers; ARGS="--target readers --seed 17" draws them again
fuzz: MINUTES = 30
fuzz: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python -m fuzz.run --minutes $(MINUTES) $(ARGS)

## make soak       10,000 batches, trainings and 100,000 steps of dynamics: memory, files and threads
##                 that are left over; half an hour, ARGS="calculator --rounds 5000" a part of it
soak: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python -m tools.soak $(ARGS)

## make faults     trainings killed at 20 random moments and in the middle of 4 checkpoints
faults: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python -m tools.killed $(ARGS)

## make accuracy   errors of the backends that run here, by dtype and pass, in units of the budget:
##                 rewrites tests/tools/accuracy.csv
accuracy: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python -m tools.accuracy $(ARGS)

## make test-gpu   what only a CUDA device can prove, within MINUTES=9; DEVICE=cpu rehearses it
test-gpu: $(VENV)/.package
	$(BIN)/python tests/gpu/evidence.py --device $(DEVICE) --minutes $(MINUTES) --out gpu-evidence \
	  --blocks environment smoke prewarm correctness adapters invariants sanitizers $(ARGS)

## make bench-gpu  kernel times and the libraries beside us on a CUDA device, within MINUTES=9
bench-gpu: $(VENV)/.package
	$(BIN)/python tests/gpu/evidence.py --device $(DEVICE) --minutes $(MINUTES) --out gpu-evidence \
	  --blocks environment prewarm speed rivals $(ARGS)

## make lint       ruff and mypy
lint: $(VENV)/.lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

## make docs       the site in build/site, from docs/ and the docstrings; a warning is an error, and
##                 nothing is loaded from a network
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)
	@echo "open build/site/index.html"

## make aot        compiles every entry of the Triton tile table for every architecture, as far as
##                 build/ lacks it, and sums it up; JOBS=8 at a time, an hour on two cores
aot: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python -m tools.triton_table update --jobs $(JOBS)
	PYTHONPATH=.:tests $(BIN)/python -m tools.triton_table check

## make triton-matrix  the Triton backend with Triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0, and a table:
##                 about 80 s of one core per version, ARGS=--all 200 s; installs them in build/triton
triton-matrix: $(VENV)/.test
	$(BIN)/python tests/tools/triton_versions.py --pip="$(PIP)" --jobs $(JOBS) $(ARGS)

## make versions   one CPU wheel beside other versions of Python, torch, numpy, PyG and Lightning, and a
##                 table: 20 s of one core each and the download of that torch, ARGS="oldest newest"
versions: $(VENV)/.package
	$(BIN)/python tests/tools/versions.py --pip="$(PIP)" $(ARGS)

## make arm        the CPU kernels compiled for ARM and run by an emulator, beside those of this machine
##                 (Debian: g++-aarch64-linux-gnu, qemu-user): a minute of one core
arm: $(VENV)/.package
	$(BIN)/python tests/tools/processors.py $(ARGS)

## make mutation   which generated bugs the tests notice: a row of tests/tools/mutation.csv for each,
##                 ARGS="--groups cuda nn", ARGS="--again survived"
mutation: $(VENV)/.test
	$(BIN)/python tests/tools/mutation.py $(ARGS)

## make wheel      a wheel with the CUDA library and a source distribution in dist/, audited (nvcc 12.8 or
##                 later; no GPU needed)
wheel: $(VENV)/.package
	$(INSTALL) $(KEEP) "attnpool-kernels[wheel]"
	rm -rf dist
	ATTNPOOL_BUILD=cuda $(BIN)/python -m pip wheel --quiet . --no-build-isolation --no-deps -w dist
	ATTNPOOL_BUILD=python $(BIN)/python -m build --sdist --no-isolation --outdir dist . >/dev/null
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/twine check --strict dist/*

format: $(VENV)/.lint
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info attnpool_kernels/*.so $(VENV)/.package
