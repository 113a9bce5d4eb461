PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test demo lint gpu clean

test: $(STAMP)
	$(BIN)/python -m pytest -q

demo: $(STAMP)
	$(BIN)/fastscore demo --out demo

lint: $(STAMP)
	$(BIN)/ruff check .

# Torch first: the extension is built against the torch that is installed.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/* build_support/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt setuptools ninja triton
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q -e '.[test]'
	touch $(STAMP)

# With the interpreter at hand and no network: build in place, run the GPU tests, then the GPU benchmarks.
gpu:
	ln -sfn ../kernels fastscore/kernels
	FASTSCORE_BUILD=cuda $(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu tests
	mkdir -p benchmarks/results
	PYTHONPATH=. $(PYTHON) -m pytest -q benchmarks --device cuda --results benchmarks/results

clean:
	rm -rf build demo fastscore/_C*.so fastscore/_build_info.json
