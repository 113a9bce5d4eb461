"""Dual numbers written into ordinary tensors.

Those become carriers of the tangents, and f is called once.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import fastscore
from fastscore.dual import jvp, routes
from fastscore.dual.jets import second_order

F64 = {"dtype": torch.float64}
torch.manual_seed(0)
W = torch.randn(4, 4, **F64).requires_grad_()
BIAS = torch.randn(4, **F64).requires_grad_()
ROWS, COLUMNS = torch.tensor([2, 0]), torch.tensor([1, 3, 0])


@pytest.fixture(autouse=True)
def one_call(request, monkeypatch):
    """Fail where f falls back."""
    if request.node.name.startswith("test_a_fallback"):
        return

    def detour(*args):
        raise AssertionError("f was called again")

    for slower in ("_forward_mode", "_double_backward"):
        monkeypatch.setattr(routes, slower, detour)


def h(x):
    return torch.tanh(F.linear(x, W, BIAS))


def into(write, make=lambda x: torch.zeros(x.shape, dtype=x.dtype)):
    """A function that writes into a tensor which does not depend on x, and uses it in more than
    one way."""

    def f(x):
        out = make(x)
        write(out, x)
        return out * x + out.sin()

    return f


def accumulate(out, x):
    out += h(x)
    out += x.sin()
    out -= 0.5 * h(x).mean(1, keepdim=True)


def by_views(out, x):
    left = out.narrow(1, 0, 2)
    left.copy_(h(x)[:, :2])
    out[:, 2:] += h(x)[:, 2:].exp()
    left.mul_(2)


def by_the_base(out, x):
    flat, column = out.view(-1), out[:, 1]
    out += h(x)
    flat[::3] *= x.sum()
    out[:, 0] = column * 3


def recurrent(x):
    states = torch.zeros(4, len(x), 4, **F64)
    states[0] = x
    for t in range(3):
        states[t + 1] = h(states[t].clone()) + t
    return states[-1] * states.sum(0)


def read_in_between(x):
    out = torch.full(x.shape, 0.5, **F64)
    view = out.t()
    before = view.sum() + out.sum()   # of constants
    out.add_(h(x))
    after = view.sum(0)   # holds no dual number of its own accord
    return before * after[:, None] * x


def several(x):
    out = torch.zeros(len(x), 4, 4, **F64)
    out[torch.arange(len(x)), :, torch.tensor([1, 3, 0, 2])[: len(x)]] = h(x)
    out[:, ROWS, COLUMNS[:2]] = x[:, :2].sin()
    out[1, ROWS, COLUMNS[:2]] = 3.0
    return out.sum(1) + out.square().sum(2)


def with_modes(x):
    out = torch.zeros(x.shape, **F64)
    view = out.view(-1)
    with torch.device("cpu"):
        out += h(x)
        inner = torch.ones(4, **F64) * view.sum()
    return out * inner * x


def integers(x):
    whole = torch.zeros(x.shape, dtype=torch.int64)
    whole[:] = 10 * x
    whole.copy_(whole + 10 * x)
    return whole * x


FUNCTIONS = {
    "accumulated": into(accumulate),
    "buffer-of-ones": into(
        lambda out, x: out.mul_(h(x)).add_(1), make=lambda x: torch.ones(x.shape, **F64)
    ),
    "empty": into(lambda out, x: out.copy_(h(x)), make=lambda x: torch.empty(x.shape, **F64)),
    "clone-of-a-constant": into(accumulate, make=lambda x: BIAS.detach().expand(x.shape).clone()),
    "depends-on-a-parameter": into(accumulate, make=lambda x: BIAS.expand(x.shape).clone()),
    "range": into(
        lambda out, x: out.addcmul_(h(x), x, value=2),
        make=lambda x: torch.arange(1.0, 5, **F64).repeat(len(x), 1),
    ),
    "broadcast": into(lambda out, x: out.copy_(h(x).mean(0))),
    "one-number": into(lambda out, x: out.fill_(h(x).mean())),
    "views": into(by_views),
    "a-piece-of-a-piece": into(lambda out, x: out[1:][0].copy_(h(x)[0])),
    "recurrent": recurrent,
    "several-index-tensors": several,
    "columns": into(lambda out, x: out.__setitem__((slice(None), COLUMNS), h(x)[:, :3])),
    "mask": into(lambda out, x: out.__setitem__(x > 0, h(x)[x > 0])),
    "index-put": into(lambda out, x: out.index_put_((ROWS,), h(x)[:2], accumulate=True)),
    "index-add": into(lambda out, x: out.index_add_(0, ROWS, h(x)[:2], alpha=2)),
    "index-copy": into(lambda out, x: out.index_copy_(1, COLUMNS, h(x)[:, :3])),
    "index-fill": into(lambda out, x: out.index_fill_(0, ROWS, h(x).sum())),
    "scatter": into(lambda out, x: out.scatter_(1, COLUMNS.expand(len(x), 3), h(x)[:, :3])),
    "scatter-add": into(lambda out, x: out.scatter_add_(1, COLUMNS.expand(len(x), 3), h(x)[:, :3])),
    "masked-scatter": into(lambda out, x: out.masked_scatter_(x > 0, h(x))),
    "masked-fill": into(lambda out, x: out.masked_fill_(x > 0, h(x).sum())),
    "lerp": into(lambda out, x: out.lerp_(h(x), 0.3)),
    "products": into(lambda out, x: out.addmm_(h(x), W, alpha=0.5)),
    "power": into(lambda out, x: out.add_(2).pow_(h(x))),
    "divided": into(lambda out, x: out.__iadd__(1).__itruediv__(h(x) + 3)),
    "put": into(lambda out, x: out.put_(COLUMNS, h(x)[0, :3])),
    "into-integers": integers,
    "foreign-to-dual": lambda x: (
        lambda out: out.copy_(torch.zeros(x.shape, **F64).add_(h(x))) * x
    )(torch.zeros_like(x)),
    "list": lambda x: (
        torch.stack([h(x)[:, i] * i for i in range(4)], 1)
        + torch.cat([*h(x).unbind(1)]).view(4, -1).t()
    ),
    "resized": into(
        lambda out, x: out.resize_as_(h(x)).copy_(h(x)), make=lambda x: torch.empty(0, **F64)
    ),
    "bits": lambda x: h(x).view(torch.int64).bitwise_and(-(2**52)).view(torch.float64) * x,
    "bits-of-another-width": lambda x: h(x).view(dtype=torch.float32).double()[:, :4] * x,
    "bits-as-complex": lambda x: torch.view_as_real(h(x).view(torch.complex128)).flatten(1) * x,
    "no-dimensions": lambda x: (lambda total: [total.add_(row.sum()) for row in h(x)][-1] * x)(
        torch.zeros((), **F64)
    ),
}


@torch.jit.script
def doubled(t):
    return 2 * t


def read_by_torchscript(x):
    out = torch.zeros(x.shape, **F64)
    view = out.t()
    out += h(x)
    return doubled(view).t() * x


def read_from_a_parameter(x):
    weight = torch.nn.Parameter(torch.zeros(x.shape, **F64))
    weight.data.copy_(h(x))
    return weight * x


def of_other_memory(x):
    out = torch.zeros(x.shape, **F64)
    out.data = h(x)
    return out * x


def seen_by_numpy(x):
    out = torch.zeros(x.shape, **F64)
    out.data = h(x)
    return torch.from_numpy(2 * out.numpy()) * x


def parameter_of_other_memory(x):
    weight = torch.nn.Parameter(torch.zeros(x.shape, **F64))
    weight.data = h(x)
    return weight * x


def weight_of_other_memory(x):
    layer = torch.nn.Linear(4, 4, bias=False, **F64)
    layer.weight.data = h(x)
    return layer(x)


def swapped(x):
    out, y = torch.zeros(x.shape, **F64), h(x)
    torch.utils.swap_tensors(out, y)
    return out * x + y


def made_a_parameter(x):
    layer = torch.nn.Linear(4, 4, bias=False, **F64)
    layer.weight = torch.nn.Parameter(h(x))
    return layer(x) * x


def assigned_to_a_module(x):
    layer = torch.nn.Linear(4, 4, bias=False, **F64)
    layer.load_state_dict({"weight": h(x)}, assign=True)
    return layer(x) * x


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(FUNCTIONS["accumulated"], x, use_reentrant=False) * x


UNSEEN = {
    "transposed": into(
        lambda out, x: out.t().add_(h(x).t()), make=lambda x: torch.zeros(4, len(x), **F64).t()
    ),
    "base": into(by_the_base),
    "read-in-between": read_in_between,
    "below-other-modes": with_modes,
    "script": read_by_torchscript,
    "parameter": read_from_a_parameter,
    "checkpoint": checkpointed,
    "data": of_other_memory,
    "data-seen-by-numpy": seen_by_numpy,
    "data-of-a-parameter": parameter_of_other_memory,
    "data-of-a-layer": weight_of_other_memory,
    "swapped": swapped,
    "made-a-parameter": made_a_parameter,
    "assigned-to-a-module": assigned_to_a_module,
}


def double_backprop(f, x, v):
    x = x.clone().requires_grad_()
    y = f(x)
    vj = torch.stack(
        [torch.autograd.grad(y, x, d, create_graph=True, materialize_grads=True)[0] for d in v]
    )
    return x, y, (vj * v).flatten(1).sum(1)


def gradients(x, y, vjv, v):
    loss = (vjv + 0.5 * (y * v).flatten(1).sum(1).square()).sum()
    return torch.autograd.grad(loss, [x, W, BIAS], allow_unused=True, materialize_grads=True)


def close(a, b, tolerance):
    return float((a - b).abs().max()) <= tolerance * max(1e-3, float(b.abs().max()))


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_written_into_an_ordinary_tensor_keeps_its_tangents(name, M):
    torch.manual_seed(1)
    f, x, v = FUNCTIONS[name], 0.8 * torch.randn(4, 4, **F64), torch.randn(M, 4, 4, **F64)
    tolerance = 1e-9
    leaf, y, vjv = double_backprop(f, x, v)
    expected = gradients(leaf, y, vjv, v)
    leaf = x.clone().requires_grad_()
    got, js = jvp(f, leaf, v)
    found = gradients(leaf, got, (js * v).flatten(1).sum(1), v)
    assert close(got, y, tolerance) and close((js * v).flatten(1).sum(1), vjv, tolerance)
    assert all(close(a, b, tolerance) for a, b in zip(found, expected))
    with torch.no_grad():
        assert all(close(a, b, tolerance) for a, b in zip(jvp(f, x, v), (got, js)))


@pytest.mark.parametrize("name", UNSEEN)
def test_a_fallback_takes_what_is_read_or_called_again_unseen(name):
    torch.manual_seed(1)
    f, x, v = UNSEEN[name], 0.8 * torch.randn(4, 4, **F64), torch.randn(2, 4, 4, **F64)
    leaf, y, vjv = double_backprop(f, x, v)
    expected = gradients(leaf, y, vjv, v)
    leaf = x.clone().requires_grad_()
    with pytest.warns(fastscore.FallbackWarning):
        got, js = jvp(f, leaf, v)
    found = gradients(leaf, got, (js * v).flatten(1).sum(1), v)
    assert close(got, y, 1e-9) and close((js * v).flatten(1).sum(1), vjv, 1e-9)
    assert all(close(a, b, 1e-9) for a, b in zip(found, expected))


@pytest.mark.parametrize("M", [1, 2])
def test_out_is_a_place_for_dual_numbers(M):
    """Under no_grad alone, as in PyTorch."""
    x, v, out = torch.randn(3, 4, **F64), torch.randn(M, 3, 4, **F64), torch.zeros(3, 4, **F64)
    with torch.no_grad():
        y, jv = jvp(lambda x: torch.mul(x.sin(), x, out=out) * out, x, v)
    expected = (x.sin() * x).square()
    assert torch.allclose(y, expected)
    assert torch.allclose(jv, 2 * x.sin() * x * (x.cos() * x + x.sin()) * v)
    assert type(out) is torch.Tensor and torch.allclose(out, x.sin() * x)


def test_a_buffer_is_an_ordinary_tensor_afterwards_and_holds_the_value():
    buffer, x = torch.ones(3, 4, **F64), torch.randn(3, 4, **F64)
    address = buffer.data_ptr()

    def f(x):
        nonlocal buffer
        buffer += x.sin()
        return buffer * x

    _, jv = jvp(f, x, torch.ones_like(x))
    assert torch.allclose(jv, 1 + x.sin() + x * x.cos())
    assert (
        type(buffer) is torch.Tensor
        and buffer.data_ptr() == address
        and torch.allclose(buffer, 1 + x.sin())
    )


def test_a_buffer_is_as_it_was_where_f_fails():
    buffer = torch.ones(3)

    def f(x):
        buffer.add_(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jvp(f, torch.ones(3), torch.ones(3))
    assert type(buffer) is torch.Tensor and torch.equal(buffer, torch.ones(3))


def _workers_write(out, x):
    def write(i):
        out[:, i] = h(x[:, i])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(x.shape[1])))
    return out * x


def _workers_and_the_caller_write(out, x):
    def write(i):
        out[:, i].copy_(h(x[:, i]))

    with ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(write, i) for i in range(1, x.shape[1])]
        write(0)
        for part in parts:
            part.result(timeout=20)
    return out * x


@pytest.fixture
def impatient():
    """Threads that take turns after each instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_what_workers_write_into_an_ordinary_tensor_is_refused():
    """Autograd loses one of two simultaneous writes: a fallback would be wrong now and then."""
    x = torch.randn(3, 6, 4, **F64)
    with pytest.raises(NotImplementedError, match="in a thread that f has started"):
        jvp(lambda x: _workers_write(torch.zeros(x.shape, **F64), x), x, torch.ones_like(x))


