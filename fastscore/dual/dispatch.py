"""What becomes of a torch function that meets numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.autograd_function import custom_function_call
from torch._ops import HigherOrderOperator

from fastscore.dual import transposed
from fastscore.dual.call import NoRule, switched_off
from fastscore.dual.generic import generic
from fastscore.dual.norms import REFUSED
from fastscore.dual.number import ComplexDual, Dual, Jet, NoDual
from fastscore.dual.rules import POINTWISE
from fastscore.dual.sharded import of_fsdp
from fastscore.dual.table import (
    BASE,
    DATA,
    GRAPH,
    INPLACE_AT,
    LIKE,
    OUT_OF_TORCH,
    REQUIRES_GRAD,
    STORAGE,
    VALUES,
)
from fastscore.dual.values import graph_of, new_place, on_constants, on_values, sets_attribute
from fastscore.dual.writes import in_place, in_place_of, into_out


def carried(
    cls: type, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # Or it is a Function's forward, and not even a sign is a constant.
    constant = not torch.is_grad_enabled() and switched_off()
    if func in VALUES and kwargs.get("out") is None:
        if func in OUT_OF_TORCH and not constant:
            raise RuntimeError(
                "fastscore.jvp: numpy cannot carry derivatives; "
                "use x.detach().numpy() for a constant."
            )
        if func == DATA:
            func = torch.Tensor.detach   # whose writes are seen
        return on_values(func, args, kwargs)
    if constant and not (isinstance(args[0] if args else None, Dual) and sets_attribute(func)):
        return on_constants(func, args, kwargs)

    if kwargs:
        if kwargs.get("out") is not None:
            return into_out(func, args, kwargs)
        if kwargs.get("inplace"):
            return in_place_of(args[0], func, *args[1:], **{**kwargs, "inplace": False})

    at = INPLACE_AT.get(func)
    if at is not None and len(args) > at and args[at]:
        return in_place_of(args[0], func, *args[1:at], False, *args[at + 1 :], **kwargs)

    rule = cls.rules.get(func)
    # A dimension counted from the end of a 0-d value would be that of the stack.
    if rule is not None and (
        func in POINTWISE or not (args and isinstance(args[0], Dual) and args[0].scalar())
    ):
        try:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        except NoDual:   # an argument that has no stack
            pass
        # a spelling that the rule does not know, as axis= or input=; its own errors come through.
        except TypeError as error:
            if not kwargs and error.__traceback__.tb_next is not None:
                raise

    result = _special(cls.order, func, args, kwargs)
    if result is not NotImplemented:
        return result
    if cls.order == 2:
        raise _refusal(2, _name(func))
    return generic(func, args, kwargs)


def _name(func):
    return getattr(func, "__name__", str(func))


def _refusal(order, name):
    if order == 2:
        return NoRule(
            f"second_order: no rule carries {name} with its derivatives, sample by sample."
        )
    return NoRule(f"fastscore.jvp: {name} cannot be carried through with its tangents.")


def _special(order, func, args, kwargs):
    """In-place operations, the constructors that follow a tensor, gradients asked for inside f."""
    name = getattr(func, "__name__", "")
    if func in LIKE:
        return new_place(func, args, kwargs)
    if func in GRAPH:
        # Second derivatives are those of a variable.
        return True if order == 2 and func == REQUIRES_GRAD else graph_of(func, args[0])
    if func == BASE:
        return None  # the stack may be a view, but never one that f has made
    if name == "register_hook" and of_fsdp(args[1]):
        return func(args[0].stack, args[1])
    if name in STORAGE or sets_attribute(func):
        raise _refusal(order, name)

    result = NotImplemented if order == 2 else _of_first_order(func, name, args, kwargs)
    return in_place(func, name, args, kwargs) if result is NotImplemented else result


def _of_first_order(func, name, args, kwargs):
    if func is custom_function_call:  # Function.apply inside a transform
        raise NoRule(
            f"fastscore.jvp: the autograd.Function {args[0].__name__} cannot be carried inside a "
            "transform of torch.func."
        )
    if isinstance(func, HigherOrderOperator):
        return _higher_order(func, name, args)
    if name in ("view", "view_copy") and any(
        isinstance(a, torch.dtype) for a in (*args, *kwargs.values())
    ):
        # Other bits of the same memory: a constant to autograd.
        return on_values(func, args, kwargs)
    if type(func).__name__ in ("OpOverload", "OpOverloadPacket", "ScriptFunction", "ScriptMethod"):
        return _unnamed(func, name, args, kwargs)
    if func in REFUSED or func in (
        torch.autograd.grad,
        torch.autograd.backward,
        torch.Tensor.backward,
    ):
        raise _refusal(1, name)
    return NotImplemented


def _higher_order(func, name, args):
    """Operators that take functions: control flow runs as Python's does."""
    if name == "cond":
        holds, if_true, if_false, operands = args
        return (if_true if holds else if_false)(*operands)

    if name == "while_loop":
        holds, body, state, rest = args
        while holds(*state, *rest):
            state = body(*state, *rest)
        return tuple(state)

    raise NotImplementedError(
        f"fastscore.jvp: {name}, an operator that takes functions, cannot be carried through with "
        "its tangents; write what it does in ordinary operations, or as a loop."
    )


def _unnamed(func, name, args, kwargs):
    """Operators called by way of torch.ops, and TorchScript."""
    overloads = []
    if hasattr(func, "_schema"):
        overloads = [func]
    elif hasattr(func, "overloads"):
        overloads = [getattr(func, n) for n in func.overloads()]

    if any(overload._schema.is_mutable for overload in overloads) and (
        name.endswith("_") or "out" in kwargs or len(overloads) == 1
    ):
        raise NoRule(
            f"fastscore.jvp: {name} writes into its arguments and cannot be carried through with "
            "its tangents."
        )
    return transposed.transposed(str(name or func), func, args, kwargs)


def carried_complex(
    cls: type, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # z / |z|, no constant.
    if func in (torch.sgn, torch.Tensor.sgn) and kwargs.get("out") is None:
        if torch.is_grad_enabled() or not switched_off():
            return generic(func, args, kwargs)
    return carried(cls, func, args, kwargs)


def carried_second(
    cls: type, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Without what first derivatives alone are carried through."""
    if func not in GRAPH and func != BASE:
        # Without gradients we may stand inside an autograd.Function, whose result would look like a
        # constant.
        if not torch.is_grad_enabled() or kwargs.get("out") is not None:
            raise NoRule(f"second_order: {_name(func)} without gradients, or with out=.")
        # What a variable refuses, or whose writes nobody sees.
        if func in OUT_OF_TORCH or func == DATA:
            raise _refusal(2, _name(func))
    return carried(cls, func, args, kwargs)


Dual.carried = classmethod(carried)
Jet.carried = classmethod(carried_second)
ComplexDual.carried = classmethod(carried_complex)
