PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test demo lint bench gpu clean

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2   # two workers of one thread each: more threads than cores wait for each other

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

bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks --results benchmarks/results/cpu.json

# On a machine with a GPU, its own Python and no network: build in place, test every GPU back end, then measure.
gpu:
	ln -sfn ../kernels fastscore/kernels
	TORCH_CUDA_ARCH_LIST="$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" \
		FASTSCORE_BUILD=cuda $(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu tests
	PYTHONPATH=. $(PYTHON) -m pytest -q benchmarks --device cuda --results \
		benchmarks/results/$$($(PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))').json

clean:
	rm -rf build demo fastscore/_C*.so fastscore/_build_info.json