@pytest.mark.parametrize("place", [torch.zeros_like, torch.clone])
@pytest.mark.parametrize("writes", [_workers_write, _workers_and_the_caller_write])
def test_no_write_of_a_worker_is_lost(place, writes, impatient):
    for _ in range(60):
        x = torch.randn(50, 6, 4, **F64, requires_grad=True)
        v = torch.randn(2, 50, 6, 4, **F64)
        got, expected = jvp(lambda x: writes(place(x), x), x, v), jvp(lambda x: h(x) * x, x, v)
        assert all(close(a, b, 1e-9) for a, b in zip(got, expected))
        (a,), (b,) = (torch.autograd.grad(y[1].square().sum(), x) for y in (got, expected))
        assert close(a, b, 1e-9)


@pytest.mark.parametrize("writes", [_workers_write, _workers_and_the_caller_write])
def test_no_write_of_a_worker_is_lost_in_second_order(writes, impatient):
    for _ in range(60):
        x = torch.randn(50, 6, 4, **F64, requires_grad=True)
        v = torch.randn(2, 50, 6, 4, **F64)
        got = second_order(lambda x: writes(x.clone(), x).sum((1, 2)), x, v, straight=False)
        expected = second_order(lambda x: (h(x) * x).sum((1, 2)), x, v)
        assert all(close(a, b, 1e-9) for a, b in zip(got, expected))
        (a,), (b,) = (torch.autograd.grad(y[2].square().sum(), x) for y in (got, expected))
        assert close(a, b, 1e-9)


