"""NCSN is the official network with right derivatives, ScoreMLP conditions smoothly, analytic
scores are gradients of log p.

Random tests name their seed; statistical ones bound a z-score by 5 (false alarm 6e-7 each,
two-sided).
"""

import math

import pytest
import torch

import fastscore
from fastscore import nn as fnn
from fastscore.models import NCSN, Gaussian, GaussianMixture, ScoreMLP

LADDER = torch.linspace(0, math.log(0.01), 10, dtype=torch.float64).exp()


def tiny_ncsn(size=8, **kwargs):
    """ngf = 4 in float64, with every coefficient moved off its initial value."""
    torch.manual_seed(0)
    net = NCSN(channels=2, ngf=4, image_size=size, **kwargs).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def tiny_mlp(conditional):
    """In float64, the zero-initialised last layer filled."""
    torch.manual_seed(0)
    net = ScoreMLP(6, width=16, depth=2, sigmas=LADDER if conditional else None).double()
    torch.nn.init.normal_(net.last.weight)
    return net


def directional_error(loss, parameters):
    """Relative difference of the gradient along a random direction from a fourth-order central
    difference."""
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss(), parameters)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction)).item()

    def at(t):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=t)
        value = loss().item()
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=-t)
        return value

    # ELU has a jump in its second derivative: a step that crosses none sees a smooth function.
    e = 1e-7
    expected = (8 * (at(e) - at(-e)) - (at(2 * e) - at(-2 * e))) / (12 * e)
    return abs(slope - expected) / abs(expected)


# --- normalisation


def instance_norm_plus_by_hand(x, gamma, alpha, beta):
    """systems.md section 2, one sample at a time."""
    y = torch.empty_like(x)
    for b in range(len(x)):
        mu = x[b].mean((1, 2))
        m_hat = (
            (mu - mu.mean()) / (mu.var(correction=1) + 1e-5).sqrt()
            if len(mu) > 1
            else torch.zeros_like(mu)
        )
        for c in range(x.shape[1]):
            h = (x[b, c] - mu[c]) / (x[b, c].var(correction=0) + 1e-5).sqrt()
            y[b, c] = gamma[b, c] * (h + alpha[b, c] * m_hat[c]) + beta[b, c]
    return y


@pytest.mark.parametrize("channels", [5, pytest.param(1, id="one-channel")])
@pytest.mark.parametrize("bias", [True, False])
def test_conditional_norm_matches_the_formula(channels, bias):
    torch.manual_seed(1)
    x, labels = (
        3 + 2 * torch.randn(4, channels, 6, 5, dtype=torch.float64),
        torch.tensor([2, 0, 2, 1]),
    )
    norm = fnn.ConditionalInstanceNorm2dPlus(channels, 3, bias=bias).double()
    torch.nn.init.normal_(norm.embed.weight)
    gamma, alpha, *beta = norm.embed.weight[labels].split(channels, -1)
    expected = instance_norm_plus_by_hand(
        x, gamma, alpha, beta[0] if bias else torch.zeros_like(gamma)
    )
    # Sums of 30 float64
    torch.testing.assert_close(norm(x, labels), expected, rtol=1e-12, atol=1e-12)


def test_unconditional_norm_matches_the_formula():
    torch.manual_seed(2)
    # ncsnv2 passes L as bias.
    x, norm = (
        torch.randn(3, 4, 6, 6, dtype=torch.float64),
        fnn.InstanceNorm2dPlus(4, bias=232).double(),
    )
    rows = [p.detach().expand(3, 4) for p in (norm.gamma, norm.alpha, norm.beta)]
    torch.testing.assert_close(
        norm(x), instance_norm_plus_by_hand(x, *rows), rtol=1e-12, atol=1e-12
    )
    assert sorted(norm.state_dict()) == ["alpha", "beta", "gamma"]


