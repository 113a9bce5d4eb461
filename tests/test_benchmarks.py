"""Every benchmark runs, verifies its competitors and writes a row that a table can be made of."""

import contextlib
import functools
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import torch

from fastscore import backend

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import harness  # noqa: E402


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_benchmark_runs_and_times_ours_a_ceiling_and_a_peer(tmp_path):
    if backend.why_not("cpp", "cpu") is not None:
        pytest.skip(backend.why_not("cpp", "cpu"))
    path = tmp_path / "results" / "smoke.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--smoke",
        "--results", str(path),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = children.run(command, cwd=ROOT, env=environment, seconds=800)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(path.read_text())
    rows = [harness.Row(**row) for row in found["rows"]]
    assert (
        found["device"]
        and found["versions"]["torch"]
        and len(rows) == int(re.search(r"(\d+) passed", result.stdout)[1])
    )
    for row in rows:
        peers = set(row.seconds) - {"ceiling", *harness.OURS}
        assert row.ours in (("triton", "cuda") if row.op.startswith("host") else ("cpp",)), row
        assert "ceiling" in row.seconds and any(peer.startswith("eager") for peer in peers), row
        assert (
            all(0 < seconds < 60 for seconds in row.seconds.values())
            and row.bytes >= row.elements > 0
        ), row
    lines = harness.table(found).splitlines()
    assert len(lines) == 2 + len(rows) and all(
        line.count("|") == lines[0].count("|") for line in lines
    )


MOCKED = """
import contextlib, itertools, json, sys
import pytest
with contextlib.redirect_stdout(sys.stderr):
    status = pytest.main(
        ["-q", "-p", "no:cacheprovider", "benchmarks/bench_host.py", "--smoke", "--results", PATH]
    )
sys.path.insert(0, "benchmarks")
import bench_host, fastscore, torch
x = torch.ones(3, 40)
numbers = list(itertools.product((0, 1, 16, 5, 2**40, -3), (0, 1, 16, 7), (0, 40, 2**36)))
calls = {
    "step": lambda k, i, o: fastscore.langevin_step(
        x, x, 0.1, seed=k, step=i, offset=o, backend="triton"
    ),
    "normal": lambda k, i, o: fastscore.random.normal(
        (40,), seed=k, step=i, offset=o, stream=1024 + i, backend="triton"
    ),
    "rademacher": lambda k, i, o: fastscore.random.rademacher(
        (40,), seed=k, step=i, offset=128 * o, stream=1024 + i, backend="triton"
    ),
    "loss": lambda k, i, o: fastscore.denoising_loss(
        x, 0.5, seed=k, step=i, offset=o, backend="triton"
    ),
}
kernels = {}
with bench_host.mocked_triton(), torch.no_grad():
    for name, call in calls.items():
        compiled = sys.modules["fastscore.kernels.launch"]._compiled
        compiled.clear()
        for k, i, o in numbers:
            call(k, i, o)
        kernels[name] = len(compiled)
print(json.dumps({"status": int(status), "kernels": kernels}))
"""


@pytest.fixture(scope="module")
def mocked(tmp_path_factory):
    """(what a child found in which Triton's driver is mocked, the rows of its benchmark).

    Triton's interpreter must be off for it. One child for both tests: most of it is the import of
    PyTorch and Triton.
    """
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("mocked") / "host.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(ROOT),
    }
    program = MOCKED.replace("PATH", repr(str(path)))
    result = children.run([sys.executable, "-c", program], cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["status"] == 0, result.stderr
    return found, [harness.Row(**row) for row in json.loads(path.read_text())["rows"]]


@pytest.mark.processes
def test_what_a_call_costs_the_host_is_measured(mocked):
    rows = mocked[1]
    assert len(rows) == 5 and all(
        {"triton", "eager", "ceiling"} <= set(row.seconds) for row in rows
    )


@pytest.mark.processes
def test_other_seeds_steps_streams_and_offsets_compile_no_other_kernel(mocked):
    """Triton makes a variant of each number that is 1, a multiple of 16 or wide, if it may.

    A run would compile in its middle.
    """
    kernels = mocked[0]["kernels"]
    assert len(kernels) == 4 and set(kernels.values()) == {1}, kernels


def test_results_keep_the_rows_of_other_runs_of_the_same_machine(tmp_path):
    def row(op, seconds):
        return {"op": op, "shape": [2], "dtype": "float32", "seconds": {"cpp": seconds}}

    path, here = tmp_path / "r.json", {"device": "d", "versions": {"torch": "1"}}
    new = here | {"rows": [row("a", 2.0), row("c", 3.0)]}
    assert harness.merged(path, new) == new
    path.write_text(json.dumps(here | {"rows": [row("a", 1.0), row("b", 1.0)]}))
    assert harness.merged(path, new)["rows"] == [row("b", 1.0), row("a", 2.0), row("c", 3.0)]
    for other in ({"device": "e"}, {"versions": {"torch": "2"}}):
        assert harness.merged(path, new | other) == new | other


@pytest.fixture
def driver(monkeypatch):
    """A mocked one whose default generator takes itself for captured until a capture ends well,
    as PyTorch's does."""

    class Driver:
        inside = taken = False

        def draw(self):
            if self.taken and not self.inside:
                raise RuntimeError(
                    "Offset increment outside graph capture encountered unexpectedly."
                )

        def __enter__(self):
            self.inside = self.taken = True

        def __exit__(self, error, *rest):
            self.inside = False
            self.taken = error is not None

        def replay(self):
            self.draw()

        def wait_stream(self, other):
            pass

    driver, zeros = Driver(), torch.zeros
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: driver)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    return driver


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_a_capture_that_fails_leaves_the_others_and_the_generator_as_they_were(driver, error):
    def not_to_be_captured():
        if driver.inside:
            raise error("operation not permitted when stream is capturing")

    calls = {
        "cuda": driver.draw,
        "torch.compile": not_to_be_captured,
        "eager": driver.draw,
        "ceiling": lambda: None,
    }
    found = harness.replays(calls)
    assert list(found) == ["cuda", "eager", "ceiling"]
    driver.draw()   # the next benchmark's inputs
    for replay in found.values():
        replay()


