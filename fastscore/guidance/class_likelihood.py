"""The likelihood of a class label, from a noise-conditional classifier."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastscore.messages import printed, shown
from fastscore.scalars import function, plain_int, whole
from fastscore.tensors import valued


def class_likelihood(net: Callable[..., Tensor], labels: int | Tensor) -> Callable[..., Tensor]:
    """log p(label | x_σ), for `posterior`.

    Args:
        net: called net(x, sigma), returns logits (B, K); trained on noisy x, as by `fastscore train
            --task classifier`.
        labels: one class for all samples, an int, or one for each, int64 (B,); in 0..K-1.

    Returns:
        log_likelihood(x, sigma) -> (B,).

    Raises:
        ValueError: a label is negative or not an integer; when called: it is not below K, there is
            not one for each sample, or the logits are not (B, K).

    Source: Song et al. 2021, section 5 and appendix I.1 (arXiv:2011.13456).

    >>> log_likelihood = class_likelihood(lambda x, sigma: torch.zeros(len(x), 4), 3)
    >>> log_likelihood(torch.zeros(2, 5), torch.ones(2)).exp()
    tensor([0.2500, 0.2500])
    """
    function("class_likelihood", "net", net)
    try:
        labels = valued(
            "class_likelihood", "labels", plain_int(labels) if whole(labels) else labels
        )
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"class_likelihood: labels must be a class number, or int64 (B,); got {shown(labels)}."
        ) from None
    if (
        labels.dtype not in (torch.int64, torch.int32)
        or labels.dim() > 1
        or bool((labels < 0).any())
    ):
        raise ValueError(
            "class_likelihood: labels must be a class number, or int64 (B,), not negative; got "
            f"{shown(labels.tolist())}."
        )

    return _LogLikelihood(net, labels, highest=int(labels.max()) if labels.numel() else 0)


@printed
@dataclass(eq=False)
class _LogLikelihood:
    net: Callable
    labels: torch.Tensor
    highest: int

    def __call__(self, x, *arguments):
        logits = self.net(x, *arguments)
        labels = self.labels
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(
                f"class_likelihood: net(x, sigma) must return logits ({len(x)}, K); got {got}."
            )
        if self.highest >= logits.shape[1]:
            raise ValueError(
                f"class_likelihood: labels must be in 0..{logits.shape[1] - 1}; got {self.highest}."
            )
        if labels.dim() and len(labels) != len(x):
            raise ValueError(
                f"class_likelihood: labels must be one for each of the {len(x)} samples; got "
                f"{len(labels)}."
            )

        index = labels.to(logits.device, torch.int64).expand(len(x))[:, None]
        return logits.log_softmax(1).gather(1, index)[:, 0]
