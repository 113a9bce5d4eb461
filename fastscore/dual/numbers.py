"""Dual numbers as a tensor subclass that flows through unmodified modules, and jvp, their door."""

import contextlib
import functools
import inspect
import re
import threading
import types
import weakref

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._functorch.autograd_function import custom_function_call
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastscore import backend as backends
from fastscore import scalars
from fastscore.compiling import eagerly, skip
from fastscore.dual import carriers, compositions, fallback, kept, transposed
from fastscore.dual.compiled import as_written, undisturbed
from fastscore.dual.norms import FACTORISED, NATIVE_NORMS, REFUSED, Refuse
from fastscore.dual.once import Draws, Once
from fastscore.dual.rules import POINTWISE, RULES, NoDual, aligned, memory, separated
from fastscore.dual.sharded import check_once, of_fsdp, sharded
from fastscore.ops import checks
from fastscore.ops.functions import in_words, released


def jvp(f, x, v):
    """Evaluate f and its Jacobian-vector products along one or several directions in one forward pass.

        (f(x), J v_m),    J = ∂f/∂x

    Value and tangents flow through f side by side: every linear layer and convolution is one call for all of them, activations and
    normalisations are fused. PyTorch's own norms, whose forward mode gives wrong gradients, are right here. What no rule covers goes
    through stock forward mode, operation by operation, or, where even that is impossible, f as a whole, last of all by two backward
    passes.

    Args:
        f: any function or module of x alone; its result is a tensor. What f writes into ordinary tensors, its own (`sums = zeros(...);
            sums += h`, slices, `out=`) or its buffers, is carried too, and the tensors are ordinary again afterwards. f is called again,
            and FallbackWarning says so, if it holds an operation that cannot be carried through: autograd.grad inside f, TorchScript, a
            write into memory that another tensor or NumPy shares, or into an ordinary tensor inside a checkpoint or another thread. It
            then draws the same random numbers each time.
        x: (B, *), any float dtype.
        v: directions, (B, *) like x, or (M, B, *).

    Returns:
        f(x), and J v: like f(x), or (M, *f(x).shape). Both are differentiable in x, v and whatever parameters f holds.

    Raises:
        ValueError: v does not fit x. TypeError: x is no float tensor, or f returns something else than a tensor.

    Under torch.compile it runs eagerly (a graph break), and compiled functions and modules inside f run as they were written.
    A block under torch.no_grad() inside f and .detach() count as constants; where the caller is under no_grad himself, such a
    block cannot be told from the rest, and is carried like it.

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
        raise ValueError(f"jvp: v must have the shape of x, {tuple(x.shape)}, or (M, *) of it; got {tuple(v.shape)}.")
    if v.dtype != x.dtype or v.device != x.device:
        raise ValueError(f"jvp: v must be {x.dtype} on {x.device} like x; got {v.dtype} on {v.device}.")
    s = stack(f, x, v[None] if single else v)
    return s[0], s[1] if single else s[1:]


@eagerly("fastscore.jvp runs eagerly")
def stack(f, x, v):
    """f(x) and J v_m for v (M, *x.shape), side by side: (1 + M, *f(x).shape)."""
    with as_written:
        try:
            return _routed(f, x, v)
        except RuntimeError as error:
            told = in_words(error)
            if told is None:
                raise
            raise told from error


def _routed(f, x, v):
    if torch._C._functorch.maybe_current_level() is not None:
        with _forward_gradients():
            return _transformed(f, x, v)
    if hasattr(_local, "call") or isinstance(x, Dual) or isinstance(v, Dual):
        # The rules do not tell the numbers of one jvp from those of another around it, which f may hold.
        raise NoRule("fastscore.jvp: a jvp inside f cannot be carried through with its tangents.")
    transposed.see_functions()
    if torch._C._is_fwd_grad_enabled() and not torch._C._len_torch_dispatch_stack():
        return _carried(f, x, v)
    with _forward_gradients(), _as_dispatched():
        return _carried(f, x, v)


def _as_dispatched():
    """What fails in a transform below a mode, as of make_fx, would leave torch without autograd."""
    if not torch._C._len_torch_dispatch_stack():
        return contextlib.nullcontext()
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def _forward_gradients():
    """The forward of an autograd.Function, and with it a reentrant checkpoint, switches them off: f would look constant."""
    if torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.autograd.forward_ad._set_fwd_grad_enabled(True)


# PyTorch's messages to who takes dual numbers for ordinary tensors, and what is to be called again on the slower path.
_UNSEEN = {
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
    return NoRule(f"fastscore.jvp: {what} cannot be carried through with its tangents.").with_traceback(error.__traceback__)


def _carried(f, x, v):
    once = Once(x.device, f)
    try:
        if once.quiet and not torch._C._len_torch_dispatch_stack():
            return _stacked(f, x, v)
        with once.watched(), _as_dispatched():
            return _stacked(f, x, v)
    except NoRule as error:
        once.undo()
        fallback.warn(error)
    except (RuntimeError, TypeError) as error:   # what runs where nobody sees that its argument is a dual number
        rule = _unseen(error)
        if rule is None:
            raise
        once.undo()
        fallback.warn(rule)
        del rule   # and with it the frames
    if _linearized():
        raise NotImplementedError("fastscore.jvp: torch.func.linearize takes f only where the rules of fastscore do; take torch.func.jvp.")
    # f as a whole, and first by what calls it once.
    try:
        check_once("f, for the operation that the FallbackWarning names,", f)
        with _in_one_sentence(), once.watched():
            return _double_backward(f, x, v)
    except (NotImplementedError, RuntimeError) as error:   # of torch: an operation without a second derivative
        if backends._dual_level():   # forward mode does not nest
            raise
        once.undo()
        try:
            return _forward_mode(f, x, v)
        except (NotImplementedError, RuntimeError):   # of torch: an operation, or an autograd.Function, without a rule for forward mode
            raise error from None


def _linearized():
    """Inside torch.func.linearize, whose folding of constants loses what is written in place, by f or by PyTorch's backward formulas."""
    return backends._dual_level() and get_proxy_mode() is not None