def test_one_worker_and_the_caller_write_in_turn():
    """Once it is dual numbers, whoever holds the tensor writes to those."""
    def f(x):
        out = torch.zeros(x.shape, **F64)
        out[0] = h(x[0])
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: out[1:].copy_(h(x[1:]))).result(timeout=20)
        return out * x

    x, v = torch.randn(6, 4, **F64), torch.randn(2, 6, 4, **F64)
    assert all(close(a, b, 1e-9) for a, b in zip(jvp(f, x, v), jvp(lambda x: h(x) * x, x, v)))


def kept_graph(write):
    def f(x):
        y = x * x
        with torch.no_grad():
            z = write(y)
        return z * x + y

    return f


def doubled_in_place(y):
    y *= 2
    return y


@pytest.mark.parametrize(
    "write, value",
    [
        (doubled_in_place, 2),
        (lambda y: y.mul_(2), 2),
        (torch.relu_, 1),
        (lambda y: F.relu(y, inplace=True), 1),
        (lambda y: torch.add(y, y, out=y), 2),
        (lambda y: y.contiguous(), 1),
    ],
    ids=["+=", "mul_", "relu_", "inplace=True", "out=", "contiguous"],
)
def test_what_hands_back_its_argument_without_gradients_keeps_its_tangents(write, value):
    """As autograd's: y is c x² with the derivative 2x, for its graph does not know of c."""
    x, v = torch.randn(4, 4, **F64), torch.randn(2, 4, 4, **F64)
    y, jv = jvp(kept_graph(write), x.requires_grad_(), v)
    torch.testing.assert_close(y, value * x**2 * (x + 1))
    torch.testing.assert_close(jv, (2 * x * x + value * x**2 + 2 * x) * v)


