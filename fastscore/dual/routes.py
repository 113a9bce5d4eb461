"""jvp, and the ways that it takes.

Dual numbers first, then stock forward mode or two backward passes.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastscore import backend as backends
from fastscore import scalars
from fastscore.compiling import eagerly
from fastscore.dual import dispatch as dispatch
from fastscore.dual import fallback, transposed
from fastscore.dual.call import Call, NoRule, SecondCall, thread
from fastscore.dual.compiled import as_written
from fastscore.dual.norms import FACTORISED, NATIVE_NORMS
from fastscore.dual.number import Dual
from fastscore.dual.once import Once
from fastscore.dual.saved import derived
from fastscore.dual.sharded import check_once, sharded
from fastscore.dual.stock import (
    in_one_sentence,
    right_derivatives,
    rows,
    without_constants,
)
from fastscore.ops import checks
from fastscore.ops.functions import in_words, released


def jvp(f: Callable[..., Any], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate f and its Jacobian-vector products along one or several directions in one forward
    pass.

        (f(x), J v_m),    J = ∂f/∂x

    Value and tangents flow through f side by side: every linear layer and convolution is one call
    for all of them, activations and normalisations are fused. PyTorch's own norms, whose forward
    mode gives wrong gradients, are right here. What no rule covers goes through stock forward mode,
    operation by operation, or, where even that is impossible, f as a whole, last of all by two
    backward passes.

    Args:
        f: any function or module of x alone; its result is a tensor. What f writes into ordinary
            tensors, its own (`sums = zeros(...); sums += h`, slices, `out=`) or its buffers, is
            carried too, and the tensors are ordinary again afterwards. f is called again, and
            FallbackWarning says so, if it holds an operation that cannot be carried through:
            autograd.grad inside f, TorchScript, a write into memory that another tensor or NumPy
            shares, or into an ordinary tensor inside a checkpoint. It then draws
            the same random numbers each time.
        x: (B, *), any float dtype.
        v: directions, (B, *) like x, or (M, B, *).

    Returns:
        f(x), and J v: like f(x), or (M, *f(x).shape). Both are differentiable in x, v and whatever
        parameters f holds.

    Raises:
        ValueError: v does not fit x. TypeError: x is no float tensor, or f returns something else
            than a tensor. NotImplementedError: PyTorch cannot differentiate f rightly.

    Under torch.compile it runs eagerly (a graph break), and compiled functions and modules inside f
    run as they were written. A block under torch.no_grad() inside f and .detach() count as
    constants; where the caller is under no_grad himself, such a block cannot be told from the rest,
    and is carried like it.

    >>> jvp(torch.sin, torch.zeros(1, 2), torch.ones(3, 1, 2))[1].shape
    torch.Size([3, 1, 2])
    """
    if not callable(f):
        scalars.function("jvp", "f", f)

    checks.check_float("jvp", "x", x)
    checks.check_float("jvp", "v", v)
    given, wanted = v.shape, x.shape
    single = given == wanted
    if len(given) > len(wanted) and not given[0]:
        raise ValueError("jvp: v must hold at least one direction; got none.")
    if not single and given[1:] != wanted:
        raise ValueError(
            f"jvp: v must have the shape of x, {tuple(x.shape)}, or (M, *) of it; "
            f"got {tuple(v.shape)}."
        )
    if v.dtype != x.dtype or v.device != x.device:
        raise ValueError(
            f"jvp: v must be {x.dtype} on {x.device} like x; got {v.dtype} on {v.device}."
        )

    s = stacked_jvp(f, x, v[None] if single else v)
    return s[0], s[1] if single else s[1:]


@eagerly("fastscore.jvp runs eagerly")
def stacked_jvp(
    f: Callable[..., Any],
    x: Tensor,
    v: Tensor | Callable[[], Tensor],
    start: Tensor | None = None,
) -> Tensor:
    """f(x) and J v_m for v (M, *x.shape), side by side: (1 + M, *f(x).shape).

    start: x and v side by side, which f may write into; v then makes the directions again, for what
    needs them after that.
    """
    with as_written:
        try:
            return _routed(f, x, v, start)
        except RuntimeError as error:
            told = in_words(error)
            if told is None:
                raise
            raise told from error


def _routed(f, x, v, start):
    if torch._C._functorch.maybe_current_level() is not None:   # where nothing has started
        with _forward_gradients():
            return _transformed(f, x, v)
    outer = getattr(thread, "call", None)
    if (outer and outer.order == 1) or isinstance(x, Dual) or isinstance(v, Dual):
        # The rules do not tell the numbers of one jvp from those of another around it, which f may
        # hold.
        raise NoRule("fastscore.jvp: a jvp inside f cannot be carried through with its tangents.")

    transposed.see_functions()
    if torch._C._is_fwd_grad_enabled() and not torch._C._len_torch_dispatch_stack():
        return _carried(f, x, v, start)

    with _forward_gradients(), _as_dispatched():
        return _carried(f, x, v, start)


def _as_dispatched():
    """What fails in a transform below a mode, as of make_fx, would leave torch without autograd."""
    if not torch._C._len_torch_dispatch_stack():
        return contextlib.nullcontext()
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    )


def _forward_gradients():
    """The forward of an autograd.Function, and with it a reentrant checkpoint, switches them off.

    f would look constant.
    """
    if torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.autograd.forward_ad._set_fwd_grad_enabled(True)


