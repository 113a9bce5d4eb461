"""While a CUDA graph is captured no generator of the GPU can be asked or set back.

What would draw twice is refused.

The driver is a mocked one: a capture runs, and the GPU's generator answers as PyTorch's does then.
Tensors on "meta" stand for the GPU's.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

import fastscore
from fastscore import losses
from fastscore.dual import generic, once, routes, transposed

CUDA = torch.device("cuda")


@pytest.fixture
def capturing(monkeypatch):
    def refuse(*args):
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture.")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
    monkeypatch.setattr(torch.cuda, "set_rng_state", refuse)


@pytest.fixture
def on_gpu(capturing, monkeypatch):
    """What the library asks of generators, it asks as if its tensors lay on a GPU.

    Draws on the CPU count as the GPU's.
    """
    for module in (
        routes,
        sys.modules["fastscore.losses.exact"],
        sys.modules["fastscore.losses.finite_difference"],
    ):
        monkeypatch.setattr(module, "Once", lambda device, *functions: once.Once(CUDA, *functions))
    for module in (generic, transposed):
        monkeypatch.setattr(module, "Draws", lambda device, *rest: once.Draws(CUDA, *rest))
    monkeypatch.setattr(once, "_KEPT", "no device's")


def dropout(x):
    return F.dropout(x, 0.5)


def meta_noise():
    return torch.rand(4, device="meta")


@pytest.mark.parametrize(
    "draw",
    [
        meta_noise,
        lambda: torch.empty(4, device="meta").random_(),
        lambda: torch.randperm(4, device="meta"),
    ],
)
def test_a_second_evaluation_of_what_draws_is_refused(capturing, draw):
    twice = once.Once(CUDA, draw)
    with twice:
        draw()
    with pytest.raises(
        RuntimeError, match=r"f draws random numbers \(aten\.rand.* while a CUDA graph is captured"
    ):
        with twice:
            draw()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        twice.undo()


def test_outside_a_capture_the_generator_is_set_back(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state {len(said)}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: said.append(state))
    twice = once.Once(CUDA, meta_noise)
    for _ in range(2):
        with twice:
            meta_noise()
    # Before the second evaluation, and after it to where the first had left it.
    assert said == ["state 0", "state 0"]


@pytest.mark.parametrize(
    "quiet",
    [
        lambda: torch.rand(4),  # of the CPU, which is set back
        lambda: F.dropout(torch.ones(4, device="meta"), 0.5, training=False),
        lambda: torch.ones(4, device="meta") * 2,
        lambda: torch.ops.aten._scaled_dot_product_efficient_attention(
            *(torch.ones(1, 1, 4, 8, device="meta"),) * 3, None, False
        ),
    ],
    ids=["cpu", "not-training", "no-draw", "attention"],
)
def test_what_does_not_draw_there_is_evaluated_again(capturing, quiet):
    twice = once.Once(CUDA, quiet)
    for _ in range(2):
        with twice:
            quiet()
    twice.undo()


def derivative_inside(x):
    """Falls back: stacks do not go through grad."""
    return torch.autograd.grad(dropout(x).square().sum(), x, create_graph=True)[0]


@pytest.mark.filterwarnings("ignore::fastscore.FallbackWarning")
def test_a_loss_that_would_draw_twice_says_so(on_gpu):
    x, v = torch.randn(3, 4), torch.randn(2, 3, 4)
    calls = [
        lambda: fastscore.jvp(lambda x: torch.special.i0e(dropout(x)) + derivative_inside(x), x, v),
        lambda: fastscore.jvp(lambda x: F.rrelu(x, training=True), x, v),
        lambda: losses.finite_difference_sliced(dropout, x),
        lambda: losses.exact(dropout, x, chunk=2),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="f draws random numbers"):
            call()


@pytest.mark.filterwarnings("ignore::fastscore.FallbackWarning")
def test_a_capture_that_draws_nothing_twice_is_as_ever(on_gpu, monkeypatch):
    x, v = torch.randn(3, 4), torch.randn(2, 3, 4)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 4))

    def inside(x):
        return torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0]

    calls = [
        lambda: losses.sliced(net, x, seed=1),   # one evaluation
        lambda: fastscore.jvp(inside, x, v)[1],
        lambda: losses.finite_difference_sliced(net.eval(), x, seed=1),
        lambda: losses.exact(inside, x, chunk=2),
    ]
    found = []
    for call in calls:
        net.train()
        torch.manual_seed(0)
        found.append(call())
    monkeypatch.undo()
    for call, value in zip(calls, found):
        net.train()
        torch.manual_seed(0)
        assert torch.equal(call(), value)
