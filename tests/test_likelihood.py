"""Densities from scores against closed forms; everything in float64 unless it says otherwise."""

import math
import sys

import pytest
import torch

from fastscore import likelihood, models, random, schedules
from fastscore.likelihood import bits_per_dim, dequantize, log_density, log_ratio

COVARIANCE = torch.tensor(
    [[1.0, 0.5, 0.2, 0.0], [0.5, 0.8, -0.1, 0.1], [0.2, -0.1, 0.6, 0.3], [0.0, 0.1, 0.3, 0.9]],
    dtype=torch.float64,
)
GAUSSIAN = models.Gaussian([0.3, -0.2, 0.1, 0.5], COVARIANCE)
MEANS, SHAPES = (
    [[-1.0, 0.5], [2.0, 1.0], [0.0, -1.5]],
    [[[1.0, 0.5], [0.5, 0.8]], [[0.3, 0.0], [0.0, 0.2]], [[0.2, 0.1], [0.1, 0.4]]],
)
MIXTURE = models.GaussianMixture([0.5, 0.3, 0.2], MEANS, SHAPES)
RANGE = {"sigma_min": 0.1, "sigma_max": 20.0}


def points(density, n=6, seed=0):
    return density.sample(n, RANGE["sigma_min"], seed=seed, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"atol": 1e-7, "rtol": 1e-7}, id="dopri5"),
        pytest.param({"method": "dopri8", "atol": 1e-8, "rtol": 1e-8}, id="dopri8"),
        pytest.param({"steps": 96}, id="rk4"),
    ],
)
@pytest.mark.parametrize(
    "density, shape", [(GAUSSIAN, (1, 2, 2)), (MIXTURE, (2,))], ids=["gaussian-images", "mixture"]
)
def test_the_density_comes_back_from_the_score_to_a_millionth_of_a_nat_per_dimension(
    density, shape, options
):
    x = points(density).view(-1, *shape)
    found = log_density(density.score, x, prior=density, chunk=3, **RANGE, **options)
    assert found.dtype == torch.float64
    assert float((found - density.log_prob(x, RANGE["sigma_min"])).abs().max()) < 1e-6 * density.dim


def test_the_customary_prior_is_off_by_its_formula():
    """Data N(μ, s² I): (d/2) log(v/σ²) + ‖x_T - μ‖²/(2v) - ‖x_T‖²/(2σ²), v = s² + σ².

    At σ_max = 2 it is of the order of a nat.
    """
    d, mu, s2, low, high = 3, torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64), 0.25, 0.1, 2.0
    density = models.Gaussian(mu, s2)
    x = density.sample(5, low, seed=1, dtype=torch.float64)
    v = s2 + high**2
    end = mu + (x - mu) * math.sqrt(v / (s2 + low**2))
    bias = (
        d / 2 * math.log(v / high**2)
        + (end - mu).square().sum(1) / (2 * v)
        - end.square().sum(1) / (2 * high**2)
    )
    found = log_density(density.score, x, sigma_min=low, sigma_max=high, steps=64)
    assert float(bias.abs().max()) > 0.1
    torch.testing.assert_close(found - density.log_prob(x, low), bias, rtol=0, atol=3e-7)
    given = log_density(
        density.score,
        x,
        sigma_min=low,
        sigma_max=high,
        steps=64,
        prior=lambda x: density.log_prob(x, high),
    )
    torch.testing.assert_close(given, density.log_prob(x, low), rtol=0, atol=3e-7)