def test_norm_is_right_to_second_order_in_both_modes():
    torch.manual_seed(3)
    norm, labels = fnn.ConditionalInstanceNorm2dPlus(3, 2).double(), torch.tensor([1, 0])
    weight = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def f(x, weight):
        return torch.func.functional_call(norm, {"embed.weight": weight}, (x, labels))

    assert torch.autograd.gradcheck(f, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, weight), check_fwd_over_rev=True)


def test_norm_of_one_pixel_is_the_channel_term():
    norm = fnn.InstanceNorm2dPlus(2)
    y = norm(torch.tensor([[1.0, -1.0]])[..., None, None]).flatten()
    expected = norm.gamma * norm.alpha * torch.tensor([1.0, -1.0]) / math.sqrt(2 + 1e-5)
    torch.testing.assert_close(y, expected)


# --- NCSN


@pytest.mark.parametrize("channels, ngf, count", [(3, 128, 30_117_635), (1, 64, 7_638_657)])
def test_ncsn_has_the_official_parameters(channels, ngf, count):
    with torch.device("meta"):
        net = NCSN(channels=channels, ngf=ngf, sigmas=None)
    assert len(net.state_dict()) == len(list(net.parameters())) == 173
    assert sum(p.numel() for p in net.parameters()) == count


def test_ncsn_keys_and_shapes_follow_the_official_grammar():
    n, L, C = 6, 10, 3
    shapes = {k: tuple(v.shape) for k, v in NCSN(channels=C, ngf=n).state_dict().items()}
    expected = {
        "begin_conv.weight": (n, C, 3, 3),
        "normalizer.embed.weight": (L, 3 * n),
        "end_conv.weight": (C, n, 3, 3),
        "res1.0.conv1.weight": (n, n, 3, 3),
        "res2.0.conv1.weight": (n, n, 3, 3),
        "res2.0.normalize2.embed.weight": (L, 3 * n),
        "res2.0.conv2.conv.weight": (2 * n, n, 3, 3),
        "res2.0.shortcut.conv.weight": (2 * n, n, 1, 1),
        "res3.0.shortcut.weight": (2 * n, 2 * n, 3, 3),
        "res4.1.conv2.bias": (2 * n,),
        "refine1.adapt_convs.0.2_2_conv.weight": (2 * n, 2 * n, 3, 3),
        "refine2.msf.convs.1.bias": (2 * n,),
        "refine3.adapt_convs.1.1_1_norm.embed.weight": (L, 6 * n),
        "refine3.msf.convs.0.weight": (n, 2 * n, 3, 3),
        "refine3.msf.norms.1.embed.weight": (L, 6 * n),
        "refine4.crp.convs.1.weight": (n, n, 3, 3),
        "refine4.crp.norms.0.embed.weight": (L, 3 * n),
        "refine4.output_convs.3_2_conv.weight": (n, n, 3, 3),
    }
    assert {k: shapes.get(k) for k in expected} == expected
    absent = (
        "refine1.msf",
        "res1.0.shortcut",
        "res3.1.shortcut",
        "refine3.output_convs.2",
        "sigmas",
    )
    assert not [k for k in shapes if k.startswith(absent)]
    assert not [
        k
        for k in shapes
        if k.endswith("bias") and any(s in k for s in ("crp", "adapt_convs", "output_convs"))
    ]


@pytest.mark.parametrize("size", [8, 28, 32])
def test_ncsn_scores_images_of_any_even_size(size):
    net, x = tiny_ncsn(), torch.rand(2, 2, size, size, dtype=torch.float64)
    s = net(x, 0.01)
    assert s.shape == x.shape
    torch.testing.assert_close(net(x[:1], 0.01), s[:1], rtol=1e-9, atol=1e-9)  # samples do not mix
    assert (net(x, 1.0) - s).abs().max() > 1e-3


