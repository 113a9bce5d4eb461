"""Launches that kernels/direct.py has kept, beside those of the launchers themselves; Triton's
driver is a mocked one. Run by tests/test_direct_on_gpu.py."""

import random as python_random
import sys
from unittest import mock

import torch

sys.path.insert(0, "benchmarks")
import bench_host

import fastscore
from fastscore import backend, direct

made = []


class Compiled(bench_host.Compiled):
    def __init__(self):
        self.run = lambda *arguments: made.append((id(self), *arguments))


def described(launch):
    """Without what is no one's: addresses of fresh tensors, whose shape may be any of one size."""
    kernel, x, y, z, queue, function, packed, metadata, enter, leave, *arguments = launch
    return kernel, (x, y, z, queue), [
        (a.dtype, a.numel(), a.data_ptr() if a.data_ptr() in given else "fresh")
        if isinstance(a, torch.Tensor)
        else (type(a), a)
        for a in arguments
    ]


def one(r):
    """A call, and what its launch is made of."""
    dtype = r.choice([torch.float32, torch.bfloat16])
    shape = r.choice([(4, 3, 4, 4), (2, 3, 5, 4), (1, 16, 4, 1)])

    def tensor(dtype=dtype, shape=shape):
        n = torch.Size(shape).numel()
        start = r.choice([0, 0, 0, 0, 1])
        return torch.rand(n + 1, dtype=torch.float32).to(dtype)[start : start + n].view(shape)

    def coefficient():
        each = r.choice([(), shape[:1]])
        return r.choice([0.0, 0.25, tensor(torch.float32, each), tensor(torch.float32, each)])

    key = {
        "seed": r.choice([0, 1, -5, 2**64 - 1, 16]),
        "step": r.choice([0, 1, 16, 2**33]),
        "offset": r.choice([0, 0, 0, 1, 16]),
    }
    x, s = tensor(), tensor()
    out = r.choice([None, tensor()])
    c = r.choice([0.0, 0.25, 3.0])
    rows = [tensor(torch.float32, r.choice([shape[1:2], shape[:2]])) for _ in range(3)]
    table = tensor(torch.float32, (r.choice([1, 5]), 3 * shape[1]))
    labels = torch.zeros(shape[0] + 1, dtype=torch.int64)[r.choice([0, 1]) :][: shape[0]]
    options = {"activation": r.choice([None, "elu"]), "eps": r.choice([1e-5, 1e-5, 1e-3])}
    a, b = coefficient(), coefficient()
    groups = shape[1] if r.random() < 0.5 else 1
    calls = [
        lambda: fastscore.langevin_step(x, s, c, out=out, **key),
        lambda: fastscore.noisy_update(x, s, a, b, out=out, **key),
        lambda: fastscore.perturb(x, b, out=out, **key),
        lambda: fastscore.denoising_loss(x, a, **key),
        lambda: fastscore.instance_norm_plus(x, *rows[: r.choice([1, 2, 3])], **options),
        lambda: fastscore.conditional_instance_norm_plus(x, labels, table, **options),
        lambda: fastscore.group_norm_modulate(
            x, groups, rows[0].reshape(-1)[: shape[1]], **options
        ),
    ]
    which = r.randrange(len(calls))
    state = r.getstate()
    held = [t for t in (x, s, out, a, b, table, labels) if isinstance(t, torch.Tensor)]
    return calls[which], state, held


def compared(r):
    global given
    call, state, held = one(r)
    given = {t.data_ptr() for t in held}
    launches = []
    for way in ("compiles", "launcher", "keeps", "kept"):
        r.setstate(state)
        made.clear()
        if way in ("keeps", "kept"):
            with mock.patch.object(backend, "_resolve", lambda *a: "refused"):
                call()
        else:
            with fastscore.use_backend("triton"), mock.patch.object(direct, "served", {}):
                call()
        launches.append([described(launch) for launch in made])
    assert launches[1] and launches[1] == launches[2] == launches[3], launches[1:]


with bench_host.mocked_triton(), torch.no_grad():
    from fastscore.kernels import direct as kept

    backend.load_extension()
    with mock.patch.object(bench_host, "Compiled", Compiled):
        direct.door.serve(direct.CPU, 0, kept.LAUNCHERS)
        r = python_random.Random(0)
        for _ in range(800):
            compared(r)
        signatures = len(kept._plans)
        assert 100 < signatures < 600, signatures   # many have served calls of other tensors
