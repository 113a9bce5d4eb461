PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test test-slow test-slow-sample test-processes demo lint types docs bench gpu clean

# make test ISA=avx2 or ISA=default: PyTorch's kernels, oneDNN's and ours as a processor with no more than that runs them.
ISA_avx2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 FASTSCORE_ISA=avx2
ISA_default := ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default FASTSCORE_ISA=baseline

test: $(STAMP)
	$(ISA_$(ISA)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2   # two workers of one thread each: more threads than cores wait for each other

# Whole, before a release: the sweep of PyTorch's operators, random networks, compilers, interpreters, wheels.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow -o timeout=3000 -o faulthandler_timeout=3100 $(SLOW)

# For three minutes, others with each commit.
SAMPLE ?= 180
test-slow-sample: SLOW := --slow-sample $(SAMPLE)
test-slow-sample: test-slow

# A fault in how processes end shows in one run of many.
ROUNDS ?= 50
test-processes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python build_support/rounds.py $(ROUNDS)

demo: $(STAMP)
	$(BIN)/fastscore demo --out demo

lint: $(STAMP)
	$(BIN)/ruff check .

# How much of the public interface has types, and what a strict client sees of them.
types: $(STAMP)
	$(BIN)/python build_support/type_completeness.py

# The site in build/site, which opens from disk; any warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict
	@echo "site: build/site/index.html"

# Torch first: the extension is built against the torch that is installed.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/* build_support/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt setuptools ninja triton
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q -e '.[test]'
	touch $(STAMP)

# Ops, losses and samplers; networks of the field, steps of training and what a call costs the host, on one thread each; then the
# pages' tables.
RESULTS := benchmarks/results
bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks --ignore=benchmarks/bench_networks.py --ignore=benchmarks/bench_host.py --ignore=benchmarks/bench_training.py --results $(RESULTS)/cpu.json
	$(BIN)/python -m pytest -q benchmarks/bench_networks.py --threads 1 --results $(RESULTS)/networks.json
	$(BIN)/python -m pytest -q benchmarks/bench_training.py --threads 1 --results $(RESULTS)/training.json
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q benchmarks/bench_host.py --threads 1 --results $(RESULTS)/host.json
	$(BIN)/python docs/tables.py

# On a machine with a GPU, its own Python and no network, in parts that go on where they ended: build in place, measure the
# ceilings, test every GPU back end, measure, train a network of CIFAR's size, time other tiles, profile. Results in $$OUT, else
# gpu-results/. `make gpu-train DATA=images.npz` trains on images of one's own.
gpu: gpu-build gpu-ceilings gpu-check gpu-bench-ops gpu-bench-losses gpu-bench-loops gpu-train gpu-tune gpu-profile

gpu-%: export DATA := $(DATA)
gpu-%:
	$(PYTHON) build_support/on_gpu.py $*

clean:
	rm -rf build demo fastscore/_C*.so fastscore/_build_info.json
