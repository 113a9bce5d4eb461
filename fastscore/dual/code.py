"""What the code of functions and classes names: the user's objects, globals, generators."""

import dis
import functools
import random
import sys
import sysconfig
import types
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONTAINERS = list, dict, set, deque
NUMPY = sys.modules.get("numpy")
FOREIGN = (
    (random.Random,)
    if NUMPY is None
    else (random.Random, NUMPY.random.Generator, NUMPY.random.RandomState)
)
GENERATORS = (torch.Generator, *FOREIGN)
# Of Python and of NumPy, those that serve who names none.
_COMMON = (random._inst,) if NUMPY is None else (random._inst, NUMPY.random.mtrand._rand)
KEEPING = (*CONTAINERS, *GENERATORS)
FUNCTIONS = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
    types.ModuleType,
    types.CellType,
)
OWN = frozenset(vars(nn.Module()))   # what every module holds


class Part:
    """What some functions use of an object of the user's, or of the globals of a file.

    The names in `held`, which their code mentions.
    """

    def __init__(self, held: Any, names: frozenset[str]) -> None:
        self.held = held
        self.names = names


@functools.cache
def users_own(cls: type) -> bool:
    """Whether its objects are the user's and hold attributes.

    It is neither Python's nor of an installed package, and no module.
    """
    if issubclass(cls, (nn.Module, torch.Tensor, type, *KEEPING, *FUNCTIONS)):
        return False
    if cls is types.SimpleNamespace:
        return True
    return _written_here(cls) and getattr(cls, "__dictoffset__", 0) != 0


def _written_here(cls):
    """Whether its code is the user's."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return cls.__module__ == "__main__" or (file is not None and not file.startswith(_INSTALLED))


_INSTALLED = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).parents[1])}
)


def used_of(a: Any, names: frozenset[str]) -> list[Any]:
    """What code with these names uses of an object of the user's.

    Attributes, and all that its methods lead to.
    """
    names = _all_names(type(a), names)
    return [Part(vars(a), names), *_methods(type(a), names)]


@functools.cache
def _all_names(cls, names):
    """The names, and those in the code of the methods of cls among them and of those that Python
    calls by itself."""
    waiting = [*names, *_special(cls)]
    found = set(waiting)
    while waiting:
        for method in _behind_name(cls, waiting.pop()):
            new = names_in(method.__code__) - found
            found |= new
            waiting += new
    return frozenset(found)


@functools.cache
def _methods(cls, names):
    """The methods of cls with these names that the user has written."""
    return tuple(m for name in sorted(names) for m in _behind_name(cls, name) if not _library(m))


@functools.cache
def methods_named(cls: type, names: frozenset[str]) -> tuple[types.FunctionType, ...]:
    """The methods with these names of a module's class, if it is the user's, and all that they
    call of it."""
    names = names & defined_in(cls)
    return _methods(cls, _all_names(cls, names)) if names else ()


def _behind_name(cls, name):
    """The functions behind a method or a property.

    What super() leads to, too, and what a decorator has wrapped.
    """
    found = []
    for method in (vars(c)[name] for c in cls.__mro__ if name in vars(c)):
        # Of properties, cached ones, static and class methods.
        for attribute in ("fget", "func", "__func__"):
            method = getattr(method, attribute, None) or method
        found += unwrapped(method)
    return found


def unwrapped(function: Any) -> list[Any]:
    """The function, and what functools.wraps says that it calls."""
    found = []
    while isinstance(function, types.FunctionType) and function not in found:
        found.append(function)
        function = getattr(function, "__wrapped__", None)
    return found


def _library(function):
    return (function.__module__ or "").startswith(("torch.", "fastscore."))


def _special(cls):
    """Methods as __call__ and __getitem__, which no code names: those that the user has written."""
    return {n for n in defined_in(cls) if n.startswith("__") and n.endswith("__")}


@functools.cache
def defined_in(cls: type) -> frozenset[str]:
    """What the user has written in the body of cls."""
    return frozenset(n for c in cls.__mro__ if _written_here(c) for n in vars(c)) - _MAKING


# Those that make an object, or show it.
_MAKING = {
    "__init__", "__new__", "__post_init__", "__init_subclass__", "__class_getitem__", "__repr__",
    "__str__", "__del__", "__dict__", "__reduce__", "__getstate__", "__setstate__", "__copy__",
    "__deepcopy__",
}


@functools.cache
def _stored_globals(code):
    """The names of the module level that it assigns to, by `global`."""
    own = {
        i.argval
        for i in dis.get_instructions(code)
        if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
    }
    return frozenset(
        own.union(*(_stored_globals(c) for c in code.co_consts if isinstance(c, types.CodeType)))
    )


def elsewhere(function: types.FunctionType) -> list[Any]:
    """What its code names beside its arguments.

    The globals that it assigns to, the generators of Python and NumPy.
    """
    stored = _stored_globals(function.__code__)
    parts = [Part(function.__globals__, stored)] if stored else []
    return [*parts, *_COMMON] if "random" in names_in(function.__code__) else parts


@functools.cache
def of_class(cls: type) -> list[Any]:
    """What a module's methods use beside it.

    Of a class of the user's its functions, which are followed; of a package's what is global.
    """
    names = _all_names(cls, frozenset({"forward"}))
    if _written_here(cls):
        return list(_methods(cls, names))
    return [b for m in _methods(cls, names) for b in elsewhere(m)]


@functools.cache
def names_in(code: types.CodeType) -> frozenset[str]:
    """Of the module level and of attributes, those of the functions inside it too."""
    return frozenset(
        {
            *code.co_names,
            *(n for c in code.co_consts if isinstance(c, types.CodeType) for n in names_in(c)),
        }
    )
