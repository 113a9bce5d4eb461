"""Where the engine of jvp meets what else goes on.

Writes behind its back, modes that begin late, jvp inside jvp, other threads.
"""

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastscore.dual import call, jvp
from fastscore.dual.jets import second_order

D = torch.float64


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Linear(3, 3, dtype=D), nn.Linear(3, 3, dtype=D)


@pytest.fixture
def point():
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=D), torch.randn(2, 4, 3, dtype=D)


def stock(f, x, v):
    pairs = [torch.func.jvp(f, (x,), (d,)) for d in v]
    return pairs[0][0], torch.stack([t for _, t in pairs])


def agree(found, expected):
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-11)
        for a, b in zip(found, expected, strict=True)
    )


def no_grad_write(h):
    with torch.no_grad():
        h.mul_(0)


@pytest.mark.parametrize(
    "early", [False, True], ids=["an alias taken later", "an alias taken before"]
)
@pytest.mark.parametrize(
    "alias",
    [lambda h: h.detach(), lambda h: h.data, lambda h: h.view(-1).detach(), no_grad_write],
    ids=["detach", "data", "view", "no_grad"],
)
@pytest.mark.parametrize("deep", [False, True], ids=["into a source", "into what waited itself"])
def test_what_was_computed_does_not_see_a_write_through_a_constant(
    layers, point, alias, early, deep
):
    first, second = layers

    def f(x):
        h = first(x) if deep else x * 2
        a = alias(h) if early and alias is not no_grad_write else None
        y = F.silu(second(h))
        a = alias(h) if a is None else a
        if a is not None:
            a.mul_(0)
        return first(y)

    expected = stock(lambda x: first(F.silu(second(first(x) if deep else x * 2))), *point)
    with torch.no_grad():   # with gradients autograd may refuse: the layer keeps its input
        assert agree(jvp(f, *point), expected)
    try:
        assert agree(jvp(f, *point), expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


@pytest.mark.parametrize("switch", ["on", "off"])
def test_autocast_that_begins_after_a_layer_does_not_reach_it(switch):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            h = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            return h * 2 + F.silu(h)

    with torch.autocast("cpu", torch.bfloat16, enabled=switch == "off"):
        y, jv = jvp(f, x, x[None])
    expected = stock(lambda x: 2 * layer(x) + F.silu(layer(x)), x, x[None])
    assert y.dtype == torch.float32   # bfloat16 would be 2e-3 off
    assert torch.allclose(y, expected[0], atol=1e-5) and torch.allclose(jv, expected[1], atol=1e-5)


@pytest.mark.parametrize(
    "block", [nn.Linear(3, 3, dtype=D), torch.sin], ids=["a linear layer", "sin"]
)
def test_a_checkpoint_or_a_hook_behind_a_chain(layers, point, block):
    first, second = layers
    x, v = point
    parameters = [*first.parameters(), *second.parameters()]

    def run(f):
        y, jv = jvp(f, x, v)
        return (y, jv, *torch.autograd.grad((v * jv).sum() + y.square().sum(), parameters))

    expected = run(lambda x: second(block(F.silu(first(x)))))
    assert agree(
        run(lambda x: second(checkpoint(block, F.silu(first(x)), use_reentrant=False))), expected
    )

    def offloaded(x):
        h = F.silu(first(x))
        with torch.autograd.graph.save_on_cpu():
            h = block(h)
        return second(h)

    assert agree(run(offloaded), expected)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_a_jvp_inside_jvp_tells_its_numbers_from_the_others(layers, point, grad, directions):
    """f of the inner one holds x of the outer one."""
    first, second = layers

    def f(product):
        return lambda x: product(
            lambda z: torch.cat([second(F.silu(first(z) * x)), z * x, x]), x.cos(), x * x
        )

    def inner(g, x, v):
        return jvp(g, x, v)[1]

    def reference(g, x, v):
        return torch.func.jvp(g, (x,), (v,))[1]

    x, v = point[0], point[1][:directions]
    with torch.set_grad_enabled(grad):
        found = jvp(f(inner), x, v)
    assert agree(found, stock(f(reference), x, v))


def test_a_jvp_after_one_that_failed(layers, point):
    def f(x):
        layers[0](x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jvp(f, *point)
    assert agree(
        jvp(lambda x: layers[1](F.silu(layers[0](x))), *point),
        stock(lambda x: layers[1](F.silu(layers[0](x))), *point),
    )


class Doubled(torch.autograd.Function):
    """A Function, through which the whole of f falls back to stock forward mode."""

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * 2

    @staticmethod
    def jvp(ctx, t):
        return t * 2


def test_a_block_without_gradients_is_a_constant_on_every_path(point):
    x, v = point

    def f(x, last=lambda y: y * 2):
        with torch.no_grad():
            scale = x.square().sum(-1, keepdim=True)
        return last(x * scale)

    expected = 2 * v * x.square().sum(-1, keepdim=True)
    assert torch.allclose(jvp(f, x, v)[1], expected)
    assert torch.allclose(jvp(lambda x: f(x, Doubled.apply), x, v)[1], expected)   # forward mode
    # Inside a transform.
    assert torch.allclose(
        torch.vmap(lambda x, v: jvp(f, x, v)[1], in_dims=(0, 1), out_dims=1)(x, v), expected
    )


def test_nothing_stays_alive_that_f_does_not_keep(layers, point):
    seen, kept = [], []

    def f(x):
        h = layers[0](x)
        late = F.silu(h)
        seen.extend(map(weakref.ref, (h, late)))
        kept.append(layers[1](h))
        return layers[1](late)

    gc.disable()   # by reference counts alone
    try:
        result = weakref.ref(jvp(f, *point)[1])
        assert [r() for r in seen] == [None, None] and result() is None and not call.calls
    finally:
        gc.enable()
    left = layers[1](kept[0])  # after the call a number is its value
    assert type(left) is torch.Tensor and torch.equal(
        left, layers[1](layers[1](layers[0](point[0])))
    )


def test_threads_inside_f_and_around_jvp(layers, point):
    """As nn.DataParallel does.

    Workers run parts of f, and several jvp run at once, one of them without gradients.
    """
    def part(x):
        h = layers[0](x)
        h.mul_(2)
        return layers[1](F.silu(h)) + h

    def f(x):
        with ThreadPoolExecutor(2) as pool:
            return torch.cat(list(pool.map(part, (x[:2], x[2:]))))

    def one(grad):
        with torch.set_grad_enabled(grad):
            return [t.detach() for t in jvp(part, *point)]

    expected = stock(part, *point)
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)   # a race comes to light in a fifth of the runs, not in a fortieth
    try:
        assert all(agree(jvp(f, *point), expected) for _ in range(20))
    finally:
        sys.setswitchinterval(often)
    with ThreadPoolExecutor(4) as pool:
        assert all(agree(found, expected) for found in pool.map(one, [True, False] * 20))
    assert not call.calls


def in_a_worker(f, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(f, *args).result(timeout=20)


def test_a_worker_of_f_while_another_jvp_begins_and_ends(layers, point):
    """The workers' numbers are those of their own call, whichever began last.

    Its grad mode counts, and its end.
    """
    inside, leave = threading.Event(), threading.Event()

    def other(x):
        y = layers[0](x)
        inside.set()
        assert leave.wait(20)
        return y

    def without_gradients(x):
        with torch.no_grad():
            return F.silu(layers[0](x)) * x

    with ThreadPoolExecutor(1) as pool:

        def f(x):
            running = pool.submit(jvp, other, *point)
            assert inside.wait(20)
            h = in_a_worker(without_gradients, x)
            leave.set()
            running.result(timeout=20)
            return layers[1](h) * h

        with torch.no_grad():
            found = jvp(f, *point)
    assert agree(
        found,
        stock(lambda x: layers[1](F.silu(layers[0](x)) * x) * (F.silu(layers[0](x)) * x), *point),
    )


def test_numbers_of_two_jvp_that_run_at_once_do_not_mix(layers, point):
    """A worker of f takes a jvp of its own, whose f holds x of the one around it."""
    def f(x):
        return in_a_worker(lambda: jvp(lambda z: layers[0](z) * x, point[0], point[1][0])[1]) * x

    x, v = point
    expected = stock(lambda x: (v[0] @ layers[0].weight.T) * x * x, x, v)
    try:
        assert agree(jvp(f, x, v), expected)
    except RuntimeError as error:   # NoRule is one
        assert str(error).startswith("fastscore")


def test_a_worker_of_an_energy_while_another_loss_begins(layers, point):
    def energy(between):
        def f(x):
            h = in_a_worker(lambda: torch.tanh(layers[0](x)))
            between()
            return (layers[1](h) * h).sum(1)

        return f

    x, v = point
    expected = second_order(energy(lambda: None), x, v)
    found = second_order(
        energy(lambda: in_a_worker(second_order, lambda x: x.square().sum(1), x, v)), x, v
    )
    assert agree(found, expected) and expected[1].abs().min() > 1e-6


WRITES = {
    "view": lambda h, z: z.mul_(2),
    "its view": lambda h, z: z[1].add_(1),
    "base": lambda h, z: h.mul_(2),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_view_that_a_stack_cannot_have_is_never_written_to_unseen(write):
    """Between two permutations the value stays contiguous, and the stack does not."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 4, 5, dtype=D), torch.randn(2, 2, 3, 4, 5, dtype=D)

    def f(x):
        h = x.permute(0, 2, 3, 1).sin().permute(0, 3, 1, 2)
        z = h.view(2, -1)
        write(h, z)
        return h.flatten(1) * z

    assert agree(jvp(f, x, v), stock(f, x, v))
