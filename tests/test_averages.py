"""The averaged weights.

Their values in every dtype, their buffers, and models that keep results of earlier calls.
"""

import copy

import pytest
import torch
from torch.nn.utils import spectral_norm, weight_norm

from fastscore import averages, losses, models, schedules, training

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def after_3000_updates(ema, net):
    """From 1.0 to 1.5 at decay 0.999, long after the first updates, whose decay is smaller."""
    with torch.no_grad():
        net.weight.fill_(1.0)
        ema.update_parameters(net)
        ema.n_averaged.fill_(1_000_000)
        net.weight.fill_(1.5)
    for _ in range(3000):
        ema.update_parameters(net)
    return float(ema.module.weight.detach())


def squares(net, x, step):
    return net(x.to(next(net.parameters()).dtype)).float().square().flatten(1).sum(1)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_an_average_has_its_value_in_every_dtype(dtype):
    """1.5 - 0.5 · 0.999^3000 = 1.4751.

    In bfloat16 the first step, 0.0005, is lost: the last bit of 1.0 is 0.0078.
    """
    net = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
    value = after_3000_updates(training.averaged(net, 0.999), net)
    # float32 rounds each of 3,000 updates by 2^-24 relative; the average forgets, so some 1/(1 - d)
    # = 1,000 of them add up.
    slack = 1000 * 2**-24 * 1.5 if dtype != torch.float64 else 1e-9
    assert abs(value - (1.5 - 0.5 * 0.999**3000)) <= slack + torch.finfo(dtype).eps


def test_a_narrow_average_goes_on_from_its_state():
    """To half way, saved, loaded into a fresh average, and on: bit for bit the whole run."""

    def run(steps, ema=None, first=0):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3).bfloat16()
        if ema is not None:
            net.load_state_dict(ema[1])
        average = training.averaged(net, 0.99)
        if ema is not None:
            average.load_state_dict(ema[0])
        for step in range(first, steps):
            with torch.no_grad():
                net.weight.add_(0.01 * step)
            average.update_parameters(net)
        return copy.deepcopy(average.state_dict()), copy.deepcopy(net.state_dict())

    whole, parts = run(40)[0], run(40, run(20), 20)[0]
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any(t.dtype == torch.float32 and t.dim() for t in whole.values())


def test_weights_that_are_loaded_into_a_narrow_average_count():
    net = torch.nn.Linear(2, 2, bias=False).bfloat16()
    ema = training.averaged(net, 0.5)
    for _ in range(5):
        ema.update_parameters(net)
    with torch.no_grad():
        ema.module.weight.fill_(8.0)
        net.weight.fill_(0.0)
    ema.update_parameters(net)   # d = min(1/2, 6/15) = 0.4
    assert torch.equal(ema.module.weight, torch.full((2, 2), 3.2).bfloat16())


def test_an_average_saved_without_shadows_loads():
    net = torch.nn.Linear(2, 2).half()
    ema = training.averaged(net, 0.5)
    state = {k: v for k, v in ema.state_dict().items() if not k.startswith("average_")}
    other = training.averaged(torch.nn.Linear(2, 2).half(), 0.5)
    other.load_state_dict(state)
    with torch.no_grad():
        other.n_averaged.fill_(1)
    other.update_parameters(net)
    assert torch.equal(other.module.weight, net.weight)   # the average of a weight and itself


def test_an_average_stays_in_float32_where_it_is_moved_to_another_dtype():
    net = torch.nn.Linear(1, 1, bias=False).bfloat16()
    ema = training.averaged(net, 0.999).bfloat16()
    assert {t.dtype for k, t in ema.state_dict().items() if k.startswith("average_")} == {
        torch.float32
    }

    # Narrow only now.
    wide = training.averaged(torch.nn.Linear(1, 1, bias=False), 0.999).bfloat16()
    assert 1.46 < after_3000_updates(wide, net) < 1.49