@contextlib.contextmanager
def _in_one_sentence():
    """PyTorch's message where it has no derivative, as one of ours."""
    try:
        yield
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [""]
        if not first.startswith("fastscore") and re.search("erivative for|implemented|not differentiable|must implement", first):
            raise NotImplementedError(f"fastscore.jvp: PyTorch has no second derivative of f: {first.rstrip('.')}.") from error
        raise


def _stacked(f, x, v):
    s = torch.cat([x[None], v])
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        s = s.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, s.shape[:2])
    with _inside(torch.is_grad_enabled(), waits=not sharded(f)):
        y = f(Dual(s))
        if isinstance(y, Dual):
            s = y.stack
            del y   # it need not become an ordinary tensor again
            return s
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"jvp: f must return a tensor; got {type(y).__name__}.")
    return torch.cat([y[None], y.new_zeros(len(v), *y.shape)])   # no function of x


def _forward_mode(f, x, v):
    """Stock forward mode, one direction at a time, with PyTorch's norms replaced by compositions."""
    outputs, once, wanted = [], Once(x.device, f), torch.is_grad_enabled()
    # Outside inference mode, which switches forward mode off: f would look constant.
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        x, v = (t.clone() if t.is_inference() else t for t in (x, v))
        for direction in v:
            with once, torch.autograd.forward_ad.dual_level(), _right(NATIVE_NORMS | FACTORISED), _constants():
                y, ty = torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, direction)))
                outputs.append((y, torch.zeros_like(y) if ty is None else ty))
        return torch.stack([outputs[0][0], *(ty for _, ty in outputs)])


def _constants():
    return _Constants() if torch.is_grad_enabled() else contextlib.nullcontext()


class _Constants(torch.overrides.TorchFunctionMode):
    """Inside, what happens without gradients has no tangents either."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with contextlib.nullcontext() if torch.is_grad_enabled() else torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


def _double_backward(f, x, v):
    """J v as the transpose of the transpose, by two more levels of backward."""
    wanted = torch.is_grad_enabled()
    graph = wanted or backends._dual_level()   # forward mode needs the formulas that a graph is made of
    with torch.inference_mode(False), torch.enable_grad(), _right(NATIVE_NORMS):
        x, v = (t.clone() if t.is_inference() else t for t in (x, v))
        # A view, for detach() would drop a forward-mode tangent.
        x = x.view_as(x) if x.requires_grad else x.view_as(x).requires_grad_()
        y = f(x)
        if not isinstance(y, torch.Tensor) or not y.requires_grad:
            raise NotImplementedError("fastscore.jvp: f holds an operation through which neither forward nor reverse mode leads to x.")
        ((*products,),) = transposed.products("f", [y], [x], [(x, *v)], graph)
        stack = _rows([y, *products])
    return stack if wanted else released(stack)


def _rows(values):
    """Their stack. A gradient that begins at an odd place of the stack's is none that torch.view_as_real takes: memory of its own."""
    return torch.stack([t * 1 for t in values] if values[0].numel() % 2 else values)


