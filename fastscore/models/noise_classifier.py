"""NoiseClassifier: the class of a noisy vector or small image."""

from collections.abc import Sequence

from torch import Tensor

from fastscore.models.score_mlp import Trunk
from fastscore.ops import checks
from fastscore.scalars import SIZE


class NoiseClassifier(Trunk):
    """A residual classifier of data with noise of any level, for class-conditional sampling by
    `guidance.class_likelihood`.

        log p(k | x, σ) = log softmax(f(x / √(σ² + 1/4), e(log σ)))_k

    f is the network of `ScoreMLP` with one output per class; the last layer starts at zero, so the
    untrained classes are equally likely.

    Args:
        dim: d, the number of values of a sample. num_classes: K.
        width, depth, activation, sigmas: as in `ScoreMLP`; sigmas is needed.

    Shapes: forward(x, sigma): x (B, *) with prod(*) = d; sigma a float, 0-d or (B,). Returns
        logits, (B, K).

    Raises:
        ValueError: as `ScoreMLP`.

    >>> NoiseClassifier(64, 10, width=8, depth=1, sigmas=[1.0, 0.01]).num_classes
    10
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        width: int = 256,
        depth: int = 2,
        activation: str = "silu",
        *,
        sigmas: Tensor | Sequence[float],
    ) -> None:
        num_classes = checks.integer(self._name, "num_classes", num_classes, 1, limit=SIZE)
        super().__init__(dim, num_classes, width, depth, activation, sigmas)
        self.num_classes = num_classes

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.network(*self.inputs(x, self.check(x, sigma)))
