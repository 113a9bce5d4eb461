"""Networks under FSDP2's `fully_shard`, whose weights are there from the forward pass of a module to its end, and in one backward pass.

FSDP hangs its hooks on tensors: those that numbers carry here are their stacks, which go forward once and backward once.
"""

import sys
from collections.abc import Callable

from fastscore.modes import networks

_FSDP = "torch.distributed.fsdp"


def sharded(*functions: Callable) -> bool:
    """Whether functions hold a network of fully_shard."""
    kind = getattr(sys.modules.get(_FSDP), "FSDPModule", None)
    if kind is None or not kind.__subclasses__():   # fully_shard makes one of each class that it is applied to
        return False
    return any(isinstance(m, kind) for net in networks(*functions) for m in net.modules())


def of_fsdp(thing: object) -> bool:
    """Whether a hook or an autograd.Function is FSDP's."""
    owner = getattr(thing, "__self__", thing)
    return (owner if isinstance(owner, type) else type(owner)).__module__.startswith(_FSDP)


def check_once(what: str, *functions: Callable) -> None:
    """Refuse a second backward pass, in which FSDP neither brings the weights back nor adds up the gradients of the ranks."""
    if sharded(*functions):
        raise NotImplementedError(
            f"fastscore: {what} needs two backward passes through the network, and fully_shard frees its weights after the first; "
            "DistributedDataParallel keeps them."
        )
