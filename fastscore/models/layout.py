"""Which order of memory a convolutional network computes in."""

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W) with their channels side by side in memory where convolutions are faster
    so, that is on a CPU; anything else as it is.

    oneDNN takes images in this order as they are, and copies all others into an order of its own
    and back, around every convolution and its two gradients. The layers after the first keep it.
    Signals and volumes gain nothing.
    """
    if x.device.type != "cpu" or x.dim() != 4:
        return x
    # With one channel both orders are the same memory, and the strides have to tell which is meant.
    last = x.squeeze(1).unsqueeze(-1) if x.shape[1] == 1 else x.movedim(1, -1).contiguous()
    return last.movedim(-1, 1)


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """y, in C order if x is: the inverse of `channels_last` at the end of a network."""
    return y.contiguous() if x.is_contiguous() else y
