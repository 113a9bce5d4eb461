"""What a function can reach.

The modules, cells, containers and generators that it may draw from or write to.
"""

import dis
import functools
import types
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks as _global_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _global_pre_hooks

from fastscore.dual.code import (
    CONTAINERS,
    GENERATORS,
    KEEPING,
    OWN,
    Part,
    defined_in,
    elsewhere,
    methods_named,
    names_in,
    of_class,
    unwrapped,
    used_of,
    users_own,
)


def filled(cell: Any) -> bool:
    try:
        cell.cell_contents   # noqa: B018
    except ValueError:
        return False
    return True


@functools.cache
def _of_torch(cls):
    return cls.__module__.startswith(("torch.nn.", "fastscore."))


def built_in(module: Any) -> Any:
    return _of_torch(type(module))


def reached(functions: Any) -> Any:
    """Modules, cells of closures and containers that the functions can reach.

    And whether all is known to neither draw nor remember.
    """
    seen = set()
    found = []
    passed = []   # with buffers that they do not write to themselves
    waiting = list(functions)
    quiet = True
    if _global_hooks or _global_pre_hooks:
        waiting += [*_global_hooks.values(), *_global_pre_hooks.values()]
        quiet = False
    while waiting:
        a = waiting.pop()
        kind = type(a)
        if (still := _STILL[kind]) is not None:   # most of a network, in every call
            own = vars(a)
            quietly = (
                not own["_buffers"]
                if still is _WITHOUT_BUFFERS
                else still is _ALWAYS or not own["training"]
            )
            if (
                quietly
                and not own["_forward_hooks"]
                and not own["_forward_pre_hooks"]
                and "forward" not in own
            ):
                if (children := own["_modules"]) or own["_buffers"]:
                    if id(a) not in seen:
                        seen.add(id(a))
                        waiting += children.values()
                        if own["_buffers"]:
                            passed.append(a)
                continue
        if kind is types.FunctionType:
            if (asked := getattr(a, "asks", None)) is not None:   # one of ours, which only asks
                waiting.append(asked)
                continue
            if (modules := _modules_of(a)) is not None:   # as lambda x: net(x, 0.1).sin()
                waiting += modules
                continue
        if kind is types.BuiltinFunctionType:   # as torch.sin, or torch.bernoulli
            if a in _DRAWLESS:
                continue
            quiet = False
            if isinstance(a.__self__, GENERATORS):   # as random.random
                waiting.append(a.__self__)
            continue
        if kind is Part:
            key = id(a.held), a.names
            if key not in seen:
                seen.add(key)
                found.append(a)
                waiting += _behind_part(a)
            continue
        if id(a) in seen:
            continue
        seen.add(id(a))
        quiet = quiet and a is None
        if _plain(kind):
            hooked = a._forward_hooks or a._forward_pre_hooks
            if a._buffers or hooked:
                found.append(a)
            waiting += a._modules.values()
            if "forward" in vars(a):   # put there by somebody
                waiting.append(vars(a)["forward"])
            if hooked:
                waiting += [*a._forward_hooks.values(), *a._forward_pre_hooks.values()]
            continue
        waiting += _behind(a)
        if kind is types.FunctionType:
            continue
        if isinstance(a, nn.Module):
            if isinstance(a, nn.parallel.DistributedDataParallel) and a.static_graph:
                # PyTorch's double backprop through it does the same; without static_graph the
                # gradients are those of all ranks.
                raise ValueError(
                    "fastscore: DistributedDataParallel(static_graph=True) leaves the gradients of "
                    "a network's derivatives on their own "
                    "rank; build it without static_graph."
                )
            if a._buffers or not built_in(a):
                found.append(a)
        elif isinstance(a, types.CellType):
            if filled(a) and not isinstance(a.cell_contents, _LEADING[:2]):
                found.append(a)
        elif isinstance(a, KEEPING):
            found.append(a)

    return found if quiet else found + passed, quiet


