"""What a linear operator A of an observation y = A x + noise must do.

Forward, adjoint, and (a I + b A Aᵀ)⁻¹.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastscore import random
from fastscore.guidance.conjugate import conjugate_gradient
from fastscore.messages import printed
from fastscore.scalars import function

_CHECKS = 1027  # the stream of the vectors that check an operator


@printed
class LinearOperator:
    """What `linear_inverse` asks of an operator; any object with these methods will do.

    forward(x): A x of x (B, *) -> y (B, *).
    adjoint(y): Aᵀ y, with ⟨A x, y⟩ = ⟨x, Aᵀ y⟩ for each sample.
    solve(r, a, b): (a I + b A Aᵀ)⁻¹ r of r like y, with a, b >= 0 shaped to multiply r; conjugate
        gradients unless a class knows better. Where a = 0 and A Aᵀ is singular, the solution of
        least norm.

    observed(y): y without what A cannot have made of any x, such as the values of hidden pixels; y
    unless a class knows better.

    A class of one's own inherits solve, and first @ second, the operator that applies second, then
    first.
    """

    if TYPE_CHECKING:   # a class without them is refused where it is used

        def forward(self, x: Tensor) -> Tensor: ...

        def adjoint(self, y: Tensor) -> Tensor: ...

    def solve(self, r: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        return conjugate_gradient(lambda v: a * v + b * self.forward(self.adjoint(v)), r)

    def observed(self, y: Tensor) -> Tensor:
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def __matmul__(self, other: "LinearOperator") -> "LinearOperator":
        return Composition(self, other)


class Composition(LinearOperator):
    """A x = first(second(x)); solved by conjugate gradients."""

    first: LinearOperator
    second: LinearOperator

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        self.first = check_operator("Composition", first)
        self.second = check_operator("Composition", second)

    def forward(self, x: Tensor) -> Tensor:
        return self.first.forward(self.second.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.second.adjoint(self.first.adjoint(y))

    def observed(self, y: Tensor) -> Tensor:
        return range_of(self.first, y)


class _Function(LinearOperator):
    def __init__(self, forward, adjoint, shape):
        self._forward = forward
        self._adjoint = adjoint
        self.shape = shape

    def forward(self, x):
        return self._forward(x)

    def adjoint(self, y):
        if self._adjoint is not None:
            return self._adjoint(y)
        return torch.func.vjp(
            self._forward, torch.zeros(len(y), *self.shape, dtype=y.dtype, device=y.device)
        )[1](y)[0]


def from_function(
    forward: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    adjoint: Callable[[Tensor], Tensor] | None = None,
    *,
    device: torch.device | str | None = None,
) -> LinearOperator:
    """An operator from a linear function, checked on random vectors.

    Args:
        forward: x (B, *shape) -> y (B, *), linear in each sample. shape: of a sample.
        adjoint: y -> x; by reverse mode through `forward` unless given.
        device: where forward computes.

    Raises:
        ValueError: forward is not linear, cannot be differentiated while no adjoint is given, or
            the adjoint is not its adjoint.

    >>> from_function(lambda x: x.cumsum(1), (3,)).adjoint(torch.tensor([[1.0, 0.0, 1.0]]))
    tensor([[2., 1., 1.]])
    """
    op = "from_function"
    function(op, "forward", forward)
    if adjoint is not None:
        function(op, "adjoint", adjoint)

    operator = _Function(forward, adjoint, random.sizes(op, shape))
    key = {"seed": 0, "stream": _CHECKS, "device": device}
    x, z = (random.draw(op, random.NORMAL, (1, *operator.shape), step=i, **key) for i in range(2))
    both = forward(2 * x - 3 * z)
    apart = 2 * forward(x) - 3 * forward(z)
    if not float((both - apart).abs().max()) <= 1e-4 * float(apart.abs().max() + both.abs().max()):
        raise ValueError(
            "from_function: forward must be linear; f(2x - 3z) is not 2 f(x) - 3 f(z)."
        )

    try:
        gap = adjoint_gap(operator, operator.shape, device=device)
    except RuntimeError:
        if adjoint is not None:
            raise
        gap = math.inf
    if not gap <= 1e-4:
        found = (
            "adjoint is not the adjoint of forward"
            if adjoint
            else "forward cannot be differentiated by PyTorch, so give its adjoint"
        )
        raise ValueError(f"from_function: {found}: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩ does not hold.")

    return operator


def adjoint_gap(
    operator: LinearOperator,
    shape: Sequence[int],
    *,
    seed: int | Tensor | None = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> float:
    """|⟨A x, y⟩ - ⟨x, Aᵀ y⟩| / (‖A x‖ ‖y‖) for random x of `shape` and y.

    A few times the rounding unit if `adjoint` is the adjoint.

    >>> adjoint_gap(from_function(lambda x: x.flip(1), (8,)), (8,), dtype=torch.float64) < 1e-15
    True
    """
    check_operator("adjoint_gap", operator)
    shape = random.sizes("adjoint_gap", shape)
    seed = random.draw_seed() if seed is None else seed   # one for x and y
    key = {"seed": seed, "stream": _CHECKS, "dtype": dtype, "device": device}
    x = random.draw("adjoint_gap", random.NORMAL, (1, *shape), step=2, **key)
    ax = operator.forward(x)
    y = random.draw("adjoint_gap", random.NORMAL, ax.shape, step=3, **key)
    left = (ax * y).sum()
    right = (x * operator.adjoint(y)).sum()
    return float(
        (left - right).abs() / (ax.norm() * y.norm()).clamp(min=torch.finfo(ax.dtype).tiny)
    )


def solve(operator: LinearOperator, r: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """(a I + b A Aᵀ)⁻¹ r, by the operator's own way where it has one."""
    return (
        operator.solve(r, a, b)
        if hasattr(operator, "solve")
        else LinearOperator.solve(operator, r, a, b)
    )


def range_of(operator: LinearOperator, y: Tensor) -> Tensor:
    """y without what the operator knows to be foreign to it."""
    return operator.observed(y) if hasattr(operator, "observed") else y


def check_adjoint(op: str, operator: LinearOperator, x: Tensor) -> None:
    """Refuse an operator on samples like x whose adjoint is none.

    Of a wrong one, or of something that is not linear.
    """
    tolerance = max(1e-3, 8 * torch.finfo(x.dtype).eps)
    with torch.no_grad():
        gap = adjoint_gap(operator, x.shape[1:], dtype=x.dtype, device=x.device)
    if not gap <= tolerance:
        raise ValueError(
            f"{op}: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩ does not hold for this operator: adjoint is wrong or "
            "forward is not linear."
        )


def pseudo_inverse(eigenvalues: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """1 / (a + b λ), and 0 where noise-free data carry nothing: a = 0 and λ is rounding."""
    total = a + b * eigenvalues
    return torch.where(total > 1e-10 * b * eigenvalues.max(), 1 / total, 0)


def check_operator(op: str, operator: LinearOperator) -> LinearOperator:
    """Something with forward and adjoint."""
    for name, remedy in (
        ("forward", ""),
        ("adjoint", "; guidance.from_function makes one of a differentiable function"),
    ):
        if not callable(getattr(operator, name, None)):
            raise ValueError(
                f"{op}: the operator must have a method {name}{remedy}; {type(operator).__name__} "
                "has none."
            )
    return operator
