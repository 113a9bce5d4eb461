"""Everything that only a GPU can tell, in parts.

`python build_support/on_gpu.py build check=200 bench-ops bench-losses/energy ...`.

Each part has a time limit in seconds, never stops the next one, and leaves what it has found in a
file as it goes ($OUT, else gpu-results/): a part that is called again goes on from there. SIGINT
ends the running part and keeps its file. Needs torch, triton, pytest, ninja or g++, nvcc; no
network.

FASTSCORE_EMULATED=1 is a dry run without a GPU: the same lines, with tiny sizes, on the device of
build_support/emulate.py and Triton's interpreter. FASTSCORE_GPU_SELECT, as pytest's -k, takes a
part of the tests and benchmarks.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("OUT") or ROOT / "gpu-results")
EMULATED = os.environ.get("FASTSCORE_EMULATED") == "1"
BENCHMARKS = {
    "bench-ops": (
        "random",
        "noisy_update",
        "denoising_loss",
        "normalise",
        "rademacher_project",
        "activate",
    ),
    "bench-losses": ("sliced", "energy"),
    "bench-loops": ("sampling",),
}
SECONDS = {"build": 180, "ceilings": 60, "check": 480, "bench-ops": 240, "bench-losses": 240}
SECONDS |= {"bench-loops": 240, "tune": 240, "profile": 180, "train": 420}
METRICS = (   # of ncu: share of the memory's and the arithmetic's peak, time, registers, occupancy
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def environment() -> dict:
    """Ours first on the path.

    The compiled kernels of Triton and Inductor are kept between parts.
    """
    ours = (str(ROOT / folder) for folder in ("", "build_support", "benchmarks"))
    path = os.pathsep.join(filter(None, (*ours, os.environ.get("PYTHONPATH"))))
    emulated = {"FASTSCORE_GPU_TESTS_ON": "cpu", "TRITON_INTERPRET": "1"} if EMULATED else {}
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | emulated


def run(command: list[str], seconds: float, log: Path, env: dict | None = None) -> str:
    """One command with its output in a file.

    SIGINT at the limit, so that pytest still writes its summary.
    """
    with log.open("a") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env or environment(), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(seconds)
            return "done" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            end(process)
            return f"cut off after {seconds:.0f} s"
        except KeyboardInterrupt:   # which may have come to this process alone
            end(process)
            raise


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def build() -> str:
    """In place, for this GPU alone; an extension with CUDA that is there already is kept."""
    kernels = ROOT / "fastscore" / "kernels"
    if not kernels.exists():
        kernels.symlink_to("../kernels")
    served = (
        "from fastscore import backend as b; r = b.why_not('cuda', 'cuda'); print(r); "
        "assert r is None"
    )
    log = RESULTS / "build.log"
    if run([sys.executable, "-c", served], 60, log) == "done":
        return "kept the extension that is here"
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    env = environment() | {"TORCH_CUDA_ARCH_LIST": capability, "FASTSCORE_BUILD": "cuda"}
    command = ["build_support/emulate.py"] if EMULATED else ["setup.py", "build_ext", "--inplace"]
    return run([sys.executable, *command], SECONDS["build"], log, env)


def ceilings() -> str:
    """Of memory and of the arithmetic units; every figure is written as soon as it is known."""
    log = RESULTS / "ceilings.log"
    outcome = run(
        [sys.executable, "build_support/ceilings.py", str(RESULTS / "ceilings.json")],
        SECONDS["ceilings"],
        log,
    )
    found = RESULTS / "ceilings.json"
    return f"{outcome}: {found.read_text().strip() if found.exists() else 'nothing'}"


def selected() -> list[str]:
    choice = os.environ.get("FASTSCORE_GPU_SELECT")
    return ["-k", choice] if choice else []


def check() -> str:
    """tests/test_gpu.py in parallel processes, for Triton compiles on the CPU.

    What has passed is not run again.
    """
    found = RESULTS / "check.jsonl"
    lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    passed = [line["test"] for line in lines if line["outcome"] == "passed"]
    command = [
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-p",
        "no:cacheprovider", *selected(),
    ]
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    try:
        import xdist  # noqa: F401

        command += ["-n", str(workers)]
    except ImportError:
        pass
    env = environment() | {"FASTSCORE_TEST_LOG": str(found), "OMP_NUM_THREADS": "1"}
    if passed:
        skip = RESULTS / "passed.txt"
        skip.write_text("\n".join(passed))
        env["FASTSCORE_TESTS_PASSED"] = str(skip)
    log = RESULTS / "check.log"
    outcome = run(command, SECONDS["check"], log, env)
    return f"{outcome}: {log.read_text().strip().splitlines()[-1]}"


def bench(part: str) -> str:
    """Each file of benchmarks, or the one behind a slash, in a process of its own.

    A row is written as soon as it is measured.
    """
    end, outcomes = time.monotonic() + SECONDS[part], []
    name, _, chosen = part.partition("/")
    for stem in [chosen] if chosen else BENCHMARKS[name]:
        left = end - time.monotonic()
        if left < 5:
            outcomes.append(f"{stem}: no time left")
            continue
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"benchmarks/bench_{stem}.py",
            "--device",
            "emulated" if EMULATED else "cuda",
        ]
        command += ["-p", "no:cacheprovider", "--results", str(RESULTS / "gpu.json"), *selected()]
        outcome = run(command, left, RESULTS / f"{name}.log")
        outcomes.append(f"{stem}: {'nothing selected' if outcome == 'exit status 5' else outcome}")
    return "; ".join(outcomes)


def tune() -> str:
    """Time every entry of the table of tiles beside its neighbours."""
    command = [sys.executable, "build_support/tune.py", str(RESULTS / "tune.jsonl"), *selected()]
    return run(command, SECONDS["tune"], RESULTS / "tune.log")


def train() -> str:
    """A score network of CIFAR's size, on the images named by $DATA, else on drawn ones."""
    seconds = SECONDS["train"]
    command = [sys.executable, "build_support/gpu_train.py", str(RESULTS), str(0.9 * seconds)]
    log = RESULTS / "train.log"
    outcome = run(command, seconds, log)
    said = log.read_text().strip().splitlines()
    return f"{outcome}: {said[-1] if said else 'nothing'}"


