"""Dual numbers: a value with its tangents along several directions, carried through any function by one forward pass."""

from fastscore.dual.numbers import jvp

__all__ = ["jvp"]
