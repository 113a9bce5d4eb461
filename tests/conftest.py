import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

# Inductor's cache outlives a run, and its keys leave out the instruction set: loops of a run with
# AVX-512 step by 16 and write 8 of them with AVX2. So every run has an empty one, which its workers
# and children inherit; set before torch looks for it.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="fastscore-inductor-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED.name

import torch

if not torch.cuda.is_available():
    # Before triton is imported: kernels run on the CPU.
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )

import commands
import pytest

import fastscore
from fastscore import backend as backends

# On Triton's interpreter these take half a minute each, or all of their parameters together do:
# which of them belong to the slow half. The same tests run on the other back ends, and its values
# in tests of their own.
LONG_INTERPRETED = {
    **dict.fromkeys(
        (
            "test_derivatives_in_every_mode",
            "test_derivatives_of_every_input_in_every_mode",
            "test_stationary_variance_matches_closed_form",
            "test_group_norm_modulate_is_group_norm_scaled_and_shifted",
            "test_annealed_langevin_draws_from_the_posterior_of_any_gaussian",
            "test_table_gradient_is_summed_per_label_and_repeatable",
            "test_consistent_sampling_of_a_point_has_the_next_level_s_variance_exactly",
        ),
        lambda **_: True,
    ),
    "test_value_is_as_close_to_float64_as_pytorch_is": lambda dtype, shape, **_: (
        dtype != torch.float32 and shape != (3, 6, 5, 7)
    ),
    "test_dual_op_and_its_gradient_equal_the_reference": lambda activation, M, **_: (
        activation is None or M == 1
    ),
}
# Inductor compiles these in plain PyTorch for ten seconds each; words and the denoising loss, the
# same kinds, in every run.
LONG_COMPILED = {
    "test_compiled_equals_eager",
    "test_compiled_equals_eager_for_many_steps_without_recompiling_each",
    "test_compiled_products_equal_eager_products",
    "test_compiled_estimate_equals_eager_estimate",
}


def _long(item):
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("backend") if callspec is not None else None
    if name == "triton":
        chosen = (
            LONG_INTERPRETED.get(item.originalname)
            if os.environ.get("TRITON_INTERPRET") == "1"
            else None
        )
        return chosen is not None and chosen(**callspec.params)
    return name == "reference" and item.originalname in LONG_COMPILED


def _emulated(item):
    """Whether it runs a CUDA C++ kernel, on the device that build_support/emulate.py makes."""
    callspec = getattr(item, "callspec", None)
    return (
        callspec is not None
        and callspec.params.get("gpu_backend") == "cuda"
        and "norm_backend" not in item.fixturenames
    )


def pytest_addoption(parser):
    parser.addoption(
        "--slow-sample",
        type=float,
        metavar="SECONDS",
        help="slow tests for so long, in an order that the commit decides; of a long one (marked "
        "with its minutes) twice the time is left",
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if _long(item):
            item.add_marker(pytest.mark.slow)
        if (
            _emulated(item)
            and item.originalname == "test_compiled_equals_eager"
            and not torch.cuda.is_available()
        ):
            item.add_marker(pytest.mark.slow)  # Inductor's C++; the CPU's tests compile it, too

        if (
            item.get_closest_marker("gpu")
            and not torch.cuda.is_available()
            and "FASTSCORE_GPU_TESTS_ON" not in os.environ
        ):
            if not _emulated(item):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

    seconds = config.option.slow_sample
    if seconds is not None:
        chosen = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        random.Random(commit.stdout).shuffle(items)
        config.slow_until = time.monotonic() + seconds
        return

    if "FASTSCORE_TESTS_PASSED" in os.environ:   # a run that goes on (build_support/on_gpu.py)
        passed = set(Path(os.environ["FASTSCORE_TESTS_PASSED"]).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid not in passed]

    for item in items:
        if item.get_closest_marker("slow") and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def pytest_configure(config):
    if "FASTSCORE_TEST_LOG" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(TestLog(Path(os.environ["FASTSCORE_TEST_LOG"])))


def pytest_collectstart(collector):
    torch.manual_seed(0)   # what a module draws does not depend on which others were imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)   # nor what a test and its fixtures draw on the tests before it
    until = getattr(item.config, "slow_until", None)
    if until is not None:
        minutes = item.get_closest_marker("slow").kwargs.get("minutes", 1 / 3)
        if time.monotonic() + 2 * 60 * minutes > until:   # twice: machines differ
            pytest.skip("longer than what is left of the sample's time")


class TestLog:
    """A line for each test as soon as it has run: a run that is cut off leaves what it found."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        line = {
            "test": report.nodeid,
            "when": report.when,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
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


@pytest.fixture(name="fastscore")
def command_in_this_process():
    """The command in this process: fastscore(*words) returns (exit status, stdout, stderr)."""
    return commands.command