def test_a_write_leaves_what_a_graph_has_saved():
    """As in a recurrent cell: tanh keeps its input, which is written to afterwards."""
    def f(x, inplace):
        state, out = torch.zeros(x.shape, **F64), x
        for _ in range(3):
            if inplace:
                state *= torch.sigmoid(h(out))
                state += h(out + x)
            else:
                state = state * torch.sigmoid(h(out)) + h(out + x)
            out = torch.tanh(state) * x
        return out

    x, v = torch.randn(4, 4, **F64).requires_grad_(), torch.randn(2, 4, 4, **F64)
    found, expected = ([*jvp(lambda x, i=i: f(x, i), x, v)] for i in (True, False))
    for pair in (found, expected):
        pair += torch.autograd.grad((pair[1] * v).sum() + pair[0].square().sum(), [x, W, BIAS])
    assert all(close(a, b, 1e-11) for a, b in zip(found, expected, strict=True))


def test_views_see_a_write():
    def f(x):
        y = h(x)
        view, value = y.view(-1), y.detach()
        y.mul_(x)
        return view.view(4, 4) * x + value

    x, v = torch.randn(4, 4, **F64), torch.randn(1, 4, 4, **F64)
    y, jv = jvp(f, x, v)
    expected, slope = jvp(lambda x: h(x) * x * x, x, v)
    assert close(y, expected + h(x) * x, 1e-12) and close(jv, slope, 1e-12)


