"""Linear maps that move, cut or join: their dimensions move by one."""

import math
from typing import Any

import torch

from fastscore.dual.call import note_copy
from fastscore.dual.number import like, stack, value
from fastscore.dual.samples import (
    alone,
    along,
    along_both,
    along_these,
    anyhow,
    at_least,
    by_parts,
    indexed,
    of_rank,
    several,
)
from fastscore.dual.stacks import aligned, is_dual, memory, padded, separated, shape_of, shift
from fastscore.dual.table import rule


@rule("reshape", apart=anyhow)
def reshape(x: Any, *shape: Any) -> Any:
    if shape and isinstance(shape[0], torch.dtype):   # of view: other bits
        return NotImplemented
    shape = shape_of(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape = tuple(x.numel() // max(known, 1) if n == -1 else n for n in shape)
    return like(x, stack(x).reshape(len(stack(x)), *shape))


@rule("view", apart=anyhow)
def view(x: Any, *shape: Any) -> Any:
    y = reshape(x, *shape)
    if is_dual(y):
        told_apart(x, y)
    return y


def told_apart(x: Any, y: Any) -> None:
    if x.numel() and memory(stack(x)).data_ptr() != memory(stack(y)).data_ptr():
        note_copy(stack(x), stack(y))   # the stack does not lie in memory as the value alone would


@rule("expand", apart=of_rank)
def expand(x: Any, *shape: Any) -> Any:
    shape = shape_of(shape)
    s = aligned(stack(x), len(shape))
    return like(x, s.expand(len(s), *shape))


def _shaped_like(name, reshaped):
    def apply(x, other):
        shape = tuple(other.shape)
        return reshaped(x, shape) if is_dual(x) else getattr(x, name)(shape)

    return apply


# The shape is a constant, whoever has it.
rule("view_as", apart=by_parts)(_shaped_like("view", view))
rule("reshape_as", apart=by_parts)(_shaped_like("reshape", reshape))
rule("expand_as", apart=by_parts)(_shaped_like("expand", expand))


@rule("flatten", apart=anyhow)
def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if x.dim() == 0:
        return like(x, stack(x)[:, None])
    return like(x, stack(x).flatten(shift(start_dim), shift(end_dim)))


@rule("unflatten", apart=anyhow)
def unflatten(x: Any, dim: Any, sizes: Any) -> Any:
    return like(x, stack(x).unflatten(shift(dim), sizes))


@rule("transpose", "swapaxes", "swapdims", apart=along_both)
def transpose(x: Any, dim0: int, dim1: int) -> Any:
    return like(x, stack(x).transpose(shift(dim0), shift(dim1)))


def _from_the_first(rank, *dims):
    return shape_of(dims)[0] % rank == 0


@rule("permute", apart=alone(_from_the_first))
def permute(x: Any, *dims: Any) -> Any:
    dims = shape_of(dims)
    return like(x, stack(x).permute(0, *(1 + d % x.dim() for d in dims)))


@rule("t")
def t(x: Any) -> Any:
    return x if x.dim() < 2 else transpose(x, 0, 1)


@rule(torch.Tensor.T.__get__)
def all_transposed(x: Any) -> Any:
    return like(x, stack(x).permute(0, *range(x.dim(), 0, -1)))


@rule(torch.Tensor.mT.__get__, torch.Tensor.mH.__get__, apart=at_least(3))
def matrix_transposed(x: Any) -> Any:
    return transpose(x, -1, -2)


@rule("movedim", "moveaxis", apart=along_both)
def movedim(x: Any, source: Any, destination: Any) -> Any:
    one = isinstance(source, int)
    source, destination = ((d,) if one else d for d in (source, destination))
    places = (tuple(1 + d % x.dim() for d in dims) for dims in (source, destination))
    return like(x, stack(x).movedim(*places))


@rule("unsqueeze", apart=anyhow)
def unsqueeze(x: Any, dim: Any) -> Any:
    return like(x, stack(x).unsqueeze(shift(dim)))


@rule("squeeze", apart=anyhow)
def squeeze(x: Any, dim: Any = None) -> Any:
    dims = range(x.dim()) if dim is None else dim
    dims = (dims,) if isinstance(dims, int) else dims
    keep = [
        n for d, n in enumerate(x.shape) if n != 1 or d not in {e % max(x.dim(), 1) for e in dims}
    ]
    return like(x, stack(x).reshape(len(stack(x)), *keep))


@rule("select", apart=along())
def select(x: Any, dim: Any, index: Any) -> Any:
    return like(x, stack(x).select(shift(dim), index))


@rule("narrow", apart=along())
def narrow(x: Any, dim: Any, start: Any, length: Any) -> Any:
    return like(x, stack(x).narrow(shift(dim), start, length))


@rule("chunk", apart=along(before=1, dim=0))
def chunk(input: Any, chunks: Any, dim: Any = 0) -> Any:
    return tuple(like(input, s) for s in stack(input).chunk(chunks, shift(dim)))


@rule("split", apart=along(before=1, dim=0))
def split(tensor: Any, split_size_or_sections: Any, dim: Any = 0) -> Any:
    return tuple(like(tensor, s) for s in stack(tensor).split(split_size_or_sections, shift(dim)))


@rule("tensor_split")
def tensor_split(input: Any, indices_or_sections: Any, dim: Any = 0) -> Any:
    if isinstance(indices_or_sections, torch.Tensor):
        indices_or_sections = indices_or_sections.tolist()
    sections = (
        indices_or_sections if isinstance(indices_or_sections, int) else tuple(indices_or_sections)
    )
    return tuple(like(input, s) for s in stack(input).tensor_split(sections, shift(dim)))


@rule("unbind", apart=along(dim=0))
def unbind(x: Any, dim: Any = 0) -> Any:
    return tuple(like(x, s) for s in stack(x).unbind(shift(dim)))


@rule("repeat", "tile", apart=of_rank)
def repeat(x: Any, *sizes: Any) -> Any:
    sizes = shape_of(sizes)
    missing = x.dim() - len(sizes)
    return like(x, aligned(stack(x), len(sizes)).repeat(1, *(1,) * missing, *sizes))


@rule("repeat_interleave", apart=along(before=1))
def repeat_interleave(x: Any, repeats: Any, dim: Any = None, **kwargs: Any) -> Any:
    s = stack(x)
    if dim is None:
        return like(x, s.flatten(1).repeat_interleave(repeats, 1, **kwargs))
    return like(x, s.repeat_interleave(repeats, shift(dim), **kwargs))


@rule("flip", apart=along_these)
def flip(x: Any, *dims: Any) -> Any:
    return like(x, stack(x).flip(tuple(1 + d % x.dim() for d in shape_of(dims))))


@rule("roll", apart=along(before=1))
def roll(x: Any, shifts: Any, dims: Any = None) -> Any:
    if dims is None or dims in ((), []):
        return reshape(like(x, stack(x).flatten(1).roll(shifts, 1)), tuple(x.shape))
    dims = shift(dims) if isinstance(dims, int) else tuple(map(shift, dims))
    return like(x, stack(x).roll(shifts, dims))


@rule("tril", apart=at_least(3))
def tril(x: Any, diagonal: int = 0) -> Any:
    return like(x, stack(x).tril(diagonal))


@rule("triu", apart=at_least(3))
def triu(x: Any, diagonal: int = 0) -> Any:
    return like(x, stack(x).triu(diagonal))


@rule("index_select", apart=along())
def index_select(x: Any, dim: Any, index: Any) -> Any:
    return like(x, stack(x).index_select(shift(dim), index))


@rule("gather", apart=along())
def gather(x: Any, dim: Any, index: Any) -> Any:
    return like(x, stack(x).gather(shift(dim), index.expand(len(stack(x)), *index.shape)))


@rule("__getitem__", apart=indexed)
def getitem(x: Any, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if separated(index):
        return NotImplemented   # the indexed dimensions would move in front of the stack's
    return like(x, stack(x)[(slice(None), *index)])


@rule("contiguous", apart=anyhow)
def contiguous(x: Any, memory_format: Any = torch.contiguous_format) -> Any:
    return (
        x if x.is_contiguous(memory_format=memory_format) else clone(x, memory_format=memory_format)
    )


@rule("clone", apart=anyhow)
def clone(x: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    s = stack(x)
    if memory_format in (torch.contiguous_format, torch.preserve_format):
        return like(x, s.clone(memory_format=memory_format))
    # Within each of the stack's values.
    s = s.flatten(0, 1).clone(memory_format=memory_format).unflatten(0, s.shape[:2])
    return like(x, s)


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
        y = like(x, s)
        return y if layout == torch.preserve_format else contiguous(y, layout)

    return apply


for _name in ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu"):
    rule(_name, apart=None if _name == "type_as" else anyhow)(_conversion(_name))


@rule("neg", "negative", "__neg__", apart=anyhow)
def neg(x: Any) -> Any:
    return like(x, -stack(x))


def _skipped(a):
    """By cat, whatever the others' dimensions are."""
    return (a.stack.shape[1:] if is_dual(a) else a.shape) == (0,)


@rule("cat", "concat", "concatenate", apart=several(new=0))
def cat(tensors: Any, dim: Any = 0) -> Any:
    if any(map(_skipped, tensors)):
        tensors = [a for a in tensors if not _skipped(a)] or tensors
        if not any(map(is_dual, tensors)):
            return torch.cat(tensors, dim)
    return _joined(torch.cat, tensors, dim)


@rule("stack", apart=several(new=1))
def stack_of(tensors: Any, dim: Any = 0) -> Any:
    return _joined(torch.stack, tensors, dim)


def _joined(join, tensors, dim):
    x = next(filter(is_dual, tensors))
    return like(x, join(alike(x, tensors), shift(dim)))


def alike(x: Any, tensors: Any) -> Any:
    """Stacks of all of them, with as many coefficients as each other; x is one of the numbers."""
    n = most(x, tensors)
    return [padded(stack(a), n) if is_dual(a) else constant(a, n) for a in tensors]


def most(x: Any, tensors: Any) -> int:
    """The coefficients of the number that has most, x being one of them."""
    if x.order == 1:
        return len(x.stack)
    return max(len(a.stack) for a in tensors if is_dual(a))


def constant(a: Any, n: Any) -> Any:
    return torch.cat([a[None], a.new_zeros(n - 1, *a.shape)])