@pytest.mark.parametrize("projections", [1, 3])
def test_rademacher_estimates_are_unbiased_and_every_draw_is_the_closed_form(projections):
    """A linear score: log p + ½ vᵀKv - ½ tr K with K = log(C + σ_max² I).

    log(C + σ_min² I), of variance ½ Σ_{i≠j} K_ij² / M.

    Seed 3; five standard errors are crossed once in 1.7 million.
    """
    n, offset = 20000, 7
    x = points(GAUSSIAN, 1).expand(n, 4)
    options = {
        "trace": "rademacher",
        "projections": projections,
        "prior": GAUSSIAN,
        "steps": 24,
        **RANGE,
    }
    found = log_density(GAUSSIAN.score, x, seed=3, first_sample=offset, **options)
    values, Q = torch.linalg.eigh(COVARIANCE)
    K = (
        Q
        @ torch.diag(
            torch.log((values + RANGE["sigma_max"] ** 2) / (values + RANGE["sigma_min"] ** 2))
        )
        @ Q.T
    )
    key = {"seed": 3, "stream": random.PROJECTION, "offset": offset * 4, "dtype": torch.float64}
    v = torch.stack([random.rademacher((n, 4), substream=m, **key) for m in range(projections)])
    truth = GAUSSIAN.log_prob(x, RANGE["sigma_min"])
    each = truth + 0.5 * (torch.einsum("mbi,ij,mbj->mb", v, K, v) - K.trace()).mean(0)
    torch.testing.assert_close(found, each, rtol=0, atol=1e-3)   # the error of 24 steps
    exact = log_density(GAUSSIAN.score, x[:1], prior=GAUSSIAN, steps=24, **RANGE)
    variance = 0.5 * float((K - torch.diag(K.diagonal())).square().sum()) / projections
    assert abs(float((found - exact).mean())) < 5 * math.sqrt(variance / n)
    # vᵀKv is a sum of six products of signs: its kurtosis is at most 15, so 14 v²/n bounds the
    # variance of the variance.
    assert abs(float(found.var()) - variance) < 5 * variance * math.sqrt(14 / n)


def test_rademacher_is_exact_for_every_draw_when_the_jacobian_is_diagonal():
    def score(x, sigma):
        return -(x + 0.3 * x.sin()) / (1 + sigma.square())[:, None]

    x = points(GAUSSIAN)
    exact = log_density(score, x, steps=8, **RANGE)
    for seed in range(3):
        torch.testing.assert_close(
            log_density(score, x, steps=8, trace="rademacher", seed=seed, **RANGE),
            exact,
            rtol=1e-13,
            atol=1e-12,
        )


@pytest.mark.parametrize("method, order", [("heun", 2), ("rk4", 4)])
def test_fixed_steps_converge_with_their_order(method, order):
    """Twice the steps, an error 2^order times as small.

    The next order is still a fifth of it on the grids chosen.
    """
    x, n = points(MIXTURE), {"heun": 80, "rk4": 32}[method]
    options = {"prior": MIXTURE, "method": method, **RANGE}
    truth = MIXTURE.log_prob(x, RANGE["sigma_min"])
    errors = [
        float((log_density(MIXTURE.score, x, steps=steps, **options) - truth).abs().mean())
        for steps in (n, 2 * n)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3


@pytest.mark.parametrize(
    "options",
    [{}, {"trace": "rademacher", "projections": 2, "seed": 5}],
    ids=["exact", "rademacher"],
)
def test_a_sample_does_not_depend_on_its_batch(options):
    x, options = points(MIXTURE, 9), {"steps": 16, **options}
    whole = log_density(MIXTURE.score, x, **RANGE, **options)
    parts = [
        log_density(MIXTURE.score, x[a:b], first_sample=a, **RANGE, **options)
        for a, b in ((0, 4), (4, 9))
    ]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{"steps": 32}, {"atol": 1e-6, "rtol": 1e-6}], ids=["rk4", "dopri5"]
)
def test_the_gradient_in_x_is_the_score(options):
    x = points(MIXTURE).requires_grad_()
    found = log_density(MIXTURE.score, x, prior=MIXTURE, **RANGE, **options)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    # Of the steps.
    torch.testing.assert_close(
        gradient, MIXTURE.score(x.detach(), RANGE["sigma_min"]), rtol=0, atol=3e-4
    )


@pytest.mark.parametrize(
    "options",
    [{"steps": 48}, {"steps": 48, "trace": "rademacher"}, {"atol": 1e-8, "rtol": 1e-8}],
    ids=["rk4", "signs", "dopri5"],
)
def test_the_gradient_in_parameters_matches_its_closed_form(options):
    """s = -x/(a + σ²) under the customary prior.

    log N(r x; 0, σ_max²) + d log r, r² = (a + σ_max²)/(a + σ_min²).
    """
    x, low, high = points(MIXTURE), 0.5, 5.0
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = log_density(
        lambda x, sigma: -x / (a + sigma.square())[:, None],
        x,
        sigma_min=low,
        sigma_max=high,
        **options,
    )
    r2 = (a + high**2) / (a + low**2)
    truth = -0.5 * r2 * x.square().sum(1) / high**2 - math.log(2 * math.pi * high**2) + r2.log()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(t.sum(), a)[0] for t in (found, truth)), rtol=1e-6, atol=0
    )


