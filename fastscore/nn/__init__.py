"""Drop-in normalisation layers of score networks, with the state_dict of the originals and right derivatives in every mode."""

from fastscore.nn.batch_norm import ConditionalBatchNorm2d
from fastscore.nn.group_norm import AdaGroupNorm, GroupNormAct
from fastscore.nn.instance_norm import ConditionalInstanceNorm2d, ConditionalInstanceNorm2dPlus, InstanceNorm2d, InstanceNorm2dPlus
from fastscore.nn.replace import replace_norms
from fastscore.nn.variance_norm import ConditionalNoneNorm2d, ConditionalVarianceNorm2d, NoneNorm2d, VarianceNorm2d

__all__ = [
    "AdaGroupNorm",
    "ConditionalBatchNorm2d",
    "ConditionalInstanceNorm2d",
    "ConditionalInstanceNorm2dPlus",
    "ConditionalNoneNorm2d",
    "ConditionalVarianceNorm2d",
    "GroupNormAct",
    "InstanceNorm2d",
    "InstanceNorm2dPlus",
    "NoneNorm2d",
    "VarianceNorm2d",
    "replace_norms",
]
