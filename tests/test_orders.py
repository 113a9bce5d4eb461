"""First and second derivatives by one kind of number and one table of rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastscore.dual import jvp
from fastscore.dual.call import NoRule
from fastscore.dual.jets import second_order
from fastscore.dual.rules import RULES
from fastscore.dual.table import SECOND

D = torch.float64


def twice(f, x, v):
    """f and its derivatives along v, by double backprop."""
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    (g,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    hv = [torch.autograd.grad((g * d).sum(), leaf, retain_graph=True)[0] for d in v]
    first, second = ((v * t).flatten(2).sum(2) for t in (g, torch.stack(hv)))
    return y[None], first, second


def agree(found, expected):
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-11)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture
def point():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5, dtype=D), torch.randn(2, 2, 3, 4, 5, dtype=D)


def test_what_carries_second_derivatives_carries_first_ones():
    assert SECOND.keys() < RULES.keys()


WRITES = {
    "view": lambda h, z: z.mul_(2),
    "its view": lambda h, z: z[:, 1].add_(1),
    "base": lambda h, z: h.mul_(2),
}


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_view_that_a_stack_cannot_have_is_never_written_to_unseen(point, write, straight):
    """Between two permutations the value stays contiguous, and the stack does not."""

    def f(x):
        h = x.permute(0, 2, 3, 1).sin().permute(0, 3, 1, 2)
        z = h.view(2, -1)
        write(h, z)
        return (h.flatten(1) * z).sum(1)

    with pytest.raises(NoRule, match="a view that had to be a copy"):
        second_order(f, *point, straight=straight)


def test_the_numbers_of_one_pass_are_never_taken_for_those_of_another(point):
    """Each has its own directions."""
    x, v = (t.flatten(-3) for t in point)

    def mixed(x):
        c, d = torch.ones(2, 60, dtype=D), torch.ones(2, 2, 60, dtype=D)
        return second_order(lambda y: (y * x).sum(1), c, d)[0][0] + x.square().sum(1)

    with pytest.raises(NoRule, match="numbers of another"):
        second_order(mixed, x, v)


def test_a_pass_on_constants_inside_a_pass(point):
    x, v = (t.flatten(-3) for t in point)
    c, d = torch.rand(2, 4, dtype=D), torch.rand(1, 2, 4, dtype=D)
    y, first, second = twice(lambda y: y.sin().sum(1), c, d)

    def by_second_order(x):
        scale = second_order(lambda y: y.sin().sum(1), c, d)[2][0]
        return x.sin().sum(1) * scale

    def by_jvp(x):
        scale = jvp(lambda y: y.sin().sum(1), c, d)[1][0]
        return x.sin().sum(1) * scale

    assert agree(
        second_order(by_second_order, x, v), twice(lambda x: x.sin().sum(1) * second[0], x, v)
    )
    assert agree(second_order(by_jvp, x, v), twice(lambda x: x.sin().sum(1) * first[0], x, v))
    found = jvp(by_second_order, x, v)
    expected = jvp(lambda x: x.sin().sum(1) * second[0].detach(), x, v)
    assert agree(found, expected)


IN_PLACE = {
    "activation": lambda x: F.silu(x * 2, inplace=True),
    "activation by its place": lambda x: F.elu(x * 2, 1.0, True),
    "product": lambda x: (x * 2).mul_(x),
    "quotient": lambda x: (x * 2).div_(1 + x.square()),
    "straight into bent": lambda x: x.sin().add_(x),
    "bent into straight": lambda x: (x * 2).add_(x.sin()),
}


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
def test_operations_in_place_find_room_for_second_derivatives(point, write, straight):
    def f(x):
        return (write(x) * x).flatten(1).sum(1)

    assert agree(second_order(f, *point, straight=straight), twice(f, *point))


def test_second_derivatives_are_not_lost_where_there_is_no_room(point):
    def seen(x):
        h = x * 2
        part = h[:, :1]   # another number in the same memory
        h.mul_(x)
        return (h * x).flatten(1).sum(1) + part.flatten(1).sum(1)

    with pytest.raises(NoRule, match="no room"):
        second_order(seen, *point)
    assert agree(second_order(seen, *point, straight=False), twice(seen, *point))


@pytest.mark.parametrize("straight", [True, False])
def test_a_checkpoint_finds_the_room_that_it_found(point, straight):
    """Its part of f is called again in the backward pass, too late for another path."""
    weight = torch.rand(5, 5, dtype=D, requires_grad=True)

    def part(x):
        return (x @ weight).mul_(x).sin().flatten(1).sum(1)

    def f(x):
        return checkpoint(part, x, use_reentrant=False)

    def gradient(g):
        _, first, second = second_order(g, *point, straight=straight)
        return torch.autograd.grad((second + first.square()).sum(), weight)[0]

    if straight:
        with pytest.raises(NoRule, match="no room"):
            second_order(f, *point)
    else:
        assert torch.allclose(gradient(f), gradient(part), rtol=1e-12)


def permuted(out, x):
    out[[2, 0, 1]] = x.sin()


def apart(out, x):
    out[:, [0, 1, 2], :, [0, 1, 2]] = x.sin()[:, 0, :, :3]


def broadcast(out, x):
    out[:] = x[:, 0].sin()


MIXED = {
    "permuted": permuted,
    "indices apart": apart,
    "broadcast": broadcast,
    "copied": lambda out, x: out.copy_(x.sum(1)),
}


@pytest.mark.parametrize("write", MIXED.values(), ids=MIXED)
def test_writes_that_mix_samples_have_no_rule(write):
    """With as many samples as other dimensions have entries, every shape fits."""
    x, v = torch.rand(3, 3, 3, 3, dtype=D), torch.rand(2, 3, 3, 3, 3, dtype=D)

    def f(x):
        out = torch.zeros_like(x)
        write(out, x)
        return (out * x).flatten(1).sum(1)

    with pytest.raises(NoRule, match="keep the samples the first dimension"):
        second_order(f, x, v)


def test_writes_that_keep_samples_apart(point):
    def f(x):
        out = torch.zeros_like(x)
        out[:, :, [0, 2], [1, 3]] = x.sin()[..., 0, :2]
        out[..., 4] = x[..., 0].exp()
        out[:, 0, 3:, :2] = 1.5
        out[[1, 0], 1, 3] = torch.arange(10, dtype=D).view(2, 5)
        out.flatten(1)[:, 7:9].copy_(x[:, 0, 0, :2].cos())
        return (out * out * x).flatten(1).sum(1)

    assert agree(second_order(f, *point), twice(f, *point))


CARRIED = {
    "glu": lambda x: F.glu(x[..., :4], -1),
    "triangles": lambda x: (x[..., :4].tril().sin() @ x[..., :4].triu(1)).exp(),
    "vectors": lambda x: x[:, 0, 0].sin() @ torch.linspace(-1, 1, 5, dtype=D),
    "leaky": lambda x: F.leaky_relu(x, 0.3) * x,
    "softmaxes": lambda x: x.softmax(-1).log_softmax(1) * x.logsumexp((1, -1), keepdim=True),
    "shapes of constants": lambda x: (
        torch.ones(1, dtype=D).expand_as(x) * x.exp().reshape_as(x.flatten(1)).view_as(x)
    ),
    "fractional power": lambda x: (1 + x.square()) ** 0.7,
    "types": lambda x: torch.where(x > 0, x.square(), torch.zeros((), dtype=torch.float32)),
}


def attention(q, k, v, mask, causal):
    """In plain operations, which PyTorch differentiates twice."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("heads", [True, False])
