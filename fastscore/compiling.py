"""What Dynamo is told of our functions, when it is there.

Importing it takes longer than importing torch.
"""

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import get_eval_frame_callback

_DYNAMO = "torch._dynamo"
F = TypeVar("F", bound=Callable[..., Any])


def when_dynamo(act: Callable[[], object]) -> None:
    """Call act() as soon as torch._dynamo is imported; now, if it is."""
    module = sys.modules.get(_DYNAMO)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        act()
    else:
        _Finder.waiting.append(act)


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the import of torch._dynamo, which the finders after it carry out."""

    waiting: list[Callable[[], object]] = []

    def find_spec(self, name, path=None, target=None):
        if name != _DYNAMO:
            return None

        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        except BaseException:
            sys.meta_path.insert(0, self)
            raise

        execute = spec.loader.exec_module

        def exec_module(module):
            del spec.loader.exec_module   # the class's again
            try:
                execute(module)
            except BaseException:   # the next import must find us again
                sys.meta_path.insert(0, self)
                raise
            for act in self.waiting:
                act()

        spec.loader.exec_module = exec_module
        return spec


if _DYNAMO not in sys.modules:
    sys.meta_path.insert(0, _Finder())


def allow_in_graph(function: F) -> F:
    """torch.compiler.allow_in_graph."""
    when_dynamo(lambda: sys.modules[_DYNAMO].allow_in_graph(function))
    return function


def constant_result(function: F) -> F:
    """torch.compiler.assume_constant_result."""
    function._dynamo_marked_constant = True
    return function


def skip(function: F) -> F:
    """torch._dynamo.decorators.skip.

    Dynamo runs this frame as it is, and sees those that it calls.
    """
    when_dynamo(lambda: sys.modules[_DYNAMO].decorators.skip(function))
    return function


def eagerly(reason: str) -> Callable[[F], F]:
    """torch.compiler.disable, without its cost where Dynamo does not run the caller."""

    def decorate(function):
        disabled = None

        @functools.wraps(function)
        def call(*args, **named):
            nonlocal disabled
            if get_eval_frame_callback() is None:
                return function(*args, **named)
            if disabled is None:
                disabled = sys.modules[_DYNAMO].disable(function, reason=reason)
            return disabled(*args, **named)

        call._torchdynamo_disable_msg = reason
        return skip(call)

    return decorate