def _transformed(f, x, v):
    """Inside a transform of torch.func, with which all of these nest: the same rules, forward mode, two levels of backward."""
    once = Once(x.device, f)
    if not hasattr(_local, "call"):
        try:
            with once.watched():
                return _stacked(f, x, v)
        except RuntimeError as error:   # what the transform does not take comes again
            if not isinstance(error, NoRule) and str(error).startswith("fastscore"):
                raise
            once.undo()
            if isinstance(error, NoRule):
                fallback.warn(error)
    try:
        pairs = []
        for direction in v:
            with once, _right(NATIVE_NORMS | FACTORISED), _constants():
                pairs.append(torch.func.jvp(f, (x,), (direction,)))
        return _rows([pairs[0][0], *(ty for _, ty in pairs)])
    except (NotImplementedError, RuntimeError):
        once.undo()
    with _in_one_sentence(), _right(NATIVE_NORMS):
        y, pull = torch.func.vjp(f, x)
        transpose = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(y))[1]
        return _rows([y, *(transpose(direction)[0] for direction in v)])


@contextlib.contextmanager
def _right(refused):
    """PyTorch's own derivatives of second and third order, without those that it lacks or gets wrong."""
    guard = Refuse(refused if torch.is_grad_enabled() else set())
    try:
        with sdpa_kernel(SDPBackend.MATH), compositions.RightForward(), guard:
            yield
    except Exception as error:   # TorchScript wraps what is raised inside
        if guard.met is None:
            raise
        where = "reached from TorchScript, torch.ops or beside what dual numbers cannot carry"
        raise NotImplementedError(f"fastscore.jvp: {guard.met} is {where}; PyTorch's gradients of its tangent are wrong.") from error


class _Call:
    """One jvp that runs: the caller's grad mode, and references to whose stack is not computed yet and to memory not to be written to.

    `shown`: memory that ordinary tensors share, as of a detached value.
    `lock`: what waits is computed by one thread, once; who writes, waits until it is. `waits`: nothing does where weights come and go.
    """

    def __init__(self, grad_mode, waits):
        self.grad_mode, self.waits, self.waiting, self.copied, self.made = grad_mode, waits, [], [], []
        self.lock, self.shown, self.carriers = threading.RLock(), [], carriers.Carriers(grad_mode)

    def numbers(self):
        """All that are alive."""
        found = [reference() for reference in self.made + self.carriers.references()]
        return [n for n in found if n is not None and hasattr(type(n), "stack")]


_local = threading.local()
_calls = []   # of all threads


class _inside:
    """A call's duration. No generator, whose context costs a microsecond."""

    __slots__ = ("call",)

    def __init__(self, grad_mode, waits=True):
        self.call = _Call(grad_mode, waits)

    def __enter__(self):
        if kept.outside:
            kept.keep(kept.outside)
        _local.call = self.call
        _calls.append(self.call)

    def __exit__(self, kind, error, trace):
        try:
            self.call.carriers.close(keep=kind is None)
        finally:
            self.leave()

    def leave(self):
        del _local.call
        _calls.remove(self.call)
        kept.keep(self.call.made)


def _call():
    """This thread's, or, in a worker that f has started, that of the numbers at hand; None outside, where nothing waits."""
    return getattr(_local, "call", None)


def of_its_call(function, args, kwargs):
    """function() in the call to which the numbers among the arguments belong, which no other running call may share."""
    owners = {a.call for a in tree_flatten((args, kwargs))[0] if type(a) in (Dual, ComplexDual)} - {None}
    here = _call()
    if len(owners | {here} - {None}) > 1:
        raise NoRule("fastscore.jvp: f computes with the numbers of another jvp that runs at the same time.")
    if here is not None or not owners:
        return function()
    (_local.call,) = owners
    try:
        return function()
    finally:
        del _local.call


def of_several():
    """Whether numbers may belong to another call than this thread's."""
    return bool(_calls) and (len(_calls) > 1 or not hasattr(_local, "call"))


def _constant_block():
    """Whether grad mode was switched off inside f. An autograd.Function's forward is no such block: its backward carries gradients."""
    return not torch.is_grad_enabled() and _switched_off()


def _switched_off():
    if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
        raise NoRule("fastscore.jvp: an autograd.Function cannot be carried through with its tangents.")
    call = _call()
    return call is None or call.grad_mode


class NoRule(NotImplementedError):
    """An operation that dual numbers cannot be carried through."""


_shell = torch.Tensor._make_wrapper_subclass
# What PyTorch takes for sparse no ordinary tensor's .data or .grad can be set to: C++ asks nobody, and would find no memory.
_UNLIKE_DENSE = torch.sparse_coo


