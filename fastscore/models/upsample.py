"""A convolution of a doubled image, without the doubled image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MANY = 512  # places of a batch, from which the convolution costs more than its kernel's sums


class Upsample(nn.Module):
    """A convolution of the image with every place doubled along each side."""

    conv: nn.Module

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        places = x.shape[0] * math.prod(x.shape[2:])
        if x.device.type != "cpu" or places < _MANY or not _bare(self.conv):
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

        # Two of a kernel's three places along a side fall on the same place of x. Added up first,
        # they are a kernel of four that is transposed with stride 2: 4/9 of an image's products,
        # and no doubled image, which the convolution would keep for its backward pass.
        y = _TRANSPOSED[x.dim() - 3](x, _doubled(self.conv.weight), stride=2, padding=1)
        # oneDNN would take longer for the bias's gradient than for the weight's.
        bias = self.conv.bias.reshape(-1, *[1] * (x.dim() - 2))
        # Under autocast y is narrower.
        return y + bias.to(y.dtype)


def _bare(conv):
    """Whether a call does nothing but what its `Conv` was built for: no hook, no other forward, no
    other settings, and no other module in its place, as of parametrizations, sharding or adapters.
    """
    if type(conv) not in _CONVOLUTIONS or conv.bias is None:
        return False
    hooks = conv._forward_pre_hooks, conv._forward_hooks, conv._backward_pre_hooks
    if any(hooks) or conv._backward_hooks or _hooked_everywhere():
        return False
    own = {"forward", "_conv_forward"} & vars(conv).keys()
    same = {*conv.stride, *conv.dilation, *conv.padding, conv.groups} == {1}
    return not own and same and set(conv.kernel_size) == {3} and conv.padding_mode == "zeros"


def _hooked_everywhere():
    """Whether there are hooks of all modules, but for those of PyTorch's FlopCounterMode, which
    only looks."""
    every = nn.modules.module
    if not every._has_any_global_hook():
        return False
    forward = *every._global_forward_pre_hooks.values(), *every._global_forward_hooks.values()
    backward = every._global_backward_pre_hooks or every._global_backward_hooks
    return bool(backward) or any(h.__module__ != "torch.utils.module_tracker" for h in forward)


def _doubled(weight):
    """(out, in, 3, ...) for the doubled image as (in, out, 4, ...) for `conv_transpose`."""
    sides = range(2, weight.dim())
    weight = weight.transpose(0, 1).flip(tuple(sides))
    for side in sides:
        nothing = torch.zeros_like(weight.narrow(side, 0, 1))
        weight = torch.cat([weight, nothing], side) + torch.cat([nothing, weight], side)
    return weight
