"""What this GPU can do at best: `ceilings.py FILE`.

GB/s of a copy, a read, a write; G/s of Philox blocks, of exp2 and of fma alone.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from workloads import DEVICE, EMULATED

from fastscore.kernels.philox import philox

BYTES = 2**14 if EMULATED else 2**31
# Enough programs for every multiprocessor.
PROGRAMS, LANES, ROUNDS = (2, 128, 2) if EMULATED else (132 * 16, 1024, 256)


@triton.jit
def philox_only(out_ptr, seed, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    """ROUNDS Philox blocks per lane and one word written for all of them."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.uint32)
    zero = (seed * 0).to(tl.uint32)
    for i in range(ROUNDS):
        w0, w1, w2, w3 = philox(lane * ROUNDS + i, zero, zero + 1, zero + 5, zero + 7, False)
        total ^= w0 ^ w1 ^ w2 ^ w3
    tl.store(out_ptr + lane, total.to(tl.int32, bitcast=True))


@triton.jit
def exp2_only(out_ptr, seed, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    x = tl.zeros([LANES], tl.float32) + seed.to(tl.float32) - 1.5
    for _ in range(ROUNDS):
        x = tl.exp2(x)
    tl.store(out_ptr + lane, x.to(tl.int32))


@triton.jit
def fma_only(out_ptr, seed, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    x = tl.zeros([LANES], tl.float32) + seed.to(tl.float32)
    for _ in range(ROUNDS):
        x = tl.fma(x, x, x)
    tl.store(out_ptr + lane, x.to(tl.int32))


def seconds(task) -> float:
    times = []
    for _ in range(2 if EMULATED else 12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return sorted(times)[len(times) // 2]


def main(path: Path) -> None:
    a = torch.randn(BYTES // 4, device=DEVICE)
    b, words = torch.empty_like(a), torch.empty(PROGRAMS * LANES, dtype=torch.int32, device=DEVICE)
    tasks = {
        "copy": (2 * BYTES, lambda: b.copy_(a)),
        "read": (BYTES, lambda: a.sum()),
        "write": (BYTES, lambda: b.zero_()),
    }
    for name, kernel in {"philox blocks": philox_only, "exp2": exp2_only, "fma": fma_only}.items():
        launch = kernel[(PROGRAMS,)]
        tasks[name] = (
            words.numel() * ROUNDS,
            lambda launch=launch: launch(words, 3, ROUNDS=ROUNDS, LANES=LANES),
        )

    figures = {"device": torch.cuda.get_device_name()}
    for name, (work, task) in tasks.items():
        figures[name] = round(work / seconds(task) / 1e9, 3)
        path.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        if EMULATED:
            import emulate

            stack.enter_context(emulate.torch_cuda())
        main(Path(sys.argv[1]))
