"""Bayes' rule for scores against posteriors in closed form.

Gaussian priors with linear observations, mixtures with their component.
"""

import math

import pytest
import torch

import fastscore
from fastscore import conversions, guidance, models, random, sampling, schedules
from fastscore.guidance.linear import adjoint_gap

F64 = torch.float64
D, M, NOISE = 3, 2, 0.4
X = torch.zeros(2, 1, 4, 4)
ONE = {"sigmas": schedules.geometric(1.0, 0.1, 3), "steps_per_level": 2, "step_size": 2e-3}


def drawn(*shape, step=0):
    return random.normal(shape, seed=5, step=step, stream=1024, dtype=F64)


def gaussian_problem(covariance=None):
    """Prior, operator, y, and the posterior N(μ + K (y - A μ), C - K A C), K = C Aᵀ (A C Aᵀ +
    σ_y² I)⁻¹."""
    root, mean, matrix, y = drawn(D, D), drawn(D, step=1), drawn(M, D, step=2), drawn(M, step=3)
    c = (
        root @ root.mT / D + 0.2 * torch.eye(D, dtype=F64)
        if covariance is None
        else covariance * torch.eye(D, dtype=F64)
    )
    gain = (
        c
        @ matrix.mT
        @ torch.linalg.inv(matrix @ c @ matrix.mT + NOISE**2 * torch.eye(M, dtype=F64))
    )
    posterior = models.Gaussian(mean + gain @ (y - matrix @ mean), c - gain @ matrix @ c)
    return models.Gaussian(mean, c), guidance.Matrix(matrix), y, posterior


def covariance_of(gaussian):
    axes = gaussian.axes[0] if gaussian.axes is not None else torch.eye(gaussian.dim, dtype=F64)
    return axes @ gaussian.variances[0].diag() @ axes.mT


SIGMA = torch.tensor([3.0, 1.0, 0.3, 0.02], dtype=F64)


# Bayes' rule


def test_observations_add_up_to_the_posterior_of_all():
    """Prior N(0, 1) per pixel, observed twice with noise 0.5 and 2.

    Precision 1 + 4 + 1/4, at σ = 0.
    """
    y = drawn(4, step=4)
    once = guidance.posterior(lambda x: -x, lambda x: -2 * (y - x).square().sum(1))
    twice = guidance.posterior(once, likelihood_score=lambda x: (1.5 - x) / 4)
    posterior = models.Gaussian((4 * y + 1.5 / 4) / 5.25, 1 / 5.25)
    x = drawn(7, 4, step=5)
    torch.testing.assert_close(twice(x), posterior.score(x), rtol=1e-12, atol=1e-12)


