"""What each torch function does to dual numbers, on the stack (1 + M, *) of the value and its tangents.

Every rule is made of differentiable torch operations or of our own Functions, so reverse mode goes through all of them.
"""

import math

import torch
import torch.nn.functional as F

from fastscore import backend as backends
from fastscore.dual import chains, compositions, norms, numbers
from fastscore.dual.functions import (
    activate_stack,
    add_bias,
    add_to_value,
    in_half,
    linear_in_half,
    matmul_stack,
    normalise_stack,
    softmax_stack,
)
from fastscore.ops.normalise import Form, normalise, pack

RULES = {}
HOLDERS = (torch.Tensor, torch, F, torch._C._nn, torch.special)


def rule(*names, table=RULES):
    """Register a rule under every function of that name in torch, torch.Tensor and torch.nn.functional."""

    def register(function):
        for name in names:
            for holder in HOLDERS:
                if hasattr(holder, name):
                    table.setdefault(getattr(holder, name), function)
        return function

    return register


class NoDual(Exception):
    """A rule's first argument is an ordinary tensor; stock forward mode takes the operation."""


def is_dual(a):
    return hasattr(type(a), "stack")


def stack(a):
    try:
        return a.stack
    except AttributeError:
        raise NoDual from None


def dual(s):
    return numbers.Dual(s)


def later(x, pending):
    return numbers.Dual.later(pending) if type(x) is numbers.Dual else dual(pending.stack())   # other kinds do not wait


def value(a):
    return a.stack[0] if is_dual(a) else a


def memory(s):
    """The storage of a stack, inside a transform of torch.func, too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(s):
        s = torch._C._functorch.get_unwrapped(s)
    return s.untyped_storage()


def shift(d):
    """A dimension of the value as one of the stack."""
    return d if d < 0 else d + 1


def shape_of(args):
    """Sizes given as one sequence or one by one."""
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def aligned(s, dims):
    """The stack of a value with at least `dims` dimensions."""
    missing = dims - (s.dim() - 1)
    return s.reshape(s.shape[0], *(1,) * missing, *s.shape[1:]) if missing > 0 else s


def both(a, b):
    """Two stacks aligned to broadcast with each other."""
    if a.dtype != b.dtype:   # by the rules for the values, whose dimensions count
        dtype = torch.result_type(a[0], b[0])
        a, b = a.to(dtype), b.to(dtype)
    dims = max(a.dim(), b.dim()) - 1
    return aligned(a, dims), aligned(b, dims)


def beside(s, c):
    """A stack and a constant, in the dtype that PyTorch gives to the value and the constant."""
    if not isinstance(c, torch.Tensor) or c.dtype == s.dtype:
        return s, c
    dtype = torch.result_type(s[0], c)
    return s.to(dtype), c.to(dtype)


def joined(y, ty):
    return dual(torch.cat([y[None], ty]))


def parts(s):
    """Value and tangents: one split, whose gradient is one copy, where two slices' are written into zeros of the whole size and added."""
    value, tangents = s.split_with_sizes((1, len(s) - 1))
    return value.squeeze(0), tangents


# ---- maps that are linear in the input and work sample by sample: one call for value and tangents


def _folded(function, x, *args, **kwargs):
    return dual(_fold(function, stack(x), *args, **kwargs))


def _fold(function, s, batched_dims, *args, bias=None, **kwargs):
    if s.dim() == batched_dims:   # a value without batch dimension: the stack is the batch
        y = function(s, *args, **kwargs)
        return y if bias is None else add_bias(y, bias[0], 1)
    y, sizes = function(s.flatten(0, 1), *args, **kwargs), s.shape[:2]
    return torch.unflatten(y if bias is None else add_bias(y, bias, sizes[1]), 0, sizes)


def _convolution(function):
    def apply(input, weight, bias=None, *args, **kwargs):
        if is_dual(weight) or is_dual(bias):
            return NotImplemented
        s, dims = stack(input), weight.dim()
        bias = None if bias is None else bias.reshape(1, -1, *(1,) * (dims - 2))
        low = _without_instructions(s, weight)
        if low is None and bias is not None and 4 * bias.numel() <= s.shape[1 - dims] and in_half(s):
            # By two calls, which costs little where there are few channels to write: the last layer of an image's score.
            value = _fold(function, s[:1], dims, weight, bias.flatten(), *args, **kwargs)
            return dual(torch.cat([value, _fold(function, s[1:], dims, weight, None, *args, **kwargs)]))
        if low is None:
            return dual(_fold(function, s, dims, weight, None, *args, bias=bias, **kwargs))
        with torch.autocast("cpu", enabled=False):
            s, weight, bias = (None if t is None else t.to(low).float() for t in (s, weight, bias))
            return dual(_fold(function, s, dims, weight, None, *args, bias=bias, **kwargs).to(low))

    return apply


