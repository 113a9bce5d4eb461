"""Linear maps that move, cut or join: their dimensions move by one."""

import math
from typing import Any

import torch

from fastscore.dual.call import note_copy
from fastscore.dual.number import dual, is_dual, stack, value
from fastscore.dual.stacks import aligned, memory, separated, shape_of, shift
from fastscore.dual.table import RULES, rule


@rule("reshape")
def reshape(x: Any, *shape: Any) -> Any:
    if shape and isinstance(shape[0], torch.dtype):   # of view: other bits
        return NotImplemented
    shape = shape_of(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape = tuple(x.numel() // max(known, 1) if n == -1 else n for n in shape)
    return dual(stack(x).reshape(len(stack(x)), *shape))


@rule("view")
def view(x: Any, *shape: Any) -> Any:
    y = reshape(x, *shape)
    if is_dual(y):
        told_apart(x, y)
    return y


def told_apart(x: Any, y: Any) -> None:
    if x.numel() and memory(stack(x)).data_ptr() != memory(stack(y)).data_ptr():
        note_copy(stack(x), stack(y))   # the stack does not lie in memory as the value alone would


@rule("reshape_as")
def reshape_as(x: Any, other: Any) -> Any:
    return reshape(x, tuple(other.shape))


@rule("view_as")
def view_as(x: Any, other: Any) -> Any:
    return view(x, tuple(other.shape))


@rule("expand")
def expand(x: Any, *shape: Any) -> Any:
    shape = shape_of(shape)
    s = aligned(stack(x), len(shape))
    return dual(s.expand(len(s), *shape))


@rule("expand_as")
def expand_as(x: Any, other: Any) -> Any:
    return expand(x, tuple(other.shape))


@rule("flatten")
def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if x.dim() == 0:
        return dual(stack(x)[:, None])
    return dual(stack(x).flatten(shift(start_dim), shift(end_dim)))


@rule("unflatten")
def unflatten(x: Any, dim: Any, sizes: Any) -> Any:
    return dual(stack(x).unflatten(shift(dim), sizes))


@rule("transpose", "swapaxes", "swapdims")
def transpose(x: Any, dim0: int, dim1: int) -> Any:
    return dual(stack(x).transpose(shift(dim0), shift(dim1)))


@rule("permute")
def permute(x: Any, *dims: Any) -> Any:
    dims = shape_of(dims)
    return dual(stack(x).permute(0, *(1 + d % x.dim() for d in dims)))


@rule("t")
def t(x: Any) -> Any:
    return x if x.dim() < 2 else transpose(x, 0, 1)


RULES[torch.Tensor.T.__get__] = lambda x: dual(stack(x).permute(0, *range(x.dim(), 0, -1)))
RULES[torch.Tensor.mT.__get__] = RULES[torch.Tensor.mH.__get__] = lambda x: transpose(x, -1, -2)


@rule("movedim", "moveaxis")
def movedim(x: Any, source: Any, destination: Any) -> Any:
    one = isinstance(source, int)
    source, destination = ((d,) if one else d for d in (source, destination))
    return dual(
        stack(x).movedim(
            tuple(1 + d % x.dim() for d in source), tuple(1 + d % x.dim() for d in destination)
        )
    )


@rule("unsqueeze")
def unsqueeze(x: Any, dim: Any) -> Any:
    return dual(stack(x).unsqueeze(shift(dim)))


@rule("squeeze")
def squeeze(x: Any, dim: Any = None) -> Any:
    dims = range(x.dim()) if dim is None else dim
    dims = (dims,) if isinstance(dims, int) else dims
    keep = [
        n for d, n in enumerate(x.shape) if n != 1 or d not in {e % max(x.dim(), 1) for e in dims}
    ]
    return dual(stack(x).reshape(len(stack(x)), *keep))


@rule("select")
def select(x: Any, dim: Any, index: Any) -> Any:
    return dual(stack(x).select(shift(dim), index))


@rule("narrow")
def narrow(x: Any, dim: Any, start: Any, length: Any) -> Any:
    return dual(stack(x).narrow(shift(dim), start, length))


@rule("chunk")
def chunk(input: Any, chunks: Any, dim: Any = 0) -> Any:
    return tuple(dual(s) for s in stack(input).chunk(chunks, shift(dim)))


@rule("split")
def split(tensor: Any, split_size_or_sections: Any, dim: Any = 0) -> Any:
    return tuple(dual(s) for s in stack(tensor).split(split_size_or_sections, shift(dim)))


@rule("tensor_split")
def tensor_split(input: Any, indices_or_sections: Any, dim: Any = 0) -> Any:
    if isinstance(indices_or_sections, torch.Tensor):
        indices_or_sections = indices_or_sections.tolist()
    sections = (
        indices_or_sections if isinstance(indices_or_sections, int) else tuple(indices_or_sections)
    )
    return tuple(dual(s) for s in stack(input).tensor_split(sections, shift(dim)))


@rule("unbind")
def unbind(x: Any, dim: Any = 0) -> Any:
    return tuple(dual(s) for s in stack(x).unbind(shift(dim)))


@rule("repeat", "tile")
def repeat(x: Any, *sizes: Any) -> Any:
    sizes = shape_of(sizes)
    return dual(aligned(stack(x), len(sizes)).repeat(1, *(1,) * (x.dim() - len(sizes)), *sizes))


@rule("repeat_interleave")
def repeat_interleave(x: Any, repeats: Any, dim: Any = None, **kwargs: Any) -> Any:
    return dual(
        (stack(x).flatten(1) if dim is None else stack(x)).repeat_interleave(
            repeats, 1 if dim is None else shift(dim), **kwargs
        )
    )


@rule("flip")
def flip(x: Any, *dims: Any) -> Any:
    return dual(stack(x).flip(tuple(1 + d % x.dim() for d in shape_of(dims))))


@rule("roll")
def roll(x: Any, shifts: Any, dims: Any = None) -> Any:
    if dims is None or dims in ((), []):
        return reshape(dual(stack(x).flatten(1).roll(shifts, 1)), tuple(x.shape))
    return dual(
        stack(x).roll(shifts, shift(dims) if isinstance(dims, int) else tuple(map(shift, dims)))
    )


@rule("tril")
def tril(x: Any, diagonal: int = 0) -> Any:
    return dual(stack(x).tril(diagonal))


@rule("triu")
def triu(x: Any, diagonal: int = 0) -> Any:
    return dual(stack(x).triu(diagonal))


@rule("index_select")
def index_select(x: Any, dim: Any, index: Any) -> Any:
    return dual(stack(x).index_select(shift(dim), index))


@rule("gather")
def gather(x: Any, dim: Any, index: Any) -> Any:
    return dual(stack(x).gather(shift(dim), index.expand(len(stack(x)), *index.shape)))


@rule("__getitem__")
def getitem(x: Any, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if separated(index):
        return NotImplemented   # the indexed dimensions would move in front of the stack's
    return dual(stack(x)[(slice(None), *index)])


@rule("contiguous")
def contiguous(x: Any, memory_format: Any = torch.contiguous_format) -> Any:
    return (
        x if x.is_contiguous(memory_format=memory_format) else clone(x, memory_format=memory_format)
    )


@rule("clone")
def clone(x: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    s = stack(x)
    if memory_format in (torch.contiguous_format, torch.preserve_format):
        return dual(s.clone(memory_format=memory_format))
    # Within each of the stack's values.
    return dual(s.flatten(0, 1).clone(memory_format=memory_format).unflatten(0, s.shape[:2]))


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
def neg(x: Any) -> Any:
    return dual(-stack(x))


@rule("cat", "concat", "concatenate")
def cat(tensors: Any, dim: Any = 0) -> Any:
    # Which cat skips, whatever the others' dimensions are.
    if any(a.shape == (0,) for a in tensors):
        tensors = [a for a in tensors if a.shape != (0,)] or tensors
        if not any(map(is_dual, tensors)):
            return torch.cat(tensors, dim)
    return dual(torch.cat(alike(tensors), shift(dim)))


@rule("stack")
def stack_of(tensors: Any, dim: Any = 0) -> Any:
    return dual(torch.stack(alike(tensors), shift(dim)))


def alike(tensors: Any) -> Any:
    """Stacks of all of them; constants have zero tangents."""
    n = next(len(stack(a)) for a in tensors if is_dual(a))
    return [stack(a) if is_dual(a) else constant(a, n) for a in tensors]


def constant(a: Any, n: Any) -> Any:
    return torch.cat([a[None], a.new_zeros(n - 1, *a.shape)])
