"""diffusers' UNet2DModel, unmodified, as a score network through every loss.

Gradients equal double backprop in float64.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastscore
from fastscore import losses, random
from fastscore.losses.projections import directions

diffusers = pytest.importorskip("diffusers")

SIGMAS = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


@pytest.fixture(scope="module")
def unet():
    """Two levels, the lower one with attention, as is the middle.

    Random weights, also in the convolutions that start at zero.
    """
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return net.double()


@pytest.fixture
def data():
    return random.normal((2, 2, 4, 4), seed=1, stream=1024, dtype=torch.float64)


def along(score, x, v):
    """s and (v_mᵀ J v_m) (M, B), by double backprop."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):   # the fused form cannot be differentiated twice
        s = score(x)
    products = [torch.autograd.grad(s, x, d, create_graph=True)[0] for d in v]
    return s, torch.stack([(p * d).flatten(1).sum(1) for p, d in zip(products, v)])


def sliced(score, x, v, variance_reduced):
    s, vjv = along(score, x, v)
    rest = (
        s.square().flatten(1).sum(1)
        if variance_reduced
        else (v * s).flatten(2).sum(2).square().mean(0)
    )
    return vjv.mean(0) + 0.5 * rest


def exact(score, x):
    units = torch.eye(x[0].numel(), dtype=x.dtype).view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    s, diagonal = along(score, x, units)
    return diagonal.sum(0) + 0.5 * s.square().flatten(1).sum(1)


def assert_equal_gradients(net, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (
        torch.autograd.grad(value.sum(), list(net.parameters()), allow_unused=True)
        for value in (loss, expected)
    )
    scale = max(float(g.abs().max()) for g in theirs if g is not None)
    for a, b in zip(ours, theirs):
        a, b = (torch.zeros(1, dtype=loss.dtype) if g is None else g for g in (a, b))
        assert float((a - b).abs().max()) < 1e-10 * scale
    assert scale > 0


@pytest.mark.parametrize("projections", [1, 4])
@pytest.mark.parametrize("variance_reduced", [True, False], ids=["variance-reduced", "plain"])
def test_sliced(unet, data, variance_reduced, projections):
    def score(x):
        return unet(x, 3).sample

    options = {"projections": projections, "variance_reduced": variance_reduced, "seed": 2}
    v = directions("test", data, projections, seed=2)
    assert_equal_gradients(
        unet, losses.sliced(score, data, **options), sliced(score, data, v, variance_reduced)
    )


def test_exact(unet, data):
    def score(x):
        return unet(x, 3).sample

    assert_equal_gradients(unet, losses.exact(score, data), exact(score, data))


def test_finite_differences_converge_to_sliced(unet, data):
    """They hold no derivative but the backward pass: order two, in the loss and in its gradient."""

    def vector(loss):
        gradients = torch.autograd.grad(
            loss.sum(), list(unet.parameters()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([loss.detach(), *(g.flatten() for g in gradients)])

    def score(x):
        return unet(x, 3).sample

    def error(epsilon):
        return float(
            (
                vector(
                    losses.finite_difference_sliced(
                        score, data, projections=2, seed=2, radius=epsilon
                    )
                )
                - target
            ).norm()
        )

    target = vector(losses.sliced(score, data, projections=2, seed=2))
    errors = [error(0.02), error(0.01)]
    assert 3.8 < errors[0] / errors[1] < 4.2 and errors[1] < 1e-2 * float(target.norm())


CASES = [
    ("denoising", 1),
    ("exact", 1),
    ("sliced", 1),
    ("sliced", 4),
    ("sliced-vr", 1),
    ("sliced-vr", 4),
]


@pytest.mark.parametrize("method, projections", CASES)
def test_noise_conditional(unet, data, method, projections):
    def score(x, sigma):
        return unet(x, 100 * sigma).sample

    options = {} if method in ("denoising", "exact") else {"projections": projections}
    loss = losses.noise_conditional(
        score, data, SIGMAS, method=method, labels=LABELS, seed=5, **options
    )
    each = SIGMAS.float().double()[LABELS]
    noisy, z = (
        fastscore.perturb(data, each, seed=5),
        random.normal(data.shape, seed=5, stream=random.PERTURB, dtype=data.dtype),
    )
    v = directions("test", data, projections, seed=5)
    expected = {
        "denoising": lambda f: (
            0.5 * (f(noisy) + z / each.view(-1, 1, 1, 1)).square().flatten(1).sum(1)
        ),
        "exact": lambda f: exact(f, noisy),
        "sliced": lambda f: sliced(f, noisy, v, False),
        "sliced-vr": lambda f: sliced(f, noisy, v, True),
    }[method](lambda x: score(x, each))
    assert_equal_gradients(unet, loss, each**2 * expected)


def test_denoising(unet, data):
    z = random.normal(data.shape, seed=3, stream=random.PERTURB, dtype=data.dtype)
    loss = losses.denoising(lambda x, sigma: unet(x, sigma).sample, data, 0.5, seed=3)
    score = unet(
        fastscore.perturb(data, 0.5, seed=3), torch.full((2,), 0.5, dtype=torch.float64)
    ).sample
    assert_equal_gradients(unet, loss, 0.5 * (score + z / 0.5).square().flatten(1).sum(1))