def _without_instructions(s, weight):
    """The half precision of a convolution that this processor has no instructions for; None elsewhere.

    PyTorch's own loops then add up the weight's gradient in that precision, sample by sample: the longer the stack, the more is lost.
    """
    if s.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):   # the usual case
        return None
    if s.device.type != "cpu" or torch.float64 in (s.dtype, weight.dtype):
        return None
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
    else:
        low = s.dtype if s.dtype == weight.dtype else None   # which PyTorch refuses
    return low if low in (torch.bfloat16, torch.float16) and not _has_instructions(low) else None


def _has_instructions(low):
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    ops = torch.ops.mkldnn
    return ops._is_mkldnn_bf16_supported() if low == torch.bfloat16 else ops._is_mkldnn_fp16_supported()


for _name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
    rule(_name)(_convolution(getattr(F, _name)))


@rule("linear")
def linear(input, weight, bias=None):
    if is_dual(weight) or is_dual(bias):
        return NotImplemented
    pending = chains.linear(input.pending or input.computed, weight, bias)
    if pending is not None:
        return later(input, pending)
    s = stack(input)
    if bias is not None and weight.dim() == 2 and in_half(s):
        return dual(linear_in_half(s, weight, bias))
    y = F.linear(s, weight)
    return dual(y if bias is None else add_bias(y, bias, 1))


def _pooling(function, dims):
    return lambda input, *args, **kwargs: _folded(function, input, dims, *args, **kwargs)


for _name, _dims in (("avg_pool1d", 3), ("avg_pool2d", 4), ("avg_pool3d", 5), ("adaptive_avg_pool1d", 3), ("adaptive_avg_pool2d", 4),
                     ("adaptive_avg_pool3d", 5), ("pixel_shuffle", 4), ("pixel_unshuffle", 4), ("unfold", 4), ("fold", 3)):  # fmt: skip
    if _name != "unfold":
        rule(_name)(_pooling(getattr(F, _name), _dims))
RULES[F.unfold] = _pooling(F.unfold, 4)   # Tensor.unfold is another function


@rule("interpolate")
def interpolate(input, *args, **kwargs):
    return _folded(F.interpolate, input, input.dim(), *args, **kwargs)


@rule("pad")
def pad(input, pad, mode="constant", value=None):
    if mode != "constant":
        return _folded(F.pad, input, input.dim(), pad, mode)
    y = F.pad(stack(input), pad)
    if value:
        y = add_to_value(y, value * (1 - F.pad(torch.ones_like(stack(input)[0]), pad)))
    return dual(y)


# ---- linear maps whose dimensions only move by one


