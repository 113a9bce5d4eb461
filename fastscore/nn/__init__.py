"""Normalisation layers of score networks, with the state_dict of the originals.

Drop-in, and their derivatives are right in every mode. `nn.ablations` holds the rarer ones.
"""

from fastscore.nn import ablations
from fastscore.nn.group_norm import AdaGroupNorm, GroupNormAct
from fastscore.nn.instance_norm import (
    ConditionalInstanceNorm2d,
    ConditionalInstanceNorm2dPlus,
    InstanceNorm2d,
    InstanceNorm2dPlus,
)
from fastscore.nn.replace import replace_norms

__all__ = [
    "AdaGroupNorm",
    "ConditionalInstanceNorm2d",
    "ConditionalInstanceNorm2dPlus",
    "GroupNormAct",
    "InstanceNorm2d",
    "InstanceNorm2dPlus",
    "ablations",
    "replace_norms",
]
