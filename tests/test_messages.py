"""What is said when something is wrong.

What it is, in a sentence of a bearable length, and nothing that it is not.
"""

import numpy as np
import pytest
import torch

import fastscore
from fastscore import guidance, likelihood, losses, models, sampling, schedules, training
from fastscore.schedules.ladders import check_ladder

X = torch.linspace(-1, 1, 12).reshape(4, 3)
LONG = schedules.geometric(348.0, 0.01, 2311)


def squares(net, x, step):
    return net(x).square().sum(1)


def run(loader, net=None, **options):
    return list(
        training.training_loop(
            net or torch.nn.Linear(3, 3),
            loader,
            options.pop("loss", squares),
            **{"steps": 5, **options},
        )
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "pack",
    [lambda x: x, lambda x: [x, torch.zeros(4)], lambda x: {"image": (x,)}],
    ids=["tensor", "list", "dict"],
)
def test_nan_in_the_data_is_called_that(bad, pack):
    x = X.clone()
    x[1, 2] = bad

    def loss(net, batch, step):
        tensor = (
            batch
            if isinstance(batch, torch.Tensor)
            else batch[0]
            if isinstance(batch, list)
            else batch["image"][0]
        )
        return squares(net, tensor, step)

    with pytest.raises(
        FloatingPointError,
        match="at step 1; the batch holds NaN or infinite values, so look at the data",
    ) as error:
        run([pack(X), pack(x)], loss=loss)
    assert "learning rate" not in str(error.value)


def test_nan_in_arrays_of_numpy_is_seen():
    loader = [np.full((4, 3), np.nan, np.float32)]
    with pytest.raises(FloatingPointError, match="the batch holds NaN"):
        run(loader, loss=lambda net, x, step: squares(net, torch.from_numpy(x), step))


def test_a_run_that_diverges_is_called_that():
    with pytest.raises(
        FloatingPointError,
        match=r"the weights are not finite; lower the learning rate, or clip the gradient",
    ):
        net = torch.nn.Linear(3, 3)
        run(
            [X],
            net,
            optimizer=torch.optim.SGD(net.parameters(), lr=1e38),
            loss=lambda net, x, step: 100 * squares(net, x, step),
        )


def test_a_loss_that_is_not_finite_by_itself_is_called_that():
    with pytest.raises(
        FloatingPointError, match="the data and the weights are finite, so look at the loss"
    ):
        run([X], loss=lambda net, x, step: squares(net, x, step) / 0)


def test_a_generator_that_has_ended_is_called_that():
    """After three batches of five steps; it was called an empty loader."""
    done = []
    loop = training.training_loop(
        torch.nn.Linear(3, 3), (X for _ in range(3)), squares, steps=12, first_step=7
    )
    with pytest.raises(
        ValueError,
        match=r"the loader ended before step 10, after 3 batches, .* \(a generator runs once\)",
    ):
        for state in loop:
            done.append(state.step)
    assert done == [7, 8, 9]

    spent = iter([X])
    next(spent)
    with pytest.raises(
        ValueError, match=r"the loader is empty \(an iterator that has ended already\?\)"
    ):
        run(spent)
    with pytest.raises(ValueError, match=r"the loader is empty\.$"):
        run([])
    assert len(run(X for _ in range(5))) == 5   # as many as there are steps
    assert len(run([X, X])) == 5


LADDER_TAKERS = {
    "check_ladder": lambda s: check_ladder("op", s),
    "NCSNv2": lambda s: models.NCSNv2(1, 4, s),
    "annealed_langevin": lambda s: sampling.annealed_langevin(
        torch.neg, X, sigmas=s, steps_per_level=1, step_size=1e-5
    ),
    "noise_conditional": lambda s: losses.noise_conditional(lambda x, sigma: -x, X, s, seed=0),
    "log_density": lambda s: likelihood.log_density(
        lambda x, sigma: -x, X, sigma_min=0.01, sigma_max=348.0, steps=s
    ),
}


