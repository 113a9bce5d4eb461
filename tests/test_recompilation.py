"""A compiled sampler or loss keeps its graph when a number changes.

The second value makes one more, for all, and no other.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fastscore
from fastscore import losses, random
from fastscore.losses.noise_conditional import draw_labels

KEY = {"seed": 1}
SHIFT = torch.linspace(-1, 1, 5)
GAMMA = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))
LABELS, TABLE = torch.tensor([0, 1, 1, 0]), nn.Parameter(torch.linspace(-1, 1, 18).reshape(2, 9))
LAYER = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
NETWORK = fastscore.models.ScoreMLP(3, width=8, depth=1, sigmas=[2.0, 0.1])
FLOATS = {
    "step_size": lambda x, a: fastscore.langevin_step(x, -x, a, **KEY),
    "sigma of perturb": lambda x, a: fastscore.perturb(x, a, **KEY),
    "drift": lambda x, a: fastscore.noisy_update(x, -x, a, 0.2, **KEY),
    "diffusion": lambda x, a: fastscore.noisy_update(x, -x, 0.2, a, **KEY),
    "both": lambda x, a: fastscore.noisy_update(x, -x, a, 2 * a, **KEY),
    "sigma of denoising_loss": lambda x, a: fastscore.denoising_loss(-x, a, **KEY),
    "sigma of denoising": lambda x, a: losses.denoising(lambda x, sigma: -x, x, a, **KEY),
    "sigma of a network": lambda x, a: NETWORK(x, a),
    "eps of instance_norm_plus": lambda x, a: fastscore.instance_norm_plus(
        x[:, :, None] + SHIFT, x.mean(0), eps=a
    ),
    "eps with a gradient": lambda x, a: fastscore.instance_norm_plus(
        x[:, :, None] + SHIFT, GAMMA, GAMMA, GAMMA, eps=a, activation="elu"
    ),
    "eps of conditional_instance_norm_plus": lambda x, a: fastscore.conditional_instance_norm_plus(
        x[:, :, None] + SHIFT, LABELS, TABLE, eps=a
    ),
    "eps of group_norm_modulate": lambda x, a: fastscore.group_norm_modulate(
        x[:, :, None] + SHIFT, 3, GAMMA, GAMMA, eps=a
    ),
    "eps of instance_norm_plus_dual": lambda x, a: torch.cat(
        fastscore.ops.instance_norm_plus_dual(
            x[:, :, None] + SHIFT, (x[:, :, None] * SHIFT)[None], GAMMA, GAMMA, eps=a
        )[1:]
    ),
    "power": lambda x, a: losses.noise_conditional(
        lambda x, sigma: -x, x, [2.0, 0.1], power=a, **KEY
    ),
    "radius": lambda x, a: losses.finite_difference_sliced(LAYER, x, radius=a, **KEY),
    "step_size with noise": lambda x, a: fastscore.langevin_step(x, -x, a, noise=x),
}
BROKEN = {  # by graph breaks
    "power of sliced": lambda x, a: losses.noise_conditional(
        lambda x, s: -x * x, x, [2.0, 0.1], method="sliced", power=a, **KEY
    ),
    "power of exact": lambda x, a: losses.noise_conditional(
        lambda x, s: -x * x, x, [2.0, 0.1], method="exact", power=a, **KEY
    ),
    "radius of a function": lambda x, a: losses.finite_difference_sliced(
        lambda x: -x * x, x, radius=a, **KEY
    ),
}
INTEGERS = {
    "langevin_step": lambda x, k: fastscore.langevin_step(x, -x, 0.1, offset=k, **KEY),
    "perturb": lambda x, k: fastscore.perturb(x, 0.1, offset=k, **KEY),
    "noisy_update": lambda x, k: fastscore.noisy_update(x, -x, 0.1, 0.2, offset=k, **KEY),
    "denoising_loss": lambda x, k: fastscore.denoising_loss(-x, 0.1, offset=k, **KEY),
    "denoising": lambda x, k: losses.denoising(lambda x, sigma: -x, x, 0.1, first_sample=k, **KEY),
    "noise_conditional": lambda x, k: losses.noise_conditional(
        lambda x, sigma: -x, x, [1.0, 0.1], first_sample=k, **KEY
    ),
    "normal": lambda x, k: x + random.normal(x.shape, stream=1024, offset=k, **KEY),
    "uniform": lambda x, k: x + random.uniform(x.shape, stream=1024, offset=k, **KEY),
    "rademacher": lambda x, k: x + random.rademacher(x.shape, stream=1024, offset=k, **KEY),
    "words": lambda x, k: random.words(7, stream=1024, offset=k, **KEY),
    "draw_labels": lambda x, k: draw_labels(3, 4, first_sample=k, **KEY),
    "step": lambda x, k: fastscore.langevin_step(x, -x, 0.1, step=k, **KEY),
    "seed": lambda x, k: fastscore.langevin_step(x, -x, 0.1, seed=k),
}
VALUES = {"float": [0.1, 0.25, 0.3, 1.5, 0.7, 2.0], "int": [0, 3, 5, 64, 7, 2**33]}


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counted(function):
    """The function compiled, and the list of its graphs."""
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    return torch.compile(function, backend=compiler), graphs


CASES = [pytest.param(f, VALUES["float"], id=name) for name, f in FLOATS.items()]
CASES += [pytest.param(f, VALUES["int"], id=f"offset of {name}") for name, f in INTEGERS.items()]


@pytest.mark.parametrize(("function", "values"), CASES)
def test_no_graph_after_the_second_value(function, values):
    _count(function, values)


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (FLOATS["step_size"], VALUES["float"]),
        (INTEGERS["normal"], [4 * k for k in VALUES["int"]]),   # its blocks of four begin elsewhere
    ],
)
def test_no_graph_after_the_second_value_on_the_reference(function, values):
    with fastscore.use_backend("reference"):
        _count(function, values)


@pytest.mark.parametrize("name", BROKEN)
def test_no_graph_after_the_second_value_where_a_loss_breaks_its_graph(name):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    compiled, graphs = counted(BROKEN[name])

    counts = []
    for value in VALUES["float"]:
        torch.testing.assert_close(compiled(x, value), BROKEN[name](x, value), rtol=1e-5, atol=1e-5)
        counts.append(len(graphs))
    assert counts[1:] == counts[1:2] * (len(counts) - 1)


def test_gradients_follow_an_eps_that_changes():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradients(f, eps):
        return torch.autograd.grad(f(x, eps).square().sum(), [x, GAMMA])

    def f(x, eps):
        return fastscore.instance_norm_plus(x, GAMMA, GAMMA, GAMMA, eps=eps, activation="silu")

    compiled, graphs = counted(f)
    for eps in VALUES["float"]:
        for a, b in zip(gradients(compiled, eps), gradients(f, eps), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2


def _count(function, values):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    compiled, graphs = counted(function)

    counts = []
    for value in values:
        torch.testing.assert_close(compiled(x, value), function(x, value), rtol=1e-6, atol=1e-6)
        counts.append(len(graphs))
    assert counts[0] == 1 and counts[1:] == [2] * (len(values) - 1)


def test_gradients_through_the_second_value():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for function, values in (
        (FLOATS["both"], [0.1, 0.4, 0.3]),
        (INTEGERS["denoising_loss"], [0, 5, 9]),
    ):
        compiled, graphs = counted(function)
        for value in values:
            g, e = (
                torch.autograd.grad(f(x, value).square().sum(), x)[0] for f in (compiled, function)
            )
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)
        assert len(graphs) == 2


def test_a_loss_that_breaks_its_graph_keeps_the_parts():
    net, x = nn.Linear(3, 3), torch.randn(4, 3)
    compiled, graphs = counted(lambda x, k: losses.sliced(net, x, seed=1, first_sample=k))
    counts = []
    for k in (0, 3, 5, 64, 7):
        torch.testing.assert_close(compiled(x, k), losses.sliced(net, x, seed=1, first_sample=k))
        counts.append(len(graphs))
    assert counts[1:] == [2 * counts[0]] * 4


def test_a_sampler_in_one_graph():
    """Step sizes and steps change together, as in a run."""
    x = torch.randn(4, 3)
    compiled, graphs = counted(
        lambda x, size, k: fastscore.langevin_step(x, -x, size, seed=1, step=k, offset=k)
    )
    y = x
    for k, size in enumerate(torch.linspace(1.0, 0.1, 9).tolist()):
        x = compiled(x, size, k)
        y = fastscore.langevin_step(y, -y, size, seed=1, step=k, offset=k)
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 3


def test_a_wrong_number_is_refused_when_it_comes_late():
    x = torch.randn(4, 3)
    compiled, _ = counted(FLOATS["step_size"])
    for size in (0.1, 0.2, 0.3):
        compiled(x, size)
    with pytest.raises(ValueError, match="step_size must be finite and >= 0"):
        torch.compile(FLOATS["step_size"], backend="eager")(x, -0.1)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="step_size must be finite and >= 0"):
            compiled(x, wrong)


def test_inductor_takes_open_offsets():
    x = torch.randn(4, 3)
    compiled = torch.compile(INTEGERS["langevin_step"])
    for k in (0, 3, 5):
        torch.testing.assert_close(
            compiled(x, k), INTEGERS["langevin_step"](x, k), rtol=1e-6, atol=1e-6
        )