def profile() -> str:
    """Each workload under ncu, or under PyTorch's profiler where that is not.

    One file for each, and none twice.
    """
    from workloads import WORKLOADS

    end, outcomes, ncu = time.monotonic() + SECONDS["profile"], [], shutil.which("ncu")
    for name in WORKLOADS:
        file = RESULTS / f"profile-{name.replace(' ', '-')}.csv"
        left = end - time.monotonic()
        if file.exists() or left < 5:
            outcomes.append(f"{name}: {'there already' if file.exists() else 'no time left'}")
            continue
        new = file.with_suffix(".new")   # a file that is there is whole
        new.unlink(missing_ok=True)
        outcome = "no ncu"
        if ncu:
            command = [
                ncu,
                "--csv",
                "--metrics",
                ",".join(METRICS),
                "--target-processes",
                "all",
                "--log-file",
                str(new),
            ]
            outcome = run(
                [*command, sys.executable, "build_support/workloads.py", name],
                left,
                RESULTS / "profile.log",
            )
        left = end - time.monotonic()
        if outcome != "done" and left >= 5:   # counters may be forbidden
            command = [sys.executable, "build_support/profiled.py", name, str(new)]
            outcome = f"{outcome}, without it: {run(command, left, RESULTS / 'profile.log')}"
        if outcome.endswith("done") and new.exists():
            new.replace(file)
        outcomes.append(f"{name}: {outcome}")
    return "; ".join(outcomes)


def main(parts: list[str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    own = {"build": build, "ceilings": ceilings, "check": check, "tune": tune, "profile": profile}
    own |= {"train": train}
    for part in parts:
        part, _, seconds = part.partition("=")
        SECONDS[part] = float(seconds or SECONDS[part.split("/")[0]])
        start = time.monotonic()
        try:
            outcome = own[part]() if part in own else bench(part)
        except KeyboardInterrupt:
            outcome = "interrupted"
        except Exception as error:   # a part that breaks must not take the others with it
            outcome = f"{type(error).__name__}: {error}"
        line = f"{part}: {outcome} ({time.monotonic() - start:.0f} s)"
        print(line, flush=True)
        with (RESULTS / "parts.log").open("a") as log:
            log.write(line + "\n")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "build_support")]
    # A script's background jobs ignore SIGINT, and so would the parts that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        if EMULATED:
            import emulate

            stack.enter_context(emulate.torch_cuda())
        every = ["build", "ceilings", "check", *BENCHMARKS, "train", "tune", "profile"]
        main(sys.argv[1:] or every)