def test_forward_mode_along_x_is_the_score_times_the_tangent():
    x, v = points(MIXTURE), points(MIXTURE, seed=1)
    tangent = torch.func.jvp(
        lambda x: log_density(MIXTURE.score, x, prior=MIXTURE, steps=24, **RANGE), (x,), (v,)
    )[1]
    # Of 24 steps.
    torch.testing.assert_close(
        tangent, (v * MIXTURE.score(x, RANGE["sigma_min"])).sum(1), rtol=1e-3, atol=1e-3
    )


def network(dtype):
    torch.manual_seed(0)
    net = models.ScoreMLP(4, width=16, depth=1, sigmas=[5.0, 0.1])
    torch.nn.init.normal_(net.last.weight, std=0.3)
    return net.to(dtype).requires_grad_(False)


def test_a_network_flows_as_the_jacobian_of_reverse_mode_says():
    """Heun's method with the trace of torch.func.jacrev, on images.

    An untrained network is no gradient field.
    """
    net, x, sigmas = (
        network(torch.float64),
        0.5 + 0.2 * points(GAUSSIAN, 3).view(-1, 1, 2, 2),
        schedules.geometric(5.0, 0.1, 6),
    )

    def rhs(x, sigma):
        jacobian = torch.stack(
            [torch.func.jacrev(lambda y: net(y[None], sigma)[0])(y).reshape(4, 4) for y in x]
        )
        return -(sigma**2) * net(x, sigma), -(sigma**2) * jacobian.diagonal(dim1=1, dim2=2).sum(1)

    y, total, levels = x, 0, sigmas.tolist()[::-1]
    for a, b in zip(levels, levels[1:]):
        h = math.log(b / a)
        k1, l1 = rhs(y, a)
        k2, l2 = rhs(y + h * k1, b)
        y, total = y + h / 2 * (k1 + k2), total + h / 2 * (l1 + l2)
    expected = (
        total
        - 0.5 * y.flatten(1).square().sum(1) / levels[-1] ** 2
        - 2 * math.log(2 * math.pi * levels[-1] ** 2)
    )
    options = {"sigma_min": 0.1, "sigma_max": 5.0, "steps": sigmas, "method": "heun"}
    torch.testing.assert_close(log_density(net, x, **options), expected, rtol=1e-12, atol=1e-12)
    single = log_density(network(torch.float32), x.float(), **options)
    assert single.dtype == torch.float32
    # Five steps of float32 scores of size 10
    torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=2e-5)


def test_an_energy_is_a_score_like_any_other():
    def energy(x, sigma):
        return -0.5 * (
            x.square() / (torch.arange(1.0, 5.0, dtype=x.dtype) + sigma.square()[:, None])
        ).sum(1)

    density = models.Gaussian([0.0] * 4, torch.arange(1.0, 5.0))
    x = points(density)
    with torch.no_grad():
        found = log_density(models.EnergyScore(energy), x, prior=density, steps=64, **RANGE)
    torch.testing.assert_close(found, density.log_prob(x, RANGE["sigma_min"]), rtol=0, atol=1e-5)


def test_a_network_of_fixed_levels_is_asked_only_for_these():
    """NCSN refuses every sigma between its levels on the CPU."""
    net = models.NCSN(channels=1, ngf=4, image_size=8, sigmas=[1.0, 0.5, 0.2]).requires_grad_(False)
    x, options = (
        torch.rand(2, 1, 8, 8),
        {"sigma_min": 0.2, "sigma_max": 1.0, "trace": "rademacher", "seed": 0},
    )
    assert bool(log_density(net, x, steps=net.sigmas, method="heun", **options).isfinite().all())
    with pytest.raises(ValueError, match="sigma must be one of the 3 levels"):
        log_density(net, x, steps=net.sigmas, **options)


