"""Which tensors every back end can read.

Those whose elements lie in memory where their strides say.
"""

import functools
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin

from fastscore.messages import shown

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
# Subclasses that stand for a plain tensor: those of torch.compile and torch.export, of collectives
# under way, and dual numbers.
_KNOWN = ("torch._subclasses.", "torch.distributed._functional_collectives", "fastscore.")


def check_tensor(op: str, name: str, t: torch.Tensor) -> None:
    """t must be an ordinary tensor, of any dtype.

    Raises:
        TypeError: t is no tensor, has another layout than torch.strided (nested, sparse, MKL-DNN),
            or is a subclass with a dispatch of its own.
    """
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(t).__name__}.")

    kind = type(t)
    if kind in _PLAIN and dense(t):
        return
    if kind not in _PLAIN and kind.__module__.startswith(_KNOWN):
        return _check_mode(op, name, t)
    if t.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor; got a nested one (torch.nested.to_padded_tensor "
            "pads it)."
        )
    if t.layout is not torch.strided:
        raise TypeError(
            f"{op}: {name} must be a dense tensor; got layout {t.layout} (.to_dense() converts it)."
        )

    if kind not in _PLAIN:
        _check_subclass(op, name, t)


def dense(t: torch.Tensor) -> bool:
    """Whether the elements of a tensor that is no subclass lie where its strides say."""
    return t.layout is _STRIDED and not t.is_nested


def _check_subclass(op, name, t):
    kind = type(t)
    if isinstance(t, UninitializedTensorMixin):
        raise TypeError(
            f"{op}: {name} must have a shape; got an {kind.__name__} (run its lazy module once)."
        )
    if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(
            f"{op}: {name} must be an ordinary tensor; got a {kind.__name__}, which holds its "
            "values elsewhere "
            "(hand over the tensor inside it; of a DTensor, to_local() or full_tensor())."
        )


def fake(t: torch.Tensor) -> bool:
    """Whether t is a FakeTensor, which has a shape and no values."""
    return type(t) not in _PLAIN and type(_inside(t)).__name__ == "FakeTensor"


def _inside(t):
    """What dual numbers are made of, where that may be fake; another tensor itself."""
    return t.stack if hasattr(type(t), "stack") and torch._C._len_torch_dispatch_stack() else t


def _check_mode(op, name, t):
    if (
        fake(t)
        and not _inside(t).fake_mode.allow_non_fake_inputs
        and not torch.compiler.is_compiling()
    ):
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            raise TypeError(f"{op}: {name} is a FakeTensor; call {op} inside its FakeTensorMode.")


def check_as_real(op: str, name: str, t: torch.Tensor, x: torch.Tensor, of: str = "x") -> None:
    """t and x must both have values, or both be fakes of torch.compile, torch.export or
    FakeTensorMode."""
    if type(t) is not type(x) and fake(t) != fake(x):
        mode = _inside(t if fake(t) else x).fake_mode
        if not mode.allow_non_fake_inputs:
            kinds = ("a FakeTensor", "a tensor with values")
            is_fake, of_fake = kinds if fake(t) else kinds[::-1]
            raise TypeError(
                f"{op}: {name} is {is_fake} and {of} {of_fake}; convert both with "
                "FakeTensorMode.from_tensor, or neither."
            )


def check_device(op: str, device: torch.device | str | int | None) -> torch.device:
    """The device that is named, as a torch.device with tensors on it; the default one for None."""
    if device is None:
        return torch.empty(0).device
    named = device if isinstance(device, torch.device) else _named(op, device)
    if named.type == "cuda" and named.index is None and torch.cuda.is_available():
        named = torch.device("cuda", torch.cuda.current_device())
    if not torch.compiler.is_compiling() and not _usable(named):
        raise ValueError(f"{op}: device must be one that PyTorch finds here; got {str(named)!r}.")
    return named


def _named(op, device):
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        raise ValueError(
            f"{op}: device must name a device, such as 'cpu' or 'cuda:0'; got {shown(device)}."
        ) from None


@functools.cache
def _usable(device):
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def home() -> torch.device:
    """Where a tensor with values is made: the default device, or the CPU where that is meta."""
    default = torch.empty(0).device
    return torch.device("cpu") if default.type == "meta" else default


def numbers(op: str, name: str, value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`valued` of real numbers, as floats: in dtype, or in their own or the default one."""
    try:
        found = valued(op, name, value)
        strange = found.dtype == torch.bool or found.is_complex()
    except (TypeError, RuntimeError, OverflowError):
        strange = True
    except ValueError:
        if isinstance(value, torch.Tensor):   # of the meta device
            raise
        strange = True
    if strange or isinstance(value, str | bytes):
        raise TypeError(f"{op}: {name} must be real numbers; got {shown(value)}.")
    if dtype is None and found.is_floating_point():
        return found

    return torch.as_tensor(value, dtype=dtype or torch.get_default_dtype(), device=found.device)


def valued(op: str, name: str, value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor where it is, numbers at `home`.

    torch.as_tensor would take both to the default device, meta or another.

    Raises:
        ValueError: a tensor of the meta device, which has no values.
    """
    if not isinstance(value, torch.Tensor):
        try:
            return torch.as_tensor(value, dtype=dtype, device=home())
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(
                f"{op}: {name} must be a tensor, or numbers for one; got {shown(value)}."
            ) from None

    check_tensor(op, name, value)
    if value.is_meta:
        raise ValueError(f"{op}: {name} must have values; it is on the meta device.")

    return value if dtype is None else value.to(dtype)
