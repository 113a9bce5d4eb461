"""What torch.compile returned, run as it was written: its graphs are made for ordinary tensors and one backward pass."""

import contextlib
import functools
import threading

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import eval_frame
from torch._dynamo.decorators import skip

_EAGER = eval_frame.DynamoStance("force_eager")


class _AsWritten(contextlib.ContextDecorator):
    """Inside, compiled functions and modules run uncompiled; what leaves it last brings the caller's stance back.

    A compiled function switches Dynamo on again whoever calls it, and Dynamo looks at our numbers as at the tensors that they stand for.
    The stance is the process's, so that threads share this one: a compiled function of another thread meanwhile runs uncompiled, too.
    """

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, None

    # As torch.compiler.set_stance, whose 25 microseconds are a fortieth of a small network's loss.
    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.before, eval_frame._stance = eval_frame._stance, _EAGER
            self.inside += 1

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                eval_frame._stance = self.before


as_written = _AsWritten()


def eagerly(reason):
    """torch.compiler.disable, without its cost where Dynamo does not run the caller."""

    def decorate(function):
        disabled = torch.compiler.disable(function, reason=reason)

        @skip
        @functools.wraps(disabled)
        def call(*args, **named):
            if get_eval_frame_callback() is None:
                return function(*args, **named)
            return disabled(*args, **named)

        return call

    return decorate


@torch.compiler.disable(reason="fastscore's numbers are carried eagerly")
def undisturbed(function, *args):
    """Call it, where Dynamo runs the caller, without Dynamo."""
    return function(*args)
