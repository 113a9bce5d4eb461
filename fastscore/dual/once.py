"""Several evaluations of one function that count as one.

Each draws the same random numbers and starts from the same memory.

What the function remembers (running statistics, the iterations of a spectral norm, averages in
buffers, counters, what hooks note in lists, attributes of the user's own objects, global numbers)
is afterwards what the first evaluation made of it. Not seen are attributes of classes and
functions, slots, what weak references lead to, iterators, NumPy arrays, byte arrays, files,
containers of more than 10,000 entries and what those of more than 1,000 hold.
"""

import contextlib
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastscore.dual.code import CONTAINERS, FOREIGN, GENERATORS, OWN, Part
from fastscore.dual.reach import built_in, filled, reached
from fastscore.ops import checks

_LARGE = 2**20   # elements that are not copied on suspicion
_NOTHING = contextlib.nullcontext()


class Once:
    """Enter it around each evaluation.

    >>> once = Once(torch.device("cpu"), f := nn.Dropout())
    >>> results = []
    >>> for _ in range(2):
    ...     with once:
    ...         results.append(f(torch.ones(64)))
    >>> torch.equal(*results)
    True
    """

    times: int
    draws: Any
    after: Any
    memory: list[Any]
    watch: Any

    def __init__(self, device: torch.device, *functions: Any) -> None:
        self.times = 0
        # Tensors have no values to keep.
        tracing = torch._C._len_torch_dispatch_stack() and not checks.readable()
        found, quiet = ([], False) if tracing else reached(functions)
        self.quiet = quiet   # neither draws nor remembers, so that nothing has to be brought back
        if quiet:
            return

        self.draws = Draws(device, found)
        self.after = None
        self.memory = [Memory(m) for m in found if not isinstance(m, GENERATORS)] if found else []

    def watched(self) -> Any:
        """Around an evaluation that is not made inside this.

        What it draws cannot be drawn again while a CUDA graph is captured.
        """
        return _NOTHING if self.quiet else self.draws.watched()

    def __enter__(self) -> None:
        if self.quiet:
            return

        if self.times:
            self.after = Draws(self.draws.device, [generator for generator, _ in self.draws.given])
            self.draws.again()
            # All of them before any is changed, for they may share a list.
            for memory in self.memory:
                memory.note()
            for memory in self.memory:
                memory.lend()

        self.watch = self.watched()
        self.watch.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.quiet:
            return
        self.watch.__exit__(*error)
        if self.times:
            self.after.again()
            for memory in self.memory:
                memory.take_back()
        self.times += 1

    def undo(self) -> None:
        """Forget the only evaluation so far."""
        if self.quiet:
            return
        self.times = 0
        self.draws.again()
        for memory in self.memory:
            memory.undo()


class Draws:
    """Where the generators stand, those among the arguments too.

    While a CUDA graph is captured, PyTorch neither says where a generator of the GPU stands nor
    sets it back. Then what is evaluated stands inside `watched()`, and `again` refuses once
    something was drawn there.
    """

    cuda: Any
    watch: Any
    cpu: Tensor
    given: list[Any]

    def __init__(self, device: torch.device, arguments: Any = ()) -> None:
        self.device = device
        self.cuda = None
        self.watch = None
        self.cpu = torch.default_generator.get_state()
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                self.watch = _Watch()
            else:
                self.cuda = torch.cuda.get_rng_state(device)   # of the host: nothing waits

        generators = [a for a in arguments if isinstance(a, GENERATORS)] if arguments else []
        self.given = [
            (a, _state(a))
            for a in generators
            if self.watch is None or isinstance(a, FOREIGN) or a.device.type == "cpu"
        ]

    def watched(self) -> Any:
        return _NOTHING if self.watch is None else self.watch

    def again(self) -> None:
        if self.watch is not None and self.watch.met is not None:
            raise RuntimeError(
                f"fastscore: f draws random numbers ({self.watch.met}) and has to be evaluated "
                "more than once, which cannot draw the same "
                "ones while a CUDA graph is captured: "
                "draw with fastscore.random, or before the capture, or leave the loss out of it."
            )

        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        for generator, state in self.given:
            _set_state(generator, state)


def _state(generator):
    if isinstance(generator, random.Random):
        return generator.getstate()
    return (
        generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state
    )


def _set_state(generator, state):
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


_KEPT = "cpu"   # the device whose generator can be set back at any time


class _Watch(TorchDispatchMode):
    """Notes the first operation that draws from a generator which is not the CPU's."""

    met: Any = None

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.met is None and _may_draw(func) and not _draws_none(func, args, kwargs or {}):
            if any(
                isinstance(a, torch.Tensor) and a.device.type != _KEPT for a in tree_leaves(result)
            ):
                self.met = str(func)
        return result


@functools.cache
def _may_draw(func):
    # random_ lacks the tag.
    return torch.Tag.nondeterministic_seeded in func.tags or any(
        a.name == "generator" for a in func._schema.arguments
    )


def _draws_none(func, args, kwargs):
    """Whether it is attention without dropout, or a layer that is not in training.

    Tagged all the same.
    """
    parameters = func._schema.arguments
    values = (
        {a.name: a.default_value for a in parameters}
        | dict(zip((a.name for a in parameters), args))
        | kwargs
    )
    return any(
        name in values and not values[name]
        for name in ("dropout_p", "dropout", "train", "training")
    )


