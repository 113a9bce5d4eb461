PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test demo lint gpu clean

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2

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

# With the interpreter at hand and no network: build in place, then every back end that a GPU can run.
gpu:
	ln -sfn ../kernels fastscore/kernels
	$(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu tests

clean:
	rm -rf build demo fastscore/_C*.so fastscore/_build_info.json
