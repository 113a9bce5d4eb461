"""The choice of a back end: which calls it holds for, and in which threads."""

import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fastscore
from fastscore import backend as backends
from fastscore import direct, losses, ops
from fastscore.ops.activate import activate_dual, activate_jet
from fastscore.ops.normalise_core import Form, in_clusters

KEY = {"seed": 3, "step": 1}
NET = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
X, IMAGE, DIRECTIONS = torch.randn(5, 4), torch.randn(2, 3, 2, 2), torch.randn(2, 2, 3, 2, 2)


def normalised(x):
    return torch.cat(
        [
            x.flatten(),
            ops.instance_norm_plus_dual(x, DIRECTIONS, torch.rand(3), torch.rand(3))[1].flatten(),
        ]
    )


def normalised_by_jvp(x):
    return fastscore.jvp(lambda x: ops.group_norm_modulate(x, 3, activation="silu"), x, DIRECTIONS)[
        1
    ]


CALLS = {
    "langevin_step": (
        lambda x: fastscore.langevin_step(
            x, x.sin(), x.detach().square().mean(1) * x.mean(1).exp(), **KEY
        ),
        X,
    ),
    "denoising_loss": (lambda x: fastscore.denoising_loss(x, x.square().mean(1), **KEY), X),
    "instance_norm_plus": (
        lambda x: ops.instance_norm_plus(x, torch.rand(3), torch.rand(3)),
        IMAGE,
    ),
    "instance_norm_plus_dual": (normalised, IMAGE),
    "norms of dual numbers": (normalised_by_jvp, IMAGE),
    "activate_dual": (lambda x: activate_dual(x, "silu"), X),
    "activate_jet": (lambda x: activate_jet(x, 2, "silu"), X),
    "rademacher_jvp": (
        lambda x: fastscore.rademacher_jvp(lambda x: x.square() * x.sum(1, True), x, **KEY)[1],
        X,
    ),
    "losses.sliced": (lambda x: losses.sliced(NET, x, seed=0), X),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("twice", [False, True], ids=["gradient", "gradient of a gradient"])
def test_gradients_run_on_the_back_end_of_their_op(backend, call, twice, monkeypatch):
    """In another thread, where autograd runs the nodes of a GPU, and after use_backend has
    ended."""
    f, x = CALLS[call]
    x = x.clone().requires_grad_()
    y = f(x).square().sum()
    if twice:
        y = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
    chosen, real, errors = [], backends.call, []
    monkeypatch.setattr(backends, "call", lambda b, *args: (chosen.append(b), real(b, *args)))
    monkeypatch.setattr(
        backends,
        "_environment",
        lambda: {"reference": "cpp", "cpp": "triton", "triton": "cpp"}[backend],
    )

    def backward():
        try:
            y.backward()
        except Exception as error:   # of this thread; raised again below
            errors.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not errors and bool(x.grad.isfinite().all())
    assert set(chosen) <= {backend} - {"reference"}


class Deep(torch.autograd.Function):
    """A backward pass in a backward pass, n levels deep.

    Beyond 60 autograd goes on in another thread.
    """

    @staticmethod
    def forward(ctx, x, n, f):
        ctx.n, ctx.f = n, f
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.n == 0:
            ctx.f()
        else:
            with torch.enable_grad():
                Deep.apply(torch.ones((), requires_grad=True), ctx.n - 1, ctx.f).backward()
        return g, None, None


def test_use_backend_holds_in_autograd_s_own_threads(backend):
    """Where a checkpoint runs an op again, say."""
    found = []

    def look():
        found.extend((threading.get_ident(), backends.choose(torch.device("cpu"))))

    Deep.apply(torch.ones((), requires_grad=True), 70, look).backward()
    assert found[0] != threading.get_ident() and found[1] == backend


def test_use_backend_ends_with_its_block():
    look = []
    with fastscore.use_backend("reference"):
        with fastscore.use_backend("triton"):
            pass
        look.append(backends.choose(torch.device("cpu")))
    look.append(backends.choose(torch.device("cpu")))
    Deep.apply(
        torch.ones((), requires_grad=True),
        70,
        lambda: look.append(backends.choose(torch.device("cpu"))),
    ).backward()
    automatic = "reference" if backends.why_not("cpp", "cpu") else "cpp"
    assert look == ["reference", automatic, automatic]


def test_a_checkpoint_runs_again_on_the_back_end_of_its_backward_pass(backend, monkeypatch):
    chosen, real = [], backends.call
    monkeypatch.setattr(backends, "call", lambda b, *args: (chosen.append(b), real(b, *args)))
    monkeypatch.setattr(direct, "door", None)   # through which calls on 'cpp' would not be seen
    x = X.clone().requires_grad_()
    y = checkpoint(
        lambda x: fastscore.perturb(x, x.square().mean(1), **KEY).square(), x, use_reentrant=False
    )
    y.sum().backward()
    assert set(chosen) == {backend} - {"reference"}


def test_a_compiled_function_follows_the_request(monkeypatch):
    """The back end is a constant of its graph.

    Another one is another graph, and one that cannot serve is refused.
    """
    chosen, real = [], backends.call
    monkeypatch.setattr(backends, "call", lambda b, *args: (chosen.append(b), real(b, *args)))
    counter = CompileCounter()

    def step(x):
        return fastscore.langevin_step(x, -x, 0.1, **KEY)

    torch.compiler.reset()
    compiled, expected = torch.compile(step, backend=counter), step(X)
    # The second time from the cache.
    for requests in (("cpp", "reference", "auto"), ("auto", "cpp", "reference")):
        chosen.clear()
        for name in requests:
            with fastscore.use_backend(name):
                torch.testing.assert_close(compiled(X), expected)
    assert chosen == ["cpp", "cpp"]
    assert counter.frame_count == 3

    with (
        pytest.raises(Exception, match="backend 'cuda' was requested for a tensor on cpu"),
        fastscore.use_backend("cuda"),
    ):
        compiled(X)


@pytest.mark.parametrize("name", backends.OPS)
def test_schemas_are_those_of_the_table(backend, name):
    if backend == "reference":
        pytest.skip("plain PyTorch, no raw op")
    schema = str(backends.raw(backend, name)._schema)
    assert schema.split("::")[1] == f"{name}({backends.OPS[name].schema}) -> ()"


def test_what_a_norm_asks_at_every_call_is_answered_once(monkeypatch):
    """The answer for a GPU reads the record of the build from its file."""
    asked = []

    def why_not(name, device):
        asked.append((name, device))
        return "it is not built"

    monkeypatch.setattr(backends, "why_not", why_not)
    x = torch.empty(1, 20, 30, 30, device="meta")
    for _ in range(3):
        assert not in_clusters(x, Form(0, True, True, 1e-5, None))
    assert asked == [("cuda", "meta")]