class Memory:
    """What one module, or the closure of one function, remembers."""

    start: dict[Any, Any]
    copies: dict[Any, Any]
    versions: dict[Any, Any]
    end: dict[Any, Any]
    end_copies: dict[Any, Any]

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.start = _contents(owner)
        self.copies = {key: _copy(a) for key, a in self.start.items() if _is_memory(a)}
        self.versions = {
            key: a._version
            for key, a in self.start.items()
            if isinstance(a, torch.Tensor) and not a.is_inference()
        }

    def note(self) -> None:
        """What the first evaluation left."""
        self.end = _contents(self.owner)
        self.end_copies = {
            key: list(_items(a)) for key, a in self.end.items() if isinstance(a, CONTAINERS)
        }

    def lend(self) -> None:
        """For the next evaluation.

        What there was at the start, tensors that were written to as new ones.
        """
        for key in self.end.keys() - self.start.keys():
            _set(self.owner, key, None, gone=True)
        for key, a in self.start.items():
            if isinstance(a, torch.Tensor):
                self._lend_tensor(key, a)
                continue
            if isinstance(a, CONTAINERS) and key in self.copies:
                _refill(a, self.copies[key])
            if self.end.get(key, self) is not a:
                _set(self.owner, key, a)

    def _lend_tensor(self, key, a):
        if self._moved(key, a):
            if key not in self.copies:
                raise _unknown(a)
            _set(self.owner, key, self.copies[key].clone())
        elif self.end.get(key, self) is not a:
            _set(self.owner, key, a)

    def _moved(self, key, a):
        # PyTorch's kernels for norms write without counting.
        uncounted = isinstance(self.owner, _NormBase) and self.owner.training and key in self.copies
        return uncounted or (key in self.versions and a._version != self.versions[key])

    def take_back(self) -> None:
        """Bring that back."""
        for key in _contents(self.owner).keys() - self.end.keys():
            _set(self.owner, key, None, gone=True)
        for key, a in self.end.items():
            if isinstance(a, CONTAINERS) and key in self.end_copies:
                _refill(a, self.end_copies[key])
            _set(self.owner, key, a)

    def undo(self) -> None:
        for key in _contents(self.owner).keys() - self.start.keys():
            _set(self.owner, key, None, gone=True)
        for key, a in self.start.items():
            if isinstance(a, torch.Tensor):
                self._undo_tensor(key, a)
            elif key in self.copies:
                _refill(a, self.copies[key])
            _set(self.owner, key, a)

    def _undo_tensor(self, key, a):
        if not self._moved(key, a):
            return
        if key not in self.copies:
            raise _unknown(a)
        a.data.copy_(self.copies[key])
        self.versions[key] = a._version


def _unknown(a):
    return RuntimeError(
        f"fastscore: f writes into a large tensor of shape {tuple(a.shape)} that it keeps, and has "
        "to be evaluated more than once here: "
        "what was in it is lost; keep the write out of f."
    )


def _is_memory(a):
    if isinstance(a, torch.Tensor):
        return not isinstance(a, nn.Parameter) and a.numel() <= _LARGE and type(a) is torch.Tensor
    return isinstance(a, CONTAINERS) and len(a) <= 10_000


def _copy(a):
    return a.detach().clone() if isinstance(a, torch.Tensor) else list(_items(a))


def _items(a):
    return a.items() if isinstance(a, dict) else a


def _refill(a, items):
    if len(a) == len(items) and all(map(_same, _items(a), items)):
        return   # nothing to do, which a frozen dictionary would not let us do
    a.clear()
    if isinstance(a, dict | set):
        a.update(items)
    else:
        a.extend(items)


def _same(a, b):
    """One entry, or one (made anew) item of a dictionary.

    By identity, for tensors have no other equality that is a bool.
    """
    return a is b or (
        type(a) is type(b) is tuple and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1]
    )


def _contents(owner):
    """{key: value} of what may change."""
    if isinstance(owner, Part):
        return {("attribute", name): a for name, a in owner.held.items() if name in owner.names}
    if isinstance(owner, nn.Module):
        values = {("buffer", name): b for name, b in owner._buffers.items() if b is not None}
        if not built_in(owner) or owner._forward_hooks or owner._forward_pre_hooks:
            values |= {("attribute", name): a for name, a in vars(owner).items() if name not in OWN}
        return values
    if isinstance(owner, types.CellType):
        return {("cell", None): owner.cell_contents} if filled(owner) else {}

    return {("itself", None): owner}   # a container or a tensor of the module level


def _set(owner, key, a, gone=False):
    kind, name = key
    if kind == "buffer":
        if gone:
            owner._buffers.pop(name, None)
        else:
            owner._buffers[name] = a
    elif kind == "attribute":
        held = owner.held if isinstance(owner, Part) else vars(owner)
        if gone:
            held.pop(name, None)
        else:
            held[name] = a
    elif kind == "cell" and not gone:
        owner.cell_contents = a


_NOISY = (
    _DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    _NormBase,
)


def moves(f: Callable[..., Any]) -> bool:
    """Whether f may draw or remember, for all that can be seen while it is compiled."""
    if not isinstance(f, nn.Module):
        return True
    own = ("torch.nn.", "fastscore.")
    return any(
        m.training and (isinstance(m, _NOISY) or not type(m).__module__.startswith(own))
        for m in f.modules()
    )