def test_the_average_of_float32_weights_is_that_of_pytorch_bit_for_bit():
    from torch.optim.swa_utils import AveragedModel

    def average(ema, current, n):
        torch._foreach_lerp_(
            list(ema), list(current), 1 - min(0.99, (1 + float(n)) / (10 + float(n)))
        )

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    stock, ours = AveragedModel(net, multi_avg_fn=average), training.averaged(net, 0.99)
    for _ in training.training_loop(net, [X], squares, steps=20, ema=ours):
        stock.update_parameters(net)
    assert stock.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(t, ours.state_dict()[k]) for k, t in stock.state_dict().items())


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_model_that_keeps_results_of_its_calls_is_trained_and_averaged(norm):
    """The old weight_norm keeps a weight with a graph, which copy.deepcopy refuses."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        norm(torch.nn.Linear(3, 4)), torch.nn.Tanh(), norm(torch.nn.Linear(4, 3))
    )
    net[0].seen = [{"last": net(X)}]
    before = net(X)
    *_, state = training.training_loop(net, [X], squares, steps=50, lr=0.05, ema_decay=0.5)
    assert float(state.losses.sum()) < 0.1 * float(before.square().sum())

    # The average settles on the network: after 50 steps with d <= 1/2 it is a few steps behind.
    with torch.no_grad():
        net.eval()
        assert torch.allclose(state.ema(X), net(X), atol=0.1)
        for p in net.parameters():
            p.zero_()
        assert bool(state.ema(X).abs().sum() > 0)   # its own weights


def test_the_average_is_in_evaluation_mode_and_the_model_stays_in_training():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    for state in training.training_loop(net, [X], squares, steps=2):
        assert not any(m.training for m in state.ema.modules()) and all(
            m.training for m in net.modules()
        )


def test_buffers_that_a_model_makes_as_it_runs_reach_its_average():
    class Late(torch.nn.Linear):
        def forward(self, x):
            if "scale" not in self._buffers:
                self.register_buffer("scale", torch.tensor(2.0))
                self.register_buffer("hidden", torch.tensor(3.0), persistent=False)
            return self.scale * super().forward(x)

    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), Late(3, 3))
    *_, state = training.training_loop(net, [X], squares, steps=3)
    assert float(state.ema.module[1].scale) == 2.0 and float(state.ema.module[1].hidden) == 3.0
    assert state.ema.module.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(state.ema.module[0].running_mean, net[0].running_mean)


def test_another_model_than_the_averaged_one_is_refused():
    ema = training.averaged(torch.nn.Linear(3, 3), 0.9)
    with pytest.raises(ValueError, match="must have the parameters that it had"):
        ema.update_parameters(torch.nn.Linear(3, 3, bias=False))


def test_a_network_in_bfloat16_is_trained_and_averaged():
    torch.manual_seed(0)
    sigmas = schedules.geometric(1.0, 0.1, 3)
    net = models.ScoreMLP(3, width=16, depth=1, sigmas=sigmas).bfloat16()

    def loss(net, x, step):
        return losses.noise_conditional(net, x, sigmas, seed=0, step=step)

    *_, state = training.training_loop(net, [X.bfloat16()], loss, steps=30)
    assert {p.dtype for p in state.ema.module.parameters()} == {torch.bfloat16}
    assert state.ema(X.bfloat16(), 0.5).dtype == torch.bfloat16


def test_complex_weights_are_averaged():
    """They were copied at each update."""
    net = torch.nn.Linear(2, 2, bias=False, dtype=torch.complex64)
    average = averages.averaged(net, 0.5)
    expected = None
    for n in range(5):
        with torch.no_grad():
            net.weight.fill_(complex(n, -2 * n))
        average.update_parameters(net)
        decay = 0.0 if n == 0 else min(0.5, (1 + n) / (10 + n))
        expected = (
            complex(n, -2 * n) if n == 0 else decay * expected + (1 - decay) * complex(n, -2 * n)
        )
    assert (
        abs(average.module.weight[0, 0].item() - expected) < 1e-5 < abs(expected - complex(4, -8))
    )


@pytest.mark.parametrize("decay", [2.0, 1.0, -0.1, float("nan"), "0.9", True])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(
        ValueError, match=r"averaged: decay must be a finite number in \[0, 1\); got"
    ):
        averages.averaged(torch.nn.Linear(2, 2), decay)


def test_a_model_without_weights_is_refused():
    with pytest.raises(
        ValueError, match=r"averaged: the model must have weights; 0\.weight has no shape yet"
    ):
        averages.averaged(torch.nn.Sequential(torch.nn.LazyLinear(3)), 0.9)


def test_what_is_given_twice_is_refused():
    """It was dropped in silence."""
    net = torch.nn.Linear(2, 2)
    given = {
        "steps": 1,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "ema": averages.averaged(net, 0.5),
    }
    refused = (
        ({"lr": 1e-2}, "give either an optimizer"),
        ({"ema_decay": 0.9}, "ema_decay must be that of the ema that is given, 0.5"),
    )
    for more, message in refused:
        with pytest.raises(ValueError, match=f"training_loop: {message}"):
            training.training_loop(
                net, [torch.ones(1, 2)], lambda net, x, step: net(x).sum(1), **given, **more
            )
    assert (
        len(
            list(
                training.training_loop(
                    net,
                    [torch.ones(1, 2)],
                    lambda net, x, step: net(x).sum(1),
                    **given,
                    ema_decay=0.5,
                )
            )
        )
        == 1
    )
