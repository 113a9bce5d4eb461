"""Bayes' rule for scores."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastscore.compiling import eagerly
from fastscore.dual import transposed
from fastscore.dual.compiled import as_written
from fastscore.dual.saved import derived
from fastscore.losses.projections import check_score
from fastscore.messages import printed
from fastscore.ops import checks
from fastscore.ops.functions import outside_inference, released
from fastscore.scalars import function


def posterior(
    score: Callable[..., Tensor],
    log_likelihood: Callable[..., Tensor] | None = None,
    scale: float | Tensor = 1.0,
    *,
    likelihood_score: Callable[..., Tensor] | None = None,
) -> Callable[..., Tensor]:
    """The score of x given an observation y.

        ∇ log p(x | y) = ∇ log p(x) + scale · ∇ log p(y | x)

    At noise σ both terms are those of the noisy x: p(y | x_σ), not p(y | x₀).

    Args:
        score: called score(x, sigma), or score(x); a posterior score is one too, so that
            observations add up.
        log_likelihood: called with the same arguments, log p(y | x) of each sample alone, (B,);
            differentiated here.
        likelihood_score: ∇ₓ log p(y | x) itself, like x, in place of log_likelihood.
        scale: a float or (B,); 1 is Bayes' rule, more than 1 sharpens the likelihood to p(y |
            x)^scale.

    Returns:
        A function of the arguments of `score`, for any sampler. It works under no_grad and in
            inference mode, where the result holds no graph; where gradients are enabled the result
            is differentiable. It can be pickled where its parts can.

    Raises:
        ValueError: not exactly one of log_likelihood and likelihood_score is given; scale is not
            finite; when called: log_likelihood returns another shape or does not depend on x, score
            or likelihood_score returns another shape.

    Source: Song et al. 2021, section 5 (arXiv:2011.13456).

    A prior N(0, 1) and y = 1 with noise N(0, 1) have the posterior N(1/2, 1/2):

    >>> guided = posterior(lambda x: -x, likelihood_score=lambda x: 1 - x)
    >>> guided(torch.tensor([[0.5]])).item()
    0.0
    """
    if (log_likelihood is None) == (likelihood_score is None):
        raise ValueError("posterior: give exactly one of log_likelihood and likelihood_score.")
    function("posterior", "score", score)
    given = "log_likelihood" if likelihood_score is None else "likelihood_score"
    function("posterior", given, log_likelihood if likelihood_score is None else likelihood_score)
    check_scale("posterior", scale)
    if likelihood_score is None:
        likelihood_score = _Gradient(log_likelihood)
    return _Posterior(score, likelihood_score, scale)


@printed
@dataclass(eq=False)
class _Posterior:
    """An object and no closure, which could neither be pickled nor copied."""

    score: Callable
    likelihood_score: Callable
    scale: float | torch.Tensor

    @outside_inference
    def __call__(self, x, *arguments):
        g = self.likelihood_score(x, *arguments)
        checks.check_like("posterior", "the likelihood's score", g, x)
        return add("posterior", called("posterior", self.score, x, arguments), g, self.scale)


@printed
@dataclass(eq=False)
class _Gradient:
    """∇ₓ log p(y | x) as a function of (x, ...)."""

    log_likelihood: Callable

    @outside_inference
    def __call__(self, x, *arguments):
        return gradient("posterior", lambda x: self._value(x, arguments), x)[0]

    def _value(self, x, arguments):
        v = self.log_likelihood(x, *arguments)
        if not isinstance(v, torch.Tensor) or v.shape != x.shape[:1]:
            got = tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__
            raise ValueError(
                f"posterior: log_likelihood must return one value per sample, ({len(x)},); got "
                f"{got}."
            )
        return v, v


def gradient(op: str, f: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any]:
    """f(x) returns values (B,) and another tensor.

    This returns ∇ₓ of the values, and the other tensor.

    Samples never mix, so the gradient of the sum holds the gradient of each. Both results are
    differentiable where gradients are enabled.
    """
    if not checks.readable():   # inside a transform or torch.compile tensors have no graph to walk
        return torch.func.grad(lambda x: _summed(*f(x)), has_aux=True)(x)

    wanted = torch.is_grad_enabled()
    # a view, for detach() would drop a forward-mode tangent.
    leaf = x if wanted and x.requires_grad else x.view_as(x).requires_grad_()
    # Forward mode over reverse mode needs the formulas that a graph is made of: fused ones carry no
    # tangent.
    create_graph = wanted or forward_ad.unpack_dual(leaf).tangent is not None
    g, rest = (_uncompiled if create_graph else _gradient)(op, f, leaf, create_graph)
    return (g, rest) if wanted else (released(g), released(rest))


def _gradient(op, f, leaf, create_graph):
    if create_graph:
        transposed.see_functions()
    with torch.enable_grad():
        with derived() if create_graph else contextlib.nullcontext():
            values, rest = f(leaf)
        if not values.requires_grad:
            raise ValueError(
                f"{op}: log_likelihood must depend on x through differentiable operations."
            )
        g = torch.autograd.grad(
            values.sum(), leaf, create_graph=create_graph, materialize_grads=True
        )[0]

    return g, rest


# A compiled graph has one backward pass.
_uncompiled = eagerly("a gradient that is differentiated again runs eagerly")(as_written(_gradient))


def _summed(values, rest):
    return values.sum(), rest


def check_scale(op: str, scale: float | Tensor, name: str = "scale") -> None:
    """Finite; the shape of a tensor is checked with the first x."""
    probe = torch.zeros(
        scale.shape if isinstance(scale, torch.Tensor) and scale.dim() else (1,),
        device=getattr(scale, "device", None),
    )
    checks.coefficient(op, name, scale, probe)


def called(op: str, score: Callable[..., Tensor], x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """The prior's score; another shape would broadcast against the likelihood's."""
    s = score(x, *arguments)
    check_score(op, s, x)
    return s


def add(op: str, s: Tensor, g: Tensor, scale: float | Tensor, name: str = "scale") -> Tensor:
    """s + scale · g in the dtype of s."""
    scale = checks.expand(checks.coefficient(op, name, scale, s), s)
    return (s + scale * g).to(s.dtype)
