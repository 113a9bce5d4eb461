import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

if "emulated" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"   # before triton is imported

sys.path.insert(0, str(Path(__file__).parent))
import harness
from harness import (
    InTurn,
    Row,
    calls_in_a_graph,
    copy_of,
    interleave,
    keep_pages,
    l2_of,
    merged,
    replays,
    report,
    table,
)

from fastscore import backend as backends

ROWS = []


def pytest_addoption(parser):
    help = "where to measure; emulated: a dry run of cuda's benchmarks without a GPU"
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda", "emulated"), help=help)
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.addoption(
        "--smoke",
        action="store_true",
        help="tiny sizes, one round: does every benchmark run and verify?",
    )
    parser.addoption(
        "--results",
        type=Path,
        help="write the figures to this JSON file, into the table that it holds",
    )


def pytest_configure(config):
    keep_pages()
    if config.option.device == "emulated":
        config.option.smoke = True
        config.add_cleanup(emulated().close)


def emulated():
    """Tensors on the CPU, torch.cuda and CUDA C++ as build_support/emulate.py has them, Triton's
    interpreter, and nothing compiled."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "build_support"))
    import emulate

    stack = contextlib.ExitStack()
    stack.enter_context(emulate.installed())
    stack.enter_context(emulate.torch_cuda())
    stack.enter_context(
        mock.patch.object(torch, "compile", lambda f=None, **options: f or (lambda g: g))
    )
    stack.enter_context(mock.patch.object(harness, "REPLAYED", 2))
    stack.enter_context(mock.patch.object(harness, "copies_for", lambda total_bytes, l2: 2))
    return stack


def clocked(config):
    """Whose clock the harness reads."""
    return "cuda" if config.option.device == "emulated" else config.option.device


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.option.threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def equal_terms():
    """No peer in TensorFloat-32, which keeps three digits.

    None compiled for the sizes of an earlier benchmark.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def device(request):
    where = request.config.option.device
    return "cpu" if where == "emulated" else where


@pytest.fixture
def ours(request, device):
    """The compiled back ends that serve this device: Triton's interpreter is no competitor."""
    names = ("cuda", "triton") if clocked(request.config) == "cuda" else ("cpp",)
    return [name for name in names if backends.why_not(name, device) is None]


@pytest.fixture
def size(request):
    """A power of two, or a small one for the smoke run."""
    return lambda exponent: 2 ** min(exponent, 12) if request.config.option.smoke else 2**exponent


@pytest.fixture
def compare(request, device):
    """compare(op, like, bytes, calls).

    Time the calls and the ceiling (a copy of `bytes` unless given), keep and return the row.
    from_memory: the calls, each a functools.partial of its tensors, do not find them in a GPU's L2.
    """

    def run(op, like, total_bytes, calls, ceiling=None, from_memory=False, figures=None):
        smoke = request.config.option.smoke
        calls = calls | {"ceiling": ceiling or copy_of(total_bytes, device)}
        row = Row(
            op, list(like.shape), str(like.dtype).removeprefix("torch."), like.numel(), total_bytes
        )
        row.figures = figures or {}
        clock = clocked(request.config)
        if from_memory:
            assert all(isinstance(call, functools.partial) for call in calls.values()), calls
            row.copies = harness.copies_for(total_bytes, l2_of(clock))
        if row.copies > 1:
            calls = {name: InTurn(call, row.copies) for name, call in calls.items()}
        row.seconds = interleave(
            calls, clock, rounds=1 if smoke else 15, least=0 if smoke else 0.005
        )
        if clock == "cuda":
            graphs = interleave(
                replays(calls), clock, rounds=1 if smoke else 7, least=0 if smoke else 0.002
            )
            row.replayed = {
                name: seconds / calls_in_a_graph(calls[name]) for name, seconds in graphs.items()
            }
        ROWS.append(row)
        # Row by row: a run that is cut off keeps what it has measured.
        if request.config.option.results:
            write(request.config.option.results, report([row], clock))
        return row

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    result = report(ROWS, clocked(config))
    terminalreporter.write_line(f"\n{result['device']}, {result['versions']}\n{table(result)}")
    if config.option.results:
        # Tiny runs may ask one question twice, and keep both rows.
        write(config.option.results, result)


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged(path, result), indent=1) + "\n")
