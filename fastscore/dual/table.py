"""The rules, by function, and what PyTorch's functions are to a number.

Metadata, constants, in-place operations.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastscore.dual.samples import guarded


def _getters(*names):
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


METADATA = _getters(
    "shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_sparse", "is_quantized", "is_meta",
    "is_nested", "is_cpu", "is_mps", "is_xpu", "itemsize", "nbytes", "grad", "output_nr",
    "_version", "_backward_hooks", "names", "is_sparse_csr", "is_mkldnn",
)
METADATA |= {
    getattr(torch.Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
        "is_floating_point", "is_complex", "element_size", "get_device", "__len__", "is_signed",
        "storage_offset", "is_conj", "is_neg", "is_inference",
    )
}
METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel}
GRAPH = _getters("requires_grad", "grad_fn", "is_leaf")
REQUIRES_GRAD: Any = torch.Tensor.requires_grad.__get__
# Where a shell tells that it is sparse.
_OF_DENSE = {
    torch.Tensor.layout.__get__: lambda x: torch.strided,
    torch.Tensor.is_sparse.__get__: lambda x: False,
    torch.Tensor.nbytes.__get__: lambda x: x.numel() * x.element_size(),
    torch.Tensor.is_contiguous: lambda x, **how: torch.empty_strided(
        x.shape, x.stride(), device="meta"
    ).is_contiguous(**how),
}


def metadata(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return _OF_DENSE.get(func, func)(*args, **kwargs)


BASE: Any = torch.Tensor._base.__get__
# Values without tangents: comparisons, integers, numbers, what stops a gradient.
VALUES = """
    eq ne lt le gt ge isnan isinf isfinite argmax argmin argsort sign sgn floor ceil round trunc
    detach item tolist numpy allclose equal isclose floor_divide __floordiv__ __rfloordiv__
    bincount nonzero any all logical_not signbit bool int long short searchsorted bucketize
    rand_like randn_like new_zeros new_ones new_empty new_full new_tensor is_same_size __eq__
    __ne__ __lt__ __le__ __gt__ __ge__ __bool__ __float__ __int__ __format__ __index__
    __contains__ __array__ result_type can_cast
""".split()
VALUES = {
    getattr(holder, name)
    for holder in (torch.Tensor, torch)
    for name in VALUES
    if hasattr(holder, name)
}
DATA: Any = torch.Tensor.data.__get__
VALUES.add(DATA)
OUT_OF_TORCH: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__}
# Without a derivative.
STEPS: set[Any] = {
    torch.floor_divide,
    torch.Tensor.floor_divide,
    torch.Tensor.__floordiv__,
    torch.Tensor.__rfloordiv__,
}
LIKE = {getattr(torch, name) for name in ("zeros_like", "ones_like", "empty_like", "full_like")}
# Random as values, and in place.
VALUES |= {getattr(torch, name) for name in ("bernoulli", "multinomial", "poisson")} | {
    torch.Tensor.bernoulli,
    torch.Tensor.multinomial,
}
FILLS = (
    "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "geometric_",
    "cauchy_",
)


def _places_of_inplace():
    """Where the functions of torch.nn.functional have their argument of that name."""
    found = {}
    for function in vars(torch.nn.functional).values():
        if isinstance(function, types.FunctionType):
            names = list(inspect.signature(function).parameters)
            found |= {function: names.index("inplace")} if "inplace" in names else {}
    return found


INPLACE_AT: Any = _places_of_inplace()
STORAGE = (
    "requires_grad_", "set_", "register_hook", "retain_grad", "as_strided", "untyped_storage",
    "data_ptr", "__deepcopy__", "__reduce_ex__", "resize_",
)
# What becomes of numbers with first derivatives, and of those with second ones, too.
RULES: dict[Any, Any] = {}
SECOND: dict[Any, Any] = {}
HOLDERS = (torch.Tensor, torch, F, torch._C._nn, torch.special)


def rule(*functions: Any, apart: Callable[..., bool] | None = None) -> Any:
    """Register a rule under functions, or under all functions of a name in torch, torch.Tensor and
    torch.nn.functional that have none.

    apart: whether the samples stay apart, as second derivatives ask, from the same arguments.
        Without it, the rule carries first ones alone.
    """

    def register(function):
        tables = [(RULES, function)]
        if apart is not None:
            tables.append((SECOND, guarded(function, apart)))

        for table, carrier in tables:
            for key in functions:
                if isinstance(key, str):
                    table |= dict.fromkeys(functions_named(key) - table.keys(), carrier)
                else:
                    table[key] = carrier
        return function

    return register


def functions_named(names: Any) -> Any:
    return {
        getattr(holder, name)
        for name in names.split()
        for holder in HOLDERS
        if hasattr(holder, name)
    }
