"""In-place operations, out= and indexed writing, into dual numbers and into ordinary tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from fastscore.backend import linearized
from fastscore.dual import carriers, samples
from fastscore.dual.call import NoRule, running, settle
from fastscore.dual.number import ComplexDual, Dual, like
from fastscore.dual.stacks import aligned, memory, padded, separated
from fastscore.dual.table import FILLS
from fastscore.dual.values import on_values


def in_place(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if func == torch.Tensor.__setitem__:
        return set_item(*args)

    if name.startswith("__i") and name.endswith("__"):
        plain = getattr(torch.Tensor, f"__{name[3:-2]}__", None)
    elif name.endswith("_") and not name.endswith("__"):
        plain = getattr(torch.Tensor, name[:-1], None) or getattr(
            torch.nn.functional, name[:-1], None
        )
    else:
        return NotImplemented
    if name in FILLS and isinstance(args[0], Dual):
        return (
            set_item(
                args[0], ..., func(torch.empty_like(args[0].stack[0].detach()), *args[1:], **kwargs)
            )
            or args[0]
        )

    copied = name in ("zero_", "fill_", "copy_")
    if (plain is None and not copied) or not args or not isinstance(args[0], Dual):
        return _into_ordinary(func, plain, name, args, kwargs)
    if copied:
        return set_item(args[0], ..., _source(name, args, kwargs)) or args[0]

    return in_place_of(args[0], plain, *args[1:], **kwargs)


def _source(name, args, kwargs):
    """What zero_, fill_ or copy_ writes."""
    if name == "zero_":
        return 0
    return args[1] if len(args) > 1 else kwargs["value" if name == "fill_" else "other"]


def _into_ordinary(func, plain, name, args, kwargs):
    """An in-place operation on an ordinary tensor, which becomes dual numbers."""
    target = args[0] if args else None
    copied = name in ("copy_", "fill_")
    if (
        (plain is None and not copied)
        or not isinstance(target, torch.Tensor)
        or not _all_first_order((args, kwargs))
    ):
        raise NoRule(f"fastscore.jvp: {name} would write dual numbers into an ordinary tensor.")

    settle()
    inexact = target.is_floating_point() or target.is_complex()
    # What is drawn is a value alone, and integers have no tangents.
    if name in FILLS or name == "resize_as_" or not inexact:
        return on_values(func, args, kwargs)

    carriers.check(name, target)
    if copied:
        return _overwrite(
            target,
            Dual(carriers.aligned_copy(_source(name, args, kwargs).stack, target.shape)),
            name,
        )

    result = plain(*args, **kwargs)
    if not isinstance(result, Dual):
        return on_values(func, args, kwargs)
    if not torch.can_cast(result.dtype, target.dtype):
        raise NoRule(f"fastscore.jvp: {name} would write {result.dtype} into {target.dtype}.")

    return _overwrite(target, result, name)


def _all_first_order(tree):
    return all(type(a) in (Dual, ComplexDual) for a in tree_flatten(tree)[0] if isinstance(a, Dual))


def _overwrite(target, result, name):
    """Make an ordinary tensor hold dual numbers, which nobody else holds."""
    if result.shape != target.shape:
        raise NoRule(f"fastscore.jvp: {name} would change the shape of an ordinary tensor.")
    if not carriers.fill(target, _own(result)):
        carriers.carry(target, len(result.stack), name)
        write(target, result)
    return target


def into_out(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The results of an operation, written into the tensors given as out=."""
    name = getattr(func, "__name__", str(func))
    out = kwargs["out"]
    if not _all_first_order((args, kwargs)):
        raise NoRule(
            f"fastscore.jvp: {name} with out= cannot be carried through with its tangents."
        )

    for o in [out] if isinstance(out, torch.Tensor) else out:
        if not isinstance(o, Dual) and (o.is_floating_point() or o.is_complex()):
            carriers.check(name, o)

    results = func(*args, **{key: a for key, a in kwargs.items() if key != "out"})
    if isinstance(out, torch.Tensor):
        return _written(out, results, name)

    return type(results)([_written(o, r, name) for o, r in zip(out, results, strict=True)])


def _written(out, result, name):
    if not torch.can_cast(result.dtype, out.dtype):
        raise NoRule(f"fastscore.jvp: {name} would write {result.dtype} into {out.dtype}.")
    if isinstance(out, Dual):
        return write(out, result)

    settle()
    if not isinstance(result, Dual):
        return (
            out.copy_(result)
            if out.shape == result.shape
            else out.resize_(result.shape).copy_(result)
        )
    if not (out.is_floating_point() or out.is_complex()):
        raise NoRule(f"fastscore.jvp: {name} would write dual numbers into {out.dtype}.")

    fresh = Dual(result.stack.clone())
    if out.shape != result.shape and not out.numel():
        return carriers.replace(out, fresh.stack, name)

    return _overwrite(out, fresh, name)


