import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import REPLAYED, Row, copy_of, interleave, keep_pages, merged, replays, report, table

from fastscore import backend as backends

ROWS = []


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.addoption("--smoke", action="store_true", help="tiny sizes, one round: does every benchmark run and verify?")
    parser.addoption("--results", type=Path, help="write the figures to this JSON file, into the table that it holds")


def pytest_configure(config):
    keep_pages()


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.option.threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def equal_terms():
    """No peer in TensorFloat-32, which keeps three digits; none compiled for the sizes of an earlier benchmark."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def device(request):
    return request.config.option.device


@pytest.fixture
def ours(device):
    """The compiled back ends that serve this device: Triton's interpreter is no competitor."""
    names = ("cuda", "triton") if device == "cuda" else ("cpp",)
    return [name for name in names if backends.why_not(name, device) is None]


@pytest.fixture
def size(request):
    """A power of two, or a small one for the smoke run."""
    return lambda exponent: 2 ** min(exponent, 12) if request.config.option.smoke else 2**exponent


@pytest.fixture
def compare(request, device):
    """compare(op, like, bytes, calls): time the calls and the ceiling (a copy of `bytes` unless given), keep and return the row."""

    def run(op, like, total_bytes, calls, ceiling=None):
        smoke = request.config.option.smoke
        calls = calls | {"ceiling": ceiling or copy_of(total_bytes, device)}
        row = Row(op, list(like.shape), str(like.dtype).removeprefix("torch."), like.numel(), total_bytes)
        row.seconds = interleave(calls, device, rounds=1 if smoke else 15, least=0 if smoke else 0.005)
        if device == "cuda" and not smoke:
            graphs = interleave(replays(calls), device, rounds=7, least=0.002)
            row.replayed = {name: seconds / REPLAYED for name, seconds in graphs.items()}
        ROWS.append(row)
        if request.config.option.results:   # row by row: a run that is cut off keeps what it has measured
            write(request.config.option.results, report([row], device))
        return row

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    result = report(ROWS, config.option.device)
    terminalreporter.write_line(f"\n{result['device']}, {result['versions']}\n{table(result)}")
    if config.option.results:
        write(config.option.results, result)   # tiny runs may ask one question twice, and keep both rows


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged(path, result), indent=1) + "\n")
