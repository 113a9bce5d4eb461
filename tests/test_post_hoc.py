"""Power averages of weights, and averages of other widths made from them, against sums in closed
form."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fastscore import training
from fastscore.training.post_hoc import gamma_of

UPDATES = 400


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(dtype)


def walk(model, widths, every, updates=UPDATES):
    """A training of random steps: its weights at each update, and states of the averages."""
    generator = torch.Generator().manual_seed(1)
    averages = [training.power_averaged(model, w) for w in widths]
    path, states = [], []
    for t in range(1, updates + 1):
        for p in model.parameters():
            with torch.no_grad():
                p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        model[1].running_mean.fill_(t)
        for average in averages:
            average.update_parameters(model)
        path.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        if t % every == 0:
            states += [copy.deepcopy(average.state_dict()) for average in averages]
    return torch.stack(path), averages, states


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2])
def test_gamma_has_the_width_it_is_for(width):
    """Mean and variance of p(τ) = (γ + 1) τ^γ on [0, 1], by sums."""
    gamma = gamma_of(width)
    tau = (np.arange(400_000) + 0.5) / 400_000
    p = (gamma + 1) * tau**gamma / 400_000
    mean = (p * tau).sum()
    assert abs(((p * (tau - mean) ** 2).sum()) ** 0.5 - width) < 1e-6


@pytest.mark.parametrize("width", [0.05, 0.15])
def test_a_power_average_weighs_the_past_by_its_power(width):
    """Σ w_t of weight (t^(γ+1) - (t-1)^(γ+1))/T^(γ+1), up to the first order in 1/t."""
    path, (average,), _ = walk(network(), [width], UPDATES)
    gamma, t = gamma_of(width), torch.arange(1, UPDATES + 1, dtype=torch.float64)
    beta = (1 - 1 / t) ** (gamma + 1)
    tails = torch.cat([beta[1:].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    weights = (1 - beta) * tails
    assert abs(weights.sum() - 1) < 1e-12
    torch.testing.assert_close(vector(average.module), weights @ path)
    torch.testing.assert_close(tails, (t / UPDATES) ** (gamma + 1))


@pytest.mark.parametrize("width", [0.05, 0.07, 0.1, 0.13])
def test_the_width_is_chosen_afterwards(width):
    """Against an average of that width that was kept all along."""
    path, (*_, wanted), states = walk(network(), [0.05, 0.1, width], 20)
    states = [s for s in states if round(float(s["width"]), 6) in (0.05, 0.1)]
    model = network()
    before = vector(model).clone()
    made = training.post_hoc(model, states, width)
    scale = (path[-1] - path[0]).norm()
    assert (vector(made) - vector(wanted.module)).norm() < 0.01 * scale
    assert (vector(wanted.module) - path[-1]).norm() > 0.1 * scale   # it is not the last one
    assert torch.equal(vector(model), before) and not made.training
    assert torch.equal(made[1].running_mean, torch.full((3,), 400.0).double())


def test_a_width_and_step_that_were_kept_are_exact():
    _, _, states = walk(network(), [0.05, 0.1], 100)
    for state in states:
        made = training.post_hoc(
            network(), states, float(state["width"]), step=int(state["n_averaged"])
        )
        for name, t in made.state_dict().items():
            torch.testing.assert_close(t, state[f"module.{name}"])


def test_narrow_weights_are_combined_in_float32():
    model = network(torch.bfloat16)
    _, _, states = walk(model, [0.05, 0.1], 40)
    made = training.post_hoc(model, states, 0.07)
    wide = training.post_hoc(
        network(), [{**{n: t.double() if t.is_floating_point() else t for n, t in s.items()},
                     **{f"module.{n}": s[f"average_{i}"].double()
                        for i, (n, _) in enumerate(model.named_parameters())}} for s in states],
        0.07,
    )
    assert made[0].weight.dtype == torch.bfloat16
    assert torch.equal(made[0].weight, wide[0].weight.to(torch.bfloat16))


def test_states_travel_by_files_and_pickles():
    model = network()
    _, (average,), _ = walk(model, [0.1], 100)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = training.power_averaged(network(), 0.05)
    other.load_state_dict(state)
    assert float(other.width) == 0.1 and other.gamma == average.gamma
    again = pickle.loads(pickle.dumps(average))
    for a in (other, again):
        a.update_parameters(model)
    average.update_parameters(model)
    assert torch.equal(vector(other.module), vector(average.module))
    assert torch.equal(vector(again.module), vector(average.module))
    assert average.float().width.dtype == torch.float64


def test_what_does_not_fit_is_refused():
    model = network()
    _, (average,), states = walk(model, [0.05], 100)
    for call, match in [
        (lambda: training.power_averaged(model, 0.3), "width must be"),
        (lambda: training.post_hoc(model, [], 0.1), "one or more"),
        (lambda: training.post_hoc(model, average.state_dict(), 0.1), "state_dicts"),
        (lambda: training.post_hoc(model, [model.state_dict()], 0.1), "lacks its width"),
        (lambda: training.post_hoc(nn.Linear(2, 3), states, 0.05), "of another network"),
        (lambda: training.post_hoc(model, states, 0.05, step=401), "step must be"),
        (lambda: training.post_hoc(model, states[-1:], 0.2), "the nearest profile is"),
        (lambda: training.post_hoc(
            model, [training.power_averaged(model, 0.1).state_dict()], 0.1), "not updated"),
    ]:   # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