class Dual(torch.Tensor):
    """A value with M tangents: looks like the value, holds `stack` (1 + M, *shape), which may be computed when it is asked for."""

    rules = RULES
    call = None   # of other kinds

    @staticmethod
    def __new__(cls, stack):
        cls = ComplexDual if stack.is_complex() else cls
        return _shell(cls, stack.shape[1:], stack.stride()[1:], None, None, stack.dtype, _UNLIKE_DENSE, stack.device)

    def __init__(self, stack):
        self.computed, self.pending = stack, None
        call = self.call = getattr(_local, "call", None)
        (kept.outside if call is None else call.made).append(weakref.ref(self))

    @property
    def stack(self):
        if self.computed is None:
            with self.call.lock:   # a second result would lose what was written to the first
                if self.computed is None:
                    self.computed, self.pending = self.pending.stack(), None
        return self.computed

    @stack.setter
    def stack(self, stack):
        self.computed, self.pending = stack, None

    @classmethod
    def later(cls, pending):
        """Dual numbers that wait in a chain (of `dual.chains`)."""
        call = _call()
        if call is None or not call.waits:
            return cls(pending.stack())
        result = _shell(cls, pending.shape[1:], None, None, None, pending.dtype, _UNLIKE_DENSE, pending.device)
        result.computed, result.pending, result.call = None, pending, call
        pending.holder = weakref.ref(result)
        with call.lock:   # no list that another thread has just taken away
            call.waiting.append(pending.holder)
        call.made.append(pending.holder)
        return result

    def like(self, stack):
        """Another number of this kind."""
        return type(self)(stack)

    def scalar(self):
        """Whether its value has no dimensions, asked without the way through `__torch_function__`."""
        pending = self.pending   # which another thread may compute meanwhile
        return self.stack.dim() == 1 if pending is None else not pending.shape[1:]

    @classmethod
    @skip   # by Dynamo; torch.compiler.disable(recursive=False) is a call more for each operation
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            return _metadata(func, args, kwargs)
        if get_eval_frame_callback() is not None:   # a checkpoint in f calls a compiled part again during the backward pass
            return undisturbed(cls.__torch_function__, func, types, args, kwargs)
        if (len(_calls) != 1 or not hasattr(_local, "call")) and of_several():
            return of_its_call(lambda: cls.carried(func, args, kwargs), args, kwargs)
        return cls.carried(func, args, kwargs)

    @classmethod
    def carried(cls, func, args, kwargs):
        constant = not torch.is_grad_enabled() and _switched_off()   # or it is a Function's forward, and not even a sign is a constant
        if func in _VALUES and kwargs.get("out") is None:
            if func in _OUT_OF_TORCH and not constant:
                raise RuntimeError("fastscore.jvp: numpy cannot carry derivatives; use x.detach().numpy() for a constant.")
            if func == _DATA:
                func = torch.Tensor.detach   # whose writes are seen
            return _on_values(func, args, kwargs)
        if constant and not (isinstance(args[0] if args else None, Dual) and _sets(func)):
            return _constant(func, args, kwargs)
        if kwargs:
            if kwargs.get("out") is not None:
                return _into_out(func, args, kwargs)
            if kwargs.get("inplace"):
                return _in_place_of(args[0], func, *args[1:], **{**kwargs, "inplace": False})
        at = _INPLACE_AT.get(func)
        if at is not None and len(args) > at and args[at]:
            return _in_place_of(args[0], func, *args[1:at], False, *args[at + 1 :], **kwargs)
        result = cls.ruled(func, args, kwargs)
        if result is NotImplemented:
            result = _special(func, args, kwargs)
        return _generic(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def ruled(cls, func, args, kwargs):
        rule = cls.rules.get(func)
        if rule is None:
            return NotImplemented
        if args and isinstance(args[0], Dual) and func not in POINTWISE and args[0].scalar():
            return NotImplemented   # a dimension counted from the end of a 0-d value would be that of the stack
        try:
            return rule(*args, **kwargs)
        except (NoDual, TypeError):   # an argument that has no stack, or a spelling that the rule does not know (axis=, input=)
            return NotImplemented

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NoRule(f"fastscore.jvp: {func} cannot be carried through with its tangents.")

    def __repr__(self):
        return f"Dual({len(self.stack) - 1} tangents of {self.stack[0]!r})"


class ComplexDual(Dual):
    """Complex values take stock forward mode for everything: the rules are those of real numbers."""

    rules = {}

    @classmethod
    def carried(cls, func, args, kwargs):
        if func in (torch.sgn, torch.Tensor.sgn) and torch.is_grad_enabled():   # z / |z|, no constant
            return _generic(func, args, kwargs)
        return super().carried(func, args, kwargs)


def _getters(*names):
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


_METADATA = _getters("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_nested", "is_cpu",
                     "is_mps", "is_xpu", "itemsize", "nbytes", "grad", "output_nr", "_version", "_backward_hooks",
                     "names", "is_sparse_csr", "is_mkldnn")  # fmt: skip
_METADATA |= {getattr(torch.Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
              "is_floating_point", "is_complex", "element_size", "get_device", "__len__", "is_signed", "storage_offset", "is_conj",
              "is_neg", "is_inference")}  # fmt: skip
_METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel}
_GRAPH = _getters("requires_grad", "grad_fn", "is_leaf")
# Where a shell tells that it is sparse.
_OF_DENSE = {
    torch.Tensor.layout.__get__: lambda x: torch.strided,
    torch.Tensor.is_sparse.__get__: lambda x: False,
    torch.Tensor.nbytes.__get__: lambda x: x.numel() * x.element_size(),
    torch.Tensor.is_contiguous: lambda x, **how: torch.empty_strided(x.shape, x.stride(), device="meta").is_contiguous(**how),
}


