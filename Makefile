# make demo    set up and run everything on real reviews     make test    set up and run the tests
# make check   ruff, format, mypy     make compat   the wheel by each Python     make fix   what ruff can mend
# make bench   benchmarks             make golden   the golden caches and the golden export
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: demo test check compat fix bench golden constraints
.DELETE_ON_ERROR:

# All of params.yaml but the entries that end in -full. The report comes last, over what there is.
demo: .venv/ready
	dvc repro $$(dvc stage list --name-only | grep --invert-match --regexp='-full$$' --regexp='^report$$')
	dvc repro --single-item report
	@echo "Open $(CURDIR)/report/index.html"

# A process a core, a file at a time; one thread each, since tests are small.
test: .venv/ready
	OMP_NUM_THREADS=1 pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

check: .venv/ready
	ruff check .
	ruff format --check .
	mypy

# The wheel, used without torch by each of python3.11, 3.12 and 3.13 that is there.
compat:
	$(PYTHON) tests/compat.py

fix: .venv/ready
	ruff check --fix .
	ruff format .

bench: .venv/ready
	for file in benchmarks/bench_*.py; do python $$file || exit 1; done

golden: .venv/ready
	for file in tests/golden/make_*.py; do python $$file || exit 1; done

# torch comes first and alone: resolved together with others, a newer build with gigabytes of CUDA could be chosen.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	pip install --constraint constraints.txt torch
	pip install --constraint constraints.txt --editable '.[pipeline,dev]'
	touch $@

constraints: .venv/ready
	(grep '^#' constraints.txt; pip freeze --exclude-editable | sed 's/+cpu//') > constraints.new
	mv constraints.new constraints.txt