@rule("reshape")
def reshape(x, *shape):
    shape = shape_of(shape)
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return NotImplemented
    if -1 in shape:
        known = -math.prod(shape)
        shape = tuple(x.numel() // max(known, 1) if n == -1 else n for n in shape)
    return dual(stack(x).reshape(len(stack(x)), *shape))


@rule("view")
def view(x, *shape):
    y = reshape(x, *shape)
    if is_dual(y):
        told_apart(x, y)
    return y


def told_apart(x, y):
    if x.numel() and memory(stack(x)).data_ptr() != memory(stack(y)).data_ptr():
        numbers.note_copy(stack(x), stack(y))   # the stack does not lie in memory as the value alone would


@rule("reshape_as")
def reshape_as(x, other):
    return reshape(x, tuple(other.shape))


@rule("view_as")
def view_as(x, other):
    return view(x, tuple(other.shape))


@rule("expand")
def expand(x, *shape):
    shape = shape_of(shape)
    s = aligned(stack(x), len(shape))
    return dual(s.expand(len(s), *shape))


@rule("expand_as")
def expand_as(x, other):
    return expand(x, tuple(other.shape))


@rule("flatten")
def flatten(x, start_dim=0, end_dim=-1):
    if x.dim() == 0:
        return dual(stack(x)[:, None])
    return dual(stack(x).flatten(shift(start_dim), shift(end_dim)))


@rule("unflatten")
def unflatten(x, dim, sizes):
    return dual(stack(x).unflatten(shift(dim), sizes))


@rule("transpose", "swapaxes", "swapdims")
def transpose(x, dim0, dim1):
    return dual(stack(x).transpose(shift(dim0), shift(dim1)))


@rule("permute")
def permute(x, *dims):
    dims = shape_of(dims)
    return dual(stack(x).permute(0, *(1 + d % x.dim() for d in dims)))


@rule("t")
def t(x):
    return x if x.dim() < 2 else transpose(x, 0, 1)


RULES[torch.Tensor.T.__get__] = lambda x: dual(stack(x).permute(0, *range(x.dim(), 0, -1)))
RULES[torch.Tensor.mT.__get__] = RULES[torch.Tensor.mH.__get__] = lambda x: transpose(x, -1, -2)


@rule("movedim", "moveaxis")
def movedim(x, source, destination):
    one = isinstance(source, int)
    source, destination = ((d,) if one else d for d in (source, destination))
    return dual(stack(x).movedim(tuple(1 + d % x.dim() for d in source), tuple(1 + d % x.dim() for d in destination)))


@rule("unsqueeze")
def unsqueeze(x, dim):
    return dual(stack(x).unsqueeze(shift(dim)))


@rule("squeeze")
def squeeze(x, dim=None):
    dims = range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    keep = [n for d, n in enumerate(x.shape) if n != 1 or d not in {e % max(x.dim(), 1) for e in dims}]
    return dual(stack(x).reshape(len(stack(x)), *keep))


@rule("select")
def select(x, dim, index):
    return dual(stack(x).select(shift(dim), index))


@rule("narrow")
def narrow(x, dim, start, length):
    return dual(stack(x).narrow(shift(dim), start, length))


@rule("chunk")
def chunk(input, chunks, dim=0):
    return tuple(dual(s) for s in stack(input).chunk(chunks, shift(dim)))


@rule("split")
def split(tensor, split_size_or_sections, dim=0):
    return tuple(dual(s) for s in stack(tensor).split(split_size_or_sections, shift(dim)))


@rule("tensor_split")
def tensor_split(input, indices_or_sections, dim=0):
    if isinstance(indices_or_sections, torch.Tensor):
        indices_or_sections = indices_or_sections.tolist()
    sections = indices_or_sections if isinstance(indices_or_sections, int) else tuple(indices_or_sections)
    return tuple(dual(s) for s in stack(input).tensor_split(sections, shift(dim)))


@rule("unbind")
def unbind(x, dim=0):
    return tuple(dual(s) for s in stack(x).unbind(shift(dim)))


@rule("repeat", "tile")
def repeat(x, *sizes):
    sizes = shape_of(sizes)
    return dual(aligned(stack(x), len(sizes)).repeat(1, *(1,) * (x.dim() - len(sizes)), *sizes))


@rule("repeat_interleave")
def repeat_interleave(x, repeats, dim=None, **kwargs):
    return dual((stack(x).flatten(1) if dim is None else stack(x)).repeat_interleave(repeats, 1 if dim is None else shift(dim), **kwargs))


@rule("flip")
def flip(x, *dims):
    return dual(stack(x).flip(tuple(1 + d % x.dim() for d in shape_of(dims))))


@rule("roll")
def roll(x, shifts, dims=None):
    if dims is None or dims in ((), []):
        return reshape(dual(stack(x).flatten(1).roll(shifts, 1)), tuple(x.shape))
    return dual(stack(x).roll(shifts, shift(dims) if isinstance(dims, int) else tuple(map(shift, dims))))


@rule("tril")
def tril(x, diagonal=0):
    return dual(stack(x).tril(diagonal))


@rule("triu")
def triu(x, diagonal=0):
    return dual(stack(x).triu(diagonal))


@rule("index_select")
def index_select(x, dim, index):
    return dual(stack(x).index_select(shift(dim), index))


@rule("gather")
def gather(x, dim, index):
    return dual(stack(x).gather(shift(dim), index.expand(len(stack(x)), *index.shape)))


@rule("__getitem__")
def getitem(x, index):
    index = index if isinstance(index, tuple) else (index,)
    if separated(index):
        return NotImplemented   # the indexed dimensions would move in front of the stack's
    return dual(stack(x)[(slice(None), *index)])


def separated(index, more=1):
    """Whether an index holds arrays, more than `more` of them, that do not follow each other."""
    arrays = [i for i, part in enumerate(index) if not isinstance(part, int | slice | None | type(...))]
    return len(arrays) > 1 and (not more or arrays != list(range(arrays[0], arrays[0] + len(arrays))))


@rule("contiguous")
def contiguous(x, memory_format=torch.contiguous_format):
    return x if x.is_contiguous(memory_format=memory_format) else clone(x, memory_format=memory_format)


@rule("clone")
def clone(x, *, memory_format=torch.preserve_format):
    s = stack(x)
    if memory_format in (torch.contiguous_format, torch.preserve_format):
        return dual(s.clone(memory_format=memory_format))
    return dual(s.flatten(0, 1).clone(memory_format=memory_format).unflatten(0, s.shape[:2]))   # within each of the stack's values


def _conversion(name):
    def apply(x, *args, **kwargs):
        if not is_dual(x):   # towards a dual number's dtype
            return getattr(x, name)(*map(value, args), **{k: value(a) for k, a in kwargs.items()})
        layout = kwargs.pop("memory_format", torch.preserve_format)
        s = getattr(stack(x), name)(*map(value, args), **kwargs)
        if not isinstance(s, torch.Tensor):   # type() without arguments
            return s
        if not (s.is_floating_point() or s.is_complex()):   # integers have no tangents
            return s[0]
        return dual(s) if layout == torch.preserve_format else contiguous(dual(s), layout)

    return apply


for _name in ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu"):
    rule(_name)(_conversion(_name))


@rule("neg", "negative", "__neg__")
def neg(x):
    return dual(-stack(x))


@rule("cat", "concat", "concatenate")
def cat(tensors, dim=0):
    if any(a.shape == (0,) for a in tensors):   # which cat skips, whatever the others' dimensions are
        tensors = [a for a in tensors if a.shape != (0,)] or tensors
        if not any(map(is_dual, tensors)):
            return torch.cat(tensors, dim)
    return dual(torch.cat(_alike(tensors), shift(dim)))


@rule("stack")
def stack_of(tensors, dim=0):
    return dual(torch.stack(_alike(tensors), shift(dim)))


def _alike(tensors):
    """Stacks of all of them; constants have zero tangents."""
    n = next(len(stack(a)) for a in tensors if is_dual(a))
    return [stack(a) if is_dual(a) else constant(a, n) for a in tensors]


def constant(a, n):
    return torch.cat([a[None], a.new_zeros(n - 1, *a.shape)])


def _reduction(name):
    def apply(x, dim=None, keepdim=False, **kwargs):
        s = stack(x)
        if dim is None or dim in ((), []):
            dim = tuple(range(x.dim()))
        dims = shift(dim) if isinstance(dim, int) else tuple(map(shift, dim))
        return dual(getattr(s, name)(dims, keepdim=keepdim, **kwargs))

    return apply


for _name in ("sum", "mean"):
    rule(_name)(_reduction(_name))


@rule("cumsum")
def cumsum(x, dim, **kwargs):
    return dual(stack(x).cumsum(shift(dim), **kwargs))


def _tensor(c, like, dtype):
    """A number as a tensor, made on the device: a copy from the host would be waited for."""
    return c.to(dtype) if isinstance(c, torch.Tensor) else torch.full((), c, dtype=dtype, device=like.device)


@rule("where")
def where(condition, input=None, other=None):
    if input is None or is_dual(condition):
        return NotImplemented
    n, dtype = len(stack(input if is_dual(input) else other)), torch.result_type(value(input), value(other))
    dims = max(c.dim() for c in (condition, input, other) if isinstance(c, torch.Tensor))

    def whole(c):
        s = stack(c).to(dtype) if is_dual(c) else constant(_tensor(c, condition, dtype), n)
        return aligned(s, dims)

    return dual(torch.where(condition, whole(input), whole(other)))


RULES[torch.Tensor.where] = lambda x, condition, other: where(condition, x, other)


@rule("masked_fill")
def masked_fill(x, mask, value):
    if not is_dual(x) or is_dual(value):
        return where(mask, value, x)
    s = aligned(stack(x), mask.dim())
    s = s.expand(len(s), *torch.broadcast_shapes(s.shape[1:], mask.shape)).masked_fill(mask, 0)
    return dual(add_to_value(s, torch.zeros_like(s[0]).masked_fill(mask, value)))


# ---- arithmetic


def _number(a):
    return isinstance(a, int | float)


def _summand(b, a):
    """Integers in a's dtype: unsigned ones would wrap when negated or multiplied."""
    whole = isinstance(b, torch.Tensor) and not b.is_floating_point() and not b.is_complex() and b.dtype != torch.bool
    return b.to(a.dtype) if whole and isinstance(a, torch.Tensor) else b


@rule("add", "__add__", "__radd__")
def add(a, b, *, alpha=1):
    b = _summand(b, a) * alpha if alpha != 1 else b
    if is_dual(a) and is_dual(b):
        a, b = both(stack(a), stack(b))
        return dual(a + b)
    a, c = (a, b) if is_dual(a) else (b, a)
    s = stack(a)
    if isinstance(c, torch.Tensor):
        s, c = beside(s, c)
        s = aligned(s, c.dim())
        shape = torch.broadcast_shapes(s.shape[1:], c.shape)
        s = s.expand(len(s), *shape)
    return dual(add_to_value(s, c))


@rule("sub", "subtract", "__sub__")
def sub(a, b, *, alpha=1):
    b = _summand(b, a)
    b = b * alpha if alpha != 1 else b
    return add(a, -b)


@rule("rsub", "__rsub__")
def rsub(a, b, *, alpha=1):
    return sub(b, a, alpha=alpha)


@rule("mul", "multiply", "__mul__", "__rmul__")
def mul(a, b):
    if is_dual(a) and is_dual(b):
        (a, da), (b, db) = map(parts, both(stack(a), stack(b)))
        return joined(a * b, da * b + a * db)
    a, c = (a, b) if is_dual(a) else (b, a)
    s, c = beside(stack(a), c)
    return dual(aligned(s, c.dim() if isinstance(c, torch.Tensor) else 0) * c)


@rule("div", "divide", "true_divide", "__truediv__")
def div(a, b, *, rounding_mode=None):
    if rounding_mode is not None:
        return NotImplemented
    if not is_dual(b):
        s, b = beside(stack(a), b)
        return dual(aligned(s, b.dim() if isinstance(b, torch.Tensor) else 0) / b)
    return mul(a, reciprocal(b))


@rule("__rdiv__", "__rtruediv__")
def rdiv(a, b):
    return div(b, a)


@rule("addcmul")
def addcmul(input, tensor1, tensor2, *, value=1):
    product = mul(tensor1, tensor2) if is_dual(tensor1) or is_dual(tensor2) else tensor1 * tensor2
    return add(input, product, alpha=value)


@rule("lerp")
def lerp(input, end, weight):
    difference = sub(end, input) if is_dual(input) or is_dual(end) else end - input
    return add(input, mul(difference, weight))


def _elementwise(slope):
    """slope(x, y): f'(x), given y = f(x)."""

    def rule_for(function):
        def apply(x, *args, **kwargs):
            x, dx = parts(stack(x))
            y = function(x, *args, **kwargs)
            return joined(y, slope(x, y) * dx)

        return apply

    return rule_for


_SLOPES = {
    "exp": lambda x, y: y,
    "expm1": lambda x, y: y + 1,
    "log": lambda x, y: 1 / x,
    "log1p": lambda x, y: 1 / (x + 1),
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y / x,
    "square": lambda x, y: 2 * x,
    "sin": lambda x, y: x.cos(),
    "cos": lambda x, y: -x.sin(),
    "abs": lambda x, y: x.sgn(),
    "reciprocal": lambda x, y: -y.square(),
    "erf": lambda x, y: (2 / math.sqrt(math.pi)) * (-x.square()).exp(),
}
for _name, _slope in _SLOPES.items():
    rule(_name)(_elementwise(_slope)(getattr(torch, _name)))
reciprocal = RULES[torch.reciprocal]
RULES[torch.Tensor.__abs__] = RULES[torch.abs]


@rule("pow", "__pow__")
def power(x, exponent):
    if is_dual(exponent) and not is_dual(x):
        if isinstance(x, complex) or (isinstance(x, torch.Tensor) and x.is_complex()):
            return NotImplemented
        s, x = stack(exponent), _tensor(x, exponent, exponent.dtype)
        y = x ** s[0]
        # 0 to a positive power is flat in the exponent; PyTorch's slope, 0 · log 0, has no gradient.
        return joined(y, y * torch.where(x == 0, 1.0, x).log() * aligned(s, x.dim())[1:])
    if not is_dual(x) or not _number(exponent):
        return NotImplemented
    s = stack(x)
    if exponent == 0:   # 0 · x⁻¹ is no number at x = 0
        return joined(s[0] ** 0, torch.zeros_like(s[1:]))
    x, dx = parts(s)
    return joined(x**exponent, exponent * x ** (exponent - 1) * dx)


def _activation(name, unless=lambda *args, **kwargs: False):
    def apply(input, *args, inplace=False, **kwargs):
        if unless(*args, **kwargs):
            return NotImplemented
        pending = input.pending   # which another thread may compute meanwhile
        if pending:   # of a linear layer
            return later(input, chains.Pending(pending, chains.Step(name=name), pending.shape))
        return dual(activate_stack(stack(input), name))

    return apply


for _name in ("relu", "silu", "tanh", "sigmoid"):
    rule(_name)(_activation(_name))
rule("elu")(_activation("elu", unless=lambda alpha=1.0: alpha != 1))
_GELUS = {"none": _activation("gelu"), "tanh": _activation("gelu_tanh")}
rule("softplus")(_activation("softplus", unless=lambda beta=1, threshold=20: beta != 1 or threshold < 20))


@rule("gelu")
def gelu(input, *, approximate="none"):
    return _GELUS[approximate](input) if approximate in _GELUS else NotImplemented


@rule("glu")
def glu(input, dim=-1):
    a, b = chunk(input, 2, dim)
    return mul(a, RULES[torch.sigmoid](b))


@rule("softmax")
def softmax(input, dim=None, _stacklevel=3, dtype=None):
    if dim is None:
        return NotImplemented
    s = stack(input) if dtype is None else stack(input).to(dtype)
    return dual(softmax_stack(s, dim))


@rule("log_softmax")
def log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    if dim is None:
        return NotImplemented
    s = stack(input) if dtype is None else stack(input).to(dtype)
    x, dx = parts(s)
    y = x.log_softmax(dim)
    return joined(y, dx - (y.exp() * dx).sum(shift(dim), keepdim=True))


@rule("matmul", "__matmul__", "bmm", "mm", "mv", "dot")
def matmul(a, b):
    if is_dual(a) and is_dual(b):
        if a.dim() < 2 or b.dim() < 2:
            return NotImplemented
        return dual(matmul_stack(*both(stack(a), stack(b))))
    if is_dual(a):
        if b.layout != torch.strided:
            return transpose(_sparse_times(b.t(), t(a)), 0, 1) if a.dim() == 2 else NotImplemented
        return dual(stack(a) @ b) if a.dim() >= 2 and b.dim() <= a.dim() else NotImplemented
    if a.layout != torch.strided:
        return _sparse_times(a, b)
    if b.dim() < 2 or a.dim() > b.dim() or a.dim() < 2:
        return NotImplemented
    return dual(a @ stack(b))


def _sparse_times(a, b):
    """A sparse matrix (n, m) times vectors (m,) or matrices (m, k): all of the stack as columns."""
    s = stack(b).reshape(len(stack(b)), b.shape[0], -1)   # (1 + M, m, k)
    y = a @ s.movedim(0, 1).flatten(1)
    return dual(y.unflatten(1, (len(s), -1)).movedim(1, 0).reshape(len(s), -1, *b.shape[1:]))


RULES[torch.Tensor.__rmatmul__] = lambda a, b: matmul(b, a)


@rule("baddbmm")
def baddbmm(input, batch1, batch2, *, beta=1, alpha=1):
    product = matmul(batch1, batch2) if is_dual(batch1) or is_dual(batch2) else batch1 @ batch2
    scaled = mul(product, alpha) if is_dual(product) else product * alpha
    return scaled if beta == 0 else add(scaled, input * beta)


# PyTorch makes the tangents of these from a factorisation that it saved as a constant; their reverse mode is right at every order.


def _solve(A, B, *, left=True):
    if backends.levels():
        return compositions.solve(A, B, left=left)
    n = len(stack(A if is_dual(A) else B))
    A, B = (stack(a) if is_dual(a) else constant(a, n) for a in (A, B))
    vector = B.dim() == 2 or (A.dim() - 1 == B.dim() and B.shape[1:] == A.shape[1:-1])   # as torch tells them apart
    A, B = both(A, B[..., None] if vector else B)
    if not left and not vector:   # X A = B
        A, B = A.mT, B.mT
    y = torch.linalg.solve(A[0], B[0])
    s = torch.cat([y[None], torch.linalg.solve(A[0], B[1:] - A[1:] @ y)])
    return dual(s[..., 0] if vector else s if left else s.mT)


def _log_slope(s):
    """tr(A⁻¹ Ȧ), the tangents of log |det A|."""
    return (torch.linalg.inv(s[0]).mT * s[1:]).sum((-2, -1))


def _det(A):
    s = stack(A)
    if backends.levels() or not _invertible(s[0].detach()):   # a singular matrix has no inverse, but its determinant has slopes
        return compositions.det(A)
    y = torch.linalg.det(s[0])
    return joined(y, y * _log_slope(s))


def _invertible(A):
    """Far enough from singular for det A · A⁻¹ to have half its digits."""
    inverse, info = torch.linalg.inv_ex(A)
    condition = torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(inverse, 1) if A.shape[-1] else A.new_ones(A.shape[:-2])
    return bool(((info == 0) & (condition < torch.finfo(A.dtype).eps ** -0.5)).all())


def _logdet(A):
    s = stack(A)
    return joined(torch.logdet(s[0]), _log_slope(s))


def _slogdet(A):
    s = stack(A)
    sign, y = torch.linalg.slogdet(s[0])
    return torch.return_types.slogdet((sign, joined(y, _log_slope(s))))


def _inverse(A):
    s = stack(A)
    y = torch.linalg.inv(s[0])
    return joined(y, -(y @ s[1:] @ y))


RULES[torch.linalg.solve] = _solve
for _function in (torch.linalg.inv, torch.inverse, torch.Tensor.inverse):
    RULES[_function] = _inverse
for _name, _function in (("det", _det), ("logdet", _logdet), ("slogdet", _slogdet)):
    for _holder in (torch, torch.Tensor, torch.linalg):
        if hasattr(_holder, _name):
            RULES[getattr(_holder, _name)] = _function


def _eigh(A, UPLO="L"):
    """V̇ = V (F ∘ VᵀȦV), F_ij = 1/(λ_j - λ_i): PyTorch's tangent has a gradient of NaN."""
    s = stack(A)
    lower = s.tril(-1) if UPLO.upper() == "L" else s.triu(1).mT
    s = lower + lower.mT + torch.diag_embed(s.diagonal(dim1=-2, dim2=-1))
    values, vectors = torch.linalg.eigh(s[0])
    inner = vectors.mT @ s[1:] @ vectors
    same = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    gaps = torch.where(same, 1.0, values.unsqueeze(-2) - values.unsqueeze(-1))
    turned = vectors @ torch.where(same, 0.0, inner / gaps)
    parts = joined(values, inner.diagonal(dim1=-2, dim2=-1)), joined(vectors, turned)
    return torch.return_types.linalg_eigh(parts)


RULES[torch.linalg.eigh] = _eigh
RULES[torch.Tensor.__rpow__] = lambda exponent, x: power(x, exponent)


@rule("scaled_dot_product_attention")
def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return F.dropout(scores.softmax(-1), dropout_p) @ value
    if attn_mask.dtype != torch.bool:
        return F.dropout((scores + attn_mask).softmax(-1), dropout_p) @ value
    nothing = ~attn_mask.any(-1, keepdim=True)   # such rows attend to nothing and are zero
    weights = scores.masked_fill(~(attn_mask | nothing), -math.inf).softmax(-1).masked_fill(nothing, 0)
    return F.dropout(weights, dropout_p) @ value


@rule("multi_head_attention_forward")
def multi_head_attention(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
                         dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
                         use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None,
                         static_v=None, average_attn_weights=True, is_causal=False):  # fmt: skip
    """Tokens first: query (L, B, E). What this leaves out goes through stock forward mode, with attention in plain operations."""
    if need_weights or query.dim() != 3 or any(a is not None for a in (bias_k, bias_v, static_k, static_v)) or add_zero_attn:
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    if query is key is value and not use_separate_proj_weight:
        parts = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        parts = [F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases)]
    q, k, v = (t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in parts)   # (B, H, L, E/H)
    mask = _attention_mask(attn_mask, key_padding_mask, len(q), num_heads, q)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p if training else 0.0)
    return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None


