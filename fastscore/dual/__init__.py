"""Dual numbers: a value with its tangents along several directions, carried through any function
by one forward pass."""

from fastscore.dual.fallback import FallbackWarning
from fastscore.dual.number import Dual
from fastscore.dual.routes import jvp, stacked_jvp
from fastscore.dual.trace import rademacher_jvp

__all__ = ["Dual", "FallbackWarning", "jvp", "rademacher_jvp", "stacked_jvp"]