def test_scale_sharpens_each_sample_as_asked():
    x, scale = drawn(3, 2), torch.tensor([0.0, 1.0, 4.0], dtype=F64)
    guided = guidance.posterior(lambda x: -x, lambda x: -0.5 * (x - 1).square().sum(1), scale)
    torch.testing.assert_close(guided(x), -x + scale[:, None] * (1 - x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", ["flat", "denoiser", "moments"])
def test_no_graph_is_left_under_no_grad_and_samples_do_not_mix(method):
    prior, operator, y, _ = gaussian_problem()
    guided = guidance.linear_inverse(prior, operator, y, NOISE, method=method, iterations=M)
    guided = guidance.posterior(guided, lambda x, sigma: -(x**4).sum(1))
    x = drawn(4, D)
    with torch.no_grad():
        whole, parts = guided(x, SIGMA), [guided(x[i : i + 1], SIGMA[i : i + 1]) for i in range(4)]
    assert not whole.requires_grad and not x.requires_grad
    # Only the blocking of the matrix products may differ: a few rounding units of terms below 1e4.
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("kind", ["likelihood", "flat", "denoiser", "blur"])
def test_every_derivative_of_a_guided_score_is_the_hessian(kind):
    """For Gaussians ∂s/∂x is constant.

    Reverse mode, both functorch modes and forward mode give it, or refuse.
    """
    prior, operator, y, posterior = gaussian_problem(0.7)
    if kind == "blur":   # conjugate gradients
        operator = guidance.Blur(torch.tensor([[0.2, 0.5, 0.4]]), "zero")
        y = drawn(1, 1, D)
        prior = lambda x, sigma: -x / (0.7 + sigma.reshape(-1, 1, 1, 1) ** 2)  # noqa: E731
    x, sigma = (
        (drawn(1, 1, 1, D) if kind == "blur" else drawn(1, D)),
        torch.tensor([0.5], dtype=F64),
    )
    if kind == "likelihood":
        guided = guidance.posterior(
            prior, lambda x, sigma: -0.5 * (y - operator(x)).square().sum(1)
        )
        want = -torch.eye(D, dtype=F64) / 0.95 - operator.matrix.mT @ operator.matrix
    else:
        method = "flat" if kind == "flat" else "denoiser"
        guided = guidance.linear_inverse(
            prior, operator, y, NOISE, method=method, prior_variance=0.7
        )
        a = (
            operator.matrix
            if kind != "blur"
            else operator.forward(torch.eye(D, dtype=F64).reshape(D, 1, 1, D)).reshape(D, D).mT
        )
        j, v = (1.0, 0.25) if kind == "flat" else (0.7 / 0.95, 0.7 * 0.25 / 0.95)
        inner = torch.linalg.inv(NOISE**2 * torch.eye(len(a), dtype=F64) + v * a @ a.mT)
        want = -torch.eye(D, dtype=F64) / 0.95 - j**2 * a.mT @ inner @ a
    f = lambda x: guided(x, sigma).reshape(D)   # noqa: E731
    leaf = x.clone().requires_grad_()
    rows = [torch.autograd.grad(s, leaf, retain_graph=True)[0].reshape(D) for s in f(leaf)]
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.stack(rows), want, **close)
    torch.testing.assert_close(
        torch.func.vjp(f, x)[1](want[0])[0].reshape(D), want.mT @ want[0], **close
    )
    v = drawn(*x.shape, step=9)
    if kind == "blur":
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(f, (x,), (v,))
        return
    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], want @ v.reshape(D), **close)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            f(torch.autograd.forward_ad.make_dual(x, v))
        ).tangent
    torch.testing.assert_close(tangent, want @ v.reshape(D), **close)