def _attention_mask(attn_mask, padding, B, H, q):
    """One additive mask that broadcasts to (B, H, L, S); in the given ones True means: leave out."""

    def additive(mask):
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask

    total = None if padding is None else additive(padding)[:, None, None]
    if attn_mask is None:
        return total
    attn_mask = additive(attn_mask)
    attn_mask = attn_mask.unflatten(0, (B, H)) if attn_mask.dim() == 3 else attn_mask
    return attn_mask if total is None else attn_mask + total


def _dropout(function):
    """One mask for the value and its tangents."""

    def apply(input, p=0.5, training=True, inplace=False):
        return dual(stack(input) * function(torch.ones_like(stack(input)[0]), p, training))

    return apply


for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
    RULES[getattr(F, _name)] = _dropout(getattr(F, _name))


# ---- normalisations


def _fused(x, groups, weight, bias, eps):
    s = stack(x)   # asked instead of x, whose every answer is a call through `__torch_function__`
    dtype = torch.float64 if s.dtype == torch.float64 else torch.float32
    gamma = torch.ones(s.shape[2], dtype=dtype, device=s.device) if weight is None else weight.to(dtype)
    columns = [gamma] if bias is None else [gamma, bias.to(dtype)]
    return dual(normalise_stack(s, pack(columns), None, Form(groups, False, bias is not None, eps, None), None))


