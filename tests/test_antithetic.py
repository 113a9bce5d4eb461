"""The denoising loss over z and -z: the same expectation, and at small σ a variance that is finite.

On Gaussian data with a linear score s(x) = -a (x - m) everything is known in closed form: with
e = x - m, c = 1/σ - a σ and the expectation over z alone,

    E L = ½ a² ‖e‖² + ½ d c²,    ∂E L/∂a = a ‖e‖² - d σ c,    ∂E L/∂m = -a² e

    plain gradient        ∂L/∂a = a ‖e‖² - σ c ‖z‖² - (1/σ - 2 a σ) eᵀz,    ∂L/∂m = -a² e + a c z
    antithetic gradient   ∂L/∂a = a ‖e‖² - σ c ‖z‖²,                        ∂L/∂m = -a² e

whose variances over z are 2 d σ² c² + (1/σ - 2 a σ)² ‖e‖² and 2 d σ² c² of a, (a c)² and 0 of m.
"""

import math

import pytest
import torch
from torch import nn

from fastscore import losses, random
from fastscore.models import ScoreMLP

SIGMAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
D, DRAWS = 6, 20_000


class Linear(nn.Module):
    def __init__(self, a=0.7):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.m = nn.Parameter(torch.linspace(-1, 1, D, dtype=torch.float64))

    def forward(self, x, sigma):
        return -self.a * (x - self.m)


def each_gradient(net, x, sigma, antithetic):
    """Gradients of the losses of DRAWS draws of z at one x, (DRAWS, 1 + D)."""
    rows = nn.Parameter(net.a.detach().expand(DRAWS, 1).clone())
    means = nn.Parameter(net.m.detach().expand(DRAWS, D).clone())
    many = x.expand(DRAWS, D).contiguous()
    loss = losses.denoising(
        lambda x, sigma: -rows * (x - means), many, sigma, antithetic=antithetic, seed=5
    )
    return torch.cat(torch.autograd.grad(loss.sum(), [rows, means]), 1)


def test_expectation_and_variance_are_those_of_the_closed_form():
    """20,000 draws: means within 6 standard errors (2·10⁻⁹ for each of 98), variances within 8 %
    (5 standard errors √(κ/20,000) with κ = 5 of a sum of six squares)."""
    net, x = Linear(), torch.linspace(0.5, 2, D, dtype=torch.float64)
    a, e = net.a.item(), x - net.m.detach()
    square = e.square().sum().item()
    print("\n  sigma   variance of the gradient of a: plain, antithetic, closed forms")
    for sigma in SIGMAS:
        c = 1 / sigma - a * sigma
        mean = torch.cat([torch.tensor([a * square - D * sigma * c]).double(), -(a**2) * e])
        of_square = 2 * D * (sigma * c) ** 2
        variances = {False: of_square + (1 / sigma - 2 * a * sigma) ** 2 * square, True: of_square}
        measured = {}
        for antithetic in (False, True):
            g = each_gradient(net, x, sigma, antithetic)
            error = (g.var(0) / DRAWS).sqrt()
            assert ((g.mean(0) - mean).abs() <= 6 * error + 1e-9).all(), (sigma, antithetic)
            measured[antithetic] = g[:, 0].var().item()
            assert measured[antithetic] == pytest.approx(variances[antithetic], rel=0.08)
            of_m = (a * c) ** 2 if not antithetic else 0.0
            torch.testing.assert_close(
                g[:, 1:].var(0), torch.full((D,), of_m).double(), rtol=0.08, atol=1e-9
            )
        print(f"{sigma:7g} {measured[False]:14.4g} {measured[True]:14.4g}", end="")
        print(f" {variances[False]:14.4g} {variances[True]:14.4g}")


@pytest.mark.parametrize("kind", ["number", "tensor", "one-each"])
def test_loss_and_gradients_are_the_mean_over_both_signs(kind):
    net = ScoreMLP(D, width=16, depth=1, sigmas=[1.0, 0.1]).double()
    nn.init.normal_(net.last.weight)
    x = torch.rand(4, D, dtype=torch.float64)
    sigma = {
        "number": 0.25,
        "tensor": torch.tensor(0.25).double(),
        "one-each": torch.tensor([1, 0.5, 0.1, 2]).double(),
    }[kind]
    each = torch.as_tensor(sigma, dtype=torch.float64).expand(4)
    z = random.normal(x.shape, seed=5, step=3, stream=random.PERTURB, dtype=torch.float64)

    loss = losses.denoising(net, x, sigma, antithetic=True, seed=5, step=3)
    expected = sum(
        0.25 * (net(x + w * each[:, None], each) + w / each[:, None]).square().sum(1)
        for w in (z, -z)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for found, right in zip(
        torch.autograd.grad(loss.sum(), list(net.parameters())),
        torch.autograd.grad(expected.sum(), list(net.parameters())),
    ):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)