def test_forward_mode_goes_through_the_gradient_of_a_fused_activation():
    """d/dx of SiLU' is SiLU'' = σ' (2 + x (1 - 2σ)), σ the logistic function.

    The fused backward of SiLU has no tangent.
    """
    x, v = drawn(3, D), drawn(3, D, step=1)
    guided = guidance.posterior(lambda x: 0 * x, lambda x: torch.nn.functional.silu(x).sum(1))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            guided(torch.autograd.forward_ad.make_dual(x, v))
        ).tangent
    logistic = x.sigmoid()
    torch.testing.assert_close(
        tangent,
        v * logistic * (1 - logistic) * (2 + x * (1 - 2 * logistic)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_moments_refuses_to_be_differentiated():
    prior, operator, y, _ = gaussian_problem()
    guided = guidance.linear_inverse(prior, operator, y, NOISE, method="moments")
    x = drawn(4, D)
    calls = (
        lambda: guided(x.requires_grad_(), SIGMA),
        lambda: torch.func.jvp(lambda x: guided(x, SIGMA), (x,), (x,)),
        lambda: fastscore.jvp(lambda x: guided(x, SIGMA), x.detach(), x.detach()),
        lambda: fastscore.likelihood.log_density(
            guided, x.detach(), sigma_min=0.1, sigma_max=1.0, steps=2
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="cannot be differentiated"):
            call()


def test_derivatives_with_respect_to_sigma_are_refused():
    prior, operator, y, _ = gaussian_problem()
    guided, x, s = guidance.linear_inverse(prior, operator, y, NOISE), drawn(4, D), SIGMA.clone()
    for call in (
        lambda: guided(x, s.requires_grad_()),
        lambda: torch.func.jvp(lambda s: guided(x, s), (SIGMA,), (SIGMA,)),
    ):
        with pytest.raises(ValueError, match="no derivative with respect to sigma"):
            call()


# Classes


def test_class_of_a_mixture_is_its_component():
    """log p(k | x_σ) of a mixture is known.

    Bayes' rule then leaves the score of component k alone, at every σ.
    """
    weights, means, variances = (
        torch.tensor([0.2, 0.5, 0.3], dtype=F64),
        2 * drawn(3, D),
        torch.tensor([0.3, 0.5, 1.0], dtype=F64),
    )
    mixture = models.GaussianMixture(weights, means, variances)
    components = [models.Gaussian(m, v) for m, v in zip(means, variances)]

    def net(x, sigma):
        return torch.stack([w.log() + c.log_prob(x, sigma) for w, c in zip(weights, components)], 1)

    x, labels = drawn(4, D, step=1), torch.tensor([2, 0, 1, 1])
    each = torch.stack(
        [components[k].score(x[i : i + 1], SIGMA[i : i + 1])[0] for i, k in enumerate(labels)]
    )
    torch.testing.assert_close(
        guidance.posterior(mixture, guidance.class_likelihood(net, labels))(x, SIGMA),
        each,
        rtol=1e-9,
        atol=1e-9,
    )
    one = guidance.posterior(mixture, guidance.class_likelihood(net, 2))
    torch.testing.assert_close(one(x, SIGMA), components[2].score(x, SIGMA), rtol=1e-9, atol=1e-9)


# Operators


OPERATORS = [
    pytest.param(guidance.Mask(torch.arange(48).reshape(3, 4, 4) % 3 == 0), (3, 4, 4), id="mask"),
    pytest.param(guidance.Mask(torch.eye(4)), (3, 4, 4), id="mask-of-pixels"),
    pytest.param(guidance.Downsample(2), (3, 4, 4), id="downsample"),
    pytest.param(guidance.Grey(), (3, 4, 4), id="grey"),
    pytest.param(guidance.Grey("luma"), (3, 4, 4), id="luma"),
    pytest.param(guidance.Blur(drawn(3, 1)), (2, 5, 4), id="blur-circular"),
    pytest.param(guidance.Blur(drawn(3, 5), "zero"), (2, 5, 6), id="blur-zero"),
    pytest.param(guidance.Matrix(drawn(3, 8), shape=(2, 4)), (2, 4), id="matrix"),
    pytest.param(guidance.Downsample(2) @ guidance.Blur(drawn(3, 3)), (2, 4, 4), id="composition"),
    pytest.param(
        guidance.from_function(lambda x: x.cumsum(2).flatten(1)[:, 1:], (2, 3)),
        (2, 3),
        id="function",
    ),
]


@pytest.mark.parametrize("operator, shape", OPERATORS)
def test_adjoint_and_solution_are_those_of_the_dense_matrix(operator, shape):
    n = math.prod(shape)
    dense = operator.forward(torch.eye(n, dtype=F64).reshape(n, *shape)).reshape(n, -1).mT
    y = drawn(2, len(dense))
    like = operator.forward(torch.zeros(2, *shape, dtype=F64))
    torch.testing.assert_close(
        operator.adjoint(y.reshape(like.shape)).reshape(2, n), y @ dense, rtol=1e-12, atol=1e-12
    )
    assert adjoint_gap(operator, shape, dtype=F64) < 1e-14
    r = (y @ dense) @ dense.mT   # in the range of A, as a residual without noise is
    for a in (torch.tensor([0.3, 0.01], dtype=F64), torch.zeros(2, dtype=F64)):
        v = operator.solve(
            r.reshape(like.shape),
            *(t.reshape(2, *[1] * (like.dim() - 1)) for t in (a, torch.ones(2, dtype=F64))),
        )
        left = a[:, None] * v.reshape(r.shape) + v.reshape(r.shape) @ dense @ dense.mT
        # What Aᵀ sees of it.
        torch.testing.assert_close(left @ dense, r @ dense, rtol=1e-8, atol=1e-8)


def test_blur_is_the_convolution_of_its_equation():
    k, x = drawn(3, 3), drawn(1, 1, 4, 5)
    for padding in ("circular", "zero"):
        y = torch.zeros(4, 5, dtype=F64)
        for p in range(4):
            for q in range(5):
                for i in range(-1, 2):
                    for j in range(-1, 2):
                        inside = 0 <= p - i < 4 and 0 <= q - j < 5
                        y[p, q] += (
                            k[i + 1, j + 1]
                            * x[0, 0, (p - i) % 4, (q - j) % 5]
                            * (inside or padding == "circular")
                        )
        torch.testing.assert_close(guidance.Blur(k, padding)(x)[0, 0], y, rtol=1e-12, atol=1e-12)


def test_grey_and_downsample_are_means():
    x = torch.arange(12.0).reshape(1, 3, 2, 2)
    assert guidance.Grey()(x).flatten().tolist() == [4, 5, 6, 7] and guidance.Downsample(2)(
        x
    ).flatten().tolist() == [1.5, 5.5, 9.5]


# Linear inverse problems


def test_moments_is_exact_for_every_gaussian_prior():
    prior, operator, y, posterior = gaussian_problem()
    x = drawn(4, D, step=7)
    guided = guidance.linear_inverse(prior, operator, y, NOISE, method="moments", iterations=M)
    torch.testing.assert_close(guided(x, SIGMA), posterior.score(x, SIGMA), rtol=1e-9, atol=1e-9)


def test_denoiser_is_exact_for_an_isotropic_prior():
    prior, operator, y, posterior = gaussian_problem(0.7)
    x = drawn(4, D, step=7)
    guided = guidance.linear_inverse(
        prior, operator, y, NOISE, method="denoiser", prior_variance=0.7
    )
    torch.testing.assert_close(guided(x, SIGMA), posterior.score(x, SIGMA), rtol=1e-9, atol=1e-9)


def test_flat_is_exact_for_a_flat_prior_and_all_methods_agree_as_sigma_falls():
    _, operator, y, _ = gaussian_problem()
    x = drawn(4, D, step=7)
    a = operator.matrix
    inner = NOISE**2 * torch.eye(M, dtype=F64) + SIGMA[:, None, None] ** 2 * a @ a.mT
    want = torch.linalg.solve(inner, y - x @ a.mT) @ a
    nothing = guidance.linear_inverse(lambda x, sigma: 0 * x, operator, y, NOISE, method="flat")
    torch.testing.assert_close(nothing(x, SIGMA), want, rtol=1e-9, atol=1e-9)
    prior, operator, y, posterior = gaussian_problem()
    # V is off by O(σ²) · σ², and "flat" leaves out the shift x̂ - x, O(σ²).
    for method, order in (("flat", 2), ("denoiser", 4)):
        guided = guidance.linear_inverse(prior, operator, y, NOISE, method=method)
        errors = [
            (guided(x, s.expand(4)) - posterior.score(x, s)).abs().max()
            for s in torch.tensor([1e-2, 1e-3], dtype=F64)
        ]
        assert abs(math.log10(errors[0] / errors[1]) - order) < 0.1


def chain_law(posterior, sigmas, steps, epsilon):
    """Mean and covariance after annealed Langevin on N(m, C + σ² I) from U[0, 1], per
    eigen-direction, and after the last denoise."""
    q, c, mean = posterior.axes[0], posterior.variances[0], posterior.means[0] @ posterior.axes[0]
    m, v = torch.full((D,), 0.5, dtype=F64) @ q, torch.full((D,), 1 / 12, dtype=F64)
    for sigma in sigmas.double():
        t, e = c + sigma**2, epsilon * sigma**2 / float(sigmas[-1]) ** 2
        a = (1 - e / (2 * t)) ** steps
        m, v = mean + a * (m - mean), a**2 * v + (1 - a**2) * t / (1 - e / (4 * t))
    shrink = c / (c + float(sigmas[-1]) ** 2)
    return (mean + shrink * (m - mean)) @ q.mT, q @ (shrink**2 * v).diag() @ q.mT


def check_moments(x, mean, covariance, errors=5.0):
    """5 standard errors, 6e-7 each."""
    n, x = len(x), x.double()
    variances = covariance.diagonal()
    assert bool(((x.mean(0) - mean).abs() < errors * (variances / n).sqrt()).all())
    spread = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert bool(((x.mT.cov() - covariance).abs() < errors * spread).all())


def annealed(n, posterior, guided):
    """n samples, checked against the law of the chain, which is within one standard error of the
    posterior's. Seed 3."""
    steps, sigmas = 20, schedules.geometric(1.5, 0.1, 8)
    epsilon = 3 * float(sigmas[-1]) ** 2
    x = fastscore.sample(
        guided, shape=(n, D), sigmas=sigmas, steps_per_level=steps, step_size=epsilon, seed=3
    )
    mean, covariance = chain_law(posterior, sigmas, steps, epsilon)
    exact = covariance_of(posterior)
    variances = exact.diagonal()
    assert bool(((mean - posterior.means[0]).abs() < (variances / n).sqrt()).all())
    assert bool(
        (
            (covariance - exact).abs() < ((variances[:, None] * variances + exact**2) / n).sqrt()
        ).all()
    )
    check_moments(x, mean, covariance)


def test_annealed_langevin_draws_from_the_posterior_of_any_gaussian(backend):
    prior, operator, y, posterior = gaussian_problem()
    n = 2**9 if backend == "triton" else 2**12  # Triton is interpreted here
    annealed(
        n,
        posterior,
        guidance.linear_inverse(prior, operator, y.float(), NOISE, method="moments", iterations=M),
    )


def test_annealed_langevin_draws_from_the_posterior_of_an_isotropic_gaussian():
    prior, operator, y, posterior = gaussian_problem(0.7)
    annealed(
        2**12,
        posterior,
        guidance.linear_inverse(
            prior, operator, y.float(), NOISE, method="denoiser", prior_variance=0.7
        ),
    )


def test_probability_flow_carries_noise_to_the_posterior():
    """x ← m + ((C + σ_L²)/(C + σ_1²))^½ (x - m) per eigen-direction.

    Heun's error is of second order: half the step leaves a quarter.
    """
    prior, operator, y, posterior = gaussian_problem()
    guided = guidance.linear_inverse(prior, operator, y, NOISE, method="moments", iterations=M)
    x, q, c, m = drawn(16, D), posterior.axes[0], posterior.variances[0], posterior.means[0]
    exact = m + ((x - m) @ q * ((c + 0.1**2) / (c + 1.5**2)).sqrt()) @ q.mT
    errors = []
    for levels in (33, 65):
        sigmas = schedules.geometric(1.5, 0.1, levels)
        end = fastscore.sample(
            guided, sampler="probability_flow", x=x, sigmas=sigmas, denoise=False
        )
        errors.append(float((end - exact).abs().max()))
    assert errors[1] < 1e-3 and abs(errors[0] / errors[1] - 4) < 0.4


def test_langevin_without_levels_draws_from_the_posterior():
    """score(x) and y = A x + σ_y n.

    The unadjusted chain of step ε on N(m, C) has variance c/(1 - ε/(4c)) per eigen-direction. Seed
    4.
    """
    n, epsilon, steps = 2**12, 0.05, 100
    prior, operator, y, posterior = gaussian_problem()
    guided = guidance.linear_inverse(lambda x: prior(x), operator, y.float(), NOISE, method="flat")
    start = posterior.sample(n, seed=4, dtype=torch.float32)
    *_, state = sampling.langevin(guided, start, steps=steps, step_size=epsilon, seed=4)
    q, c = posterior.axes[0], posterior.variances[0]
    a = (1 - epsilon / (2 * c)) ** steps
    v = a**2 * c + (1 - a**2) * c / (1 - epsilon / (4 * c))
    check_moments(state.x, posterior.means[0], q @ v.diag() @ q.mT)


# Hooks


def test_known_pixels_end_as_observed(backend):
    mask = torch.eye(4, dtype=torch.bool)
    # What is unknown is not looked at.
    y = torch.where(mask, random.uniform((1, 4, 4), seed=1, stream=1024), math.nan)
    for redraw in ("level", "step"):
        hook = guidance.inpainting(y, mask, redraw=redraw, seed=2)
        x = fastscore.sample(lambda x, sigma: -x, shape=(2, 1, 4, 4), project=hook, seed=2, **ONE)
        assert torch.equal(x[:, :, mask], y[None, :, mask].expand(2, 1, 4)) and bool(
            x.isfinite().all()
        )


def test_noise_of_the_known_part_is_redrawn_as_asked():
    """NCSN draws it once per level, NCSNv2 at each step; its law is N(y, σ² - σ_y²).

    Splits of a batch agree.
    """
    x, y, mask = torch.zeros(4096, 8), torch.full((8,), 0.5), torch.arange(8) < 4
    level, step = (
        guidance.inpainting(y, mask, noise=0.3, redraw=redraw, seed=7)
        for redraw in ("level", "step")
    )
    assert torch.equal(level(x, 0.5, 0), level(x, 0.5, 1)) and not torch.equal(
        level(x, 0.5, 0), level(x, 0.6, 0)
    )
    assert torch.equal(step(x, 0.5, 1), step(x, 0.5, 1)) and not torch.equal(
        step(x, 0.5, 0), step(x, 0.5, 1)
    )
    for hook in (level, step):
        z = (hook(x, 0.5, 0)[:, :4] - 0.5).double() / 0.4
        assert abs(float(z.mean())) < 5 / math.sqrt(z.numel()) and abs(
            float(z.square().mean()) - 1
        ) < 5 * math.sqrt(2 / z.numel())
        assert not hook(x, 0.5, 0)[:, 4:].any() and torch.equal(hook(x, 0.2, 0), x)
    tail = guidance.inpainting(y, mask, noise=0.3, seed=7, first_sample=4000)
    assert torch.equal(tail(x[4000:], 0.5, 0), level(x, 0.5, 0)[4000:])


def test_data_consistency_moves_the_end_onto_the_data_and_nothing_else():
    operator = guidance.Downsample(2)
    y = torch.full((1, 2, 2), 0.25)
    hook = guidance.data_consistency(operator, y)
    x = random.normal((2, 1, 4, 4), seed=0, stream=1024)
    end = guidance.chain(hook, lambda x, sigma, step: x)(x, 0.0, 0)
    assert torch.equal(hook(x, 0.1, 0), x)
    torch.testing.assert_close(operator(end), y.expand(2, 1, 2, 2), rtol=1e-6, atol=1e-6)
    blocks = (end - x).reshape(2, 2, 2, 2, 2)
    torch.testing.assert_close(
        blocks, blocks.mean((2, 4), keepdim=True).expand_as(blocks), rtol=1e-5, atol=1e-6
    )


# Bad input


def score(x, sigma):
    return -x


class Sideways(guidance.LinearOperator):
    """Neither of its two methods is the adjoint of the other."""

    def forward(self, x):
        return 2 * x

    def adjoint(self, y):
        return y


class OneWay(guidance.LinearOperator):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: guidance.posterior(score), "exactly one of log_likelihood"),
        (lambda: guidance.posterior(score, len, math.nan), "scale must be finite"),
        (
            lambda: guidance.posterior(score, lambda x, s: x.sum())(X, 1.0),
            r"one value per sample, \(2,\); got \(\)",
        ),
        (
            lambda: guidance.posterior(score, lambda x, s: x.detach().sum((1, 2, 3)))(X, 1.0),
            "must depend on x",
        ),
        (
            lambda: guidance.posterior(score, likelihood_score=lambda x, s: x[:1])(X, 1.0),
            "must have the shape of x",
        ),
        (lambda: guidance.class_likelihood(score, -1), "not negative; got -1"),
        (lambda: guidance.class_likelihood(score, 1.5), "labels must be a class number"),
        (
            lambda: guidance.class_likelihood(lambda x, s: x[:, 0, 0], 4)(X, 1.0),
            r"labels must be in 0..3; got 4",
        ),
        (
            lambda: guidance.class_likelihood(lambda x, s: x[:, 0, 0], torch.tensor([1, 2, 3]))(
                X, 1.0
            ),
            "one for each of the 2 samples; got 3",
        ),
        (lambda: guidance.Mask(torch.tensor([0.5])), "mask must be bool, or 0"),
        (lambda: guidance.Mask(torch.zeros(4)), "at least one known value"),
        (
            lambda: guidance.Mask(torch.ones(3, 3))(X),
            r"mask must have the shape of a sample, \(1, 4, 4\).*got \(3, 3\)",
        ),
        (
            lambda: guidance.inpainting(X[0], torch.ones(3, 3)),
            "mask must have the shape of a sample",
        ),
        (
            lambda: guidance.inpainting(X[0], torch.ones(4, 4), noise=-1),
            "noise must be a finite number >= 0; got -1",
        ),
        (lambda: guidance.inpainting(X[0] * math.nan, torch.ones(4, 4)), "must be finite"),
        (
            lambda: guidance.inpainting(X[0], torch.ones(4, 4), redraw="never"),
            "redraw must be level or step",
        ),
        (
            lambda: guidance.inpainting(X[0, 0], torch.ones(4, 4))(X, 1.0, 0),
            "the observation must have the shape of x",
        ),
        (lambda: guidance.Downsample(0), "factor must be an int of at least 1"),
        (lambda: guidance.Downsample(3)(X), "must be multiples of the factor 3"),
        (lambda: guidance.Grey("hue"), "weights must be mean, luma or numbers"),
        (lambda: guidance.Grey("luma")(X), "x must have 3 channels; got 1"),
        (lambda: guidance.Blur(torch.ones(2, 2)), r"kernel must be \(h, w\), odd"),
        (lambda: guidance.Blur(torch.ones(5, 5))(X), "must not be larger than the image"),
        (lambda: guidance.Blur(torch.ones(3, 3), "reflect"), "padding must be circular or zero"),
        (lambda: guidance.Matrix(torch.ones(2, 3), shape=(4,)), "shape must hold 3 values"),
        (lambda: guidance.Matrix(torch.ones(2, 3))(X), "x must be"),
        (lambda: guidance.from_function(lambda x: x**2, (3,)), "forward must be linear"),
        (lambda: guidance.from_function(lambda x: x.detach(), (3,)), "cannot be differentiated"),
        (
            lambda: guidance.from_function(lambda x: 2 * x, (3,), adjoint=lambda y: y),
            "adjoint is not the adjoint of forward",
        ),
        (
            lambda: guidance.linear_inverse(score, torch.nn.Linear(2, 2), X),
            "must have a method adjoint; guidance.from_function",
        ),
        (lambda: guidance.linear_inverse(score, OneWay(), X), "must have a method adjoint"),
        (
            lambda: guidance.linear_inverse(score, Sideways(), X)(X, 1.0),
            "adjoint is wrong or forward is not linear",
        ),
        (
            lambda: guidance.linear_inverse(score, guidance.Grey(), X, -0.1),
            "noise must be a finite number >= 0",
        ),
        (
            lambda: guidance.linear_inverse(score, guidance.Grey(), X, method="magic"),
            "method must be one of flat, denoiser, moments",
        ),
        (
            lambda: guidance.linear_inverse(score, guidance.Grey(), X, prior_variance=0),
            "prior_variance must be a finite number > 0",
        ),
        (
            lambda: guidance.linear_inverse(score, guidance.Grey(), X, iterations=0),
            "iterations must be an int",
        ),
        (
            lambda: guidance.linear_inverse(score, guidance.Grey(), X, scale=math.inf),
            "scale must be finite",
        ),
        (
            lambda: guidance.linear_inverse(score, guidance.Downsample(2), X)(X, 1.0),
            r"the shape of A x, \(1, 2, 2\)",
        ),
        (
            lambda: guidance.linear_inverse(lambda x: -x, guidance.Grey(), X)(X),
            "noise must be positive where the score takes no sigma",
        ),
        (lambda: guidance.gaussian_kernel(0.0), "sigma must be a finite number > 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("method", ["flat", "denoiser", "moments"])
def test_hidden_pixels_of_an_observation_are_ignored(method):
    """Also by the conjugate gradients of "moments", alone and under another operator.

    NaN is no observation.
    """
    prior, *_ = gaussian_problem()
    mask, x, y = torch.tensor([True, True, False]), drawn(4, D), drawn(D, step=9)
    for operator in (
        guidance.Mask(mask),
        guidance.Mask(mask) @ guidance.Matrix(drawn(D, D, step=4)),
    ):
        results = [
            guidance.linear_inverse(
                prior.score, operator, torch.where(mask, y, hidden), NOISE, method=method
            )(x, SIGMA)
            for hidden in (0.0, 9.0, math.nan)
        ]
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("method", [None, "flat", "denoiser", "moments"])
def test_a_score_of_another_shape_does_not_broadcast(method):
    prior, operator, y, _ = gaussian_problem()

    def wrong(x, sigma):
        return -x[:, :1]

    def likelihood(x, sigma):
        return -x.square().sum(1)

    guided = (
        guidance.posterior(wrong, likelihood)
        if method is None
        else guidance.linear_inverse(wrong, operator, y, NOISE, method=method)
    )
    with pytest.raises(ValueError, match=r"must have the shape of x, \(4, 3\); got \(4, 1\)"):
        guided(drawn(4, D), SIGMA)


def test_without_a_seed_the_noise_of_a_level_is_drawn_once():
    hook, x = (
        guidance.inpainting(torch.rand(D), torch.tensor([True, False, True]), seed=None),
        torch.zeros(2, D),
    )
    assert torch.equal(hook(x, 0.5, 0), hook(x, 0.5, 1)) and not torch.equal(
        hook(x, 0.5, 0), hook(x, 0.6, 0)
    )


def test_a_batch_may_be_empty():
    images, sigma = torch.zeros(0, 1, 8, 8), torch.zeros(0)
    for operator in (
        guidance.Blur(guidance.gaussian_kernel(0.5)),
        guidance.Downsample(2),
        guidance.Mask(torch.ones(8, 8)),
    ):
        y = operator.forward(torch.zeros(1, 1, 8, 8))[0]
        for method in ("flat", "denoiser", "moments"):
            score = guidance.linear_inverse(lambda x, sigma: -x, operator, y, NOISE, method=method)
            assert score(images, sigma).shape == images.shape
    label = guidance.class_likelihood(
        lambda x, sigma: torch.zeros(len(x), 4), torch.zeros(0, dtype=torch.int64)
    )
    assert label(images, sigma).shape == (0,)
    assert (
        conversions.convert(images, images, sigma, kind="score", to="noise").shape == images.shape
    )
