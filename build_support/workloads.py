"""One call of each kernel at the size at which its limit shows, for `make gpu-tune`, `make
gpu-profile` and the model of docs/gpu.md.

`python build_support/workloads.py NAME` makes a few calls of one, for a profiler to look at.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

import fastscore
from fastscore import random
from fastscore.ops.activate import activate_dual, activate_jet
from fastscore.ops.rademacher_project import project

# a dry run: build_support/emulate.py, tiny sizes.
EMULATED = os.environ.get("FASTSCORE_EMULATED") == "1"
DEVICE = "cpu" if EMULATED else "cuda"
SIZE = 2**13 if EMULATED else 2**26
IMAGES = (2, 8, 8, 8) if EMULATED else (128, 128, 32, 32)
IN_CLUSTERS = (2, 20, 30, 30) if EMULATED else IMAGES   # samples that a cluster takes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Workload(NamedTuple):
    """What a call must move is `bytes` for each of its elements, at least."""

    make: Callable   # (dtype, backend) -> a call without arguments
    kernels: tuple[str, ...]   # entries of fastscore.kernels.tiles
    tensors: int   # of the element type that must be read or written once
    cuda: bool   # whether CUDA C++ has it, too


@functools.cache
def generator():
    """One that no graph knows: the default one is of no use after a capture that failed."""
    return torch.Generator(DEVICE).manual_seed(0)


def _fill(kind):
    def make(dtype, backend):
        return lambda: getattr(random, kind)(
            SIZE, seed=1, stream=1024, device=DEVICE, dtype=dtype, backend=backend
        )

    return make


def _langevin(per_sample):
    def make(dtype, backend):
        x, s = (
            torch.randn(SIZE // 64, 64, device=DEVICE, generator=generator()).to(dtype)
            for _ in range(2)
        )
        e = torch.full((len(x),), 1e-3, device=DEVICE) if per_sample else 1e-3
        return lambda: fastscore.langevin_step(x, s, e, seed=1, backend=backend)

    return make


def _loss(dtype, backend):
    s = torch.randn(64, SIZE // 64, device=DEVICE, generator=generator()).to(dtype)
    return lambda: fastscore.denoising_loss(s, 0.5, seed=1, backend=backend)


def _images(dtype, shape=IMAGES):
    x = torch.randn(shape, device=DEVICE, generator=generator()).to(dtype)
    return x, [
        torch.rand(shape[1], device=DEVICE, generator=generator()).add(0.5) for _ in range(3)
    ]


def _norm(dtype, backend, shape=IMAGES):
    x, c = _images(dtype, shape)
    return lambda: fastscore.instance_norm_plus(
        x, *(k.to(dtype) for k in c), activation="elu", backend=backend
    )


def _norm_backward(dtype, backend):
    x, c = _images(dtype)
    leaves = [t.to(dtype).requires_grad_() for t in (x, *c)]
    with torch.enable_grad():
        y = fastscore.instance_norm_plus(*leaves, activation="elu", backend=backend)
    return lambda: torch.autograd.grad(y, leaves, x, retain_graph=True)


def _norm_dual(dtype, backend):
    x, c = _images(dtype)
    t = torch.randn(1, *IMAGES, device=DEVICE, generator=generator()).to(dtype)
    return lambda: fastscore.ops.instance_norm_plus_dual(
        x, t, *(k.to(dtype) for k in c), activation="elu", backend=backend
    )


def _project(dtype, backend):
    s = torch.randn(64, SIZE // 64, device=DEVICE, generator=generator()).to(dtype)
    js = torch.randn(1, *s.shape, device=DEVICE, generator=generator()).to(dtype)
    return lambda: project(s, js, None, (1, 0, random.PROJECTION, 0), backend)


def _stack(dtype, backend):
    s = torch.randn(2, SIZE // 2, device=DEVICE, generator=generator()).to(dtype)
    return lambda: activate_dual(s, "silu", backend)


def _curve(dtype):
    return torch.randn(3, SIZE // 4, device=DEVICE, generator=generator()).to(dtype)


def _jet(dtype, backend):
    s = _curve(dtype)
    return lambda: activate_jet(s, 1, "silu", backend)


def _jet_backward(dtype, backend):
    s, g = _curve(dtype).requires_grad_(), _curve(dtype)
    with torch.enable_grad():
        y = activate_jet(s, 1, "silu", backend)
    return lambda: torch.autograd.grad(y, s, g, retain_graph=True)


NORM = ("moments", "apply")
WORKLOADS = {
    "normal": Workload(_fill("normal"), ("fill",), 1, True),
    "rademacher": Workload(_fill("rademacher"), ("fill",), 1, True),
    "langevin_step": Workload(_langevin(False), ("noisy_update",), 3, True),
    "langevin_step per sample": Workload(_langevin(True), ("noisy_update",), 3, True),
    "denoising_loss": Workload(_loss, ("noise_reduce",), 1, True),
    "instance_norm_plus": Workload(_norm, NORM, 2, False),
    "instance_norm_plus in clusters": Workload(
        functools.partial(_norm, shape=IN_CLUSTERS), NORM, 2, True
    ),
    "instance_norm_plus backward": Workload(
        _norm_backward, ("cotangent_sums", "gradient"), 3, False
    ),
    "instance_norm_plus dual": Workload(_norm_dual, NORM, 4, False),
    "project": Workload(_project, ("project",), 2, False),
    "activate_dual": Workload(_stack, ("activate_dual",), 2, False),
    # Three parts of a curve in and out.
    "activate_jet": Workload(_jet, ("activate_jet",), 6, False),
    "activate_jet backward": Workload(_jet_backward, ("activate_jet",), 9, False),
}
PARTS = {"activate_dual": 2, "activate_jet": 4, "activate_jet backward": 4}   # of SIZE, in values


def elements(name: str) -> int:
    numbers = 1
    for n in IN_CLUSTERS if "clusters" in name else IMAGES:
        numbers *= n
    return numbers if "norm" in name else SIZE // PARTS.get(name, 1)


def least_bytes(name: str, dtype: torch.dtype) -> int:
    return elements(name) * WORKLOADS[name].tensors * dtype.itemsize


def calls(name: str):
    """(label, dtype, back end) of every form of a workload."""
    backends = ("cuda", "triton") if WORKLOADS[name].cuda else ("triton",)
    return [
        (f"{name} {label} {backend}", dtype, backend)
        for label, dtype in DTYPES.items()
        for backend in backends
    ]


if __name__ == "__main__":
    import contextlib

    with contextlib.ExitStack() as stack:
        if EMULATED:
            import emulate

            stack.enter_context(emulate.installed())
            stack.enter_context(emulate.torch_cuda())
        with torch.no_grad():
            for _, dtype, backend in calls(sys.argv[1]):
                call = WORKLOADS[sys.argv[1]].make(dtype, backend)
                for _ in range(2):
                    call()
                torch.cuda.synchronize()
