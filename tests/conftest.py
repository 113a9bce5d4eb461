import json
import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on the CPU

import pytest

import fastscore
from fastscore import backend as backends


def pytest_collection_modifyitems(config, items):
    if "FASTSCORE_TESTS_PASSED" in os.environ:   # a run that goes on (build_support/on_gpu.py)
        passed = set(Path(os.environ["FASTSCORE_TESTS_PASSED"]).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid not in passed]

    for item in items:
        if item.get_closest_marker("slow") and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and "FASTSCORE_GPU_TESTS_ON" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure(config):
    if "FASTSCORE_TEST_LOG" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(TestLog(Path(os.environ["FASTSCORE_TEST_LOG"])))


class TestLog:
    """A line for each test as soon as it has run, so that a run that is cut off leaves what it found."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid, "when": report.when, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            line["why"] = str(report.longrepr)[-6000:]
        with self.path.open("a") as log:
            log.write(json.dumps(line) + "\n")


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    reason = backends.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    with fastscore.use_backend(request.param):
        yield request.param