def test_calls_that_fit_in_the_l2_take_other_memory_each_time():
    """For their tensors, however they are given, and for their results: in one round all of them
    together exceed twice the L2."""
    x, c, k = torch.rand(1000), [torch.rand(10), torch.rand(10, requires_grad=True)], torch.rand(3)
    seen = []

    def call(f, x, c, *, k):
        y = f(x) + c[1].sum()
        places = [t.data_ptr() for t in (x, *c, k, f.args[0], y)]
        seen.append((places, y.detach().clone(), c[1].requires_grad))
        return y

    copies = harness.copies_for(8 * 1000, 2**16)
    assert copies * 8 * 1000 > 2 * 2**16 and (copies - 1) * 8 * 1000 <= 2 * 2**16
    assert harness.copies_for(2**16 + 1, 2**16) == harness.copies_for(8, None) == 1

    inner = functools.partial(torch.add, torch.rand(1000))
    turns = harness.InTurn(functools.partial(call, inner, x, c, k=k), copies)
    for _ in range(2 * copies):
        turns()
    for place in zip(*(places for places, *_ in seen[copies:])):
        assert len(set(place)) == copies
    inputs = [places[:5] for places, *_ in seen]
    assert inputs[:copies] == inputs[copies:]
    assert all(torch.equal(y, seen[0][1]) and graded for _, y, graded in seen)


def test_a_graph_of_copies_holds_all_of_them(driver):
    called = []
    few, many = (
        harness.InTurn(functools.partial(lambda t: called.append(t.data_ptr()), torch.rand(4)), n)
        for n in (3, 50)
    )
    harness.replays({"cuda": many})
    assert harness.calls_in_a_graph(many) == 50 and len(called) == 3 + 50
    assert len(set(called[3:])) == 50
    assert harness.calls_in_a_graph(few) == harness.calls_in_a_graph(print) == harness.REPLAYED


def test_rows_say_what_stays_in_the_l2():
    def row(op, total, copies=1):
        return harness.Row(
            op,
            [total // 8],
            "float32",
            total // 8,
            total,
            {"cuda": 2.0, "ceiling": 1.0},
            {"cuda": 1.0, "ceiling": 0.75},
            copies,
        )

    report = {
        "device": "a GPU",
        "versions": {},
        "l2": 2**20,
        "rows": [
            asdict(row("small", 2**20)),
            asdict(row("in turn", 2**20, 3)),
            asdict(row("large", 2**20 + 8)),
        ],
    }
    head, _, small, in_turn, large = (
        [cell.strip() for cell in line.split("|")] for line in harness.table(report).splitlines()
    )
    ceilings = [i for i, name in enumerate(head) if name == "% of ceiling"]
    assert [[line[i] for i in ceilings] for line in (small, in_turn, large)] == [
        ["50 (L2)", "75 (L2)"],
        ["50", "75"],
        ["50", "75"],
    ]


def test_a_report_of_a_gpu_holds_the_size_of_its_l2(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=5)
    )
    pytest.importorskip("triton")
    assert harness.report([], "cuda")["l2"] == 5 and "l2" not in harness.report([], "cpu")


@pytest.mark.processes
def test_no_peer_computes_in_tensorfloat_32_or_was_compiled_for_earlier_sizes():
    """What each benchmark begins with; float32's sums are held to 1e-4."""
    program = """
import sys, types; sys.path.insert(0, "benchmarks")
import conftest, torch
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
said = []
torch._dynamo = types.SimpleNamespace(reset=lambda: said.append("reset"))   # whose import is slow
sys.modules["torch._dynamo"] = torch._dynamo
getattr(conftest.equal_terms, "_get_wrapped_function", lambda: conftest.equal_terms.__wrapped__)()()
assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
assert said == ["reset"]
"""
    result = children.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
