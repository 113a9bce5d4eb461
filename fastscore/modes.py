"""Networks in evaluation mode while a sampler or a density asks them, and as they were at all
other times."""

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_FEW = 1000   # entries of a container that are looked at
_DEEP = 5   # steps from a callable to a network


def evaluated(f: Callable) -> Callable:
    """f, called with the networks that it holds in evaluation mode; f itself if it holds none.

    A network is held by being f, by being in its closure, defaults or attributes, by being named in
    its code, or by being held by something that is. The modes are those of evaluation during a call
    only: between two states of a sampler, after an exception, and when a sampler is dropped half
    way they are what they were. A function that sets a mode itself, to sample with dropout for
    example, has its way until it returns.
    """
    held = networks(f)
    if not held:
        return f

    _warn_of_batches(held)
    evaluation = Evaluation(held)

    def call(*arguments):
        switched = evaluation.begin()
        try:
            return f(*arguments)
        finally:
            if switched:
                _set(switched, True)

    return call


class Evaluation:
    """A context in which networks are in evaluation mode, module by module.

    nobody's train() or eval() is called.

    Every call of a score is one. So modules are looked for once, and again where one has got other
    children.
    """

    held: list[nn.Module]
    switched: list[Any]
    attributes: list[Any]
    others: list[Any]
    parents: list[Any]
    leaves: list[Any]

    def __init__(self, held: list[nn.Module]) -> None:
        self.held = held
        self.switched = []
        self._look()

    def __enter__(self) -> None:
        self.switched.append(self.begin())

    def __exit__(self, *error: object) -> None:
        _set(self.switched.pop(), True)

    def begin(self) -> list[Any]:
        """Switch to evaluation mode; what has to be switched back."""
        if (
            self.others
            or [d for d in self.leaves if d["_modules"]]
            or [d for d, children in self.parents if d["_modules"] != children]
        ):
            self._look()

        switched = [d for d in self.attributes if d["training"]]
        if self.others:
            switched += [m for m in self.others if m.training]
        if switched:
            _set(switched, False)

        return switched

    def _look(self):
        self.attributes = []
        self.others = []
        for m in _modules(self.held):
            own = vars(m)
            if "training" in own and isinstance(own.get("_modules"), dict):
                self.attributes.append(own)
            # a scripted module has no such attributes, and a compiled one the mode of the network
            # inside it.
            else:
                self.others.append(m)

        self.parents = [(d, dict(d["_modules"])) for d in self.attributes if d["_modules"]]
        self.leaves = [d for d in self.attributes if not d["_modules"]]


def _set(switched, mode):
    for a in switched:
        if type(a) is dict:
            # Module.__setattr__ takes ten times as long, in every call of a score.
            a["training"] = mode
        else:
            a.training = mode


def _modules(networks):
    """All modules, each once."""
    seen, waiting = set(), list(networks)
    while waiting:
        m = waiting.pop()
        if m is not None and id(m) not in seen:
            seen.add(id(m))
            waiting.extend(m._modules.values())
            yield m


def networks(*callables: Any) -> list[nn.Module]:
    """The networks that callables hold."""
    found = []
    seen = {}
    waiting = [(f, 0) for f in callables]
    while waiting:
        thing, depth = waiting.pop()
        if id(thing) in seen or depth > _DEEP:
            continue
        seen[id(thing)] = thing   # which keeps its id from being used again
        if isinstance(thing, nn.Module):
            found.append(thing)
        waiting.extend((part, depth + 1) for part in _parts(thing))

    return found


def _parts(thing) -> Iterator[Any]:
    """What a thing may hold a network in."""
    if isinstance(thing, nn.Module):
        # Its modules are its own; functions and lists among its attributes may hide others.
        for m in _modules([thing]):
            attributes = vars(m)
            if len(attributes) > len(_OWN):
                yield from [
                    v
                    for name, v in attributes.items()
                    if name not in _OWN and isinstance(v, _CARRIERS)
                ]
    elif isinstance(thing, types.FunctionType):
        # What PyTorch itself defines knows nobody's networks, unless it wraps something.
        if thing.__closure__ is not None or not (thing.__module__ or "").startswith("torch."):
            yield from _of_function(thing)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, dict):
        yield from list(thing.values())[:_FEW]
    elif isinstance(thing, list | tuple):
        yield from thing[:_FEW]
    elif isinstance(thing, weakref.ref):
        yield thing()
    elif not isinstance(thing, type | types.ModuleType | torch.Tensor):
        if hasattr(thing, "__dict__"):
            yield from list(vars(thing).values())[:_FEW]
        if type(thing).__module__ != "builtins":
            yield from _in_slots(thing)


def _in_slots(thing):
    """Attributes that are not in the dict of a thing."""
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            descriptor = vars(kind).get(name)
            if isinstance(descriptor, types.MemberDescriptorType) and hasattr(thing, name):
                yield getattr(thing, name)


_OWN = frozenset(vars(nn.Module()))   # what every module has
_CARRIERS = (types.FunctionType, types.MethodType, functools.partial, list, tuple)


def _of_function(f):
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:   # not yet filled
            pass

    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()
    yield from vars(f).values()

    for name in _names(f.__code__):
        thing = f.__globals__.get(name)
        if isinstance(thing, types.ModuleType):  # mine.net(x, sigma)
            yield from (
                vars(thing)[n]
                for n in _names(f.__code__)
                if isinstance(vars(thing).get(n), nn.Module)
            )
        else:
            yield thing


def _names(code):
    """Of globals and attributes, in a function and the functions inside it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names, *(name for c in inner for name in _names(c))}


def _warn_of_batches(held):
    if any(isinstance(m, _BatchNorm) and m.running_mean is None for m in _modules(held)):
        warnings.warn(
            "the network has a batch norm without running statistics, which uses those of the "
            "batch in evaluation mode, too: "
            "a sample depends on the others of its batch.",
            stacklevel=5,
        )
