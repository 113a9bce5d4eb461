"""Every benchmark runs, verifies its competitors and writes a row that a table can be made of."""

import contextlib
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


@pytest.mark.processes
def test_what_a_call_costs_the_host_is_measured(tmp_path):
    """With Triton's launches mocked, for which its interpreter must be off."""
    pytest.importorskip("triton")
    path = tmp_path / "host.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "benchmarks/bench_host.py",
    ]
    command += ["--smoke", "--results", str(path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "TRITON_INTERPRET": "0"
    }
    result = children.run(command, cwd=ROOT, env=environment, seconds=200)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [harness.Row(**row) for row in json.loads(path.read_text())["rows"]]
    assert len(rows) == 5 and all(
        {"triton", "eager", "ceiling"} <= set(row.seconds) for row in rows
    )


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


def test_rows_say_what_stays_in_the_l2():
    def row(op, total):
        return harness.Row(
            op,
            [total // 8],
            "float32",
            total // 8,
            total,
            {"cuda": 2.0, "ceiling": 1.0},
            {"cuda": 1.0, "ceiling": 0.75},
        )

    report = {
        "device": "a GPU",
        "versions": {},
        "l2": 2**20,
        "rows": [asdict(row("small", 2**20)), asdict(row("large", 2**20 + 8))],
    }
    head, _, small, large = (
        [cell.strip() for cell in line.split("|")] for line in harness.table(report).splitlines()
    )
    ceilings = [i for i, name in enumerate(head) if name == "% of ceiling"]
    assert [[line[i] for i in ceilings] for line in (small, large)] == [
        ["50 (L2)", "75 (L2)"],
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
import sys; sys.path.insert(0, "benchmarks")
import conftest, torch, torch._dynamo
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
said = []
torch._dynamo.reset = lambda: said.append("reset")
getattr(conftest.equal_terms, "_get_wrapped_function", lambda: conftest.equal_terms.__wrapped__)()()
assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
assert said == ["reset"]
"""
    result = children.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        seconds=100,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.processes
def test_other_seeds_steps_streams_and_offsets_compile_no_other_kernel():
    """Triton makes a variant of each number that is 1, a multiple of 16 or wide, if it may.

    A run would compile in its middle.
    """
    pytest.importorskip("triton")
    program = """
import sys; sys.path.insert(0, "benchmarks")
import bench_host, fastscore, itertools, torch
x = torch.ones(3, 40)
numbers = list(itertools.product((0, 1, 16, 5, 2**40, -3), (0, 1, 16, 7), (0, 40, 2**36)))
calls = [
    lambda k, i, o: fastscore.langevin_step(x, x, 0.1, seed=k, step=i, offset=o, backend="triton"),
    lambda k, i, o: fastscore.random.normal(
        (40,), seed=k, step=i, offset=o, stream=1024 + i, backend="triton"
    ),
    lambda k, i, o: fastscore.random.rademacher(
        (40,), seed=k, step=i, offset=128 * o, stream=1024 + i, backend="triton"
    ),
    lambda k, i, o: fastscore.denoising_loss(x, 0.5, seed=k, step=i, offset=o, backend="triton"),
]
with bench_host.mocked_triton(), torch.no_grad():
    for call in calls:
        compiled = sys.modules["fastscore.kernels.launch"]._compiled
        compiled.clear()
        for k, i, o in numbers:
            call(k, i, o)
        assert len(compiled) == 1, compiled.keys()
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    result = children.run([sys.executable, "-c", program], cwd=ROOT, env=environment, seconds=100)
    assert result.returncode == 0, result.stderr
