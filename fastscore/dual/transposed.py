"""Operations without a rule, an autograd.Function above all.

The transpose of their transpose, reverse mode twice through them alone.

f as a whole is called once then, and the operation, too: what it draws and what it remembers is as
in an ordinary call.
"""

import contextlib
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction, _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

from fastscore import backend as backends
from fastscore.backend import linearized
from fastscore.dual import kept, saved
from fastscore.dual.call import NoRule, constant_block, note_copy, of_its_call, of_several, settle
from fastscore.dual.chains import saved_as_they_are
from fastscore.dual.norms import NATIVE_NORMS
from fastscore.dual.number import ComplexDual, Dual, like
from fastscore.dual.once import Draws
from fastscore.dual.sharded import check_conversion, of_fsdp
from fastscore.dual.stacks import is_dual, shares_memory
from fastscore.dual.stock import right_derivatives
from fastscore.dual.writes import write
from fastscore.ops import checks
from fastscore.ops.functions import released


class NotLinear(NotImplementedError):
    """A backward that is no transpose: it hides its cotangent, or bends it."""


def see_functions() -> None:
    """From now on an autograd.Function that is applied to dual numbers is carried by
    `apply_function`.

    Python's part of Function.apply ends in the apply of the C++ class, which takes dual numbers for
    ordinary tensors and their result for a constant. The class between the two has none of its own,
    and is reached by `op = MyFunction.apply`, too, whenever that was made.
    """
    if "apply" not in vars(_SingleLevelFunction):
        _SingleLevelFunction.apply = classmethod(_apply)


def _apply(cls, *args, **kwargs):
    for a in args:
        if type(a) in _ORDINARY:
            continue
        # a checkpoint calls f once more.
        if isinstance(a, kept.Kept) and torch._C._current_graph_task_id() != -1:
            kept.take_up(a)
        if is_dual(a):
            return _apply_to_numbers(cls, args, kwargs)
    plain = super(_SingleLevelFunction, cls).apply
    return saved.applied(cls, plain, args, kwargs) if saved.running else plain(*args, **kwargs)


# Most arguments of all Functions.
_ORDINARY = {torch.Tensor, torch.nn.Parameter, type(None), str, int, float, bool, tuple, list}


def _value(a):
    return a.stack[0] if is_dual(a) else a


def _apply_to_numbers(cls, args, kwargs):
    plain = super(_SingleLevelFunction, cls).apply
    args, kwargs = tree_map(kept.value_of, (args, kwargs))
    # Autograd looks at arguments, not into the lists and dictionaries among them, which are
    # constants to it.
    args = [a if isinstance(a, torch.Tensor) else tree_map(_value, a) for a in args]
    if of_several():
        return of_its_call(
            lambda: _carried_function(cls, plain, args, kwargs), args, kwargs, in_turn=False
        )
    return _carried_function(cls, plain, args, kwargs)


def _carried_function(cls, plain, args, kwargs):
    if of_fsdp(cls):   # the identity, whose backward frees the weights
        outputs = plain(*(a.stack if is_dual(a) else a for a in args))
        return tuple(like(a, o) for a, o in zip(filter(is_dual, args), outputs, strict=True))

    check_conversion(cls)
    if any(type(a) not in (Dual, ComplexDual) for a in args if is_dual(a)):
        raise NoRule(f"second_order: no rule carries the autograd.Function {cls.__name__}.")
    if constant_block():
        settle()
        return plain(*map(_value, args), **kwargs)
    if cls is CheckpointFunction:   # its forward is f's, and its backward is there to save memory
        return args[0](*args[2:])

    has_jvp = cls.jvp is not torch.autograd.Function.jvp
    return transposed(cls.__name__, plain, args, kwargs, has_jvp, cls)