def test_ncsn_finds_its_level():
    net, x = tiny_ncsn(), torch.zeros(10, 2, 8, 8, dtype=torch.float64)
    order = torch.tensor([9, 0, 3, 3, 7, 1, 2, 8, 5, 4])
    assert net.level(LADDER[order] * 1.0005, x).tolist() == order.tolist()
    assert net.level(LADDER[order].float(), x.float()).tolist() == order.tolist()
    assert net.level(0.01, x).tolist() == [9] * 10
    assert net.bfloat16().level(LADDER[order].bfloat16(), x.bfloat16()).tolist() == order.tolist()


def test_ncsn_takes_images_in_the_unit_interval():
    net = tiny_ncsn()
    seen = []
    net.begin_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.full((1, 2, 8, 8), 0.75, dtype=torch.float64), 1.0)
    assert (seen[0] == 0.5).all()


@pytest.mark.parametrize("sigma", [0.5, torch.tensor([1.0, 0.0101]), float("nan"), 0.0])
def test_ncsn_names_a_sigma_that_is_no_level(sigma):
    with pytest.raises(ValueError, match="sigma must be"):
        NCSN(channels=2, ngf=4)(torch.zeros(2, 2, 8, 8), sigma)


def test_ncsn_rejects_bad_shapes_and_ladders():
    with pytest.raises(
        ValueError, match=r"x must be \(B, 3, H, W\) with even sides; got \(1, 3, 7, 8\)"
    ):
        NCSN(ngf=4)(torch.zeros(1, 3, 7, 8), 1.0)
    for sigmas in ([0.1, 1.0], [1.0, 1.0], [1.0, 0.0], [[1.0]], []):
        with pytest.raises(ValueError, match="descending ladder"):
            NCSN(ngf=4, sigmas=sigmas)


def test_ncsn_parameter_gradient_matches_finite_differences():
    net = tiny_ncsn()
    x, sigma = torch.rand(2, 2, 8, 8, dtype=torch.float64), LADDER[[2, 7]]
    error = directional_error(lambda: net(x, sigma).square().sum(), net.parameters())
    assert error < 1e-6  # rounding, 1e-16 / e times the condition of the sum


def sliced(net, x, sigma, v, forward_mode):
    """Half the squared score plus v·J v, summed."""
    if forward_mode:
        s, jv = torch.func.jvp(lambda x: net(x, sigma), (x,), (v,))
    else:
        x = x.clone().requires_grad_()
        s = net(x, sigma)
        (jv,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
    return 0.5 * s.square().sum() + (v * jv).sum()


def test_ncsn_sliced_gradient_through_forward_mode_equals_double_backward_and_finite_differences():
    net = tiny_ncsn()
    x, sigma = torch.rand(2, 2, 8, 8, dtype=torch.float64), LADDER[[0, 9]]
    v = torch.randint(0, 2, x.shape, dtype=torch.float64) * 2 - 1
    losses = [sliced(net, x, sigma, v, mode) for mode in (True, False)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-11, atol=0)
    forward, reverse = (torch.autograd.grad(loss, list(net.parameters())) for loss in losses)
    scale = max(g.abs().max().item() for g in reverse)
    for a, b in zip(forward, reverse):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * scale)
    assert directional_error(lambda: sliced(net, x, sigma, v, True), net.parameters()) < 1e-6


def test_ncsn_vmaps_over_samples():
    net, x, sigma = tiny_ncsn(), torch.rand(3, 2, 8, 8, dtype=torch.float64), LADDER[[1, 5, 9]]
    mapped = torch.func.vmap(lambda x, s: net(x[None], s[None])[0])(x, sigma)
    torch.testing.assert_close(mapped, net(x, sigma), rtol=1e-9, atol=1e-9)


