"""What each torch function does to numbers, on the stack (1 + M, *) of the value and its tangents.

A linear map does not know which coefficient it carries: where samples stay apart, its rule takes
second derivatives, (1 + 2M, *), as they are. Every rule is made of differentiable torch operations
or of our own Functions, so reverse mode goes through all of them.
"""

import torch

from fastscore.dual import (  # noqa: F401
    compositions,
    compositions_linalg,
    rules_attention,
    rules_layer,
    rules_linalg,
    rules_math,
    rules_shape,
)
from fastscore.dual.formulas import FORMULAS, WITHOUT_DERIVATIVE, refused
from fastscore.dual.slopes import SLOPES
from fastscore.dual.table import RULES, functions_named

for _function, _composition in FORMULAS.items():
    RULES.setdefault(_function, _composition)
for _function, _sentence in WITHOUT_DERIVATIVE.items():
    RULES[_function] = refused(_sentence)
# Whose rules count no dimensions: a value without dimensions takes them, too.
POINTWISE = (
    functions_named("""
    add __add__ __radd__ sub subtract __sub__ rsub mul multiply __mul__ __rmul__ div divide
    true_divide __truediv__ __rdiv__ __rtruediv__ addcmul lerp pow __pow__ neg negative __neg__
    relu silu tanh sigmoid elu leaky_relu gelu softplus where masked_fill clone to type type_as
    float double half bfloat16 cuda cpu dropout
""")
    | functions_named(" ".join(SLOPES))
    | {torch.Tensor.__abs__}
)