def test_attention_of_both_orders(point, heads, causal, masked):
    x, v = point if heads else (t.flatten(-3, -2) for t in point)
    mask = torch.tensor([True, False, True, True]) if masked and heads else None

    def energy(by):
        return lambda x: by(x.sin(), x, x.exp(), mask, causal).flatten(1).sum(1)

    def fused(q, k, v, mask, causal):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

    expected = twice(energy(attention), x, v)
    assert agree(second_order(energy(fused), x, v), expected)
    value, first = jvp(energy(fused), x, v)
    assert agree((value[None], first), expected[:2])


def test_attention_between_samples_has_no_rule():
    def f(x):
        return F.scaled_dot_product_attention(x, x, x).sum(1)

    with pytest.raises(NoRule):
        second_order(f, torch.rand(3, 3, dtype=D), torch.rand(1, 3, 3, dtype=D))


@pytest.mark.parametrize("f", CARRIED.values(), ids=CARRIED)
def test_rules_of_both_orders(point, f):
    def energy(x):
        return f(x).reshape(2, -1).sum(1)

    found, (x, v) = second_order(energy, *point), point
    expected = twice(energy, x, v)
    assert agree(found, expected)
    value, first = jvp(energy, x, v)
    assert agree((value[None], first), expected[:2])


def test_logsumexp_of_nothing_has_no_slope():
    x = torch.tensor([[-torch.inf] * 3, [0.0, 1.0, 2.0]], dtype=D)
    v = torch.ones(1, 2, 3, dtype=D)
    y, first = jvp(lambda x: x.logsumexp(1), x, v)
    assert y[0] == -torch.inf and first[0, 0] == 0 and abs(first[0, 1] - 1) < 1e-15
    _, first, second = second_order(lambda x: x.logsumexp(1), x, v)
    assert first[0, 0] == 0 and second[0, 0] == 0 and abs(second[0, 1]) < 1e-15


@pytest.mark.parametrize("drop", [nn.Dropout(0.5).eval(), nn.Dropout(0.0), nn.Dropout2d(0.0)])
def test_dropout_that_drops_nothing_is_its_argument(point, drop):
    same = []
    jvp(lambda x: same.append(drop(x) is x) or x, *point)
    assert same == [True]


def test_dropout_refuses_a_probability_that_is_none(point):
    with pytest.raises(ValueError, match="probability"):
        jvp(lambda x: F.dropout(x, -1.0, training=False), *point)