def test_compiled_ncsn_equals_eager_in_value_and_gradient():
    net, x, sigma = tiny_ncsn(), torch.rand(2, 2, 8, 8, dtype=torch.float64), LADDER[[1, 8]]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, sigma), net(x, sigma), rtol=1e-10, atol=1e-10)
    grads = [
        torch.autograd.grad(f(x, sigma).square().sum(), list(net.parameters()))
        for f in (compiled, net)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# --- ScoreMLP


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
@pytest.mark.parametrize("conditional", [False, True])
def test_mlp_keeps_the_shape_and_does_not_mix_samples(shape, conditional):
    net, x = tiny_mlp(conditional), torch.rand(4, *shape, dtype=torch.float64)
    sigma = (LADDER[:4],) if conditional else ()
    s = net(x, *sigma)
    assert s.shape == x.shape
    one = net(x[2:3], *(t[2:3] for t in sigma))
    torch.testing.assert_close(one, s[2:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(x.flatten(1), *sigma), s.flatten(1), rtol=0, atol=0)


def test_untrained_mlp_has_score_zero():
    assert not ScoreMLP(6, width=16, depth=1)(torch.rand(2, 6)).any()


def test_mlp_depends_on_sigma_smoothly_and_takes_any():
    net, x = tiny_mlp(True), torch.rand(1, 6, dtype=torch.float64)
    sigma = torch.tensor([0.0314], dtype=torch.float64, requires_grad=True)  # between two levels
    (slope,) = torch.autograd.grad(net(x, sigma).sum(), sigma)
    e = 1e-6
    numeric = (net(x, 0.0314 + e).sum() - net(x, 0.0314 - e).sum()) / (2 * e)
    assert abs(slope.item() / numeric.item() - 1) < 1e-5 and slope.abs() > 1e-3
    torch.testing.assert_close(net(x, 0.0314), net(x, sigma), rtol=1e-12, atol=0)


def test_mlp_output_scales_as_one_over_sigma():
    """f sees inputs of order one at every σ, so σ s keeps its size along the ladder (within 10x)
    while s grows 100x."""
    net, x = tiny_mlp(True), torch.rand(64, 6, dtype=torch.float64)
    sizes = torch.stack([(sigma * net(x, sigma.item())).square().mean().sqrt() for sigma in LADDER])
    assert sizes.max() / sizes.min() < 10


@pytest.mark.parametrize("conditional", [False, True])
def test_mlp_derivatives(conditional):
    net, x = tiny_mlp(conditional), torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    sigma = (torch.tensor([0.5, 0.3], dtype=torch.float64),) if conditional else ()
    assert torch.autograd.gradcheck(lambda x: net(x, *sigma), (x,), check_forward_ad=True)
    v = torch.randn_like(x)

    def loss():
        s, jv = torch.func.jvp(lambda x: net(x, *sigma), (x.detach(),), (v,))
        return 0.5 * s.square().sum() + (v * jv).sum()

    assert directional_error(loss, net.parameters()) < 1e-6


def test_mlp_errors():
    for build, message in (
        (lambda: ScoreMLP(6, activation="sine"), "activation"),
        (lambda: ScoreMLP(6, sigmas=[1, 0]), "sigmas"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    net = ScoreMLP(6, width=8, depth=1)
    with pytest.raises(ValueError, match="6 values per sample"):
        net(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="if and only if"):
        net(torch.zeros(2, 6), 1.0)
    with pytest.raises(ValueError, match="if and only if"):
        ScoreMLP(6, width=8, depth=1, sigmas=[1.0, 0.1])(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="sigma must be finite and >= 1e-30; got 0"):
        ScoreMLP(6, width=8, depth=1, sigmas=[1.0, 0.1])(torch.zeros(2, 6), 0.0)


def test_compiled_mlp_equals_eager():
    net, x, sigma = tiny_mlp(True), torch.rand(3, 6, dtype=torch.float64), LADDER[:3]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, sigma), net(x, sigma), rtol=1e-12, atol=1e-12)


# --- analytic densities


def random_covariances(*shape, d):
    a = torch.randn(*shape, d, d, dtype=torch.float64)
    return a @ a.mT + 0.01 * torch.eye(d, dtype=torch.float64)


def mixture(kind, K=4, d=3):
    torch.manual_seed(4)
    covariances = {
        "scalar": torch.tensor(0.3),
        "per-component": torch.rand(K) + 0.1,
        "diagonal": torch.rand(K, d) + 0.1,
        "full": random_covariances(K, d=d),
    }[kind]
    return GaussianMixture(torch.rand(K), 2 * torch.randn(K, d), covariances)


def dense(target, sigma):
    """torch.distributions' own mixture with C_k + σ² I."""
    axes = torch.eye(target.dim, dtype=torch.float64) if target.axes is None else target.axes
    C = (axes * (target.variances + sigma**2)[:, None, :]) @ axes.mT
    component = torch.distributions.MultivariateNormal(target.means, (C + C.mT) / 2)
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=target.log_weights), component
    )


