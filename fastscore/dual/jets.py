"""Second-order forward propagation.

a value with its first and second derivatives along M directions, carried through any function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastscore.dual import dispatch  # noqa: F401  what becomes of an operation
from fastscore.dual.call import NoRule, SecondCall
from fastscore.dual.number import Jet


def second_order(
    f: Callable[..., Any], x: Tensor, v: Tensor, straight: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """f of samples that do not mix, and its first and second derivatives along v, in one forward
    pass.

        f(x + t v_m) = f(x) + t f'_m + ½ t² f''_m + ...,    f'_m = v_mᵀ∇f,    f''_m = v_mᵀ∇²f v_m

    The 1 + 2M coefficients go through each linear layer or convolution as one batch, and through
    activations by Faà di Bruno's formula; until the first bend f'' = 0 and only 1 + M of them
    exist.

    Args:
        f: called f(x); (B,) or (B, 1). x: (B, *). v: (M, B, *).
        straight: begin without f''. A write right after a linear layer, into memory that other
            numbers share, then finds no room for it.

    Returns:
        f(x) (B,), f' and f'' (M, B), differentiable in x, v and the parameters of f. Gradients must
        be enabled.

    Raises:
        NoRule: f holds an operation that no rule covers, or one that mixes samples. What else f
            raises comes through.

    Source: Griewank & Walther 2008, chapter 13; Bettencourt, Johnson & Duvenaud 2019 (Taylor-mode
        automatic differentiation).

    >>> x, v = torch.tensor([[3.0]]), torch.ones(1, 1, 1)
    >>> value, first, second = second_order(lambda x: x.square().sum(1), x, v)
    >>> value.item(), first.item(), second.item()
    (9.0, 6.0, 2.0)
    """
    if (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or not x.numel()
    ):
        raise NoRule("second_order: transforms, forward mode and empty tensors take another way.")

    parts = [x[None], v] if straight else [x[None], v, torch.zeros_like(v)]
    with SecondCall():
        y = f(Jet(torch.cat(parts), len(v)))
        if not isinstance(y, Jet) or y.shape not in ((len(x),), (len(x), 1)):
            raise NoRule("second_order: f(x) is no function of x, or not one value per sample.")
        value, first, second = y.coefficients(y.stack)

    second = torch.zeros_like(first) if second is None else second
    return tuple(c.reshape(-1, len(x)) for c in (value, first, second))