def _metadata(func, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return _OF_DENSE.get(func, func)(*args, **kwargs)


_BASE = torch.Tensor._base.__get__
# Values without tangents: comparisons, integers, numbers, what stops a gradient.
_VALUES = """
    eq ne lt le gt ge isnan isinf isfinite argmax argmin argsort sign sgn floor ceil round trunc detach item tolist numpy allclose equal
    isclose floor_divide __floordiv__ __rfloordiv__ bincount nonzero any all logical_not signbit bool int long short
    searchsorted bucketize rand_like randn_like new_zeros
    new_ones new_empty new_full new_tensor is_same_size __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __bool__ __float__ __int__ __format__
    __index__ __contains__ __array__ result_type can_cast
""".split()
_VALUES = {getattr(holder, name) for holder in (torch.Tensor, torch) for name in _VALUES if hasattr(holder, name)}
_DATA = torch.Tensor.data.__get__
_VALUES.add(_DATA)
_OUT_OF_TORCH = {torch.Tensor.numpy, torch.Tensor.__array__}
_STEPS = {torch.floor_divide, torch.Tensor.floor_divide, torch.Tensor.__floordiv__, torch.Tensor.__rfloordiv__}   # without a derivative
_LIKE = {getattr(torch, name) for name in ("zeros_like", "ones_like", "empty_like", "full_like")}
# Random as values, and in place.
_VALUES |= {getattr(torch, name) for name in ("bernoulli", "multinomial", "poisson")} | {torch.Tensor.bernoulli, torch.Tensor.multinomial}
_FILLS = ("normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "geometric_", "cauchy_")


def _places_of_inplace():
    """Where the functions of torch.nn.functional have their argument of that name."""
    found = {}
    for function in vars(torch.nn.functional).values():
        if isinstance(function, types.FunctionType):
            names = list(inspect.signature(function).parameters)
            found |= {function: names.index("inplace")} if "inplace" in names else {}
    return found


_INPLACE_AT = _places_of_inplace()
_STORAGE = ("requires_grad_", "set_", "register_hook", "retain_grad", "as_strided", "untyped_storage", "data_ptr", "__deepcopy__",
            "__reduce_ex__", "resize_")  # fmt: skip


def _on_values(func, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    args, kwargs = tree_unflatten([a.stack[0] if isinstance(a, Dual) else a for a in leaves], spec)
    with torch.no_grad() if func in _STEPS else contextlib.nullcontext():
        result = func(*args, **kwargs)
    _show(result, leaves)
    return result


def _constant(func, args, kwargs):
    """In a block without gradients: an operation on the values. What hands back its argument, hands back the number."""
    _settle()   # it may be written to
    leaves, spec = tree_flatten((args, kwargs))
    with torch.enable_grad():   # views that may be written to as the numbers themselves
        values = [a.stack[0] if isinstance(a, Dual) else a for a in leaves]
    args, kwargs = tree_unflatten(values, spec)
    result = func(*args, **kwargs)
    numbers = {id(value): a for a, value in zip(leaves, values) if isinstance(a, Dual)}
    result = tree_map(lambda t: numbers.get(id(t), t), result)
    _show(result, leaves)
    return result


def _show(result, leaves):
    """Note the memory that f sees from now on in ordinary tensors, or in arrays."""
    call = _call()
    if call is None or result is None or isinstance(result, bool | int | float | torch.Size | torch.dtype):
        return
    results = [t for t in tree_flatten(result)[0] if not isinstance(t, bool | int | float | Dual)]
    for a in leaves:
        if isinstance(a, Dual) and any(not isinstance(t, torch.Tensor) or _same_memory(t, a.stack) for t in results):
            call.shown.append(weakref.ref(memory(a.stack)))


def _same_memory(a, b):
    return a.layout == torch.strided and memory(a) is memory(b)


def _sets(func):
    """Whether it assigns to an attribute, as t.data = x does."""
    return getattr(func, "__name__", "") == "__set__"


def _special(func, args, kwargs):
    """In-place operations, the constructors that follow a tensor, gradients asked for inside f."""
    name = getattr(func, "__name__", "")
    if func is custom_function_call:   # Function.apply inside a transform
        raise NoRule(f"fastscore.jvp: the autograd.Function {args[0].__name__} cannot be carried inside a transform of torch.func.")
    if func in _LIKE:
        return _place(func, args, kwargs)
    if func in _GRAPH:
        return func(args[0].stack)
    if func == _BASE:
        return None   # the stack may be a view, but never one that f has made
    if name in ("view", "view_copy") and any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return _on_values(func, args, kwargs)   # other bits of the same memory: a constant to autograd
    if name == "register_hook" and of_fsdp(args[1]):
        return func(args[0].stack, args[1])
    if type(func).__name__ in ("OpOverload", "OpOverloadPacket", "ScriptFunction", "ScriptMethod"):
        return _unnamed(func, name, args, kwargs)
    if func in REFUSED or func in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward):
        raise NoRule(f"fastscore.jvp: {name} cannot be carried through with its tangents.")
    if name in _STORAGE or _sets(func):
        raise NoRule(f"fastscore.jvp: {name} cannot be carried through with its tangents.")
    return _in_place(func, name, args, kwargs)


def _unnamed(func, name, args, kwargs):
    """Operators called by way of torch.ops, and TorchScript."""
    overloads = [func] if hasattr(func, "_schema") else [getattr(func, n) for n in func.overloads()] if hasattr(func, "overloads") else []
    if any(overload._schema.is_mutable for overload in overloads) and (name.endswith("_") or "out" in kwargs or len(overloads) == 1):
        raise NoRule(f"fastscore.jvp: {name} writes into its arguments and cannot be carried through with its tangents.")
    return transposed.transposed(str(name or func), func, args, kwargs)


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
    if name in _FILLS and isinstance(args[0], Dual):
        return _setitem(args[0], ..., func(torch.empty_like(args[0].stack[0].detach()), *args[1:], **kwargs)) or args[0]
    copied = name in ("zero_", "fill_", "copy_")
    if (plain is None and not copied) or not args or not isinstance(args[0], Dual):
        return _into_ordinary(func, plain, name, args, kwargs)
    if copied:
        return _setitem(args[0], ..., _source(name, args, kwargs)) or args[0]
    return _in_place_of(args[0], plain, *args[1:], **kwargs)


def _source(name, args, kwargs):
    """What zero_, fill_ or copy_ writes."""
    if name == "zero_":
        return 0
    return args[1] if len(args) > 1 else kwargs["value" if name == "fill_" else "other"]


def _into_ordinary(func, plain, name, args, kwargs):
    """An in-place operation on an ordinary tensor, which becomes dual numbers."""
    target = args[0] if args else None
    copied = name in ("copy_", "fill_")
    if (plain is None and not copied) or not isinstance(target, torch.Tensor) or not _all_first_order((args, kwargs)):
        raise NoRule(f"fastscore.jvp: {name} would write dual numbers into an ordinary tensor.")
    _settle()
    inexact = target.is_floating_point() or target.is_complex()
    if name in _FILLS or name == "resize_as_" or not inexact:   # what is drawn is a value alone, and integers have no tangents
        return _on_values(func, args, kwargs)
    carriers.check(name, target)
    if copied:
        return _overwrite(target, Dual(carriers.aligned_copy(_source(name, args, kwargs).stack, target.shape)), name)
    result = plain(*args, **kwargs)
    if not isinstance(result, Dual):
        return _on_values(func, args, kwargs)
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
        _write(target, result)
    return target


def _into_out(func, args, kwargs):
    """The results of an operation, written into the tensors given as out=."""
    name, out = getattr(func, "__name__", str(func)), kwargs["out"]
    if not _all_first_order((args, kwargs)):
        raise NoRule(f"fastscore.jvp: {name} with out= cannot be carried through with its tangents.")
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
        return _write(out, result)
    _settle()
    if not isinstance(result, Dual):
        return out.copy_(result) if out.shape == result.shape else out.resize_(result.shape).copy_(result)
    if not (out.is_floating_point() or out.is_complex()):
        raise NoRule(f"fastscore.jvp: {name} would write dual numbers into {out.dtype}.")
    fresh = Dual(result.stack.clone())
    if out.shape != result.shape and not out.numel():
        return carriers.replace(out, fresh.stack, name)
    return _overwrite(out, fresh, name)


def _copy(x):
    return x.like(x.stack.clone()) if isinstance(x, Dual) else x


def _settle():
    """Before a write: compute what waits, for it may read what is written."""
    call = _call()
    if call is None:
        return
    with call.lock:   # until all is computed: another thread may have begun
        references, call.waiting = call.waiting, []
        for reference in references:
            waiting = reference()
            if waiting is not None:
                waiting.stack   # noqa: B018


def note_copy(*stacks):
    """What should share memory and does not: from now on neither may be written to."""
    call = _call()
    if call:
        call.copied += [weakref.ref(memory(s)) for s in stacks]


def _check_alias(target):
    if _linearized():
        raise NotImplementedError("fastscore.jvp: torch.func.linearize loses in-place operations inside f; take torch.func.jvp.")
    call = _call()
    if call and call.copied:
        own = memory(target.stack)
        if any(reference() is own for reference in call.copied):
            raise NoRule("fastscore.jvp: an in-place operation on what has a view that had to be a copy.")


def _write(target, result):
    """In place on the memory of the stack, so that views of it see the change; `result` was made from a copy, which autograd may keep."""
    if not isinstance(target, Dual) or result.shape != target.shape:
        raise NoRule("fastscore.jvp: an in-place operation would change a shape or write into an ordinary tensor.")
    _check_alias(target)
    _settle()
    if not isinstance(result, Dual):   # sign_, floor_: no function of the tangents
        return _setitem(target, ..., result) or target
    target.stack.copy_(result.stack)
    return target


def _in_place_of(target, function, *args, **kwargs):
    """Let function(target, ...) take the place of its argument."""
    if type(target) not in (Dual, ComplexDual) or not _alone(target):
        return _write(target, function(_copy(target), *args, **kwargs))
    result = function(target, *args, **kwargs)
    if not isinstance(result, Dual) or result.shape != target.shape:
        return _write(target, function(_copy(target), *args, **kwargs))   # sgn_: its graph has saved what is overwritten
    _check_alias(target)
    _settle()
    target.stack = carriers.fitted(_own(result), target)   # the graph may have saved what was there
    return target


def _alone(x):
    """Whether no other number and no value that f can see lies in the memory of x: it may take another stack, then."""
    _settle()
    return not _seen(x.stack, but=(x,))


def _own(result):
    """The stack of a result, in memory that f cannot see otherwise."""
    return result.stack.clone() if _seen(result.stack, but=(result,)) else result.stack


def _seen(s, but):
    call = _call()
    if call is None or torch._C._functorch.is_functorch_wrapped_tensor(s):
        return True
    own = memory(s)
    if any(reference() is own for reference in call.shown):
        return True
    return any(memory(n.computed) is own for n in call.numbers() if n.computed is not None and all(n is not b for b in but))


def _setitem(target, index, source):
    if not isinstance(target, Dual):
        if not isinstance(source, Dual) or not (target.is_floating_point() or target.is_complex()):
            return _on_values(torch.Tensor.__setitem__, (target, index, source), {})
        if not _all_first_order(source):
            raise NoRule("fastscore.jvp: indexed writing of dual numbers into an ordinary tensor.")
        _settle()
        carriers.check("indexed writing", target)
        carriers.carry(target, len(source.stack), "indexed writing")
    _check_alias(target)
    _settle()
    index = index if isinstance(index, tuple) else (index,)
    if separated(index, more=0):
        for m in range(len(target.stack)):   # the indexed dimensions would move in front of the stack's
            target.stack[m][index] = source.stack[m] if isinstance(source, Dual) else source if m == 0 else 0
    elif isinstance(source, Dual):
        target.stack[(slice(None), *index)] = _fitted(source.stack, target.stack[:1][(slice(None), *index)].dim())
    else:
        target.stack[(slice(0, 1), *index)] = source
        target.stack[(slice(1, None), *index)] = 0


def _fitted(s, dims):
    """The stack with as many dimensions as the place it goes to, so that its first one stays the first."""
    s = aligned(s, dims - 1)
    extra = s.dim() - dims   # leading ones
    return s.reshape(len(s), *s.shape[1 + extra :]) if extra else s


def _generic(func, args, kwargs):
    """Stock forward mode through one operation: right for everything but the norms, which have rules of their own."""
    name = getattr(func, "__name__", str(func))
    if func in compositions.REFUSED:
        compositions.refused(compositions.REFUSED[func])()
    if func in (torch.linalg.eig, torch.linalg.eigh):   # eigenvectors of complex matrices, and their phase
        raise NoRule(f"fastscore.jvp: {name} has tangents that depend on the phase of eigenvectors.")
    composed = compositions.FORMULAS.get(func)   # of complex numbers and of values without dimensions, too, which rules leave out
    if composed is not None and (result := composed(*args, **kwargs)) is not NotImplemented:
        return result

    if backends._dual_level():
        raise NoRule(f"fastscore.jvp: {name} inside the forward mode of another level, and forward mode does not nest.")
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [kept.value_of(a) for a in leaves]
    narrow = _narrow_dtype(leaves)
    places = [i for i, a in enumerate(leaves) if isinstance(a, Dual)]
    stacks = [leaves[i].stack for i in places]
    draws, form = Draws(stacks[0].device, leaves), []

    def plain(*duals):
        filled = list(leaves)
        for i, d in zip(places, duals):
            filled[i] = d
        arguments, keywords = tree_unflatten(filled, spec)
        outputs, spec_out = tree_flatten(func(*arguments, **keywords))
        transposed.check_nested(name, outputs)
        form[:] = spec_out, [o is None for o in outputs]
        if not all(isinstance(o, torch.Tensor | None) for o in outputs):
            raise NoRule(f"fastscore.jvp: {name} returns something else than tensors.")
        return tuple(o for o in outputs if o is not None)

    def along(m):
        draws.again()
        with draws.watched():
            return torch.func.jvp(plain, tuple(s[0] for s in stacks), tuple(s[m] for s in stacks))

    with torch._C.DisableTorchFunctionSubclass(), _differentiable(name):
        try:
            outputs = [along(m) for m in range(1, len(stacks[0]))]
        except RuntimeError:   # it has no forward mode, or one with a fault; what f itself has done wrong comes again
            outputs = None
        if outputs is None:
            draws.again()
            return transposed.transposed(name, func, tree_unflatten(leaves, spec)[0], kwargs)
        if narrow is not None:
            outputs = [[[_narrowed(t, narrow) for t in part] for part in output] for output in outputs]
        values, (shape, missing) = outputs[0][0], form
        views = [len(stacks) == 1 and _shares_memory(value, stacks[0]) for value in values]
        whole = torch.vmap(plain)(stacks[0]) if any(views) else None   # a view stays one, of the whole stack
        joined = (Dual(whole[k]) if views[k] else _joined(v, [t[k] for _, t in outputs]) for k, v in enumerate(values))
        joined = iter(list(joined))
    return tree_unflatten([None if none else next(joined) for none in missing], shape)


def _narrow_dtype(leaves):
    """The dtype of an operation on 0-d tensors, where a transform takes Python's numbers for tensors of their own, in float64.

    None where nothing has to be mended: no number, a dtype that was asked for, or a tensor that is wide by itself.
    """
    tensors = [a for a in leaves if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.is_complex())]
    numbers = any(isinstance(a, float | complex | int) for a in leaves)
    if not numbers or any(a.dim() for a in tensors) or any(isinstance(a, torch.dtype) for a in leaves):
        return None
    dtype = functools.reduce(torch.promote_types, (a.dtype for a in tensors))
    return None if dtype in (torch.float64, torch.complex128) else dtype


def _narrowed(t, dtype):
    if t.dtype not in (torch.float64, torch.complex128):
        return t
    return t.to(dtype if t.is_complex() == dtype.is_complex else dtype.to_complex() if t.is_complex() else dtype.to_real())


def _joined(value, tangents):
    if value.layout != torch.strided:
        raise NoRule("fastscore.jvp: a sparse result cannot be carried with its tangents.")
    return Dual(torch.stack([value, *tangents])) if value.is_floating_point() or value.is_complex() else value


def _shares_memory(a, b):
    return memory(a).data_ptr() == memory(b).data_ptr() and a.numel() > 0


def _differentiable(name):
    """Attention and recurrent layers in the forms that have a forward mode."""
    if name in ("multi_head_attention_forward", "scaled_dot_product_attention"):
        return sdpa_kernel(SDPBackend.MATH)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return torch.backends.mkldnn.flags(enabled=False)
    return contextlib.nullcontext()
