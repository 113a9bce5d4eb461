"""A function that leaves the path of one call says so, once, and where."""

import warnings

import pytest
import torch

import fastscore
from fastscore import jvp


def test_a_fallback_is_named_with_its_line_once():
    def f(x):
        return torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0]

    x = torch.eye(3, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            jvp(f, x, x)
    found = [w for w in seen if w.category is fastscore.FallbackWarning]
    line = f.__code__.co_firstlineno + 1
    assert len(
        found
    ) == 1 and f"grad cannot be carried through with its tangents ({__file__}:{line})" in str(
        found[0].message
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=fastscore.FallbackWarning)
        with pytest.raises(fastscore.FallbackWarning, match="grad cannot be carried"):
            jvp(f, x, x)


def test_a_write_into_memory_that_has_another_alias_is_right_and_says_that_it_costs_more():
    def f(x):
        sums = torch.zeros_like(x.detach())
        view = sums.t()
        sums += x.sin()
        return view.t() * x

    x, v = (
        torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3),
        torch.ones(2, 3, dtype=torch.float64),
    )
    with pytest.warns(fastscore.FallbackWarning, match="an ordinary tensor that is held elsewhere"):
        y, t = jvp(f, x, v)
    torch.testing.assert_close(t, x.cos() * x + x.sin())


def test_what_is_carried_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jvp(
            torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.LayerNorm(4)),
            torch.ones(2, 3),
            torch.ones(2, 3),
        )
