"""The normalisations' common door: values and tangents of statistics, affine map and activation in
one op.

instance_norm_plus and group_norm_modulate go through it; normalise_core.py has the reference and
the kernels, normalise_functions.py the derivatives.
"""

import torch
from torch import Tensor

from fastscore import backend as _backend
from fastscore.ops import checks
from fastscore.ops.activations import OF_NORMS
from fastscore.ops.normalise_core import Form as Form
from fastscore.ops.normalise_core import _columns as _columns
from fastscore.ops.normalise_core import _dense as _dense
from fastscore.ops.normalise_core import _dual_ref as _dual_ref
from fastscore.ops.normalise_core import _gradient_ref as _gradient_ref
from fastscore.ops.normalise_core import _in_layout_of as _in_layout_of
from fastscore.ops.normalise_core import in_clusters as in_clusters
from fastscore.ops.normalise_core import normalise_ref as normalise_ref
from fastscore.ops.normalise_core import pack as pack
from fastscore.ops.normalise_core import rows as rows
from fastscore.ops.normalise_core import run_backward as run_backward
from fastscore.ops.normalise_core import run_forward as run_forward
from fastscore.ops.normalise_core import run_stack_directly as run_stack_directly
from fastscore.ops.normalise_functions import _normalise


def normalise(
    x: Tensor, coef: Tensor, labels: Tensor | None, form: Form, backend: str | None
) -> Tensor:
    if torch.overrides.has_torch_function_unary(x):  # dual numbers and the like
        return torch.overrides.handle_torch_function(
            normalise, (x,), x, coef, labels, form, backend
        )
    chosen = _backend.choose(x.device, backend, cuda=in_clusters(x, form))
    if chosen == "reference":
        return normalise_ref(x, coef, labels, form)
    return _normalise(x, None, coef, None, labels, form, chosen, True)[0]


def normalise_dual(
    x: Tensor,
    t: Tensor,
    coef: Tensor,
    labels: Tensor | None,
    form: Form,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = _backend.choose(x.device, backend, cuda=False)
    if chosen == "reference":
        return normalise_ref(x, coef, labels, form), _dual_ref(x, t, coef, None, labels, form)
    return _normalise(x, t, coef, None, labels, form, chosen, True)[:2]


def check_image(op: str, x: Tensor) -> None:
    if x.dim() < 3 or x.shape[1] == 0:
        raise ValueError(
            f"{op}: x must be (B, C, *) with at least one channel and one spatial dimension; got "
            f"{tuple(x.shape)}."
        )


def check_tangents(op: str, t: Tensor, x: Tensor) -> None:
    checks.check_float(op, "t", t)
    if t.dim() != x.dim() + 1 or t.shape[1:] != x.shape:
        raise ValueError(
            f"{op}: t must be (M, {', '.join(map(str, x.shape))}); got {tuple(t.shape)}."
        )
    if t.dtype != x.dtype or t.device != x.device:
        raise ValueError(
            f"{op}: t must be {x.dtype} on {x.device} like x; got {t.dtype} on {t.device}."
        )
    checks.check_as_real(op, "t", t, x)


def _least_eps(dtype):
    """Below it a derivative of a constant channel overflows: that of (σ² + ε)^(-1/2) is of the size
    of ε^(-3/2)."""
    return torch.finfo(dtype).max ** (-2 / 3)


# within every compute dtype
_LEAST, _LARGEST = _least_eps(torch.float32), torch.finfo(torch.float32).max


def check_form(
    op: str,
    x: Tensor,
    groups: int,
    alpha: bool,
    beta: bool,
    eps: float,
    activation: str | None,
) -> Form:
    if not isinstance(activation, (str, type(None))) or activation not in OF_NORMS:
        named = ", ".join(repr(a) for a in OF_NORMS if a)
        raise ValueError(
            f"{op}: activation must be one of None, {named}; got {checks.shown(activation)}."
        )
    if type(eps) is float and _LEAST <= eps <= _LARGEST:
        return Form(groups, alpha, beta, eps, activation)
    eps = checks.number(op, "eps", eps, above=0)
    if eps < (least := _least_eps(checks.compute_dtype(x.dtype))):
        raise ValueError(
            f"{op}: eps must be at least {least:.3g}, or derivatives of constant channels "
            f"overflow; got {eps}."
        )
    return Form(groups, alpha, beta, float(eps), activation)
