"""Which order of memory a convolutional network computes in, and patches as channels."""

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
    """y, in C order unless x has its channels last: the inverse of `channels_last` at the end of a
    network."""
    kept = x.dim() == 4 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return y if kept else y.contiguous()


def to_channels(x: Tensor, patch: int) -> Tensor:
    """Patches (B, C, * p) as channels (B, C p^dim, *)."""
    if patch == 1:
        return x
    dims = x.dim() - 2
    sides = [n for side in x.shape[2:] for n in (side // patch, patch)]
    x = x.reshape(*x.shape[:2], *sides)
    x = x.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2))
    return x.flatten(1, 1 + dims)


def to_places(x: Tensor, patch: int) -> Tensor:
    """The inverse of `to_channels`."""
    if patch == 1:
        return x
    dims = x.dim() - 2
    x = x.unflatten(1, (-1, *[patch] * dims))   # (B, C, p..., *)
    pairs = [d for k in range(dims) for d in (2 + dims + k, 2 + k)]
    x = x.permute(0, 1, *pairs)
    return x.reshape(*x.shape[:2], *(x.shape[2 + 2 * k] * patch for k in range(dims)))
