"""Time every entry of the table of tiles beside its neighbours: `tune.py FILE [-k KERNEL]`.

A line for each (kernel, call, entry) as soon as it is measured; what is in the file already is not
measured again. At the end, or when it is cut off, the quickest entries are printed, and where they
are worth a change of kernels/tiles.py.
"""

import argparse
import contextlib
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from harness import captured
from workloads import EMULATED, WORKLOADS, calls, least_bytes

from fastscore.kernels import tiles

USED_BY = {
    "fill": ("normal",),
    "signs": ("rademacher",),
    "noise_reduce": ("denoising_loss",),
    "noisy_update": ("langevin_step", "langevin_step per sample"),
    "normalise": ("instance_norm_plus", "instance_norm_plus backward"),
    "normalise with tangents": ("instance_norm_plus dual",),
    "activate_dual": ("activate_dual",),
    "activate_jet": ("activate_jet", "activate_jet backward"),
}
WORTH = 0.02   # a gain that a second run would show again
CALLS = 1 if EMULATED else 20


def seconds(call) -> float:
    """Of one call in a graph of CALLS, the least of several replays."""
    graph = captured(call, CALLS)
    times = []
    for _ in range(1 if EMULATED else 7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000 / CALLS)
    return min(times)


def entries(kernel: str) -> list[dict[str, int]]:
    """The one in use first; of a dry run one more."""
    used = tiles.tile(kernel, torch.device("cpu" if EMULATED else "cuda:0"))
    others = [entry for entry in tiles.CANDIDATES[kernel] if entry != used]
    return [used, *others[: 1 if EMULATED else None]]


def measure(file: Path, chosen: str) -> None:
    found = read(file)
    known = {(row["call"], json.dumps(row["entry"])) for row in found}
    for kernel in tiles.CANDIDATES:
        if chosen not in kernel:
            continue
        for workload, entry in itertools.product(USED_BY[kernel], entries(kernel)):
            for label, dtype, backend in calls(workload):
                if backend != "triton" or (label, json.dumps(entry)) in known:
                    continue
                row = {"kernel": kernel, "call": label, "entry": entry}
                try:
                    with tiles.trying(kernel, entry), torch.no_grad():
                        t = seconds(WORKLOADS[workload].make(dtype, backend))
                    row |= {
                        "microseconds": round(t * 1e6, 2),
                        "GB/s": round(least_bytes(workload, dtype) / t / 1e9),
                    }
                # An entry that does not compile or launch is a result, too.
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def verdict(rows: list[dict]) -> list[str]:
    """For each kernel the entry with the least total of its calls' times relative to those of
    the entry in use."""
    lines = []
    for kernel, group in itertools.groupby(
        sorted(rows, key=lambda row: row["kernel"]), key=lambda row: row["kernel"]
    ):
        times = {}
        for row in group:
            times.setdefault(json.dumps(row["entry"]), {})[row["call"]] = row.get("microseconds")
        used, *others = times   # the one in use is measured first
        ratios = {used: 1.0}
        for entry in others:
            pairs = [(times[entry].get(call), t) for call, t in times[used].items() if t]
            if pairs and all(new for new, _ in pairs):
                ratios[entry] = sum(new / old for new, old in pairs) / len(pairs)
        best = min(ratios, key=ratios.get)
        change = "change kernels/tiles.py" if ratios[best] < 1 - WORTH else "keep"
        lines.append(
            f"{kernel}: {change}; best {best} takes {ratios[best]:.3f} of the time of {used} "
            f"({len(ratios)} entries)"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("-k", default="")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if EMULATED:
            import emulate

            stack.enter_context(emulate.torch_cuda())
        with contextlib.suppress(KeyboardInterrupt):
            measure(options.file, options.k)
    print("\n".join(verdict(read(options.file))), flush=True)
