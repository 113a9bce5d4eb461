"""Networks whose weights are spread over processes: FSDP2's `fully_shard`, and DTensors.

FSDP has weights from the forward pass of a module to its end, and in one backward pass. It hangs
its hooks on tensors: those that numbers carry here are their stacks, which go forward once and
backward once. DTensors have no second derivatives: PyTorch's conversions to and from them lose
those in silence.
"""

import sys
from collections.abc import Callable

from fastscore.modes import networks

_FSDP, _DTENSOR = "torch.distributed.fsdp", "torch.distributed.tensor"


def sharded(*functions: Callable) -> bool:
    """Whether functions hold a network of fully_shard."""
    kind = getattr(sys.modules.get(_FSDP), "FSDPModule", None)
    # fully_shard makes one of each class that it is applied to.
    if kind is None or not kind.__subclasses__():
        return False
    return any(isinstance(m, kind) for net in networks(*functions) for m in net.modules())


def _of_dtensors(functions):
    kind = getattr(sys.modules.get(_DTENSOR), "DTensor", None)
    return kind is not None and any(
        isinstance(p, kind) for net in networks(*functions) for p in net.parameters()
    )


def of_fsdp(thing: object) -> bool:
    """Whether a hook or an autograd.Function is FSDP's."""
    return _module(thing).startswith(_FSDP)


def check_conversion(function: type) -> None:
    """Refuse the conversions between numbers and DTensors."""
    if _module(function).startswith(_DTENSOR):
        raise NotImplementedError(
            "fastscore.jvp: DTensors, as of tensor parallelism, have no jvp; "
            "shard the network by fully_shard."
        )


def _module(thing):
    owner = getattr(thing, "__self__", thing)
    return (owner if isinstance(owner, type) else type(owner)).__module__


def check_once(what: str, *functions: Callable) -> None:
    """Refuse a second backward pass where it would be wrong.

    FSDP neither brings the weights back in it nor adds up the gradients of the ranks.
    """
    if sharded(*functions):
        raise NotImplementedError(
            f"fastscore: {what} needs two backward passes through the network, and fully_shard "
            "frees its weights after the first; "
            "DistributedDataParallel keeps them."
        )
    if _of_dtensors(functions):
        raise NotImplementedError(
            f"fastscore: {what} needs two backward passes through the network, and those of "
            "DTensors, as of tensor parallelism, lose "
            "second derivatives; take DistributedDataParallel."
        )
