"""Energies that are layers and activations in a row.

Score and gradients by hand, against autograd's.
"""

import pytest
import torch
from torch import nn

from fastscore import losses
from fastscore.models import EnergyScore, energy_chain

D = torch.float64


class Energy(nn.Module):
    def __init__(self, activation, end, dtype=D):
        super().__init__()
        layers = (
            nn.Linear(3, 5),
            activation(),
            nn.Linear(5, 4, bias=False),
            activation(),
            nn.Linear(4, 1),
        )
        self.net, self.end, self.calls = nn.Sequential(*layers).to(dtype), end, 0

    def forward(self, x, *arguments):
        self.calls += 1
        return self.end(self.net(x))


def plain(f, x):
    (s,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return s


@pytest.fixture
def by_hand(monkeypatch):
    """How often the score was made by hand."""
    made, real = [], energy_chain.score

    def score(*arguments):
        result = real(*arguments)
        made.append(1)
        return result

    monkeypatch.setattr(energy_chain, "score", score)
    return made


ENDS = {
    "column": lambda y: y[:, 0],
    "squeeze": lambda y: y.squeeze(-1),
    "view": lambda y: y.view(-1),
    "flatten": lambda y: y.flatten(),
    "kept": lambda y: y,
}


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.Softplus, nn.Tanh, nn.ELU, nn.Sigmoid])
@pytest.mark.parametrize("end", ENDS)
def test_score_and_gradients_of_two_orders(by_hand, activation, end):
    torch.manual_seed(0)
    f, x = Energy(activation, ENDS[end]), torch.randn(6, 3, dtype=D, requires_grad=True)
    inputs, u = [x, *(p for p in f.parameters())], torch.randn(6, 3, dtype=D)
    s, expected = EnergyScore(f)(x), plain(f, x)
    assert by_hand and torch.allclose(s, expected, rtol=1e-12)
    for result, truth in ((s, expected), (s.sin() * x, expected.sin() * x)):
        first = torch.autograd.grad(result, inputs, u, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(truth, inputs, u, create_graph=True, allow_unused=True)
        for a, b in zip(first, second, strict=True):
            assert (a is None) == (b is None) and (
                a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)
            )
        again = [
            torch.autograd.grad(
                sum(g.square().sum() for g in gs if g is not None),
                inputs,
                retain_graph=True,
                allow_unused=True,
            )
            for gs in (first, second)
        ]
        for a, b in zip(*again, strict=True):
            assert (a is None) == (b is None) and (
                a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-11)
            )
    s = EnergyScore(f)(x.detach())   # no cotangent of x; without create_graph
    gradients = torch.autograd.grad(s, inputs[1:], u, allow_unused=True)
    for a, b in zip(
        gradients, torch.autograd.grad(expected, inputs[1:], u, allow_unused=True), strict=True
    ):
        assert (a is None) == (b is None) and (
            a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_layers_get_no_gradient(frozen):
    torch.manual_seed(0)
    f, x = Energy(nn.SiLU, ENDS["column"]), torch.randn(6, 3, dtype=D)
    list(f.net)[2 * frozen].requires_grad_(False)
    trained = [p for p in f.parameters() if p.requires_grad]
    s, leaf = EnergyScore(f)(x), x.clone().requires_grad_()
    for a, b in zip(
        torch.autograd.grad(s.square().sum(), trained, allow_unused=True),
        torch.autograd.grad(plain(f, leaf).square().sum(), trained, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-10))


class Skip(Energy):
    def forward(self, x):
        self.calls += 1
        h = self.net[1](self.net[0](x))
        return (self.net(x) + h.sum(1, keepdim=True)).squeeze(1)


class Detached(Energy):
    def forward(self, x):
        self.calls += 1
        return self.net(x)[:, 0] * self.net(x.detach())[:, 0]


class Quadratic(Energy):
    def forward(self, x):
        self.calls += 1
        return self.net(x)[:, 0] - x.square().sum(1)


@pytest.mark.parametrize("kind", [Skip, Detached, Quadratic])
def test_what_is_no_chain_is_left_to_autograd_and_remembers_one_call(kind):
    torch.manual_seed(0)
    f, x = kind(nn.SiLU, ENDS["column"]), torch.randn(6, 3, dtype=D)
    score = EnergyScore(f)
    assert torch.allclose(score(x), plain(f, x.clone().requires_grad_()), rtol=1e-12)
    # What f remembers of the attempt is forgotten; the other call is that of `plain`
    assert f.calls == 2
    score(x)
    assert f.calls == 3 and score._chain is False


def test_a_module_with_hooks_or_parts_of_another_kind_is_left_to_autograd(by_hand):
    f, x, seen = Energy(nn.SiLU, ENDS["column"]), torch.randn(6, 3, dtype=D), []
    f.net[0].register_forward_hook(lambda module, given, result: seen.append(type(result)))
    EnergyScore(f)(x)
    dropped = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).to(D)
    EnergyScore(dropped)(x)
    assert seen == [torch.Tensor] and not by_hand


