"""What a call costs the host before its kernel is in the GPU's queue.

a tiny tensor on the CPU, and launches that run nothing.

Triton's driver is a mocked one; what is timed goes up to the call of its launcher in C. CUDA C++ is
that of the emulated device (build_support/emulate.py), which checks the tensors of each launch: a
microsecond too much. Eager's operations run, on 96 elements. The ceiling is one `torch.empty_like`,
which every call makes for its result.

Calls are as a user writes them, without a back end: plain ones go directly, for which the door
serves the CPU's tensors as it does a GPU's, and nothing is chosen.
"""

import contextlib
import functools
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import fastscore
from fastscore import backend as backends
from fastscore import direct
from fastscore.ops.activate import activate_dual

sys.path.insert(0, str(Path(__file__).parent.parent / "build_support"))
import emulate

SHAPE, SIGMA, EPSILON = (2, 3, 4, 4), 0.5, 0.1
DIRECT = "langevin_step", "denoising_loss", "instance_norm_plus"
WITHOUT_CUDA = "instance_norm_plus", "conditional_instance_norm_plus", "activate_dual"


class Compiled:
    function = packed_metadata = None

    def launch_metadata(self, grid, stream, *args):
        return None

    run = staticmethod(lambda *args: None)


@contextlib.contextmanager
def mocked_triton():
    """Within: Triton serves tensors on the CPU, and its driver launches nothing."""
    triton = pytest.importorskip("triton")
    if backends.interpreting():
        pytest.skip("Triton's interpreter is on: run this with TRITON_INTERPRET=0")
    assert backends.load_triton() is None
    launching = sys.modules["fastscore.kernels.launch"]
    importlib.import_module("fastscore.kernels.direct")
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    backends._choose.cache_clear()
    try:
        with (
            mock.patch.object(backends, "interpreting", lambda: True),
            mock.patch.object(triton.runtime.driver, "_active", driver),
            mock.patch.object(
                triton.runtime.jit.JITFunction,
                "__getitem__",
                lambda self, grid: lambda *args, **constants: Compiled(),
            ),
            mock.patch.object(launching, "_compiled", {}),
            mock.patch.object(sys.modules["fastscore.kernels.direct"], "_plans", {}),
        ):
            yield
    finally:
        backends._choose.cache_clear()


@contextlib.contextmanager
def stub_cuda():
    with emulate.installed() as device:
        device.emulated_stub(1)
        try:
            yield
        finally:
            device.emulated_stub(0)


class Served:
    """Direct calls of tensors on the CPU: served by Triton's launchers or by CUDA C++.

    Who serves changes between two timings only; within one it costs a comparison.
    """

    now = None

    def __init__(self, backend, call):
        self.backend, self.call = backend, call

    def __call__(self):
        if Served.now is not self.backend:
            self.serve()
        self.call()

    def serve(self):
        if self.backend == "cuda":
            direct.door.serve(direct.CPU, emulate.driver().emulated_launches(), None)
        else:
            from fastscore.kernels.direct import LAUNCHERS

            direct.door.serve(direct.CPU, 0, LAUNCHERS)
        Served.now = self.backend


@contextlib.contextmanager
def nothing_chosen():
    """Within: a call that is not direct is an error, and not one of the CPU's kernels."""
    if direct.door is None:
        backends.load_extension()

    def chosen(*arguments):
        raise AssertionError("the call was not plain")

    try:
        with mock.patch.object(backends, "_resolve", chosen):
            yield
    finally:
        direct.door.serve(direct.CPU, 0, None)
        Served.now = None


@pytest.fixture(autouse=True)
def mocked(device, threads):
    if device != "cpu":
        pytest.skip("on a GPU the columns 'in a graph' and 'time' tell the host's part")
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mocked_triton())
        if emulate.why_not() is None:
            stack.enter_context(stub_cuda())
        yield


def eager_norm(x, gamma, alpha, beta):
    means = x.mean((2, 3))
    m = (means - means.mean(1, keepdim=True)) / torch.sqrt(means.var(1, keepdim=True) + 1e-5)
    h = F.instance_norm(x) + (alpha * m)[..., None, None]
    return F.elu(gamma[..., None, None] * h + beta[..., None, None])


def eager_dual(s):
    sigmoid = s[0].sigmoid()
    return torch.stack([s[0] * sigmoid, s[1] * sigmoid * (1 + s[0] * (1 - sigmoid))])


def problems():
    """{name: (ours, of the backend unless it is direct, eager, whether it asks for gradients)}."""
    x, s = torch.randn(SHAPE), torch.randn(SHAPE)
    gamma, alpha, beta = torch.rand(3), torch.rand(3), torch.rand(3)
    labels, table, stack = (
        torch.tensor([1, 2]),
        torch.rand(10, 9, requires_grad=True),
        torch.randn(2, 96),
    )
    leaf = torch.randn(SHAPE, requires_grad=True)

    def conditional(backend):
        y = fastscore.conditional_instance_norm_plus(
            leaf, labels, table, activation="elu", backend=backend
        )
        return torch.autograd.grad(y, (leaf, table), s)

    def eager_conditional():
        return torch.autograd.grad(eager_norm(leaf, *table[labels].chunk(3, 1)), (leaf, table), s)

    def eager_loss():
        return 0.5 * (SIGMA * s + torch.randn_like(s)).square().flatten(1).sum(1)

    def norm():
        return fastscore.instance_norm_plus(x, gamma, alpha, beta, activation="elu")

    return {
        "langevin_step": (
            lambda: fastscore.langevin_step(x, s, EPSILON, seed=5, step=7),
            lambda: x + EPSILON / 2 * s + EPSILON**0.5 * torch.randn_like(x),
            False,
        ),
        "denoising_loss": (
            lambda: fastscore.denoising_loss(s, SIGMA, seed=5),
            eager_loss,
            False,
        ),
        "instance_norm_plus": (norm, lambda: eager_norm(x, gamma, alpha, beta), False),
        "conditional_instance_norm_plus": (conditional, eager_conditional, True),
        "activate_dual": (
            lambda backend: activate_dual(stack, "silu", backend),
            lambda: eager_dual(stack),
            False,
        ),
    }


@pytest.mark.parametrize("name", ["langevin_step", "denoising_loss", *WITHOUT_CUDA])
def bench_host(compare, name):
    call, eager, graded = problems()[name]
    names = ["triton"] if name in WITHOUT_CUDA or emulate.why_not() else ["triton", "cuda"]
    like = torch.empty(SHAPE)
    straight = name in DIRECT
    calls = {
        backend: Served(backend, call) if straight else functools.partial(call, backend)
        for backend in names
    }
    calls["eager"] = eager
    with (
        contextlib.nullcontext() if graded else torch.no_grad(),
        nothing_chosen() if straight else contextlib.nullcontext(),
    ):
        compare(
            f"host, {name}" + graded * " + backward",
            like,
            like.nbytes,
            calls,
            ceiling=lambda: torch.empty_like(like),
        )
