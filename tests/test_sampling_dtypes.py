"""Samplers of scores in another dtype than the state: autocast, networks in half precision."""

import pytest
import torch

import fastscore
from fastscore import models, sampling, schedules

SIGMAS = schedules.geometric(1.0, 0.1, 4)
SAMPLERS = {
    "annealed_langevin": {"sigmas": SIGMAS, "steps_per_level": 3, "step_size": 2e-3},
    "consistent_annealed": {"sigmas": SIGMAS},
    "predictor_corrector": {"sigmas": SIGMAS},
    "probability_flow": {"sigmas": SIGMAS},
    "probability_flow, adaptive": {
        "sigmas": SIGMAS,
        "method": "adaptive",
        "rtol": 1e-2,
        "atol": 1e-2,
    },
    "langevin": {"steps": 5, "step_size": 0.01, "sigma": 0.1},
    "mala": {"steps": 5, "step_size": 0.01},
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def gaussian(x, sigma):
    return (0.7 - x) / (0.04 + sigma.reshape(-1, 1) ** 2)


def log_prob(x):
    return -0.5 * (x - 0.7).square().sum(1)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    net = models.ScoreMLP(3, width=16, depth=1, sigmas=SIGMAS)
    for parameter in net.parameters():   # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return net.to(dtype)


class Energy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 8)

    def forward(self, x):
        return -self.layer(x).square().sum(1)


def drawn(score, sampler, **options):
    return fastscore.sample(
        score, sampler=sampler.split(",")[0], shape=(6, 3), seed=8, **SAMPLERS[sampler], **options
    )


@every_sampler
def test_a_bfloat16_score_of_a_float32_state_is_taken_as_losses_take_it(sampler):
    """The samples are those of the score that was rounded to bfloat16 and back, bit for bit."""
    f = (lambda x, *_: log_prob(x)) if sampler == "mala" else gaussian
    x = drawn(lambda *a: f(*a).bfloat16(), sampler)
    assert x.dtype == torch.float32
    assert torch.equal(x, drawn(lambda *a: f(*a).bfloat16().float(), sampler))


@every_sampler
def test_networks_under_autocast(sampler):
    score = Energy() if sampler == "mala" else network()
    with torch.autocast("cpu", torch.bfloat16):
        x = drawn(score, sampler)
    assert x.dtype == torch.float32
    if sampler != "mala":   # a rounded ratio may decide otherwise
        whole = drawn(score, sampler)
        assert float((x - whole).abs().max()) < 0.05 * float(whole.abs().max())


def test_ncsn_under_autocast():
    torch.manual_seed(0)
    net = models.NCSN(channels=1, ngf=4, sigmas=SIGMAS, image_size=8)
    options = {
        "shape": (2, 1, 8, 8),
        "sigmas": SIGMAS,
        "steps_per_level": 1,
        "step_size": 2e-3,
        "seed": 0,
    }
    with torch.autocast("cpu", torch.bfloat16):
        x = fastscore.sample(net, **options)
    whole = fastscore.sample(net, **options)
    assert x.dtype == torch.float32 and float((x - whole).abs().max()) < 0.05 * float(
        whole.abs().max()
    )


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_sampled_with_a_float32_state(sampler, dtype):
    """Steps of ε = 2e-5 are lost in a bfloat16 state.

    The network sees x rounded, the state is not.
    """
    score = Energy().to(dtype) if sampler == "mala" else network(dtype)
    x = drawn(score, sampler)
    assert x.dtype == torch.float32
    by_hand = (
        (lambda x: score(x.to(dtype)).float())
        if sampler == "mala"
        else lambda x, sigma: score(x.to(dtype), sigma).float()
    )
    assert torch.equal(x, drawn(by_hand, sampler))
    if sampler != "mala":
        assert drawn(score, sampler, dtype=dtype).dtype == dtype   # as it was asked for


@pytest.mark.parametrize("loss", ["sliced", "exact", "finite_difference_sliced"])
def test_a_network_of_another_dtype_in_a_loss_is_one_sentence(loss):
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.SiLU(), torch.nn.Linear(4, 2))
    net = net.double()
    with pytest.raises(TypeError, match=f"{loss}: the network is float64 and x float32; convert"):
        getattr(fastscore.losses, loss)(net, torch.ones(3, 2))


def test_what_cannot_be_matched_is_one_sentence():
    net = network(torch.bfloat16)
    message = (
        "langevin: the network is bfloat16 and x float32; "
        "hand over the network itself, or convert one of them"
    )
    with pytest.raises(TypeError, match=message) as caught:
        drawn(lambda x, sigma: 2 * net(x, sigma), "langevin")
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="mine"):   # errors of the score's own stay
        sampling.langevin(broken, torch.zeros(2, 3), steps=1, step_size=0.1, seed=0).__next__()


def broken(x):
    raise RuntimeError("mine")
