"""ScoreMLP with a context vector: what is dropped, its derivatives, and a posterior that it
learns."""

import pytest
import torch

import fastscore
from fastscore import guidance, losses, models, random

F64 = torch.float64


def net_of(**options):
    torch.manual_seed(0)
    net = models.ScoreMLP(3, width=16, depth=2, context=2, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def batch(n=5):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 3, generator=generator, dtype=F64),
        torch.randn(n, 2, generator=generator, dtype=F64),
    )


CASES = {"levels": ({"sigmas": [1.0, 0.1]}, (0.5,)), "no levels": ({}, ())}


@pytest.mark.parametrize("case", CASES)
def test_contexts_are_used_and_dropped(case):
    options, sigma = CASES[case]
    net, (x, c) = net_of(**options), batch()
    s, without = net(x, *sigma, context=c), net(x, *sigma)
    assert not torch.isclose(s, without).all(1).any()
    dropped = torch.tensor([True, False, False, True, False])
    some = net(x, *sigma, context=c, dropped=dropped)
    torch.testing.assert_close(some, torch.where(dropped[:, None], without, s))
    # no context is not a context of zeros
    assert not torch.isclose(net(x, *sigma, context=0 * c), without).all()
    for b in range(len(x)):
        torch.testing.assert_close(
            net(x[b : b + 1], *sigma, context=c[b : b + 1]), s[b : b + 1]
        )


@pytest.mark.parametrize("case", CASES)
def test_its_losses_are_those_of_double_backprop(case):
    options, sigma = CASES[case]
    net, (x, c) = net_of(**options), batch()
    v = random.rademacher(x.shape, seed=2, stream=random.PROJECTION, dtype=F64)
    loss = losses.sliced(lambda x: net(x, *sigma, context=c), x, v=v).sum()

    leaf = x.clone().requires_grad_()
    s = net(leaf, *sigma, context=c)
    (g,) = torch.autograd.grad((s * v).sum(), leaf, create_graph=True)
    expected = (g * v).sum() + 0.5 * s.square().sum()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, list(net.parameters())),
        torch.autograd.grad(expected, list(net.parameters())),
    ):
        torch.testing.assert_close(a, b)


def test_it_learns_a_posterior():
    """x ~ N(0, 1), y = x + N(0, 1/4): x | y ~ N(4y/5, 1/5), and its score at σ is
    -(x - 4y/5)/(1/5 + σ²); without y that of N(0, 1)."""
    torch.manual_seed(0)
    net = models.ScoreMLP(1, width=32, depth=1, sigmas=[1.0, 0.5], context=1)
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / 1000)
        x = torch.randn(256, 1)
        y = x + 0.5 * torch.randn(256, 1)
        dropped = torch.rand(256) < 0.25
        loss = losses.denoising(
            lambda x, s, y=y, d=dropped: net(x, s, context=y, dropped=d), x, sigma=0.5, seed=step
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()

    y = torch.tensor([[-1.0], [0.0], [1.0]])
    x = 0.8 * y + torch.tensor([[0.3], [-0.4], [0.2]])
    conditional = -(x - 0.8 * y) / 0.45
    unconditional = -x / 1.25
    with torch.no_grad():
        assert (net(x, 0.5, context=y) - conditional).abs().max() < 0.15
        assert (net(x, 0.5) - unconditional).abs().max() < 0.15
        guided = guidance.classifier_free(net, context=y, weight=1.0)(x, 0.5)
    assert (guided - (2 * conditional - unconditional)).abs().max() < 0.4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda net, x, c: net(x, context=c[:, :1]), r"context must be \(5, 2\).*got \(5, 1\)"),
        (lambda net, x, c: net(x, context=c[0]), r"context must be \(5, 2\)"),
        (lambda net, x, c: net(x, context=c, dropped=torch.ones(5)), "dropped must be bool"),
        (lambda net, x, c: models.ScoreMLP(3)(x.float(), context=c), "built without context"),
        (lambda net, x, c: models.ScoreMLP(3, context=0), "context must be an int"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(net_of(), *batch())


def test_it_is_sampled_with_its_context():
    net, (_, c) = net_of(sigmas=[1.0, 0.1]), batch(4)
    score = guidance.classifier_free(net, context=c, weight=0.0)
    options = {"sigmas": torch.tensor([1.0, 0.3, 0.1]), "steps_per_level": 2}
    options |= {"step_size": 1e-2, "seed": 3, "dtype": F64}
    whole = fastscore.sample(score, shape=(4, 3), **options)
    part = fastscore.sample(
        guidance.classifier_free(net, context=c[1:], weight=0.0), shape=(3, 3), first_sample=1,
        **options,
    )   # fmt: skip
    torch.testing.assert_close(part, whole[1:])
