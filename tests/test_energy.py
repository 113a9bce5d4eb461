"""Energy models: the score is the gradient of f, whatever is added to f.

Trained by score matching they sample the right weights.
"""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastscore
from fastscore import dual, losses, schedules
from fastscore.models import EnergyMLP, EnergyScore, GaussianMixture

LADDER = schedules.geometric(2.0, 0.1, 8)


def energy(conditional=False, **options):
    """In float64, the zero-initialised last layer filled."""
    torch.manual_seed(0)
    net = EnergyMLP(
        6, width=16, depth=2, sigmas=LADDER if conditional else None, **options
    ).double()
    torch.nn.init.normal_(net.last.weight)
    return net


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "softplus", "tanh"])
def test_score_is_the_gradient_of_f_at_every_order(activation, conditional):
    net, x = (
        energy(conditional, activation=activation),
        torch.rand(3, 6, dtype=torch.float64, requires_grad=True),
    )
    sigma = (torch.tensor([1.5, 0.3, 0.1], dtype=torch.float64),) if conditional else ()
    score = EnergyScore(net)
    torch.testing.assert_close(score(x, *sigma), torch.autograd.grad(net(x, *sigma).sum(), x)[0])
    assert torch.autograd.gradcheck(lambda x: score(x, *sigma), (x,))
    e, v = 1e-5, torch.rand_like(x)
    slope = (net(x + e * v, *sigma) - net(x - e * v, *sigma)) / (2 * e)
    torch.testing.assert_close((score(x, *sigma) * v).sum(1), slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("conditional", [False, True])
def test_f_takes_images_and_does_not_mix_samples(conditional):
    net, x = energy(conditional), torch.rand(4, 1, 2, 3, dtype=torch.float64)
    sigma = (0.3,) if conditional else ()
    score = EnergyScore(net)
    assert net(x, *sigma).shape == (4,) and score(x, *sigma).shape == x.shape
    torch.testing.assert_close(score(x[2:3], *sigma), score(x, *sigma)[2:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        score(x.flatten(1), *sigma), score(x, *sigma).flatten(1), rtol=0, atol=0
    )


def test_untrained_model_is_a_gaussian_that_widens_with_the_noise():
    x = torch.randn(5, 6)
    torch.testing.assert_close(EnergyScore(EnergyMLP(6, width=8, depth=1))(x), -x)
    score = EnergyScore(EnergyMLP(6, width=8, depth=1, sigmas=LADDER))
    torch.testing.assert_close(score(x, 0.5), -x / 0.5)


def test_scale_of_the_score_is_one_over_sigma():
    """f = (c/σ) g(x/c, e).

    ½‖x/c‖², so that the network's part of the score has the size of ∂g over σ.
    """
    net, x, sigma = (
        energy(True),
        torch.rand(3, 6, dtype=torch.float64),
        torch.tensor([1.5, 0.3, 0.1], dtype=torch.float64),
    )
    c = (sigma**2 + 0.25).sqrt()[:, None]
    u, e = net.inputs(x, sigma[:, None])
    torch.testing.assert_close(u, x / c)
    u = u.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net.network(u, e).sum(), u)
    torch.testing.assert_close(EnergyScore(net)(x, sigma), slope / sigma[:, None] - x / c**2)


def test_e_to_the_f_is_integrable():
    """The quadratic beats the network, which grows at most linearly: f(t x) / t² → -½‖x‖²."""
    net, x = energy(), torch.randn(20, 6, dtype=torch.float64)
    torch.testing.assert_close(net(1e6 * x) / 1e12, -0.5 * x.square().sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "name", ["exact", "sliced", "plain", "finite_difference_sliced", "denoising"]
)
def test_a_constant_added_to_f_changes_nothing(name):
    net, x = energy(), torch.rand(5, 6, dtype=torch.float64)
    constant = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    call = {
        "exact": losses.exact,
        "sliced": lambda s, x: losses.sliced(s, x, seed=1),
        "plain": lambda s, x: losses.sliced(s, x, seed=1, variance_reduced=False),
        "finite_difference_sliced": lambda s, x: losses.finite_difference_sliced(s, x, seed=1),
        "denoising": lambda s, x: losses.denoising(lambda x, sigma: s(x), x, 0.3, seed=1),
    }[name]
    plain, shifted = (call(EnergyScore(f), x) for f in (net, lambda x: net(x) + constant))
    assert torch.equal(plain, shifted) and plain.requires_grad
    assert torch.autograd.grad(shifted.sum(), constant, allow_unused=True)[0] in (None, 0)


def test_the_graph_is_kept_exactly_where_it_is_wanted():
    net, x = energy(), torch.rand(3, 6, dtype=torch.float64)
    score, v = EnergyScore(net), torch.ones(2, 3, 6, dtype=torch.float64)
    assert score(x).requires_grad and all(t.requires_grad for t in score.jvp(x, v))
    with torch.no_grad():
        assert not score(x).requires_grad and not any(t.requires_grad for t in score.jvp(x, v))
    net.requires_grad_(False)
    assert not score(x).requires_grad and score(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("conditional", [False, True])
def test_its_own_rule_equals_dual_numbers(conditional):
    """Through a wrapper that hides the energy, forward mode over reverse mode gives the same
    Hessian products and gradients."""
    net, x = energy(conditional), torch.rand(3, 6, dtype=torch.float64)
    sigma, v = ((0.3,) if conditional else ()), torch.randn(2, 3, 6, dtype=torch.float64)
    score, parameters = EnergyScore(net), list(net.parameters())
    own, hidden = score.jvp(x, v, *sigma), dual.jvp(lambda x: score(x, *sigma), x, v)
    for a, b in zip(own, hidden):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    grads = [
        torch.autograd.grad((js * v).sum(), parameters, allow_unused=True)
        for _, js in (own, hidden)
    ]
    for a, b in zip(*grads):
        a, b = (torch.zeros(1, dtype=x.dtype) if t is None else t for t in (a, b))   # the last bias
        torch.testing.assert_close(a.expand_as(b), b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(
            dual.jvp(lambda x: score(x, *sigma), x, v)[1], own[1], rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            torch.func.jvp(lambda x: score(x, *sigma), (x,), (v[0],))[1],
            own[1][0],
            rtol=1e-12,
            atol=1e-12,
        )
    slope, curvature = score.along(x, v, *sigma)
    torch.testing.assert_close(slope, (own[0] * v).sum(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(curvature, (own[1] * v).sum(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("graph", [True, False])
def test_a_forward_mode_tangent_passes_through_the_score(graph):
    score, x, v = (
        EnergyScore(energy()),
        torch.rand(3, 6, dtype=torch.float64),
        torch.randn(1, 3, 6, dtype=torch.float64),
    )
    with torch.set_grad_enabled(graph), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(score(forward_ad.make_dual(x, v[0]))).tangent
    torch.testing.assert_close(tangent, score.jvp(x, v)[1][0], rtol=1e-12, atol=1e-12)


def test_products_take_their_arguments_by_name():
    score = EnergyScore(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
    x, v = torch.randn(3, 2), torch.randn(1, 3, 2)
    for named, given in (
        (score.jvp(x=x, v=v), score.jvp(x, v)),
        (score.along(x, v=v), score.along(x, v)),
    ):
        assert all(map(torch.equal, named, given))


def test_linear_and_quadratic_f():
    x, v = torch.rand(3, 2), torch.ones(1, 3, 2)
    w = torch.tensor([1.0, 2.0])
    s, hv = EnergyScore(lambda x: x @ w).jvp(x, v)
    assert torch.equal(s, w.expand(3, 2)) and not hv.any()
    s, hv = EnergyScore(lambda x: (x.square() @ w)[:, None]).jvp(x, v)
    assert torch.equal(s, 2 * w * x) and torch.equal(hv[0], (2 * w).expand(3, 2))


def test_bad_energies():
    with pytest.raises(ValueError, match=r"activation must be smooth .*; got 'relu'\.$"):
        EnergyMLP(6, activation="relu")
    with pytest.raises(ValueError, match=r"EnergyMLP: x must be .* with 6 values per sample"):
        EnergyMLP(6, width=8, depth=1)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="EnergyMLP: sigma must be given if and only if"):
        EnergyMLP(6, width=8, depth=1)(torch.zeros(2, 6), 1.0)
    with pytest.raises(
        ValueError, match=r"f\(x\) must be one value per sample, \(2,\); got \(2, 6\)"
    ):
        EnergyScore(torch.sin)(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"f\(x\) must depend on x"):
        EnergyScore(lambda x: torch.zeros(2))(torch.zeros(2, 6))


@pytest.mark.parametrize("method", ["denoising", "sliced", "sliced-vr"])
def test_a_trained_energy_samples_the_weights_of_its_data(method):
    """Seed 0; 1,000 annealed samples of a mixture of 0.8 and 0.2.

    Over seeds of the data, the loss and the samples the share is 0.76 with a spread of 0.016, which
    is that of 1,000 draws: 600 steps and 20 updates a level leave 0.04. Five standard errors
    beside 0.05.
    """
    torch.manual_seed(0)
    mixture, n = GaussianMixture([0.8, 0.2], [[-1.0, -0.5], [1.0, 0.5]], 0.02), 1000
    net = EnergyScore(EnergyMLP(2, width=48, depth=1, sigmas=LADDER))
    steps = 600
    batches = (mixture.sample(256, seed=1, step=step) for step in range(steps))

    def loss(net, x, step):
        return losses.noise_conditional(net, x, LADDER, method=method, seed=2, step=step)

    *_, last = fastscore.training.training_loop(
        net, batches, loss, steps=steps, lr=5e-3, ema_decay=0.98
    )
    x = fastscore.sample(
        last.ema, shape=(n, 2), sigmas=LADDER, steps_per_level=20, step_size=2e-3, seed=3
    )
    left = x[:, 0] < 0
    assert abs(float(left.double().mean()) - 0.8) < 0.05 + 5 * math.sqrt(0.8 * 0.2 / n)
    spread = x[left].std(0)
    assert ((x[left].mean(0) - torch.tensor([-1.0, -0.5])).abs() < 0.1).all() and (
        (spread > 0.1) & (spread < 0.25)
    ).all(), spread


@pytest.mark.parametrize(
    "spectral_norm",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm],
    ids=["hook", "weight"],
)
def test_a_second_attempt_finds_a_spectral_norm_as_it_was(spectral_norm):
    """Where a rule of second order is missing, f is called again.

    The power iteration must not have moved meanwhile.
    """
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Hardswish(), nn.Linear(4, 1)).double()
    x, v, state = (
        torch.randn(5, 3).double(),
        torch.randn(2, 5, 3).double(),
        {k: t.clone() for k, t in net.state_dict().items()},
    )
    found = losses.sliced(EnergyScore(net), x, v=v, variance_reduced=False)
    moved = {k: t.clone() for k, t in net.state_dict().items()}
    net.load_state_dict(state)
    s, hv = EnergyScore(net).jvp(x, v)
    expected = ((v * hv).sum(2) + 0.5 * (v * s).sum(2).square()).mean(0)
    assert torch.allclose(found, expected) and all(
        torch.equal(t, moved[k]) for k, t in net.state_dict().items()
    )


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_a_compiled_loss_breaks_its_graph_at_the_energy(variance_reduced):
    """PyTorch refuses to differentiate a compiled graph twice, so the products of an energy run
    eagerly, by either way."""
    torch.manual_seed(0)
    score, x = EnergyScore(EnergyMLP(3, width=8, depth=1)), torch.randn(5, 3)
    torch.nn.init.normal_(score.f.last.weight)

    def loss(x):
        return fastscore.losses.sliced(score, x, variance_reduced=variance_reduced, seed=1).mean()

    found = torch.compile(loss, backend="aot_eager")(x)
    # Which a score does not depend on.
    weights = [p for name, p in score.named_parameters() if name != "f.last.bias"]
    assert torch.equal(found, loss(x))
    for a, b in zip(torch.autograd.grad(found, weights), torch.autograd.grad(loss(x), weights)):
        assert torch.equal(a, b) and float(b.abs().max()) > 0