@pytest.mark.parametrize(
    "other",
    [nn.Softplus(beta=2), nn.ELU(alpha=0.5), nn.GELU(approximate="tanh"), nn.SiLU(inplace=True)],
)
def test_an_activation_of_another_parameter(other):
    torch.manual_seed(0)
    f, x = nn.Sequential(nn.Linear(3, 4), other, nn.Linear(4, 1)).to(D), torch.randn(6, 3, dtype=D)
    assert torch.allclose(EnergyScore(f)(x), plain(f, x.clone().requires_grad_()), rtol=1e-12)


def test_a_parameter_that_changed_before_the_backward_pass_is_noticed():
    f, x = Energy(nn.SiLU, ENDS["column"]), torch.randn(6, 3, dtype=D)
    s = EnergyScore(f)(x)
    with torch.no_grad():
        f.net[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s.sum().backward()


def test_denoising_loss_and_its_gradient(by_hand):
    torch.manual_seed(0)
    f, x = Energy(nn.SiLU, ENDS["column"]), torch.randn(6, 3, dtype=D)
    parameters = list(f.net.parameters())[:-1]

    def score(x, sigma):
        return plain(f, x.clone().requires_grad_())

    found, expected = (
        torch.autograd.grad(losses.denoising(s, x, 0.3, seed=1).mean(), parameters)
        for s in (EnergyScore(f), score)
    )
    assert by_hand and all(
        torch.allclose(a, b, rtol=1e-10) for a, b in zip(found, expected, strict=True)
    )


def sequence(*activations, bias=True):
    torch.manual_seed(0)
    layers = [
        nn.Linear(3, 5),
        activations[0],
        nn.Linear(5, 4, bias=bias),
        *activations[1:],
        nn.Linear(4, 1),
    ]
    return nn.Sequential(*layers).to(D)


@pytest.mark.parametrize(
    "activations",
    [
        (nn.SiLU(), nn.Tanh()),
        (nn.GELU(), nn.Softplus()),
        (nn.Sigmoid(), nn.SiLU(), nn.Tanh()),
        (nn.SiLU(),),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_sequence_is_read_from_its_modules(by_hand, activations, bias):
    f, x = sequence(*activations, bias=bias), torch.randn(6, 3, dtype=D, requires_grad=True)
    assert energy_chain.sequence(f) is not None
    inputs = [x, *f.parameters()]
    s, expected = EnergyScore(f)(x), plain(f, x)
    assert not by_hand and torch.allclose(s, expected, rtol=1e-12)   # not even called
    for result, truth in ((s, expected), (s.sin() * x, expected.sin() * x)):
        found, right = (
            torch.autograd.grad(t.square().sum(), inputs, retain_graph=True, allow_unused=True)
            for t in (result, truth)
        )
        for a, b in zip(found, right, strict=True):
            assert (a is None) == (b is None) and (
                a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)
            )


def test_a_frozen_sequence_has_a_score_and_one_in_another_dtype_fails_as_ever():
    f, x = sequence(nn.SiLU(), nn.Tanh()), torch.randn(6, 3, dtype=D)
    expected = plain(f, x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="dtype"):
        EnergyScore(f)(x.float())
    f.requires_grad_(False)
    s = EnergyScore(f)(x)
    assert torch.allclose(s, expected, rtol=1e-12) and not s.requires_grad


LISTENERS = {
    "hook": lambda f, seen: f[2].register_forward_hook(
        lambda m, given, result: seen.append(result.shape)
    ),
    "hook of the whole": lambda f, seen: f.register_forward_pre_hook(
        lambda m, given: seen.append(given[0].shape)
    ),
    "another forward": lambda f, seen: vars(f[2]).update(
        forward=lambda h: seen.append(h.shape) or nn.Linear.forward(f[2], h)
    ),
    "hook of all": lambda f, seen: nn.modules.module.register_module_forward_pre_hook(
        lambda m, given: seen.append(m)
    ),
    "compiled": lambda f, seen: f.compile(backend=lambda graph, given: seen.append(graph) or graph),
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_a_sequence_on_which_somebody_listens_is_called(listener):
    f, x, seen = sequence(nn.SiLU(), nn.Tanh()), torch.randn(6, 3, dtype=D), []
    expected = plain(f, x.clone().requires_grad_())
    handle = LISTENERS[listener](f, seen)
    try:
        assert energy_chain.sequence(f) is None
        assert torch.allclose(EnergyScore(f)(x), expected, rtol=1e-12)
        assert seen or listener == "compiled"   # which runs as it was written
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


def test_a_backward_pass_inside_autocast_is_that_outside():
    f = nn.Sequential(nn.Linear(3, 7), nn.SiLU(), nn.Linear(7, 1))
    x = torch.randn(16, 3)
    loss, inputs = EnergyScore(f)(x).square().sum(), list(f.parameters())[:3]
    wanted = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