@pytest.mark.parametrize(
    "sigma",
    [None, 0.5, torch.linspace(0.3, 1.3, 6, dtype=torch.float64)],
    ids=["none", "one", "each"],
)
def test_the_line_integral_is_the_difference_of_log_densities(sigma):
    x0, x1, level = points(MIXTURE), points(MIXTURE, seed=1), 0.0 if sigma is None else sigma
    value, error = log_ratio(
        MIXTURE.score, x0, x1, sigma=sigma, nodes=64, chunk=10, return_error=True
    )
    truth = MIXTURE.log_prob(x1, level) - MIXTURE.log_prob(x0, level)
    torch.testing.assert_close(value, truth, rtol=0, atol=1e-6)
    coarse, estimate = log_ratio(MIXTURE.score, x0, x1, sigma=sigma, nodes=16, return_error=True)
    rounding = 1e-12   # 64 terms of size 1 to 10, in float64
    assert bool((estimate + rounding > (coarse - truth).abs()).all())
    assert bool((error < estimate + rounding).all())
    assert float(estimate.max()) > 1e-3


def test_the_line_integral_between_far_points_is_right_or_warned_about(recwarn):
    """x = ±12 N(0, 1), σ = 0.1: sixteen nodes are off by several nats."""
    x0, x1 = (
        12 * random.normal((64, 2), seed=seed, stream=1024, dtype=torch.float64) for seed in (7, 8)
    )
    truth = MIXTURE.log_prob(x1, 0.1) - MIXTURE.log_prob(x0, 0.1)
    assert float((log_ratio(MIXTURE.score, x0, x1, sigma=0.1, nodes=16) - truth).abs().max()) > 3.5
    assert not recwarn.list
    value, estimate = log_ratio(MIXTURE.score, x0, x1, sigma=0.1, return_error=True)
    error, done = (value - truth).abs(), estimate <= 0.01
    assert not recwarn.list and 0 < int(done.sum()) < 64
    assert float(error[done].max()) < 0.01 and bool((error < estimate + 1e-6).all())
    with pytest.warns(
        UserWarning,
        match=rf"log_ratio: {64 - int(done.sum())} of 64 ratios may be off, the worst by .* after "
              r"256 nodes",
    ):
        assert torch.equal(log_ratio(MIXTURE.score, x0, x1, sigma=0.1), value)


def test_near_points_take_sixteen_calls_and_far_ones_their_own():
    """Doubling never reaches a batch mate, and each sample's sigma goes with it.

    Gradients flow through both rules: s(x1).
    """
    x0, x1 = (scale * points(MIXTURE, seed=seed) for scale, seed in ((1.0, 1), (1.0, 2)))
    x0[:3], sigma = x1[:3] - 0.05, torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    calls = []

    def score(x, sigma):
        calls.append(len(x))
        return MIXTURE.score(x, sigma)

    near = log_ratio(score, x0[:3], x1[:3], sigma=sigma[:3])
    assert calls == [16 * 3]
    x1.requires_grad_()
    value = log_ratio(score, x0, x1, sigma=sigma, atol=1e-6)
    assert calls[1] == 16 * 6 and 0 < calls[2] <= 16 * 3
    torch.testing.assert_close(
        value, MIXTURE.log_prob(x1, sigma) - MIXTURE.log_prob(x0, sigma), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(value[:3], near, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), x1)[0],
        MIXTURE.score(x1.detach(), sigma),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rounding_of_scores_does_not_double_the_nodes(dtype):
    """A linear score in coarse arithmetic: its noise is no sign of too few nodes."""
    calls = []

    def score(x):
        calls.append(len(x))
        return -x / 0.01**2

    x0, x1 = (random.normal((4, 100), seed=seed, stream=1024, dtype=dtype) for seed in (1, 2))
    log_ratio(score, x0, x1)
    assert calls == [16 * 4]


def test_both_ways_to_the_density_agree():
    x0, x1, sigma = points(MIXTURE), points(MIXTURE, seed=1), RANGE["sigma_min"]
    by_flow = [
        log_density(MIXTURE.score, x, prior=MIXTURE, atol=1e-8, rtol=1e-8, **RANGE)
        for x in (x0, x1)
    ]
    torch.testing.assert_close(
        log_ratio(MIXTURE.score, x0, x1, sigma=sigma, nodes=96),
        by_flow[1] - by_flow[0],
        rtol=0,
        atol=1e-6,
    )


