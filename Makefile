# make demo     set up and run the demo        make example NAME=prose   set up and run one of examples/
# make test     set up and run the tests       make check                ruff, format, mypy
# make fix      fix what ruff can fix          make bench                benchmarks
# make golden   the golden caches and export   make compat               the wheel, by each Python
# make examples rewrite what examples share
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: demo example examples test check compat fix bench golden constraints
.DELETE_ON_ERROR:

demo: .venv/ready
	stillroom run
	@echo "Open $(CURDIR)/report/index.html"

example: .venv/ready
	@test -f examples/$(NAME)/params.yaml || { echo "NAME=... is one of: $$(ls examples | grep --invert-match py | xargs)"; exit 1; }
	cd examples/$(NAME) && stillroom run
	@echo "Open $(CURDIR)/examples/$(NAME)/report/index.html"

examples: .venv/ready
	python examples/make_projects.py

# A process a core, a file at a time; one thread each, since tests are small.
test: .venv/dev
	OMP_NUM_THREADS=1 pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

check: .venv/dev
	ruff check .
	ruff format --check .
	mypy

# The wheel, used without torch by each of python3.11, 3.12 and 3.13 that is there.
compat:
	$(PYTHON) tests/compat.py

fix: .venv/dev
	ruff check --fix .
	ruff format .

bench: .venv/dev
	for file in benchmarks/bench_*.py; do python $$file || exit 1; done

golden: .venv/dev
	for file in tests/golden/make_*.py; do python $$file || exit 1; done

# torch comes first and alone: resolved together with others, a newer build with gigabytes of CUDA could be chosen.
# Bytecode is written at the first import, and of the modules that are imported, instead of at installation.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	pip install --no-compile --constraint constraints.txt torch
	pip install --no-compile --constraint constraints.txt --editable '.[pipeline]'
	touch $@

# Tests turn warnings into errors, those that libraries give when they are compiled too: all are compiled before.
.venv/dev: .venv/ready
	pip install --no-compile --constraint constraints.txt --editable '.[pipeline,dev]'
	-python -m compileall -q -j 0 .venv/lib > /dev/null
	touch $@

constraints: .venv/dev
	(grep '^#' constraints.txt; pip freeze --exclude-editable | sed 's/+cpu//') > constraints.new
	mv constraints.new constraints.txt
