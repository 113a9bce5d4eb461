"""Score, noise prediction, denoiser and v-prediction become one another."""

import functools
import itertools
import math

import pytest
import torch

from fastscore import conversions, models, random, sample, schedules

KINDS = conversions.KINDS
PAIRS = list(itertools.permutations(KINDS, 2))
VE, VP = "ve", "vp"


def function(kind, to):
    return functools.partial(conversions.convert, kind=kind, to=to)


def problem(process, dtype=torch.float64, batch=4):
    """x of a known x₀ and z at per-sample σ, and what each predictor would say if it knew them."""
    x0, z = (random.normal((batch, 3, 2), seed=seed, stream=1024, dtype=dtype) for seed in (1, 2))
    sigma = torch.tensor([0.05, 0.4, 0.8, 0.95], dtype=dtype)
    alpha = (1 - sigma**2).sqrt() if process == VP else torch.ones_like(sigma)
    s, a = sigma[:, None, None], alpha[:, None, None]
    predictions = {
        "score": -z / s,
        "noise": z,
        "denoiser": x0,
        "v": (a * z - s * x0) / (a**2 + s**2).sqrt(),
    }
    return a * x0 + s * z, sigma, alpha, predictions


@pytest.mark.parametrize("process", [VE, VP])
@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_every_conversion_maps_the_true_predictions_to_each_other(kind, to, process):
    x, sigma, alpha, predictions = problem(process)
    found = function(kind, to)(predictions[kind], x, sigma, alpha)
    # Conditioning: 1/σ² = 400 at the smallest level.
    assert torch.allclose(found, predictions[to], rtol=1e-12, atol=1e-12)
    if process == VE:
        assert torch.equal(found, function(kind, to)(predictions[kind], x, sigma))


@pytest.mark.parametrize("process", [VE, VP])
@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_round_trips_of_anything(kind, to, process):
    x, sigma, alpha, _ = problem(process)
    prediction = random.normal(x.shape, seed=9, stream=1024, dtype=x.dtype)
    there = function(kind, to)(prediction, x, sigma, alpha)
    assert torch.allclose(
        function(to, kind)(there, x, sigma, alpha), prediction, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_dtype_is_kept_and_the_result_rounded_once(kind, to, dtype):
    x, sigma, _, predictions = problem(VE, batch=4)
    sigma = sigma.clamp(min=0.4)
    x, prediction = x.to(dtype), predictions[kind].to(dtype)
    found = function(kind, to)(prediction, x, sigma.float())
    expected = function(kind, to)(prediction.double(), x.double(), sigma.float().double())
    assert found.dtype == dtype
    # One rounding of the result, and of half precision nothing else; float32 rounds some eight
    # times, on terms up to |x|/σ² ~ 30.
    loss = 8 * 2**-24 * 30
    assert (
        (found.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + loss
    ).all()


@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_gradients_flow_to_prediction_x_sigma_and_alpha(kind, to):
    x, sigma, alpha, predictions = problem(VP, batch=4)
    inputs = [t.detach().clone().requires_grad_() for t in (predictions[kind], x, sigma, alpha)]
    assert torch.autograd.gradcheck(function(kind, to), inputs)


@pytest.mark.parametrize("kind", ["score", "noise", "denoiser", "v"])
def test_converted_network_serves_as_the_exact_score_of_a_gaussian(kind):
    law = models.Gaussian(torch.tensor([0.3, -1.0]), torch.tensor([[1.0, 0.4], [0.4, 0.5]]))
    network = conversions.Converted(law.score, kind="score", to=kind)
    x, sigma = random.normal((5, 2), seed=3, stream=1024), torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0])
    score = conversions.Converted(network, kind=kind)
    assert torch.allclose(score(x, sigma), law.score(x, sigma), rtol=1e-4, atol=1e-4)


def test_denoiser_of_a_gaussian_is_its_posterior_mean():
    law = models.Gaussian(torch.tensor([2.0]), torch.tensor([[0.25]]))
    denoiser = conversions.Converted(law.score, kind="score", to="denoiser")
    x, sigma = torch.tensor([[0.0], [3.0]]), torch.tensor([0.5, 2.0])
    expected = 2 + (x - 2) * (0.25 / (0.25 + sigma**2))[:, None]
    assert torch.allclose(denoiser(x, sigma), expected, atol=1e-6)


def test_converted_network_is_a_module_with_parameters_and_gradients():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x, sigma):
            return self.linear(x) * sigma[:, None]

    net = Net()
    score = conversions.Converted(net, kind="noise")
    x = torch.ones(2, 3, requires_grad=True)
    score(x, torch.tensor([0.5, 2.0])).sum().backward()
    assert [p.shape for p in score.parameters()] == [(3, 3), (3,)]
    # s = -σ (W x + b)/σ: the gradient is free of σ.
    assert torch.allclose(net.linear.bias.grad, torch.full((3,), -2.0))
    assert torch.allclose(x.grad, -net.linear.weight.sum(0).expand(2, 3))