def test_the_line_integral_is_exact_for_polynomials_and_differentiable():
    """s = x³ on images: log-ratio ¼ Σ (x1⁴ - x0⁴), with two nodes; its gradient in x1 is s(x1)."""
    x0, x1 = (points(GAUSSIAN, seed=k).view(-1, 1, 2, 2) for k in (0, 1))
    x1.requires_grad_()
    value = log_ratio(lambda x: x**3, x0, x1, nodes=2)
    torch.testing.assert_close(
        value, 0.25 * (x1**4 - x0**4).flatten(1).sum(1), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), x1)[0], x1.detach() ** 3, rtol=1e-12, atol=1e-12
    )


def test_a_score_that_is_no_gradient_depends_on_the_path():
    """The rotation (-y, x) round a triangle gives twice its area; a gradient gives zero."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for score, expected in (
        (lambda x: torch.stack([-x[:, 1], x[:, 0]], 1), 2.0),
        (lambda x: -x, 0.0),
    ):
        total = log_ratio(score, corners, corners.roll(-1, 0), nodes=2).sum()
        torch.testing.assert_close(
            total, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
        )


@pytest.mark.parametrize("low, width", [(0.0, 1.0), (-1.0, 2.0)])
def test_bits_per_dimension_of_the_true_probabilities_are_their_information(low, width):
    """p(y) = L P(k)/width on the cell of k: then b = -log₂ P(k) per value, for every u."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    k = torch.tensor([[0, 1, 3], [2, 2, 0]])
    y = low + width * dequantize(k.double() / 3, 4, seed=0)
    cells = ((y - low) / width * 4).ceil().long() - 1
    log_p = (probabilities[cells] * 4 / width).log().sum(1)
    expected = -probabilities[k].log2().mean(1)
    torch.testing.assert_close(
        bits_per_dim(log_p, 3, levels=4, width=width), expected, rtol=1e-12, atol=1e-12
    )


def test_offsets_of_eight_bit_images():
    assert (
        bits_per_dim(torch.zeros(1), 10).item() == 8
        and bits_per_dim(torch.zeros(1), 10, width=2.0).item() == 7
    )
    assert bits_per_dim(torch.full((1,), -math.log(2)), 1, levels=None).item() == pytest.approx(1)


def test_dequantized_images_fill_their_cells_the_same_for_any_split():
    """Levels and noise come back from y; float32 spoils 2^-16 of a cell of 256."""
    k = torch.arange(256).repeat(4).view(8, 1, 8, 16)
    whole = dequantize(k.float() / 255, seed=3, first_sample=2)
    u = random.uniform(k.shape, seed=3, stream=random.DEQUANTIZE, offset=2 * 128)
    torch.testing.assert_close(whole * 256 - k, u, rtol=0, atol=2**-15)
    assert torch.equal(whole[5:], dequantize(k[5:].float() / 255, seed=3, first_sample=7))


X = torch.zeros(2, 3)


