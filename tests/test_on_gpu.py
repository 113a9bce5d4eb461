"""`make gpu`, dry: every part runs on the emulated device, outlives a failure and an
interruption, and goes on where its file ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import emulate  # noqa: E402

SCRIPT = ROOT / "build_support" / "on_gpu.py"


@pytest.fixture(autouse=True)
def a_compiler():
    pytest.importorskip("triton")
    reason = emulate.why_not()
    if reason is not None:
        pytest.skip(reason)
    emulate.build()


@pytest.fixture
def parts(tmp_path):
    """run(part, ...) -> the lines that it prints."""

    def run(*names, select="", seconds=200, **environment):
        variables = os.environ | {
            "FASTSCORE_EMULATED": "1",
            "OUT": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "FASTSCORE_GPU_SELECT": select,
        }
        variables = {
            k: v for k, v in variables.items() if not k.startswith("PYTEST_")
        } | environment
        result = children.run(
            [sys.executable, SCRIPT, *names], cwd=ROOT, env=variables, seconds=seconds, check=True
        )
        return result.stdout.splitlines()

    run.results = tmp_path
    return run


def passed_of(path):
    return [
        line["test"]
        for line in map(json.loads, path.read_text().splitlines())
        if line["outcome"] == "passed"
    ]


def test_build_and_ceilings(parts):
    build, ceilings = parts("build", "ceilings")
    assert build.startswith("build: done") and ceilings.startswith("ceilings: done")
    figures = json.loads((parts.results / "ceilings.json").read_text())
    assert (
        set(figures) == {"device", "copy", "read", "write", "philox blocks", "exp2", "fma"}
        and figures["copy"] > 0
    )
    assert len((parts.results / "parts.log").read_text().splitlines()) == 2


SHORT = {
    "check": "group_size and cuda and 300",
    "bench-ops/noisy_update": "langevin_step and 12 and float32",
    "bench-losses/energy": "energy_mlp and 2-128-1024-1",
    "bench-loops": "annealed",
    "tune": "activate",
}


@pytest.mark.parametrize("part", SHORT)
def test_a_part_runs_to_its_end(parts, part):
    """A little of each; the whole of them in test_every_part_runs_to_its_end."""
    (line,) = parts(part, select=SHORT[part])
    assert (
        re.search(r": done|[1-9] passed", line)
        and "exit status" not in line
        and "cut off" not in line
    ), line
    kept = {"check": "check.jsonl", "tune": "tune.jsonl"}.get(part, "gpu.json")
    text = (parts.results / kept).read_text()
    assert text and '"error"' not in text and '"failed"' not in text


def test_train_leaves_rates_a_loss_curve_and_a_grid(parts):
    (line,) = parts("train")
    assert line.startswith("train: done: {")
    rows = [json.loads(row) for row in (parts.results / "train.jsonl").read_text().splitlines()]
    timed, steps, (end,) = ([r for r in rows if k in r] for k in ("peak GiB", "step", "data"))
    assert {row["form"] for row in timed} == {
        f"{layout} {dtype}"
        for layout in ("contiguous", "channels-last")
        for dtype in ("float32", "bfloat16")
    }
    assert [row["step"] for row in steps] == [2, 4] and end["end"] == 4
    assert all(row["loss"] > 0 and row["images/s"] > 0 for row in steps)
    best = max(timed[:4], key=lambda row: row["images/s"])["form"]
    assert end["form"] == best and end["data"] == "drawn" and end["parameters"] == 51_603

    from PIL import Image

    with Image.open(parts.results / "train.png") as picture:
        assert picture.size == (20, 20) and picture.mode == "RGB"
        assert len(picture.getcolors(1000)) > 100


@pytest.mark.slow
def test_train_takes_images_that_are_named(parts):
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (20, 7, 9, 1), dtype=np.uint8)
    np.savez(parts.results / "images.npz", images=images)
    (line,) = parts("train", DATA=str(parts.results / "images.npz"))
    end = json.loads((parts.results / "train.jsonl").read_text().splitlines()[-1])
    assert line.startswith("train: done: {") and end["data"].endswith("images.npz")
    (line,) = parts("train", DATA="nowhere.npz", OUT=str(parts.results / "other"))
    assert "exit status 1: ValueError: data must be digits" in line


@pytest.mark.slow
def test_a_training_that_was_interrupted_goes_on(parts):
    """Its file says that two steps were done and timed."""
    parts("train")
    file = parts.results / "train.jsonl"
    lines = file.read_text().splitlines()
    before = [json.loads(line) for line in lines]
    import torch

    state = torch.load(parts.results / "train-state.pt", weights_only=True)
    assert state["step"] == 4
    torch.save(state | {"step": 2}, parts.results / "train-state.pt")
    file.write_text("".join(f"{line}\n" for line in lines[:5]))
    parts("train")
    after = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.get("step") for row in after] == [row.get("step") for row in before]
    assert after[:5] == before[:5] and after[-1]["end"] == 4
    assert parts("train")[0].startswith("train: done: there already")


@pytest.mark.slow
def test_check_runs_no_test_twice_that_has_passed(parts):
    (first,) = parts("check", select="group_size and cuda and (4 or 300)")
    passed = passed_of(parts.results / "check.jsonl")
    assert re.search(r"check: done: .*2 passed", first) and len(passed) == 2
    (second,) = parts("check", select="group_size and cuda and not 100_000")
    assert passed_of(parts.results / "check.jsonl")[:2] == passed and "done" in second
    assert (
        len(passed_of(parts.results / "check.jsonl"))
        == len(set(passed_of(parts.results / "check.jsonl")))
        > 2
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_benchmark_leaves_its_rows_and_those_of_the_run_before(parts):
    (line,) = parts("bench-ops", select="random and normal-18")
    assert "random: done" in line and "normalise: nothing selected" in line
    parts("bench-ops", select="random and uniform-18")
    found = json.loads((parts.results / "gpu.json").read_text())
    assert found["device"] == "emulated" and {row["op"] for row in found["rows"]} == {
        "random.normal",
        "random.uniform",
    }
    for row in found["rows"]:
        assert {"cuda", "triton", "ceiling", "eager"} <= set(row["seconds"]) and {
            "cuda",
            "triton",
        } <= set(row["replayed"])


@pytest.mark.slow
def test_tune_goes_on_where_its_file_ends_and_says_what_it_found(parts):
    assert parts("tune", select="activate_")[0].startswith("tune: done")
    file = parts.results / "tune.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["kernel"] for row in rows} == {"activate_dual", "activate_jet"} and all(
        row["microseconds"] > 0 for row in rows
    )
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:-1]))
    parts("tune", select="activate_")
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[:-1] == rows[:-1] and again[-1]["entry"] == rows[-1]["entry"]
    verdict = (parts.results / "tune.log").read_text()
    assert "activate_dual: " in verdict and "activate_jet: " in verdict and "takes" in verdict


def test_an_entry_is_changed_where_another_one_is_quicker(capsys):
    import tune

    def row(call, block, microseconds):
        return {
            "kernel": "fill",
            "call": call,
            "entry": {"BLOCK": block},
            "microseconds": microseconds,
        }

    rows = [
        row("a", 512, 10.0),
        row("b", 512, 20.0),
        row("a", 1024, 9.0),
        row("b", 1024, 18.0),
        row("a", 256, 5.0),
        row("b", 256, None),
    ]
    (line,) = tune.verdict(rows)
    assert "change kernels/tiles.py" in line and '{"BLOCK": 1024} takes 0.900' in line
    assert "keep" in tune.verdict(rows[:2] + [row("a", 1024, 9.9), row("b", 1024, 19.8)])[0]


@pytest.mark.parametrize(
    "ncu",
    ["there", *(pytest.param(ncu, marks=pytest.mark.slow) for ncu in ("absent", "forbidden"))],
)
def test_profile_takes_ncu_where_it_may(parts, tmp_path, ncu):
    tools = tmp_path / "tools"
    tools.mkdir()
    script = 'while [ "$1" != --log-file ]; do shift; done\necho "a,b" > "$2"\nshift 2\nexec "$@"\n'
    if ncu != "absent":
        (tools / "ncu").write_text("#!/bin/sh\n" + (script if ncu == "there" else "exit 1\n"))
        (tools / "ncu").chmod(0o755)
    for name in workloads():
        if name != "normal":   # all others are there
            (tmp_path / f"profile-{name.replace(' ', '-')}.csv").write_text("")
    (line,) = parts("profile=170", PATH=f"{tools}:{os.environ['PATH']}")
    said = {
        "absent": "normal: no ncu, without it: done",
        "there": "normal: done",
        "forbidden": "normal: exit status 1, without it: done",
    }
    assert said[ncu] in line and "rademacher: there already" in line
    text = (tmp_path / "profile-normal.csv").read_text()
    assert text == "a,b\n" if ncu == "there" else "normal bf16 cuda" in text


def workloads():
    from workloads import WORKLOADS

    return WORKLOADS


def test_a_part_that_fails_does_not_take_the_next_with_it(parts):
    broken, ceilings = parts("no-such-part=5", "ceilings")
    assert broken.startswith("no-such-part: KeyError") and ceilings.startswith("ceilings: done")
    (late,) = parts("check=1", select="group_size and cuda")
    assert late.startswith("check: cut off after 1 s")


@pytest.mark.slow
@pytest.mark.processes
def test_an_interruption_ends_the_part_and_its_process(tmp_path):
    environment = os.environ | {
        "FASTSCORE_EMULATED": "1",
        "OUT": str(tmp_path),
        "FASTSCORE_GPU_SELECT": "cuda",
    }
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "check"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "check.jsonl"
    until = time.monotonic() + 120
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)   # to this process alone, as a scheduler sends it
    out, _ = process.communicate(timeout=60)
    assert out.startswith("check: interrupted") and passed_of(log)
    size = log.stat().st_size
    time.sleep(2)
    assert log.stat().st_size == size   # nobody goes on


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_part_runs_to_its_end(parts):
    names = "bench-ops", "bench-losses", "bench-loops", "tune", "profile"
    lines = parts(*(f"{name}=900" for name in names), seconds=2900)
    assert [line.split(":")[0] for line in lines] == list(names)
    for line in lines[:3]:
        assert re.fullmatch(r"[\w-]+: (\w+: done(; )?)+ \(\d+ s\)", line), line
    assert lines[3].startswith("tune: done") and lines[4].count("done") == len(workloads())
    assert not [
        row
        for row in map(json.loads, (parts.results / "tune.jsonl").read_text().splitlines())
        if "error" in row
    ]
