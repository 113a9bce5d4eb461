"""Kernels and their times by PyTorch's own profiler, where ncu is not to be had.

`profiled.py WORKLOAD FILE`.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import EMULATED, WORKLOADS, calls

CALLS = 5

with contextlib.ExitStack() as stack:
    if EMULATED:
        import emulate

        stack.enter_context(emulate.installed())
        stack.enter_context(emulate.torch_cuda())
    lines = ["call,kernel,microseconds,count"]
    for label, dtype, backend in calls(sys.argv[1]):
        with torch.no_grad():
            call = WORKLOADS[sys.argv[1]].make(dtype, backend)
            call()
            torch.cuda.synchronize()
            with profile(
                activities=[ProfilerActivity.CPU] if EMULATED else [ProfilerActivity.CUDA]
            ) as found:
                for _ in range(CALLS):
                    call()
                torch.cuda.synchronize()
        for event in found.key_averages():
            spent = event.self_cpu_time_total if EMULATED else event.self_device_time_total
            lines.append(f'{label},"{event.key}",{spent / CALLS:.1f},{event.count}')
    Path(sys.argv[2]).write_text("\n".join(lines) + "\n")