def _modules_of(function):
    """The modules that a function of a few torch operations calls, which draws and remembers
    nothing else; None of any other."""
    code = function.__code__
    unknown = _foreign_names(code)
    if unknown is None or function.__defaults__ or function.__kwdefaults__:
        return None

    found, reachable = [], function.__globals__
    for name in unknown:
        found.append(reachable.get(name))
    for name in code.co_names:
        # A user's own function, or module, of that name.
        if name not in unknown and not _is_torchs(reachable.get(name)):
            return None
    for cell in function.__closure__ or ():
        if not filled(cell):
            return None
        found.append(cell.cell_contents)
    for a in found:
        if not isinstance(a, nn.Module) or isinstance(a, nn.parallel.DistributedDataParallel):
            return None
        if _has_any(a, code.co_names):   # net.relu may be anything
            return None

    return found


def _has_any(module, names):
    """Whether a module, or its class, has something of these names that not every module has."""
    own = vars(module)
    for held in (own, own["_modules"], own["_buffers"]):
        if held and not held.keys().isdisjoint(names):
            return True
    return _of_its_class(type(module), names)


@functools.cache
def _of_its_class(cls, names):
    return any(getattr(cls, n, None) is not getattr(nn.Module, n, None) for n in names)


@functools.cache
def _foreign_names(code):
    """The names of a function beside those of PyTorch's that neither draw nor write.

    None where it stores or holds functions itself.
    """
    if any(isinstance(c, types.CodeType) for c in code.co_consts):
        return None
    if any(i.opname.startswith(_STORING) for i in dis.get_instructions(code)):
        return None
    return tuple(n for n in code.co_names if n not in _DRAWLESS_NAMES)


def _is_torchs(thing):
    return thing is None or thing is torch or thing is nn or thing is nn.functional


_STORING = (
    "STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "STORE_NAME",
    "DELETE", "IMPORT",
)
_DRAWLESS_NAMES = frozenset(
    """
    torch nn functional F abs acos asin atan clamp cos cosh cumsum erf exp expm1 gelu hypot log
    log1p log_softmax logsigmoid logsumexp neg pow reciprocal relu rsqrt selu sigmoid sign silu
    sin sinh softmax softplus sqrt square tan tanh add div lerp maximum minimum mul sub amax amin
    max mean min norm prod std sum var addmm baddbmm bmm dot einsum linear matmul mm mv cat chunk
    clone contiguous detach expand expand_as flatten flip movedim narrow permute repeat reshape
    roll select split squeeze stack swapaxes t transpose unbind unflatten unsqueeze view view_as T
    mT double float new_ones new_zeros ones ones_like to type_as zeros zeros_like device dim dtype
    ndim numel shape size len range
""".split()
)
_DRAWLESS = frozenset(
    f
    for name in _DRAWLESS_NAMES
    if isinstance(f := getattr(torch, name, None), types.BuiltinFunctionType)
)
_OURS = (
    "fastscore.nn.",
    "fastscore.models.refinenet",
    "fastscore.models.ncsn",
    "fastscore.models.score_mlp",
)


_WITHOUT_BUFFERS, _IN_EVALUATION, _ALWAYS = "without buffers", "in evaluation", "always"


class _Still(dict):
    """{class: when its modules neither draw nor write}; None for what is no such module."""

    def __missing__(self, cls) -> Any:
        still = None
        if cls in _QUIET:
            still = _WITHOUT_BUFFERS
        elif cls in _STILL_IN_EVALUATION:
            still = _IN_EVALUATION
        # Whose buffers are constants.
        elif issubclass(cls, nn.Module) and cls.__module__.startswith(_OURS):
            still = _ALWAYS

        self[cls] = still
        return still


_STILL = _Still()


@functools.cache
def _plain(cls):
    """Modules of PyTorch and of our own, which keep nothing but buffers.

    DistributedDataParallel has its options.
    """
    return (
        issubclass(cls, nn.Module)
        and _of_torch(cls)
        and not issubclass(cls, nn.parallel.DistributedDataParallel)
    )