KINDS = ["scalar", "per-component", "diagonal", "full"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.0, *LADDER.tolist(), 20.0])
def test_mixture_score_is_the_gradient_of_its_log_density_at_every_level(kind, sigma):
    target = mixture(kind)
    x = (3 * torch.randn(50, 3, dtype=torch.float64)).requires_grad_()
    log_p = target.log_prob(x, sigma)
    torch.testing.assert_close(log_p, dense(target, sigma).log_prob(x), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(target(x, sigma), gradient, rtol=1e-10, atol=1e-10)


def test_sigma_may_differ_by_sample_and_images_are_flattened():
    target, sigma = mixture("full", d=4), LADDER[:5]
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    s = target(x, sigma)
    assert s.shape == x.shape
    for b in range(5):
        torch.testing.assert_close(
            target(x[b : b + 1], sigma[b].item()), s[b : b + 1], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "covariance", [0.7, [0.5, 2.0], [[2.0, 0.6], [0.6, 0.5]]], ids=["scalar", "diagonal", "full"]
)
def test_gaussian_convolves_in_closed_form(covariance):
    mean, C = (
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor(covariance, dtype=torch.float64),
    )
    C = C * torch.eye(2, dtype=torch.float64) if C.dim() < 2 else C
    x = torch.randn(20, 2, dtype=torch.float64)
    for sigma in (0.0, 0.3, 5.0):
        total = C + sigma**2 * torch.eye(2, dtype=torch.float64)
        target = Gaussian(mean, covariance)
        torch.testing.assert_close(
            target(x, sigma), torch.linalg.solve(total, (mean - x).mT).mT, rtol=1e-12, atol=1e-12
        )
        expected = torch.distributions.MultivariateNormal(mean, total).log_prob(x)
        torch.testing.assert_close(target.log_prob(x, sigma), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixture_follows_the_dtype_of_x_and_survives_far_away(dtype):
    target = GaussianMixture([0.2, 0.8, 0.0], [[-5.0, -5.0], [5.0, 5.0], [0.0, 0.0]], 1.0)
    x = torch.tensor([[200.0, 200.0], [-200.0, -200.0]], dtype=dtype)
    s = target(x)
    assert s.dtype == dtype and target.log_prob(x).dtype == dtype
    torch.testing.assert_close(s, torch.tensor([[-195.0, -195.0], [195.0, 195.0]], dtype=dtype))
    assert Gaussian([0.0], 1.0)(torch.zeros(0, 1)).shape == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_sample_moments_match_the_closed_form(kind, sigma):
    """Seed 11; 9 z-scores per case, 8 cases, |z| < 5."""
    n, target = 100_000, mixture(kind)
    x, law = target.sample(n, sigma, seed=11, dtype=torch.float64), dense(target, sigma)
    w = target.log_weights.exp()
    mean = w @ target.means
    second = torch.einsum("k,kij->ij", w, law.component_distribution.covariance_matrix)
    second = second + torch.einsum("k,ki,kj->ij", w, target.means, target.means)
    products = torch.einsum("bi,bj->bij", x, x)
    for values, expected in ((x, mean), (products, second)):
        z = (values.mean(0) - expected) / (values.std(0) / math.sqrt(n))
        assert z.abs().max() < 5
    score = target(x, sigma)  # E[s] = 0, E[s xᵀ] = -I
    for values, expected in (
        (score, 0.0),
        (torch.einsum("bi,bj->bij", score, x), -torch.eye(3, dtype=torch.float64)),
    ):
        assert ((values.mean(0) - expected) / (values.std(0) / math.sqrt(n))).abs().max() < 5


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_bit_identical_for_every_split(kind):
    target = mixture(kind)
    whole = target.sample(1001, 0.5, seed=7, step=3)
    parts = [
        target.sample(n, 0.5, seed=7, step=3, first_sample=first)
        for first, n in ((0, 1), (1, 2), (3, 500), (503, 498))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(target.sample(1001, 0.5, seed=8, step=3), whole)


def test_sample_without_a_seed_follows_manual_seed_and_never_takes_a_zero_weight():
    target = GaussianMixture([0.0, 1.0, 0.0], [[-100.0], [0.0], [100.0]], 1.0)
    torch.manual_seed(5)
    x = target.sample(4096)
    torch.manual_seed(5)
    assert torch.equal(target.sample(4096), x) and not torch.equal(target.sample(4096), x)
    assert x.abs().max() < 50


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: GaussianMixture([-1, 2], torch.zeros(2, 3), 1.0),
            "weights must be finite, not negative",
        ),
        (lambda: GaussianMixture([0, 0], torch.zeros(2, 3), 1.0), "positive sum"),
        (lambda: GaussianMixture([1, 1, 1], torch.zeros(2, 3), 1.0), r"weights must be \(2,\)"),
        (lambda: GaussianMixture([1], torch.zeros(3), 1.0), r"means must be \(K, d\)"),
        (lambda: GaussianMixture([1, 1], torch.zeros(2, 3), torch.ones(3)), "covariances must be"),
        (lambda: GaussianMixture([1, 1], torch.zeros(2, 3), 0.0), "positive definite"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 1.0], [1.0, 1.0]]), "positive definite"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: Gaussian([0.0, 0.0], [1.0, 1.0, 1.0]), r"mean must be \(d,\)"),
        (lambda: Gaussian([0.0, 0.0], 1.0)(torch.zeros(4, 3)), "2 values per sample"),
        (
            lambda: Gaussian([0.0, 0.0], 1.0)(torch.zeros(4, 2), -1.0),
            "sigma must be finite and >= 0",
        ),
    ],
)
def test_analytic_errors_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_mixture_under_transforms():
    target, x = mixture("full"), torch.randn(5, 3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda x: target(x[None], 0.3)[0]))(x)
    hessian = torch.func.vmap(torch.func.hessian(lambda x: target.log_prob(x[None], 0.3)[0]))(x)
    torch.testing.assert_close(jacobian, hessian, rtol=1e-9, atol=1e-9)


def test_data_levels_and_starts_of_one_seed_are_independent():
    """A mixture whose components came of the labels' draw would be shown to the network at half
    of the noise levels each."""
    mixture = GaussianMixture([1, 1], [[-9.0], [9.0]], 0.01)
    key = {"seed": 0, "step": 3}
    component = (mixture.sample(4000, **key) > 0)[:, 0]
    w = fastscore.random.words(4000, stream=fastscore.random.LEVEL, **key)
    upper = w >= 2**31
    assert abs(float((component == upper).double().mean()) - 0.5) < 6 * 0.5 / 4000**0.5

    normal = GaussianMixture([1], [[0.0]], 1.0).sample(4000, **key, dtype=torch.float64)[:, 0]
    for stream in (fastscore.random.INIT, fastscore.random.PERTURB, fastscore.random.LANGEVIN):
        z = fastscore.random.normal((4000,), stream=stream, dtype=torch.float64, **key)
        assert abs(float((z * normal).mean())) < 6 / 4000**0.5
