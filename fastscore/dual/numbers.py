"""Dual numbers as a tensor subclass that flows through unmodified modules, and jvp, their door."""

import sys

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastscore.dual.norms import REFUSED, RightNorms
from fastscore.dual.rules import RULES
from fastscore.ops import checks


def jvp(f, x, v):
    """Evaluate f and its Jacobian-vector products along one or several directions in one forward pass.

        (f(x), J v_m),    J = ∂f/∂x

    Value and tangents flow through f side by side: every linear layer and convolution is one call for all of them, activations and
    normalisations are fused. PyTorch's own norms, whose forward mode gives wrong gradients, are right here. What no rule covers goes
    through stock forward mode, operation by operation, or, where even that is impossible, f as a whole.

    Args:
        f: any function or module of x alone; its result is a tensor. f may be called a second time, if it holds an operation that cannot
            be carried through (autograd.grad inside f, an in-place write into a tensor that is no function of x).
        x: (B, *), any float dtype.
        v: directions, (B, *) like x, or (M, B, *).

    Returns:
        f(x), and J v: like f(x), or (M, *f(x).shape). Both are differentiable in x, v and whatever parameters f holds.

    Raises:
        ValueError: v does not fit x. TypeError: x is no float tensor, or f returns something else than a tensor.

    Under torch.compile it runs eagerly (a graph break). A block under torch.no_grad() inside f and .detach() count as constants.

    >>> jvp(torch.sin, torch.zeros(1, 2), torch.ones(3, 1, 2))[1].shape
    torch.Size([3, 1, 2])
    """
    checks.check_float("jvp", "x", x)
    checks.check_float("jvp", "v", v)
    if v.shape != x.shape and v.shape[1:] != x.shape:
        raise ValueError(f"jvp: v must have the shape of x, {tuple(x.shape)}, or (M, *) of it; got {tuple(v.shape)}.")
    if v.dtype != x.dtype or v.device != x.device:
        raise ValueError(f"jvp: v must be {x.dtype} on {x.device} like x; got {v.dtype} on {v.device}.")
    return _jvp(f, x, v)


@torch.compiler.disable(reason="fastscore.jvp runs eagerly")
def _jvp(f, x, v):
    single = v.shape == x.shape
    directions = v[None] if single else v
    if torch._C._functorch.maybe_current_level() is not None:   # inside a transform: torch's own forward mode nests with it
        y, ty = _transformed(f, x, directions)
    else:
        try:
            y, ty = _stacked(f, x, directions)
        except NoRule:
            y, ty = _forward_mode(f, x, directions)
    return y, ty[0] if single else ty


def _stacked(f, x, v):
    layout = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() else None
    s = torch.cat([x[None], v])
    if layout:
        s = s.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, s.shape[:2])
    before, Dual.grad_mode = Dual.grad_mode, torch.is_grad_enabled()
    try:
        y = f(Dual(s))
    finally:
        Dual.grad_mode = before
    if isinstance(y, Dual):
        return y.stack[0], y.stack[1:]
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"jvp: f must return a tensor; got {type(y).__name__}.")
    return y, y.new_zeros(len(v), *y.shape)   # no function of x


def _forward_mode(f, x, v):
    """Stock forward mode, one direction at a time, with PyTorch's norms replaced by compositions."""
    outputs = []
    for direction in v:
        with torch.autograd.forward_ad.dual_level(), RightNorms():
            y, ty = torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, direction)))
            outputs.append((y, torch.zeros_like(y) if ty is None else ty))
    return outputs[0][0], torch.stack([ty for _, ty in outputs])


def _transformed(f, x, v):
    with RightNorms():
        pairs = [torch.func.jvp(f, (x,), (direction,)) for direction in v]
    return pairs[0][0], torch.stack([ty for _, ty in pairs])


class NoRule(NotImplementedError):
    """An operation that dual numbers cannot be carried through."""