def transposed(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_jvp: bool = False,
    cls: Any = None,
) -> Any:
    """function(*args, **kwargs), where its outputs depend on dual numbers as dual numbers.

    has_jvp: function has a forward mode of its own, which serves where its backward has no
        transpose. cls: the autograd.Function that it applies.
    """
    # Who have reverse modes of their own.
    if torch._C._functorch.maybe_current_level() is not None or linearized():
        raise NoRule(f"fastscore.jvp: {name} cannot be carried inside a transform of torch.func.")

    leaves, spec = tree_flatten((list(args), kwargs))
    places = [i for i, a in enumerate(leaves) if is_dual(a)]
    draws = Draws(leaves[places[0]].device)
    # Parameters that are not among the arguments are those of TorchScript.
    tensors = [a.stack if is_dual(a) else a for a in leaves if isinstance(a, torch.Tensor)]
    wanted = any(t.requires_grad for t in tensors) or type(function).__name__.startswith("Script")
    wanted = wanted and torch.is_grad_enabled()
    keep = wanted or backends._dual_level()

    def of_values(*values):
        filled = list(leaves)
        for i, value in zip(places, values):
            filled[i] = value
        arguments, keywords = tree_unflatten(filled, spec)
        with torch._C.DisableTorchFunctionSubclass():
            if cls is not None and keep:
                return tree_flatten(saved.applied(cls, function, arguments, keywords))
            with saved.derived() if keep else contextlib.nullcontext():
                return tree_flatten(function(*arguments, **keywords))

    # Without a checkpoint's hooks, who would call f again at once.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        saved_as_they_are(),
        right_derivatives(NATIVE_NORMS),
    ):
        stacks = [_usable(leaves[i].stack, wanted) for i in places]
        try:
            with draws.watched():
                outputs, tree, found = _by_reverse_mode(name, of_values, stacks, keep)
        except NotLinear:
            if not has_jvp or backends._dual_level():
                raise
            draws.again()
            outputs, tree, found = _by_forward_mode(of_values, stacks, draws)
    for k, (tangents, written) in found.items():
        if outputs[k].layout != torch.strided:
            raise NoRule(
                f"fastscore.jvp: the sparse result of {name} cannot be carried with its tangents."
            )
        stack = torch.stack([outputs[k], *tangents])
        number = Dual(stack if wanted else released(stack))
        if written is not None:
            number = write(leaves[places[written]], number)
        elif shared := [i for i, s in zip(places, stacks) if shares_memory(outputs[k], s)]:
            note_copy(number.stack, *(leaves[i].stack for i in shared))
        outputs[k] = number

    return tree_unflatten(outputs, tree)


def check_nested(name: str, outputs: Any) -> None:
    if any(isinstance(o, torch.Tensor) and o.is_nested for o in outputs):
        raise NoRule(
            f"fastscore.jvp: the nested tensor that {name} makes cannot be carried with its "
            "tangents."
        )


def _references_of_a_graph():
    """How many references a tensor gains when a graph saves it, which depends on the version."""
    t = torch.zeros(1, device="cpu", requires_grad=True)
    before = sys.getrefcount(t)
    with torch.enable_grad():
        graph = t * t
    return sys.getrefcount(t) - before if graph.requires_grad else 0


_BY_GRAPHS = _references_of_a_graph()


def _check_kept(name, inputs, outputs):
    """Whether something beside the graph keeps an input or an output.

    What f computes from it later would be a constant: it is no number.
    """
    tensors = [*inputs, *(o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)]
    ours = [id(inputs), id(outputs), id(tensors)]
    known = list(map(id, (*inputs, *outputs, *tensors)))
    for k in range(len(tensors)):   # by no name of its own, which Python may count or not
        count = known.count(id(tensors[k])) + 1
        if tensors[k]._use_count() > 1:   # a graph has saved it
            count += _BY_GRAPHS
        if sys.getrefcount(tensors[k]) > count and any(
            id(holder) not in ours and not _of_graph(holder)
            for holder in gc.get_referrers(tensors[k])
        ):
            raise NoRule(
                f"fastscore.jvp: {name} keeps its argument or its result, and what is computed "
                "from it later cannot be carried with its tangents."
            )


def _of_graph(holder):
    """Whether this is a node of autograd's graph, as of ctx.x = x, or its attributes."""
    owners = gc.get_referrers(holder) if isinstance(holder, dict) else [holder]
    return any(isinstance(owner, BackwardCFunction) for owner in owners)


def _usable(s, wanted):
    """A stack that reverse mode can start from."""
    s = s.clone() if s.is_inference() else s
    return s if wanted else released(s)


