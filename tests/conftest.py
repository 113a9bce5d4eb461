import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on the CPU

import pytest

import fastscore
from fastscore import backend as backends


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available() and "FASTSCORE_GPU_TESTS_ON" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    reason = backends.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    with fastscore.use_backend(request.param):
        yield request.param
