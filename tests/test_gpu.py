"""On a GPU: the same words, the same values, the same law."""

import pytest
import torch

import fastscore
from fastscore import random

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("offset", [0, 3, 2**32 + 5])
def test_words_equal_those_of_the_cpu(offset):
    got = random.words(10_000, seed=2**40 + 1, step=3, stream=9, offset=offset, device="cuda", backend="triton")
    assert torch.equal(got.cpu(), random.words(10_000, seed=2**40 + 1, step=3, stream=9, offset=offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_ops_equal_those_of_the_cpu(dtype):
    x, s = (torch.randn(6, 3, 8, 8, dtype=dtype) for _ in range(2))
    step = torch.rand(6)
    cpu = fastscore.langevin_step(x, s, step, seed=5).double()
    gpu = fastscore.langevin_step(x.cuda(), s.cuda(), step.cuda(), seed=5, backend="triton").double().cpu()
    assert bool(((gpu - cpu).abs() <= torch.finfo(dtype).eps * cpu.abs() + 3e-6).all())
    losses = [fastscore.denoising_loss(t, 0.5, seed=5).double().cpu() for t in (s, s.cuda())]
    assert torch.allclose(*losses, rtol=1e-5)


def test_stationary_variance_matches_closed_form():
    n, x = 2**20, random.normal((2**20,), seed=9, stream=1024, device="cuda") * (8 / 7) ** 0.5
    for step in range(60):
        fastscore.langevin_step(x, -x, 0.5, seed=7, step=step, out=x)
    assert abs(float(x.double().var()) - 8 / 7) < 5 * 8 / 7 * (2 / n) ** 0.5


def test_a_captured_graph_advances_with_its_step():
    x, step = torch.zeros(1000, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    fastscore.langevin_step(x, x, 0.1, seed=1, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fastscore.langevin_step(x, x, 0.1, seed=1, step=step)
        step += 1
    for k in range(3):
        graph.replay()
        assert torch.equal(y, fastscore.langevin_step(x, x, 0.1, seed=1, step=k))