def _by_reverse_mode(name, function, stacks, keep):
    """Outputs, their tree, and for those that depend on the stacks {number.

    (tangents, which of the inputs it was written into)}.
    """
    inputs = [_variable(s) for s in stacks]
    given = [t.clone() for t in inputs]   # they may be written to
    versions = [t._version for t in given]
    outputs, tree = function(*given)
    check_nested(name, outputs)
    _check_kept(name, given, outputs)
    written = {k: i for k, o in enumerate(outputs) for i, t in enumerate(given) if o is t}
    if any(
        t._version != n and i not in written.values()
        for i, (t, n) in enumerate(zip(given, versions))
    ):
        raise NotImplementedError(
            f"fastscore.jvp: {name} writes into its input without mark_dirty, which no derivative "
            "knows of."
        )

    bent = [k for k, o in enumerate(outputs) if isinstance(o, torch.Tensor) and o.requires_grad]
    along = products(name, [outputs[k] for k in bent], inputs, stacks, keep) if bent else ()
    return outputs, tree, {k: (tangents, written.get(k)) for k, tangents in zip(bent, along)}


def _by_forward_mode(function, stacks, draws):
    outputs, tangents = None, {}
    for m in range(1, len(stacks[0])):
        draws.again()
        with draws.watched(), forward_ad.dual_level():
            found, tree = function(*(forward_ad.make_dual(s[0], s[m]) for s in stacks))
            found = [
                forward_ad.unpack_dual(o) if isinstance(o, torch.Tensor) else (o, None)
                for o in found
            ]
        outputs = [value for value, _ in found] if outputs is None else outputs
        for k, (value, tangent) in enumerate(found):
            if isinstance(value, torch.Tensor) and (
                value.is_floating_point() or value.is_complex()
            ):
                tangents.setdefault(k, []).append(
                    torch.zeros_like(value) if tangent is None else tangent
                )
    return outputs, tree, {k: (along, None) for k, along in tangents.items()}


def _variable(s):
    """The value as a variable.

    A view, for detach() would drop the tangent of a level around this.
    """
    return s[0] if s.requires_grad else s[0].requires_grad_()


def products(name: str, outputs: Any, inputs: Any, stacks: Any, keep: Any) -> Any:
    """For each output its tangents along all directions."""
    # Not zero: what bends, clips or forgets the cotangent would not be seen.
    us = [_scattered(o).requires_grad_() for o in outputs]
    with _in_words(name):
        gradients = torch.autograd.grad(outputs, inputs, us, create_graph=True, allow_unused=True)

    reached = [(g, s) for g, s in zip(gradients, stacks) if g is not None]
    linear = [(g, s) for g, s in reached if g.requires_grad]
    along = []
    for m in range(1, len(stacks[0])):
        found = [None] * len(us)
        if linear:
            with _in_words(name):
                found = torch.autograd.grad(
                    [g for g, _ in linear],
                    us,
                    [s[m] for _, s in linear],
                    retain_graph=True,
                    create_graph=keep,
                    allow_unused=True,
                )
        found = [torch.zeros_like(o) if t is None else t for o, t in zip(outputs, found)]
        _check_transpose(name, [(g, s[m]) for g, s in reached], list(zip(us, found)))
        along.append(found)

    return list(zip(*along))


def _scattered(o):
    """Numbers between -2 and 2 like o, without a pattern and without a generator."""
    i = torch.arange(o.numel(), device=o.device)
    words = (i * i * 2654435761 + i * 40503 + 12345) % 2**24
    return (words.to(_wide(o)) / 2**22 - 2).to(o.dtype).view(o.shape)


def _check_transpose(name, gradients, products):
    """⟨Jᵀu, v⟩ = ⟨u, Jv⟩ within what rounding makes of sums of random signs."""
    if not gradients or not checks.readable():
        return
    with torch.no_grad():
        left, right = (
            [(a.detach() * b.detach().conj()).real.to(_wide(a)) for a, b in pairs]
            for pairs in (gradients, products)
        )
        difference = sum(t.sum() for t in left) - sum(t.sum() for t in right)
        size = sum(t.square().sum() for t in (*left, *right)).sqrt()
        eps = max(torch.finfo(b.dtype).eps for _, b in (*gradients, *products))
        wrong = bool(difference.abs() > 3 * eps**0.5 * size)
    if wrong:
        raise NotLinear(
            f"fastscore.jvp: the backward of {name} is no linear function of its cotangent that "
            "can be differentiated (detach, .data, "
            "numpy, clipping); write it in differentiable operations."
        )


def _wide(t):
    return torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32


@contextlib.contextmanager
def _in_words(name):
    """PyTorch's refusal as one sentence of ours."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, NotLinear) or str(error).startswith("fastscore"):
            raise
        first = (str(error).splitlines() or [""])[0].rstrip(".")
        raise NotLinear(
            f"fastscore.jvp: {name} cannot be differentiated twice: {first}."
        ) from error