def _dual_affine(x, weight, bias):
    return not is_dual(x) or is_dual(weight) or is_dual(bias)


@rule("instance_norm")
def instance_norm(input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5):
    if running_mean is not None or not use_input_stats or _dual_affine(input, weight, bias) or stack(input).dim() < 4:
        return norms.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _fused(input, 0, weight, bias, eps)


@rule("group_norm")
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=None):
    if _dual_affine(input, weight, bias) or stack(input).dim() < 4:
        return norms.group_norm(input, num_groups, weight, bias, eps)
    return _fused(input, num_groups, weight, bias, eps)


@rule("layer_norm")
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=None):
    norms.check_shape("layer_norm", input, normalized_shape)
    if not is_dual(input):
        return norms.layer_norm(input, normalized_shape, weight, bias, eps)
    lead = input.shape[: input.dim() - len(normalized_shape)]
    h = reshape(_fused(reshape(input, (math.prod(lead), 1, -1)), 1, None, None, eps), tuple(input.shape))
    h = h if weight is None else mul(h, weight)
    h = h if bias is None else add(h, bias)
    return h if h.dtype == input.dtype else h.to(input.dtype)


for _function, _composition in norms.COMPOSED.items():   # batch norm, rms norm, and the forms of torch
    RULES.setdefault(_function, _composition)
RULES[torch.instance_norm] = norms._reordered(instance_norm, ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats",
                                                              "momentum", "eps"))  # fmt: skip


def _own(x, coef, labels, form, backend):
    """Our normalisations' common door."""
    return dual(normalise_stack(stack(x), coef, labels, form, backend))


RULES[normalise] = _own


# ---- what stock formulas get wrong

for _function, _composition in compositions.FORMULAS.items():
    RULES.setdefault(_function, _composition)
for _function, _sentence in compositions.REFUSED.items():
    RULES[_function] = compositions.refused(_sentence)


def _functions(names):
    return {getattr(holder, name) for name in names.split() for holder in HOLDERS if hasattr(holder, name)}


# Whose rules count no dimensions: a value without dimensions takes them, too.
POINTWISE = _functions("""
    add __add__ __radd__ sub subtract __sub__ rsub mul multiply __mul__ __rmul__ div divide true_divide __truediv__ __rdiv__ __rtruediv__
    addcmul lerp pow __pow__ neg negative __neg__ relu silu tanh sigmoid elu gelu softplus where masked_fill clone
    to type type_as float double half bfloat16 cuda cpu dropout
""") | _functions(" ".join(_SLOPES)) | {torch.Tensor.__abs__}  # fmt: skip