def variance_over_draws(net, x, sigma, draws, **options):
    """Of the mean loss's gradient, summed over the parameters."""
    gradients = []
    for step in range(draws):
        loss = losses.denoising(net, x, sigma, seed=1, step=step, **options).mean()
        parts = torch.autograd.grad(loss, list(net.parameters()))
        gradients.append(torch.cat([g.flatten() for g in parts]))
    return torch.stack(gradients).var(0).sum().item()


def test_variance_of_a_networks_gradient_stays_finite():
    """A network with tanh: plain 1/σ², antithetic a constant. Equal cost is two plain draws."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)).double()
    x = torch.randn(8, D, dtype=torch.float64)

    score = Called(net)
    print("\n  sigma   variance of the gradient: plain, antithetic, at equal cost")
    rows = []
    for sigma in SIGMAS:
        plain = variance_over_draws(score, x, sigma, 150)
        reduced = variance_over_draws(score, x, sigma, 150, antithetic=True)
        rows.append((plain, reduced))
        print(f"{sigma:7g} {plain:12.4g} {reduced:12.4g} {plain / 2 / reduced:12.4g} times less")
    # 1/σ² from 0.01 to 0.001, and nothing; 150 draws of many parameters tell a variance to 20 %.
    assert rows[-1][0] / rows[-3][0] == pytest.approx(100, rel=0.4)
    assert rows[-1][1] / rows[-3][1] == pytest.approx(1, rel=0.4)
    assert rows[-1][0] > 1e4 * rows[-1][1]
    # At no σ more than that of one draw.
    assert all(reduced < 1.3 * plain for plain, reduced in rows)


class Called(nn.Module):
    """A network that does not look at σ."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma):
        return self.net(x)


def test_over_a_ladder_the_method_is_called_denoising_vr():
    net = ScoreMLP(D, width=16, depth=1, sigmas=[1.0, 0.1]).double()
    nn.init.normal_(net.last.weight)
    x, labels = torch.rand(4, D, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    sigmas = torch.tensor([1.0, 0.125], dtype=torch.float64)
    options = {"seed": 3, "step": 2, "first_sample": 7}
    found = losses.noise_conditional(
        net, x, sigmas, method="denoising-vr", power=1, labels=labels, **options
    )
    expected = losses.denoising(net, x, sigmas[labels], antithetic=True, **options)
    torch.testing.assert_close(found, sigmas[labels] * expected, rtol=1e-10, atol=1e-12)


def test_parts_of_a_batch_have_the_losses_of_the_whole():
    x = torch.rand(4, D)
    options = {"antithetic": True, "seed": 3}
    whole = losses.denoising(lambda x, sigma: -x, x, 0.5, **options)
    parts = [
        losses.denoising(lambda x, sigma: -x, x[k : k + 1], 0.5, first_sample=k, **options)
        for k in range(4)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_minimiser_at_small_sigma_is_found_with_fewer_draws():
    """a of s = -a x on standard normal data at σ = 0.001 is 1/(1 + σ²). By 500 draws it is
    mean ‖z‖²/mean ‖x‖², right to √(4/(500 d)) = 0.04; plain draws add 1/(σ √(500 d)) = 18."""
    sigma, a_true = 1e-3, 1 / (1 + 1e-6)
    torch.manual_seed(9)
    x = torch.randn(500, D, dtype=torch.float64)

    def minimiser(antithetic):
        a = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = losses.denoising(lambda x, s: -a * x, x, sigma, antithetic=antithetic, seed=1).mean()
        (slope,) = torch.autograd.grad(loss, a, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, a)
        return -(slope / curvature).item()   # the loss is quadratic in a

    errors = [abs(minimiser(antithetic) - a_true) for antithetic in (False, True)]
    print(f"\nerror of a at sigma 0.001: plain {errors[0]:.3g}, antithetic {errors[1]:.3g}")
    assert errors[1] < 6 * math.sqrt(4 / (500 * D)) < errors[0]


def test_antithetic_is_true_or_false():
    with pytest.raises(TypeError, match="denoising: antithetic must be True or False; got 'yes'"):
        losses.denoising(lambda x, sigma: -x, torch.rand(2, D), 0.5, antithetic="yes")