# PyTorch's messages to who takes dual numbers for ordinary tensors, and what is to be called again
# on the slower path.
_UNSEEN = {
    "Error while setting up backward hooks": "a module with a full backward hook",
    "TorchScript interpreter": "a TorchScript function",
    "`variable.set_data(tensor)`": "t.data = ..., for an ordinary tensor t,",
    "Cannot swap t": "torch.utils.swap_tensors",
    "from an instance of type Dual": "nn.Parameter(...)",
    "has data of a different type": "t.grad = ..., for an ordinary tensor t,",
}


def _unseen(error):
    """The NoRule that PyTorch's message stands for, or None."""
    what = next((what for message, what in _UNSEEN.items() if message in str(error)), None)
    if what is None:
        return None
    return NoRule(
        f"fastscore.jvp: {what} cannot be carried through with its tangents."
    ).with_traceback(error.__traceback__)


def _carried(f, x, v, start):
    once = Once(x.device, f)
    try:
        if start is None:
            start = _side_by_side(x, v)
        if once.quiet and not torch._C._len_torch_dispatch_stack():
            return _stacked(f, start)
        with once.watched(), _as_dispatched():
            return _stacked(f, start)
    except NoRule as error:
        once.undo()
        fallback.warn(error)
    # What runs where nobody sees that its argument is a dual number.
    except (RuntimeError, TypeError) as error:
        rule = _unseen(error)
        if rule is None:
            raise
        once.undo()
        fallback.warn(rule)
        del rule   # and with it the frames
    if backends.linearized():
        raise NotImplementedError(
            "fastscore.jvp: torch.func.linearize takes f only where the rules of fastscore do; "
            "take torch.func.jvp."
        )

    # f as a whole, and first by what calls it once.
    if callable(v):
        v = v()
    try:
        check_once("f, for the operation that the FallbackWarning names,", f)
        with in_one_sentence(), once.watched():
            return _double_backward(f, x, v)
    # Of torch: an operation without a second derivative.
    except (NotImplementedError, RuntimeError) as error:
        if backends._dual_level():   # forward mode does not nest
            raise
        once.undo()
        try:
            return _forward_mode(f, x, v)
        # Of torch: an operation, or an autograd.Function, without a rule for forward mode.
        except (NotImplementedError, RuntimeError):
            raise error from None


def _side_by_side(x, v):
    s = torch.cat([x[None], v])
    if (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        s = s.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, s.shape[:2])
    return s


def _stacked(f, s):
    with Call(torch.is_grad_enabled(), waits=not sharded(f)):
        y = f(Dual(s))
        if isinstance(y, Dual):
            s = y.stack
            del y   # it need not become an ordinary tensor again
            return s
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"jvp: f must return a tensor; got {type(y).__name__}.")

    return torch.cat([y[None], y.new_zeros(len(s) - 1, *y.shape)])   # no function of x


def _forward_mode(f, x, v):
    """Stock forward mode, one direction at a time, with PyTorch's norms replaced by
    compositions."""
    outputs = []
    once = Once(x.device, f)
    wanted = torch.is_grad_enabled()
    # Outside inference mode, which switches forward mode off: f would look constant.
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        x, v = (t.clone() if t.is_inference() else t for t in (x, v))
        for direction in v:
            with (
                once,
                torch.autograd.forward_ad.dual_level(),
                right_derivatives(NATIVE_NORMS | FACTORISED),
                without_constants(),
            ):
                y, ty = torch.autograd.forward_ad.unpack_dual(
                    f(torch.autograd.forward_ad.make_dual(x, direction))
                )
                outputs.append((y, torch.zeros_like(y) if ty is None else ty))
        return torch.stack([outputs[0][0], *(ty for _, ty in outputs)])


def _double_backward(f, x, v):
    """J v as the transpose of the transpose, by two more levels of backward."""
    wanted = torch.is_grad_enabled()
    # Forward mode needs the formulas that a graph is made of.
    graph = wanted or backends._dual_level()
    with torch.inference_mode(False), torch.enable_grad(), right_derivatives(NATIVE_NORMS):
        x, v = (t.clone() if t.is_inference() else t for t in (x, v))
        # A view, for detach() would drop a forward-mode tangent.
        x = x.view_as(x) if x.requires_grad else x.view_as(x).requires_grad_()
        with derived():
            y = f(x)
        if not isinstance(y, torch.Tensor) or not y.requires_grad:
            raise NotImplementedError(
                "fastscore.jvp: f holds an operation through which neither forward nor reverse "
                "mode leads to x."
            )
        ((*products,),) = transposed.products("f", [y], [x], [(x, *v)], graph)
        stack = rows([y, *products])

    return stack if wanted else released(stack)


def _transformed(f, x, v):
    """Inside a transform of torch.func, with which all of these nest.

    The same rules, forward mode, two levels of backward.
    """
    once = Once(x.device, f)
    if getattr(thread, "call", SecondCall).order == 2:
        try:
            with once.watched():
                return _stacked(f, _side_by_side(x, v))
        except RuntimeError as error:   # what the transform does not take comes again
            if not isinstance(error, NoRule) and str(error).startswith("fastscore"):
                raise
            once.undo()
            if isinstance(error, NoRule):
                fallback.warn(error)
    try:
        pairs = []
        for direction in v:
            with once, right_derivatives(NATIVE_NORMS | FACTORISED), without_constants():
                pairs.append(torch.func.jvp(f, (x,), (direction,)))
        return rows([pairs[0][0], *(ty for _, ty in pairs)])
    except (NotImplementedError, RuntimeError):
        once.undo()
    with in_one_sentence(), right_derivatives(NATIVE_NORMS):
        y, pull = torch.func.vjp(f, x)
        transpose = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(y))[1]
        return rows([y, *(transpose(direction)[0] for direction in v)])