@pytest.mark.parametrize("kind", [list, torch.tensor])
@pytest.mark.parametrize("name", LADDER_TAKERS)
def test_a_long_ladder_that_does_not_descend_is_a_short_message(name, kind):
    """2,311 ascending levels were 46,335 characters; one wrong level among them is named."""
    values = LONG.tolist()
    with pytest.raises(ValueError, match=r"level 1, .* does not lie below level 0, 0\.01") as error:
        LADDER_TAKERS[name](kind(values[::-1]))
    assert len(str(error.value)) < 300

    values[1200] = values[1199]
    with pytest.raises(
        ValueError, match=r"level 1200, .* does not lie below level 1199, "
    ) as error:
        LADDER_TAKERS[name](kind(values))
    assert len(str(error.value)) < 300

    values[1200] = float("nan")
    with pytest.raises(ValueError, match=r"level 1200 is nan"):
        LADDER_TAKERS[name](kind(values))


@pytest.mark.parametrize(
    "call",
    [
        lambda: models.ScoreMLP(3, sigmas=-LONG),
        lambda: models.GaussianMixture(-LONG, LONG[:, None], 1.0),
        lambda: guidance.class_likelihood(lambda x, sigma: x, -torch.arange(2311)),
        lambda: guidance.class_likelihood(lambda x, sigma: x, ["a"] * 2311),
        lambda: guidance.Grey([0.0] * 2311),
        lambda: schedules.timesteps_of(1000 * LONG, torch.linspace(0.999, 0.01, 10)),
        lambda: likelihood.log_density(
            lambda x, sigma: -x, X, sigma_min=0.1, sigma_max=1.0, steps=LONG
        ),
        lambda: fastscore.langevin_step(
            torch.zeros(2311, 1), torch.zeros(2311, 1), torch.full((2311,), -1.0), seed=0
        ),
    ],
)
def test_many_values_are_a_short_message(call):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert len(str(error.value)) < 400


def energy():
    torch.manual_seed(0)
    score = models.EnergyScore(models.EnergyMLP(3, width=8, depth=1))
    torch.nn.init.normal_(score.f.last.weight)
    return score


@pytest.mark.parametrize(
    "wrap",
    [
        lambda e: training.averaged(e, 0.9),
        torch.nn.DataParallel,
        lambda e: torch.compile(e, backend="eager"),
        lambda e: training.averaged(torch.compile(e, backend="eager"), 0.9),
    ],
    ids=["average", "parallel", "compiled", "average of compiled"],
)
def test_mala_takes_an_energy_in_its_wrappers(wrap):
    """In one dimension its score passed for the log-density, (B, 1)."""
    score, key = energy(), {"sampler": "mala", "x": X, "steps": 3, "step_size": 0.1, "seed": 0}
    assert torch.equal(fastscore.sample(wrap(score), **key), fastscore.sample(score, **key))


def test_mala_takes_the_average_of_a_run_in_one_dimension():
    score = models.EnergyScore(models.EnergyMLP(1, width=8, depth=1))
    x = torch.linspace(-2, 2, 8)[:, None]
    *_, state = training.training_loop(
        score,
        [x],
        lambda s, x, step: losses.sliced(s, x, seed=0, step=step),
        steps=3,
        ema_decay=0.5,
    )
    key = {"sampler": "mala", "x": x, "steps": 3, "step_size": 0.1, "seed": 0}
    assert torch.equal(
        fastscore.sample(state.ema, **key), fastscore.sample(state.ema.module, **key)
    )


def test_mala_of_a_score_says_what_it_needs():
    with pytest.raises(
        ValueError,
        match=r"must be one value per sample, .* got \(4, 3\) \(a score\? Metropolis needs log p "
              r"itself\)",
    ):
        fastscore.sample(lambda x: -x, sampler="mala", x=X, steps=1, step_size=0.1)


def test_a_start_that_is_not_finite_is_no_matter_of_step_sizes():
    x = X.clone()
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the start x must be finite"):
        fastscore.sample(torch.neg, sampler="langevin", x=x, steps=1, step_size=0.1)