def _behind(a):
    if isinstance(a, types.FunctionType):
        if (a.__module__ or "").startswith("fastscore."):  # remembers nothing itself
            return [
                c.cell_contents
                for c in a.__closure__ or ()
                if filled(c) and _may_lead(c.cell_contents)
            ]
        reachable, names = a.__globals__, names_in(a.__code__)
        values = [reachable.get(n) for n in names] + [
            c.cell_contents for c in a.__closure__ or () if filled(c)
        ]
        parts = [c for b in values if users_own(type(b)) for c in used_of(b, names)]
        parts += [c for b in values if isinstance(b, nn.Module) for c in _named_of(b, names)]
        parts += elsewhere(a)
        named = [b for b in values if _may_lead(b) and not users_own(type(b))]
        defaults = [*(a.__defaults__ or ()), *(a.__kwdefaults__ or {}).values()]
        return [*(a.__closure__ or ()), *named, *parts, *filter(_may_lead, defaults)]
    if isinstance(a, nn.Module):
        more = [*a._modules.values()]
        for hooks in (a._forward_hooks, a._forward_pre_hooks):
            more += hooks.values()
        if built_in(a):
            return more
        return (
            more
            + [b for name, b in vars(a).items() if name not in OWN and _may_lead(b)]
            + of_class(type(a))
        )
    if isinstance(a, types.MethodType):
        if users_own(type(a.__self__)) and isinstance(a.__func__, types.FunctionType):
            names = frozenset().union(*(names_in(f.__code__) for f in unwrapped(a.__func__)))
            return [a.__func__, *used_of(a.__self__, names)]
        return [a.__func__, a.__self__] if _may_lead(a.__self__) else [a.__func__]
    if isinstance(a, functools.partial):
        return [a.func, *filter(_may_lead, a.args), *filter(_may_lead, a.keywords.values())]
    if isinstance(a, types.CellType):  # of an object of the user's, what the function names
        return (
            [a.cell_contents]
            if filled(a) and _may_lead(a.cell_contents) and not users_own(type(a.cell_contents))
            else []
        )
    if isinstance(a, CONTAINERS):
        return (
            [b for b in (a.values() if isinstance(a, dict) else a) if _may_lead(b)]
            if len(a) <= 1000
            else []
        )
    if users_own(type(a)):
        return used_of(a, frozenset(vars(a)) | defined_in(type(a)))

    call = vars(type(a)).get("__call__")
    attributes = [b for b in vars(a).values() if _may_lead(b)] if hasattr(a, "__dict__") else []
    return [*attributes, *([call] if isinstance(call, types.FunctionType) else [])]


def _named_of(module, names):
    """What code with these names may use of a module beside the module itself.

    What somebody has put on one of PyTorch's, and methods of the user's.
    """
    own = vars(module)
    put = frozenset(names & own.keys()) - OWN if built_in(module) else None
    parts = [Part(own, put)] if put else []
    return [*parts, *methods_named(type(module), names)]


def _behind_part(part):
    """What the attributes hold: of an object among them, what has one of the same names."""
    leading = []
    for name in part.names:
        b = part.held.get(name)
        if users_own(type(b)):
            leading += used_of(b, part.names)
        elif _may_lead(b):
            leading.append(b)
    return leading


_LEADING = (
    nn.Module,
    types.FunctionType,
    types.MethodType,
    functools.partial,
    *GENERATORS,
    *CONTAINERS,
)
_SILENT = (
    type, types.BuiltinFunctionType, torch.Tensor, types.ModuleType, str, int, float, type(None),
)


def _may_lead(a):
    """Whether it may be, or hold, something that remembers."""
    if a is None:
        return False
    if isinstance(a, types.BuiltinFunctionType):
        return isinstance(a.__self__, GENERATORS)
    return (
        isinstance(a, _LEADING)
        or users_own(type(a))
        or (not isinstance(a, _SILENT) and callable(a) and hasattr(a, "__dict__"))
    )


_QUIET = {
    nn.Sequential, nn.ModuleList, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Conv1d,
    nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.ReLU,
    nn.ELU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LeakyReLU, nn.GroupNorm,
    nn.LayerNorm, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.Upsample,
}
_STILL_IN_EVALUATION = {
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d,
}
