"""What torch.compile returned, run as it was written.

Its graphs are made for ordinary tensors and one backward pass.
"""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from fastscore.compiling import eagerly, when_dynamo


class _AsWritten(contextlib.ContextDecorator):
    """Inside, compiled functions and modules run uncompiled.

    What leaves it last brings the caller's stance back.

    A compiled function switches Dynamo on again whoever calls it, and Dynamo looks at our numbers
    as at the tensors that they stand for. The stance is the process's, so that threads share this
    one: a compiled function of another thread meanwhile runs uncompiled, too.
    """

    lock: Any
    inside: int
    before: Any
    dynamo: Any
    eager: Any

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = None
        self.dynamo = None   # without it, nothing is compiled
        when_dynamo(self.find)

    def find(self) -> None:
        with self.lock:
            self.dynamo = sys.modules["torch._dynamo"].eval_frame
            self.eager = self.dynamo.DynamoStance("force_eager")
            if self.inside:   # imported by f
                self.force()

    def force(self) -> None:
        self.before = self.dynamo._stance
        self.dynamo._stance = self.eager

    # As torch.compiler.set_stance, whose 25 microseconds are a fortieth of a small network's loss.
    def __enter__(self) -> None:
        with self.lock:
            if not self.inside and self.dynamo:
                self.force()
            self.inside += 1

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.dynamo:
                self.dynamo._stance = self.before


as_written: Any = _AsWritten()


@eagerly("fastscore's numbers are carried eagerly")
def undisturbed(function: Callable[..., Any], *args: Any) -> Any:
    """Call it, where Dynamo runs the caller, without Dynamo."""
    return function(*args)
