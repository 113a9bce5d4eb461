"""Dual numbers: a value with its tangents along several directions, carried through any function by one forward pass."""

from fastscore.dual.numbers import jvp, stack

__all__ = ["jvp", "stack"]