def test_rescaled_score_is_that_of_the_rescaled_law():
    # Of u = 2 y - 1
    law = models.Gaussian(torch.tensor([0.2, -0.4]), torch.tensor([[0.3, 0.1], [0.1, 0.2]]))
    small = models.Gaussian(
        (torch.tensor([0.2, -0.4]) + 1) / 2, torch.tensor([[0.3, 0.1], [0.1, 0.2]]) / 4
    )
    y, sigma = random.uniform((4, 2), seed=4, stream=1024), torch.tensor([0.01, 0.1, 1.0, 5.0])
    found = conversions.Rescaled(law.score, 2, -1)(y, sigma)
    assert torch.allclose(found, small.score(y, sigma), rtol=1e-4, atol=1e-4)
    mirrored = conversions.Rescaled(law.score, -1.0)(y, sigma)
    assert torch.allclose(mirrored, -law.score(-y, sigma))


def test_vp_score_becomes_the_score_of_the_rescaled_process():
    law = models.Gaussian(torch.tensor([0.2, -0.4]), torch.tensor([[0.3, 0.1], [0.1, 0.2]]))
    sigma = torch.tensor([0.1, 0.9, 7.0])
    abar = schedules.alphas_cumprod(sigma)
    x = random.normal((3, 2), seed=5, stream=1024)
    for i in range(3):  # x_vp = √ᾱ x is normal with mean √ᾱ μ and covariance ᾱ Σ + (1 - ᾱ) I
        vp = models.Gaussian(
            abar[i].sqrt() * torch.tensor([0.2, -0.4]),
            abar[i] * torch.tensor([[0.3, 0.1], [0.1, 0.2]]),
        )
        s_vp = vp.score(abar[i].sqrt() * x[i : i + 1], (1 - abar[i]).sqrt().reshape(1))
        found = conversions.vp_to_ve(s_vp, abar[i])
        assert torch.allclose(
            found, law.score(x[i : i + 1], sigma[i : i + 1]), rtol=1e-4, atol=1e-5
        )
        assert torch.allclose(conversions.ve_to_vp(found, abar[i]), s_vp, rtol=1e-6)


def test_sampling_from_a_denoiser_equals_sampling_from_its_score():
    law = models.Gaussian(torch.zeros(2), torch.eye(2))
    options = {
        "shape": (6, 2),
        "sigmas": schedules.geometric(3.0, 0.3, 5),
        "steps_per_level": 3,
        "step_size": 0.05,
        "seed": 1,
    }
    denoiser = conversions.Converted(law.score, kind="score", to="denoiser")
    found = sample(conversions.Converted(denoiser, kind="denoiser"), **options)
    assert torch.allclose(found, sample(law.score, **options), atol=1e-4)


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: function("score", "noise")(X[:2], X, 1.0),
            ValueError,
            r"value must have the shape of x, \(3, 2\); got \(2, 2\)",
        ),
        (
            lambda: function("score", "noise")(X.double(), X, 1.0),
            TypeError,
            "must have the dtype of x",
        ),
        (
            lambda: function("noise", "score")(X, X, 0.0),
            ValueError,
            "convert: sigma must be finite and >= 1e-30; got 0.0",
        ),
        (
            lambda: function("v", "score")(X, X, 1.0, -1.0),
            ValueError,
            "alpha must be finite and >= 1e-30; got -1.0",
        ),
        (
            lambda: function("v", "score")(X, X, torch.ones(2)),
            ValueError,
            r"0-d or \(3,\); got shape \(2,\)",
        ),
        (
            lambda: function("score", "v")("no", X, 1.0),
            TypeError,
            "value must be a tensor; got str",
        ),
        (
            lambda: conversions.convert(X, X, 1.0, kind="eps", to="score"),
            ValueError,
            "one of score, noise, denoiser, v; got 'eps'",
        ),
        (lambda: function("v", "v")(X, X[:2], 1.0), ValueError, "value must have the shape of x"),
        (lambda: function("noise", "noise")(X, X, math.nan), ValueError, "sigma must be finite"),
        (lambda: conversions.Converted(len, kind="noise", to="x0"), ValueError, "got 'x0'"),
        (lambda: conversions.Rescaled(len, 0), ValueError, "scale must not be 0"),
        (lambda: conversions.vp_to_ve(X, 0.0), ValueError, "alphas_cumprod must be finite"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
