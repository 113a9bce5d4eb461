"""What every op checks once, at its public door."""

import math

import numpy as np
import torch
from torch import Tensor

from fastscore.messages import shown
from fastscore.scalars import integer as integer
from fastscore.scalars import number as number
from fastscore.scalars import plain_int as plain_int
from fastscore.scalars import real as real
from fastscore.scalars import whole as whole
from fastscore.tensors import check_as_real, check_tensor, dense, fake

_STRIDED = torch.strided
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(op: str, name: str, x: Tensor) -> None:
    if type(x) is torch.Tensor and x.dtype in FLOATS and x.layout is _STRIDED and not x.is_nested:
        return
    check_tensor(op, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16; got {x.dtype}."
        )


def stand_in(x: Tensor) -> Tensor:
    """A plain tensor of x's shape, dtype and device: of a dual number, where each look at one of
    them costs a call, its value."""
    # A method of this name is somebody else's.
    if hasattr(type(x), "stack") and isinstance(stack := x.stack, torch.Tensor):
        return stack.detach()[0]
    return x


def check_like(op: str, name: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """t must have the shape, dtype and device of x."""
    # a nested one has no shape
    plain = (
        type(t) is type(x) is torch.Tensor and t.dtype == x.dtype and t.dtype in FLOATS and dense(t)
    )
    if plain and t.shape == x.shape and t.device == x.device:
        return
    check_float(op, name, t)
    if t.shape != x.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {of}, {tuple(x.shape)}; got {tuple(t.shape)}."
        )
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {of}, {x.dtype}; got {t.dtype}.")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of {of}, {x.device}; got {t.device}.")
    check_as_real(op, name, t, x, of)


_LEAST_MAXIMUM = torch.finfo(torch.float32).max  # of the compute dtypes


def coefficient(
    op: str, name: str, value: float | Tensor, x: Tensor, *, minimum: float = -math.inf
) -> float | Tensor:
    """A float, or a tensor () or (B,) in the compute dtype on x's device.

    Values of tensors are checked on the CPU, but neither while compiling nor inside a functorch
    transform, where there are none to see.
    """
    if type(value) is float and abs(value) <= _LEAST_MAXIMUM and value >= minimum:
        return value
    bound = "" if minimum == -math.inf else f" and >= {minimum:g}"
    if not isinstance(value, torch.Tensor):
        try:
            # which float() would take, too
            value = float(None if isinstance(value, (str, bytes, bool)) else value)
        except OverflowError:  # an int beyond float64
            raise ValueError(f"{op}: {name} must be finite{bound}; got {shown(value)}.") from None
        except (TypeError, ValueError):
            raise TypeError(
                f"{op}: {name} must be a number or a tensor; got {type(value).__name__}."
            ) from None
        if not (abs(value) <= torch.finfo(compute_dtype(x.dtype)).max and value >= minimum):
            raise ValueError(f"{op}: {name} must be finite{bound}; got {value}.")
        return value
    check_float(op, name, value)
    batch = x.shape[0] if x.dim() else 1
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch):
        raise ValueError(
            f"{op}: {name} must be a number, 0-d or ({batch},); got shape {tuple(value.shape)}."
        )
    if value.device != x.device and (value.dim() > 0 or value.device.type == "meta"):
        raise ValueError(
            f"{op}: {name} must be on the device of x, {x.device}; got {value.device}."
        )
    check_as_real(op, name, value, x)
    if value.device.type == "cpu" and value.numel() and readable() and not fake(value):
        values = value.detach()
        low, high = torch.aminmax(values)
        low, high = low.item(), high.item()  # NaN comes through
        if not (minimum <= low > -math.inf and high < math.inf):
            raise ValueError(
                f"{op}: {name} must be finite{bound}; got {_first_wrong(values, minimum)}."
            )
    if type(value) is torch.Tensor and not torch.compiler.is_compiling() and value._is_zerotensor():
        value = value.clone()  # products of zeros without memory lose their dtype
    value = value.to(device=x.device, dtype=compute_dtype(x.dtype))
    return value.reshape(x.shape) if x.dim() == 0 else value  # one sample without a dimension


def values(
    op: str,
    name: str,
    value: float | Tensor | np.ndarray,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
) -> float | Tensor | np.ndarray:
    """A number, or a float tensor or array of them; those on the CPU are looked at."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        for end in (value.min(), value.max()) if value.size else ():  # NaN comes through
            number(op, name, float(end), least, most, above=above)
        return value
    if not isinstance(value, torch.Tensor):
        return number(op, name, value, least, most, above=above)
    check_float(op, name, value)
    if value.device.type == "cpu" and value.numel() and readable() and not fake(value):
        for end in torch.aminmax(value.detach()):  # NaN comes through
            number(op, name, end.item(), least, most, above=above)
    return value


def in_graph(c: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient as a compiled graph takes it: a number would be a constant of the graph, and
    every new one a recompilation."""
    return (
        c if isinstance(c, torch.Tensor) or not torch.compiler.is_compiling() else as_tensor(c, x)
    )


def as_tensor(c: float, x: Tensor) -> Tensor:
    """A number as a tensor in the compute dtype, made on x's device: a copy from the host would be
    waited for."""
    dtype = compute_dtype(x.dtype)
    # AOTAutograd keeps the number of a product open, but makes a constant of what torch.full takes
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=x.device) * c
    return torch.full((), c, dtype=dtype, device=x.device)


def _first_wrong(values, minimum):
    if values.numel() < 9:
        return values.tolist()
    wrong = ~(values.isfinite() & (values >= minimum))
    return f"{values[wrong][0].item():g} at {int(wrong.nonzero()[0])}"


def flag(op: str, name: str, value: bool) -> bool:
    """True or False; 0 and 1, or numpy's, are taken for them."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{op}: {name} must be True or False; got {shown(value)}.")


def readable() -> bool:
    """Whether tensors have values to look at: not while compiling or tracing, nor inside a
    functorch transform."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    return not torch._C._len_torch_dispatch_stack() or not _tracing()


def _tracing():
    kinds = torch._C._TorchDispatchModeKey
    return any(
        torch._C._get_dispatch_mode(kind) is not None
        for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL)
    )


def expand(c: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient () or (B,) or a float, shaped to multiply x."""
    return (
        c.reshape(c.shape + (1,) * (x.dim() - c.dim()))
        if isinstance(c, torch.Tensor) and c.dim()
        else c
    )


def per_sample_sum(t: Tensor) -> Tensor:
    """(B, *) -> (B,)."""
    return t.flatten(1).sum(1) if t.dim() > 1 else t.reshape(-1)


def sum_to(t: Tensor, c: Tensor) -> Tensor:
    """(B,) summed to the shape of coefficient c, () or (B,)."""
    return t.sum() if c.dim() == 0 else t


def batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap: t with its mapped dimension in front, or t expanded to one."""
    return t.movedim(dim, 0) if dim is not None else t.unsqueeze(0).expand(size, *t.shape)
