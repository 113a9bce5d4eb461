"""Of several GPUs, every launch of Triton's goes to that of its tensors, on the stream that is
current there.

Two fake devices: PyTorch's own guard moves between them, and what is launched is noted, not run.
Kernels in CUDA C++: test_emulation.
"""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from fastscore import backend

if (reason := backend.load_triton()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fastscore import kernels

launching = importlib.import_module("fastscore.kernels.launch")


class OnSecond(torch.Tensor):
    """A tensor that says it lies on the second GPU."""

    is_cuda = True

    def get_device(self):
        return 1


def second(*shape):
    return torch.ones(*shape).as_subclass(OnSecond)


@pytest.fixture
def gpus(monkeypatch):
    """current: the device that is; launches: (kernel, device, stream) of each launch."""
    gpus = SimpleNamespace(current=0, launches=[])

    def exchange(device):
        before = gpus.current
        gpus.current = device if device >= 0 else before
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return gpus


@pytest.fixture
def noted(gpus, monkeypatch):
    def note(kernel, grid, *args, **constants):
        assert any(isinstance(a, OnSecond) for a in args)
        gpus.launches.append((kernel, gpus.current))

    for name, module in list(sys.modules.items()):
        if (
            name.startswith("fastscore.kernels")
            and getattr(module, "launch", None) is launching.launch
            and module is not launching
        ):
            monkeypatch.setattr(module, "launch", note)
    return gpus


KEY = (None, 5, 0, 9, 0)   # key, seed, step, stream, offset
NORM = (0, True, True, 1e-5, 2)   # groups, alpha, beta, eps, activation


def norm_arguments(pixels, M=0):
    """x, t, stats, coef and tcoef of a forward call."""
    x, t = second(2, 3, pixels, pixels), second(M, 2, 3, pixels, pixels) if M else None
    return x, t, second(1 + M, 2, 3, 2), second(1, 9), second(M, 1, 9) if M else None


def forward(pixels, M=0):
    x, t, stats, coef, tcoef = norm_arguments(pixels, M)
    y, ty = second(*x.shape), None if t is None else second(*t.shape)
    return y, ty, stats, x, t, coef, tcoef, None, *NORM


def backward(pixels, M=0):
    x, t, stats, coef, tcoef = norm_arguments(pixels, M)
    gx, gt = second(*x.shape), None if t is None else second(*t.shape)
    gcoef, gtcoef = second(*coef.shape), None if t is None else second(*tcoef.shape)
    return gx, gt, gcoef, gtcoef, x, t, stats, coef, tcoef, None, gx, gt, *NORM


x, long, rows = second(4, 64), second(2, 20_000), second(4)
js = second(1, 4, 64)
CALLS = {
    "fill": [(x, 2, *KEY)],
    "noisy_update": [(x, x, x, None, 0.1, rows, 0.0, *KEY)],
    "noise_reduce": [(rows, x, rows, 0.0, *KEY, 0), (second(2), long, None, 0.5, *KEY, 0)],
    "normalise": [forward(4), forward(100), forward(4, M=2)],
    "normalise_backward": [backward(4), backward(100), backward(4, M=2)],
    "rademacher_project": [
        (second(1, 4), None, None, js, None, 1, *KEY),
        (second(1, 2), None, None, long[None], None, 1, *KEY),
    ],
    "rademacher_spread": [(js, None, second(1, 4), None, None, None, 1, *KEY)],
    "activate_dual": [
        (second(2, 64), second(2, 64), None, 2),
        (second(2, 64), second(2, 64), second(2, 64), 2),
    ],
    "activate_jet": [
        (second(3, 64), second(3, 64), None, 1, 2),
        (second(3, 64), second(3, 64), second(3, 64), 1, 2),
    ],
}
FORMS = [
    pytest.param(op, call, id=f"{op}-{i}")
    for op, calls in CALLS.items()
    for i, call in enumerate(calls)
]


def test_every_launcher_is_called():
    assert set(CALLS) == set(kernels.LAUNCHERS)


@pytest.mark.parametrize("op, arguments", FORMS)
def test_every_launch_goes_to_the_device_of_its_tensors(noted, op, arguments):
    kernels.LAUNCHERS[op](*arguments)
    assert noted.launches and {device for _, device in noted.launches} == {1}
    assert noted.current == 0   # as it was


@pytest.mark.parametrize("op, arguments", FORMS)
def test_without_a_guard_this_is_noticed(noted, monkeypatch, op, arguments):
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.cuda.device(-1))
    kernels.LAUNCHERS[op](*arguments)
    assert {device for _, device in noted.launches} == {0}


def test_a_launch_takes_the_stream_and_the_module_of_the_device_that_is_current(gpus, monkeypatch):
    """The first one by Triton's dispatch, which loads a module there.

    Later ones by its function and that device's own stream.
    """

    class Compiled:
        function = packed_metadata = None

        def __init__(self):
            self.device = gpus.current

        def launch_metadata(self, grid, stream, *args):
            return None

        def run(self, x, y, z, stream, *rest):
            gpus.launches.append(("again", self.device, stream))

    class Kernel:
        params, arg_names = (
            (SimpleNamespace(is_constexpr=False, do_not_specialize=False),),
            ["x_ptr"],
        )

        def __getitem__(self, grid):
            return lambda *args, **constants: (
                gpus.launches.append(("first", gpus.current, None)) or Compiled()
            )

    active = SimpleNamespace(
        get_current_device=lambda: gpus.current,
        get_current_stream=lambda device: f"stream of {device}",
    )
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching.triton.runtime.driver, "_active", active, raising=False)
    monkeypatch.setattr(launching, "_modes", {})
    kernel = Kernel()
    for device in (0, 1, 0, 1):
        with torch.cuda.device(device):
            launching.launch(kernel, (1,), torch.ones(4))
    assert gpus.launches == [
        ("first", 0, None),
        ("first", 1, None),
        ("again", 0, "stream of 0"),
        ("again", 1, "stream of 1"),
    ]


def test_launches_share_a_kernel_only_where_triton_would_compile_the_same_one():
    """What its dispatch specialises on.

    Dtypes, alignment, None, whether a number is 1, a multiple of 16 or wide, and constants.
    """
    free, fixed = (SimpleNamespace(is_constexpr=False, do_not_specialize=d) for d in (False, True))
    kernel = SimpleNamespace(
        params=[free, free, fixed, SimpleNamespace(is_constexpr=True, do_not_specialize=False)]
    )
    x = torch.ones(8)
    alike = [(x, 5, 1, True), (torch.zeros(3), 7, 2, True), (x[4:], 2**31 - 1, 2**40, True)]
    unlike = [
        *((x, n, 1, True) for n in (5, 1, 16, 2**31 + 1, 2**31, 2.0, None)),
        (x[1:], 5, 1, True),
        (x.double(), 5, 1, True),
        (None, 5, 1, True),
        (x, 5, 1, False),
        (x, 5, 1, 3),
    ]
    kinds = [tuple(launching._kinds(kernel, arguments)) for arguments in (*alike, *unlike)]
    assert len(set(kinds[: len(alike)])) == 1 and len(set(kinds)) == len(unlike)