def copy_of(x: Any) -> Any:
    return like(x, x.stack.clone()) if isinstance(x, Dual) else x


def _check_alias(target):
    if linearized():
        raise NotImplementedError(
            "fastscore.jvp: torch.func.linearize loses in-place operations inside f; "
            "take torch.func.jvp."
        )
    call = running()
    if call and call.copied:
        own = memory(target.stack)
        if any(reference() is own for reference in call.copied):
            raise NoRule(
                "fastscore.jvp: an in-place operation on what has a view that had to be a copy."
            )


def write(target: Any, result: Any) -> Any:
    """In place on the memory of the stack, so that views of it see the change.

    `result` was made from a copy, which autograd may keep.
    """
    if not isinstance(target, Dual) or result.shape != target.shape:
        raise NoRule(
            "fastscore.jvp: an in-place operation would change a shape or write into an ordinary "
            "tensor."
        )

    _check_alias(target)
    settle()
    if not isinstance(result, Dual):   # sign_, floor_: no function of the tangents
        return set_item(target, ..., result) or target

    target.stack.copy_(_with_room(result, target))
    return target


def _with_room(source, target):
    """The stack of what is written, with as many coefficients as the target's."""
    if target.order == 1:
        return source.stack
    n = len(target.stack)
    if len(source.stack) > n:
        raise NoRule("second_order: a write of second derivatives into what has no room for them.")
    return padded(source.stack, n)


def in_place_of(target: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let function(target, ...) take the place of its argument."""
    if not isinstance(target, Dual) or not _alone(target) or _called_again(target):
        return write(target, function(copy_of(target), *args, **kwargs))

    result = function(target, *args, **kwargs)
    if not isinstance(result, Dual) or result.shape != target.shape:
        # sgn_: its graph has saved what is overwritten.
        return write(target, function(copy_of(target), *args, **kwargs))

    _check_alias(target)
    settle()
    target.stack = carriers.fitted(_own(result), target)   # the graph may have saved what was there
    return target


def _called_again(x):
    """Whether it lies in a checkpoint that would find no room for second derivatives, in the
    backward pass, where nobody knows who else has its memory."""
    return (
        x.order == 2
        and running().hooks != torch._C._autograd._top_saved_tensors_default_hooks(True)
    )


def _alone(x):
    """Whether no other number and no value that f can see lies in the memory of x.

    It may take another stack, then.
    """
    settle()
    return not _seen(x.stack, but=(x,))


def _own(result):
    """The stack of a result, in memory that f cannot see otherwise."""
    return result.stack.clone() if _seen(result.stack, but=(result,)) else result.stack


def _seen(s, but):
    call = running()
    if call is None or torch._C._functorch.is_functorch_wrapped_tensor(s):
        return True

    own = memory(s)
    if any(reference() is own for reference in call.shown):
        return True

    return any(
        memory(n.computed) is own
        for n in call.numbers()
        if n.computed is not None and all(n is not b for b in but)
    )


def set_item(target: Any, index: Any, source: Any) -> Any:
    if not isinstance(target, Dual):
        if not isinstance(source, Dual) or not (target.is_floating_point() or target.is_complex()):
            return on_values(torch.Tensor.__setitem__, (target, index, source), {})
        if not _all_first_order(source):
            raise NoRule("fastscore.jvp: indexed writing of dual numbers into an ordinary tensor.")
        settle()
        carriers.check("indexed writing", target)
        carriers.carry(target, len(source.stack), "indexed writing")

    _check_alias(target)
    settle()
    index = index if isinstance(index, tuple) else (index,)
    if target.order == 2 and isinstance(source, Dual):
        _check_samples(target, index, source)
    if separated(index, more=0):
        # The indexed dimensions would move in front of the stack's.
        tangents = len(target.stack) - 1
        each = _with_room(source, target) if isinstance(source, Dual) else [source] + [0] * tangents
        for m, part in enumerate(each):
            target.stack[m][index] = part
    elif isinstance(source, Dual):
        place = target.stack[:1][(slice(None), *index)]
        target.stack[(slice(None), *index)] = _fitted(_with_room(source, target), place.dim())
    else:
        target.stack[(slice(0, 1), *index)] = source
        target.stack[(slice(1, None), *index)] = 0


def _check_samples(target, index, source):
    """Refuse what would write a sample's derivatives into another sample."""
    place = target.stack[:1][(slice(None), *index)]
    if (
        not samples.indexed(target, index)
        or separated(index)
        or place.dim() != source.stack.dim()
    ):
        raise NoRule("second_order: a write that would not keep the samples the first dimension.")


def _fitted(s, dims):
    """The stack with as many dimensions as the place it goes to, so that its first one stays the
    first."""
    s = aligned(s, dims - 1)
    extra = s.dim() - dims   # leading ones
    return s.reshape(len(s), *s.shape[1 + extra :]) if extra else s
