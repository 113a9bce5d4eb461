"""Conditional sampling by Bayes' rule for scores, ∇ log p(x | y) = ∇ log p(x) + ∇ log p(y | x).

Guided scores, and hooks for samplers.

Guidance is a score like any other, or a hook `project(x, sigma, step)`: both go into every sampler,
alone, together, and nested.
"""

from fastscore.guidance.bayes import posterior
from fastscore.guidance.class_likelihood import class_likelihood
from fastscore.guidance.classifier_free import classifier_free
from fastscore.guidance.hooks import chain, data_consistency, inpainting
from fastscore.guidance.inverse import linear_inverse
from fastscore.guidance.linear import LinearOperator, from_function
from fastscore.guidance.operators import Blur, Downsample, Grey, Mask, Matrix, gaussian_kernel

__all__ = [
    "Blur",
    "Downsample",
    "Grey",
    "LinearOperator",
    "Mask",
    "Matrix",
    "chain",
    "class_likelihood",
    "classifier_free",
    "data_consistency",
    "from_function",
    "gaussian_kernel",
    "inpainting",
    "linear_inverse",
    "posterior",
]
