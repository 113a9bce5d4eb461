"""Classifier-free guidance: one network that knows classes or contexts, with and without them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastscore.guidance.bayes import add, called, check_scale
from fastscore.messages import printed, shown
from fastscore.scalars import SIZE, function, integer, whole
from fastscore.tensors import valued

_NAME = "classifier_free"


def classifier_free(
    net: Callable[..., Tensor],
    label: int | Tensor | None = None,
    *,
    context: Tensor | None = None,
    weight: float | Tensor = 1.0,
) -> Callable[..., Tensor]:
    """The score of a class or a context, sharpened by the network's own idea of how it differs from
    all.

        s = s_u + (1 + w)(s_c - s_u),    s_c = net(x, σ, label, context),    s_u = net(x, σ)

    w = 0 is the conditional score, w = -1 the unconditional one; w > 0 is the score of
    p(x) p(label | x)^(1 + w), up to a factor, at each σ alone.

    Args:
        net: called net(x, sigma, label=..., context=...) with what is given here, and net(x, sigma)
            without; trained with conditions that were dropped for some samples, as
            `models.UNet` takes them.
        label: one class for all samples, an int, or one for each, int64 (B,); -1 stands for none.
        context: one vector for all samples, (C,), or one for each, (B, C).
        weight: w, a float or (B,). Where it is the float 0 or -1, the network is called once, and
            otherwise twice.

    Returns:
        score(x, sigma), for any sampler. It can be pickled where net can.

    Raises:
        ValueError: neither label nor context is given, label is below -1, or weight is not finite;
            when called: there is not one label, context or weight for each sample. TypeError: label
            holds no integers, or context no floats.

    Source: Ho & Salimans 2021 (arXiv:2207.12598), equation 6.

    >>> net = lambda x, sigma, label=0: label - x
    >>> classifier_free(net, 2, weight=1.0)(torch.zeros(1, 1), torch.ones(1))
    tensor([[4.]])
    """
    function(_NAME, "net", net)
    if label is None and context is None:
        raise ValueError(f"{_NAME}: give label, context, or both; got neither.")
    check_scale(_NAME, weight, "weight")

    given = {}
    if label is not None:
        given["label"] = _label(label)
    if context is not None:
        given["context"] = _context(context)
    return _ClassifierFree(net, given, weight)


def _label(label):
    if whole(label):
        return integer(_NAME, "label", label, -1, limit=SIZE)
    try:
        label = valued(_NAME, "label", label)
    except (TypeError, ValueError, RuntimeError):
        label = None
    if label is None or label.dtype not in (torch.int64, torch.int32) or label.dim() != 1:
        got = shown(label) if label is None else f"{label.dtype} {tuple(label.shape)}"
        raise TypeError(f"{_NAME}: label must be a class number, or int64 (B,); got {got}.")
    return label.to(torch.int64)


def _context(context):
    if not isinstance(context, Tensor) or not context.is_floating_point():
        raise TypeError(f"{_NAME}: context must be a float tensor, (C,) or (B, C); got "
                        f"{shown(context)}.")
    if context.dim() not in (1, 2):
        raise ValueError(
            f"{_NAME}: context must be (C,) or (B, C); got {tuple(context.shape)}."
        )
    return context


@printed
@dataclass(eq=False)
class _ClassifierFree:
    net: Callable
    given: dict[str, Any]
    weight: float | Tensor

    def __call__(self, x, *arguments):
        if not isinstance(self.weight, Tensor) and self.weight == -1:
            return called(_NAME, self.net, x, arguments)

        named = {name: _for_each(name, value, x) for name, value in self.given.items()}
        s = called(_NAME, self._with(named), x, arguments)
        if not isinstance(self.weight, Tensor) and self.weight == 0:
            return s
        return add(
            _NAME, s, s - called(_NAME, self.net, x, arguments), self.weight, name="weight"
        )

    def _with(self, named):
        return lambda x, *arguments: self.net(x, *arguments, **named)


def _for_each(name, value, x):
    """One for each sample, on the device of x; a class number stays one."""
    if isinstance(value, int):
        return value
    if value.dim() == (2 if name == "context" else 1) and len(value) != len(x):
        raise ValueError(
            f"{_NAME}: {name} must be one for each of the {len(x)} samples; got {len(value)}."
        )
    if name == "context":
        value = value.to(x.dtype).expand(len(x), -1)
    return value.to(x.device)
