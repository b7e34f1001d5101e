# One command for each habit. `make demo`, `make test` and `make lint` need only Python >= 3.10, pip and this repository:
# they make .venv first. Settings, on the command line or in the environment:
#   PYTHON=python3.12       the interpreter that .venv is made with
#   TEST_WORKERS=4          processes of the main test run
#   PYTEST_ARGS="-k int4"   further arguments for the main test run
#   DEMO_ARGS=--check       further arguments for the demo
#   PERF_ARGS="--rows 1"    further arguments for `make perf`
#   BENCH="linear conv"     the tables that `make bench` makes instead of timing the operators
#   BASE=HEAD~1             what `make same` compares with; SAME_ARGS=--check, --only int8, ...
#   MINUTES=8               what `make gpu` may take

PYTHON ?= python3
BASE ?= HEAD
VENV ?= .venv
TEST_WORKERS ?= 2
MINUTES ?= 20
COMPAT_TRITONS ?= 3.4.0 3.6.0 3.9.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints-dev.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow nets zoo lint format docs bench perf same compiled shortlist compat gpu clean

help:
	@sed -n 's/^#: //p' Makefile

# The C kernels are compiled when the package is installed.
$(STAMP): pyproject.toml constraints-dev.txt hatch_build.py $(wildcard tilewright/kernels/cpu/c/*.[ch] tilewright/kernels/cpu/build.py)
	@echo "Setting up $(VENV): a few minutes the first time"
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Tilewright needs Python 3.10 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

#: make demo       convert a pretrained sentence encoder, then networks for digits: size, speed and accuracy
demo: $(STAMP)
	$(BIN)/python examples/minilm_demo.py $(DEMO_ARGS)
	$(BIN)/python examples/digits_demo.py $(DEMO_ARGS)

# Workers with threads of their own share the cores: a thread that waits had better not spin.
PARALLEL = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_WORKERS) -q

#: make test       the tests, then the kernels in Triton's interpreter
test: $(STAMP)
	$(PARALLEL) tests $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PARALLEL) tests/interpreter

#: make test-slow  every kernel and config emulated, and other tests that take longer than a minute
test-slow: $(STAMP)
	$(PARALLEL) tests -m "slow and aot"
	$(BIN)/python -m pytest tests --ignore tests/zoo --ignore tests/fuzz -m "slow and not aot" -q

#: make nets       every architecture of transformers in the zoo, and the long search with random networks
nets: $(STAMP)
	$(PARALLEL) tests/zoo tests/fuzz -m slow

#: make zoo        timm's and torchvision's networks under the newest PyTorch: an environment of 6 GB, then half an hour
zoo: .zoo/.installed
	OMP_WAIT_POLICY=passive .zoo/bin/python -m pytest -n $(TEST_WORKERS) -q tests/zoo/test_networks.py -m slow $(PYTEST_ARGS)

.zoo/.installed: tests/zoo/constraints.txt pyproject.toml
	$(PYTHON) -m venv .zoo
	.zoo/bin/python -m pip install --disable-pip-version-check --quiet -c tests/zoo/constraints.txt torch torchvision
	.zoo/bin/python -m pip install --disable-pip-version-check --quiet -c tests/zoo/constraints.txt \
		timm pytest pytest-xdist -e .
	@touch $@

#: make lint       ruff and mypy
lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

#: make format     let ruff rewrite what it can
format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

#: make docs       the documentation as a site, with the API reference, in build/site; warnings are errors
docs: $(STAMP)
	$(BIN)/python -m sphinx -b html -c docs -W --keep-going -q . build/site

#: make bench      time every operator on a small problem, on the CPU; BENCH="linear conv" for tables
bench: $(STAMP)
	$(BIN)/python -m bench $(BENCH)

#: make perf       whether any converted layer is slower than the float32 layer on this CPU: 30 shapes, a few minutes
perf: $(STAMP)
	$(BIN)/python -m bench.tables.never_slower $(PERF_ARGS)

#: make same       time fourteen calls of this tree beside those of an older one, by default the last commit
same: $(STAMP)
	$(BIN)/python -m bench.same --base $(BASE) $(SAME_ARGS)

#: make compiled   compile every kernel for every target, print what changed and rewrite bench/results/compiled.csv
compiled: $(STAMP)
	$(BIN)/python -m bench.tables.compiled

#: make shortlist  compile every candidate of the tuner for sm_90 and rewrite the list that GPUs then only have to time
shortlist: $(STAMP)
	$(BIN)/python -m tilewright tune --offline --target sm_90 --seconds 3600 \
		--op int4_linear int8_linear int8_weight_only_linear int4_int8_linear \
		--shape 4096x4096 --shape 8192x8192 --m 1,16,64,128 -o tilewright/autotune/shortlists/sm_90.json

#: make compat     the smoke test under other versions of Triton
compat: $(STAMP) $(COMPAT_TRITONS:%=.compat/triton-%)
	$(BIN)/python -m pytest tests/test_compat.py -q

.compat/triton-%:
	@mkdir -p .compat && rm -rf $@ $@.partial
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@.partial triton==$*
	@mv $@.partial $@

#: make gpu        the tests and the tables that need a GPU, with the Python that is there: installs nothing
gpu:
	$(PYTHON) bench/gpu.py --minutes $(MINUTES)

#: make clean      remove what these commands made
clean:
	rm -rf $(VENV) .compat .zoo .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