class Dual(torch.Tensor):
    """A value with M tangents: looks like the value, holds `stack` (1 + M, *shape)."""

    grad_mode = True   # of the caller of jvp: a no_grad block inside f is a constant

    @staticmethod
    def __new__(cls, stack):
        return torch.Tensor._make_wrapper_subclass(cls, stack.shape[1:], strides=stack.stride()[1:], dtype=stack.dtype, device=stack.device)

    def __init__(self, stack):
        self.stack = stack

    def like(self, stack):
        """Another number of this kind."""
        return type(self)(stack)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        constant = cls.grad_mode and not torch.is_grad_enabled()
        if constant and _inside_function():
            raise NoRule("fastscore.jvp: an autograd.Function inside f cannot be carried through.")
        if func in _VALUES or constant:
            return _on_values(func, args, kwargs)
        if kwargs.get("inplace"):
            return _write(args[0], func(_copy(args[0]), *args[1:], **{**kwargs, "inplace": False}))
        rule = RULES.get(func)
        result = rule(*args, **kwargs) if rule is not None and not isinstance(kwargs.get("out"), torch.Tensor) else NotImplemented
        if result is NotImplemented:
            result = _special(func, args, kwargs)
        return _generic(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NoRule(f"fastscore.jvp: {func} cannot be carried through with its tangents.")

    def __repr__(self):
        return f"Dual({len(self.stack) - 1} tangents of {self.stack[0]!r})"


def _inside_function():
    """Whether we stand in the forward of an autograd.Function, which runs without gradients and is no constant."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _jvp_code:
        if frame.f_code is _apply_code:
            return True
        frame = frame.f_back
    return False


_apply_code, _jvp_code = torch.autograd.Function.apply.__func__.__code__, _stacked.__code__


def _getters(*names):
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


_METADATA = _getters("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_nested")
_METADATA |= {getattr(torch.Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
              "is_floating_point", "is_complex", "element_size", "get_device", "__len__", "is_signed")}  # fmt: skip
_METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel}
# Values without tangents: comparisons, integers, numbers, what stops a gradient.
_VALUES = """
    eq ne lt le gt ge isnan isinf isfinite argmax argmin argsort sign sgn floor ceil round trunc detach item tolist numpy allclose equal
    isclose bincount nonzero any all logical_not heaviside signbit bool int long short searchsorted bucketize rand_like randn_like new_zeros
    new_ones new_empty new_full new_tensor is_same_size __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __bool__ __float__ __int__ __format__
    __index__ __contains__
""".split()
_VALUES = {getattr(holder, name) for holder in (torch.Tensor, torch) for name in _VALUES if hasattr(holder, name)}
_LIKE = {getattr(torch, name) for name in ("zeros_like", "ones_like", "empty_like", "full_like")}
_RANDOM = ("rrelu", "alpha_dropout", "feature_alpha_dropout", "gumbel_softmax", "bernoulli", "multinomial", "poisson", "normal")


def _on_values(func, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    args, kwargs = tree_unflatten([a.stack[0] if isinstance(a, Dual) else a for a in leaves], spec)
    return func(*args, **kwargs)


def _special(func, args, kwargs):
    """In-place operations, the constructors that follow a tensor, gradients asked for inside f."""
    name = getattr(func, "__name__", "")
    if func in _LIKE:
        return _place(func, args, kwargs)
    if func == torch.Tensor.requires_grad.__get__:
        return args[0].stack.requires_grad
    if kwargs.get("out") is not None or func in REFUSED or func in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward):
        raise NoRule(f"fastscore.jvp: {name} cannot be carried through with its tangents.")
    if name in ("requires_grad_", "data", "set_", "register_hook", "retain_grad", "as_strided", "untyped_storage", "data_ptr"):
        raise NoRule(f"fastscore.jvp: {name} cannot be carried through with its tangents.")
    return _in_place(func, name, args, kwargs)


def _place(func, args, kwargs):
    """A place to write dual numbers into."""
    value = func(args[0].stack[0], *args[1:], **kwargs)
    if not value.is_floating_point():
        return value
    return args[0].like(torch.cat([value[None], value.new_zeros(len(args[0].stack) - 1, *value.shape)]))


def _in_place(func, name, args, kwargs):
    if func == torch.Tensor.__setitem__:
        return _setitem(*args)
    if name.startswith("__i") and name.endswith("__"):
        plain = getattr(torch.Tensor, f"__{name[3:-2]}__", None)
    elif name.endswith("_") and not name.endswith("__"):
        plain = getattr(torch.Tensor, name[:-1], None) or getattr(torch.nn.functional, name[:-1], None)
    else:
        return NotImplemented
    if plain is None or not isinstance(args[0], Dual):
        raise NoRule(f"fastscore.jvp: {name} would write dual numbers into an ordinary tensor.")
    if name in ("zero_", "fill_", "copy_"):
        source = 0 if name == "zero_" else args[1]
        return _setitem(args[0], ..., source) or args[0]
    return _write(args[0], plain(_copy(args[0]), *args[1:], **kwargs))


def _copy(x):
    return x.like(x.stack.clone()) if isinstance(x, Dual) else x


def _write(target, result):
    """In place on the memory of the stack, so that views of it see the change; `result` was made from a copy, which autograd may keep."""
    if not isinstance(target, Dual) or result.shape != target.shape:
        raise NoRule("fastscore.jvp: an in-place operation would change a shape or write into an ordinary tensor.")
    target.stack.copy_(result.stack)
    return target


def _setitem(target, index, source):
    if not isinstance(target, Dual):
        raise NoRule("fastscore.jvp: indexed writing of dual numbers into an ordinary tensor.")
    index = index if isinstance(index, tuple) else (index,)
    if sum(isinstance(part, torch.Tensor | list) for part in index) > 1:
        raise NoRule("fastscore.jvp: indexed writing with several index tensors.")
    if isinstance(source, Dual):
        target.stack[(slice(None), *index)] = source.stack
    else:
        target.stack[(slice(0, 1), *index)] = source
        target.stack[(slice(1, None), *index)] = 0


def _generic(func, args, kwargs):
    """Stock forward mode through one operation: right for everything but the norms, which have rules of their own."""
    name = getattr(func, "__name__", str(func))
    if name in _RANDOM:
        raise NotImplementedError(f"fastscore.jvp: {name} draws anew for every tangent; draw its noise outside and multiply.")
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, a in enumerate(leaves) if isinstance(a, Dual)]
    stacks = [leaves[i].stack for i in places]

    def plain(*duals):
        filled = list(leaves)
        for i, d in zip(places, duals):
            filled[i] = d
        again, keywords = tree_unflatten(filled, spec)
        return func(*again, **keywords)

    with torch._C.DisableTorchFunctionSubclass():
        outputs = [torch.func.jvp(plain, tuple(s[0] for s in stacks), tuple(s[m] for s in stacks)) for m in range(1, len(stacks[0]))]
    values, shape = tree_flatten(outputs[0][0])
    tangents = [tree_flatten(t)[0] for _, t in outputs]
    if not all(isinstance(v, torch.Tensor) for v in values):
        raise NoRule(f"fastscore.jvp: {name} cannot be carried through with its tangents.")
    joined = [
        Dual(torch.stack([v, *(t[k] for t in tangents)])) if v.is_floating_point() else v for k, v in enumerate(values)
    ]
    return tree_unflatten(joined, shape)
