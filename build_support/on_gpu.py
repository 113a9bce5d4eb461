"""Everything that only a GPU can tell, in parts: `python build_support/on_gpu.py build check=200 bench-ops ...`.

Each part has a time limit in seconds, never stops the next one, and leaves what it has found in a file as it goes ($OUT, else
gpu-results/): a part that is called again goes on from there. SIGINT ends the running part and keeps its file.
Needs torch, triton, pytest, ninja or g++, nvcc; no network.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("OUT") or ROOT / "gpu-results")
BENCHMARKS = {
    "bench-ops": ("random", "langevin_step", "denoising_loss", "normalise", "rademacher_jvp"),
    "bench-losses": ("sliced", "energy"),
    "bench-loops": ("sampling",),
}
SECONDS = {"build": 180, "ceilings": 60, "check": 480, "bench-ops": 240, "bench-losses": 240}
SECONDS |= {"bench-loops": 240}


def environment() -> dict:
    """Ours first on the path; the compiled kernels of Triton and Inductor are kept between parts."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(command: list[str], seconds: float, log: Path, env: dict | None = None) -> str:
    """One command with its output in a file; SIGINT at the limit, so that pytest still writes its summary."""
    with log.open("a") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env or environment(), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(seconds)
            return "done" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            process.send_signal(2)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"cut off after {seconds:.0f} s"


def build() -> str:
    """In place, for this GPU alone; an extension with CUDA that is there already is kept."""
    kernels = ROOT / "fastscore" / "kernels"
    if not kernels.exists():
        kernels.symlink_to("../kernels")
    served = "from fastscore import backend as b; r = b.why_not('cuda', 'cuda'); print(r); assert r is None"
    log = RESULTS / "build.log"
    if run([sys.executable, "-c", served], 60, log) == "done":
        return "kept the extension that is here"
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    env = environment() | {"TORCH_CUDA_ARCH_LIST": capability, "FASTSCORE_BUILD": "cuda"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run(command, SECONDS["build"], log, env)


def ceilings() -> str:
    """GB/s of a copy, of reading and of writing 2 GiB."""
    import torch

    n = 2**29
    a = torch.randn(n, device="cuda")
    b = torch.empty_like(a)
    tasks = {"copy": (8 * n, lambda: b.copy_(a)), "read": (4 * n, lambda: a.sum()), "write": (4 * n, lambda: b.zero_())}
    figures = {"device": torch.cuda.get_device_name()}
    for name, (size, task) in tasks.items():
        times = []
        for _ in range(12):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            task()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        figures[name] = round(size / sorted(times)[6] / 1e6)
    (RESULTS / "ceilings.json").write_text(json.dumps(figures) + "\n")
    return str(figures)


def check() -> str:
    """tests/test_gpu.py in parallel processes, for Triton compiles on the CPU; what has passed is not run again."""
    found = RESULTS / "check.jsonl"
    lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    passed = [line["test"] for line in lines if line["outcome"] == "passed"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-p", "no:cacheprovider"]
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
    """Each file of benchmarks in a process of its own; a row is written as soon as it is measured."""
    end, outcomes = time.monotonic() + SECONDS[part], []
    for stem in BENCHMARKS[part]:
        left = end - time.monotonic()
        if left < 5:
            outcomes.append(f"{stem}: no time left")
            continue
        command = [sys.executable, "-m", "pytest", "-q", f"benchmarks/bench_{stem}.py", "--device", "cuda"]
        command += ["-p", "no:cacheprovider", "--results", str(RESULTS / "gpu.json")]
        outcomes.append(f"{stem}: {run(command, left, RESULTS / f'{part}.log')}")
    return "; ".join(outcomes)


def main(parts: list[str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    own = {"build": build, "ceilings": ceilings, "check": check}
    for part in parts:
        part, _, seconds = part.partition("=")
        SECONDS[part] = float(seconds or SECONDS[part])
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
    main(sys.argv[1:] or ["build", "ceilings", "check", *BENCHMARKS])