def zero(x, sigma=None):
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: log_density(zero, X, sigma_min=1.0, sigma_max=0.1),
            "0 < sigma_min < sigma_max must hold; got 1 and 0.1",
        ),
        (
            lambda: log_density(zero, X, sigma_min=0.0, sigma_max=1.0),
            "0 < sigma_min < sigma_max must hold",
        ),
        (
            lambda: log_density(zero, X, trace="magic", **RANGE),
            "trace must be one of exact, rademacher; got 'magic'",
        ),
        (
            lambda: log_density(zero, X, projections=2, **RANGE),
            "projections belong to trace='rademacher'; got 2",
        ),
        (
            lambda: log_density(zero, X, trace="rademacher", projections=0, **RANGE),
            "projections must be an int in 1..65536; got 0",
        ),
        (
            lambda: log_density(zero, X, chunk=0, **RANGE),
            "chunk must be an int of at least 1; got 0",
        ),
        (
            lambda: log_density(zero, X, first_sample=-1, **RANGE),
            "first_sample must be an int of at least 0; got -1",
        ),
        (
            lambda: log_density(zero, X, method="rk4", **RANGE),
            "without steps, method must be one of dopri5, .*; got 'rk4'",
        ),
        (
            lambda: log_density(zero, X, method="dopri5", steps=9, **RANGE),
            "with steps, method must be one of heun, rk4; got 'dopri5'",
        ),
        (lambda: log_density(zero, X, steps=0, **RANGE), "steps must be at least 1; got 0"),
        (
            lambda: log_density(zero, X, steps=[20.0, 0.2], **RANGE),
            "must go from sigma_max to sigma_min, 20 to 0.1",
        ),
        (
            lambda: log_density(zero, X, atol=0.0, **RANGE),
            "atol must be a finite number > 0; got 0.0",
        ),
        (lambda: log_density(zero, X[:0], **RANGE), r"x must hold samples; got \(0, 3\)"),
        (
            lambda: log_density(zero, X, prior=GAUSSIAN, **RANGE),
            "the prior must be of 3 dimensions like x; got 4",
        ),
        (
            lambda: log_density(zero, X, prior=lambda x: x, steps=1, **RANGE),
            r"prior\(x\) must be one value per sample, .2,.; got .2, 3.",
        ),
        (
            lambda: log_density(lambda x, s: x[:1], X, steps=1, **RANGE),
            r"score\(x\) must have the shape of x, \(2, 3\); got \(1, 3\)",
        ),
        (
            lambda: log_ratio(zero, X, X[:1]),
            r"x1 must have the shape of x0, \(2, 3\); got \(1, 3\)",
        ),
        (lambda: log_ratio(zero, X, X, nodes=0), "nodes must be an int of at least 1; got 0"),
        (
            lambda: log_ratio(zero, X, X, nodes=1, return_error=True),
            "nodes must be an int of at least 2; got 1",
        ),
        (
            lambda: torch.vmap(lambda x: log_ratio(zero, x, x))(X[None]),
            "nodes must be given under torch.func.vmap",
        ),
        (lambda: log_ratio(zero, X, X, atol=-1.0), "atol must be .*; got -1.0"),
        (lambda: log_ratio(zero, X, X, sigma=-1.0), "sigma must be finite and >= 0; got -1"),
        (
            lambda: log_ratio(lambda x: x[:1], X, X),
            r"score\(x\) must have the shape of x, \(32, 3\); got \(1, 3\)",
        ),
        (lambda: dequantize(X + 0.3), "x must hold multiples of 1/255 in .0, 1., 256 levels"),
        (lambda: dequantize(X - 1, 2), "x must hold multiples of 1/1 in .0, 1., 2 levels"),
        (lambda: dequantize(X, 1), "levels must be an int of at least 2; got 1"),
        (lambda: bits_per_dim(X[0], 0), "dim must be an int of at least 1; got 0"),
        (lambda: bits_per_dim(X[0], 3, width=0.0), "width must be a finite number > 0; got 0.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_without_torchdiffeq_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pip install 'fastscore\[ode\]', or give steps=64"):
        log_density(zero, X, **RANGE)
    assert log_density(zero, X, steps=1, **RANGE).shape == (2,)


def test_a_score_that_is_not_finite_stops_the_adaptive_solver():
    with pytest.raises(FloatingPointError, match="log_density: the adaptive solver stopped"):
        log_density(lambda x, sigma: x * math.nan, X, **RANGE)


def test_the_public_names():
    assert likelihood.__all__ == ["bits_per_dim", "dequantize", "log_density", "log_ratio"]


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_ratios_that_are_not_finite_are_told(odd):
    """An estimate that is NaN is above no tolerance."""
    x0, x1 = torch.zeros(3, 2), torch.ones(3, 2)
    scale = torch.tensor([[1.0], [odd], [1.0]])
    with pytest.warns(
        UserWarning,
        match="log_ratio: 1 of 3 ratios are not finite; look at the score between their points",
    ):
        ratio = log_ratio(
            lambda x: scale.repeat(len(x) // 3, 1) * x if len(x) % 3 == 0 else odd * x, x0, x1
        )
    assert ratio.isfinite().tolist() == [True, False, True]