class Running(torch.nn.Module):
    """A mean in a buffer, which is part of the result, as an intermediate that it keeps is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(4, **F64))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * h(x).mean(0))
        self.sums = torch.zeros(x.shape, **F64)
        self.sums += x.sin()
        return x * self.mean + self.sums


def test_the_state_of_a_module_moves_once():
    found, expected = Running(), Running()
    x = torch.randn(5, 4, **F64)
    with torch.no_grad():
        for _ in range(3):
            jvp(found, x, torch.randn(3, 5, 4, **F64))
            expected(x)
    for a, b in ((found.mean, expected.mean), (found.sums, expected.sums)):
        assert type(a) is torch.Tensor
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "alias",
    [
        lambda t: t.numpy(),
        lambda t: t.__dlpack__(),
        lambda t: t.untyped_storage(),
        lambda t: t.detach(),
    ],
)
def test_a_fallback_takes_memory_that_is_held_elsewhere(alias):
    def f(x):
        out = torch.zeros(x.shape, **F64)
        held = alias(out)   # noqa: F841
        out += h(x)
        return out * x

    x, v = torch.randn(4, 4, **F64), torch.randn(1, 4, 4, **F64)
    with pytest.warns(fastscore.FallbackWarning, match="ordinary tensor|shared with NumPy"):
        got = jvp(f, x, v)
    assert all(close(a, b, 1e-9) for a, b in zip(got, jvp(lambda x: h(x) * x, x, v)))


def test_what_f_is_told_of_a_number_is_that_of_a_dense_tensor():
    """Its shell, which no .data can be set to, is another layout's to C++."""
    def f(x):
        y = h(x).sin()
        assert y.layout is torch.strided and not y.is_sparse and y.nbytes == 8 * y.numel()
        assert y.is_contiguous() and not y.t().is_contiguous() and torch.is_tensor(y)
        image = y.reshape(2, 2, 2, 2).contiguous(memory_format=torch.channels_last)
        assert image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
        return y

    jvp(f, torch.randn(4, 4, **F64), torch.randn(1, 4, 4, **F64))
