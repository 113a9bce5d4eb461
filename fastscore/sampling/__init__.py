"""Samplers: short generators that hand a `State` to the caller after every level or step."""

from fastscore.sampling.langevin import annealed_langevin, langevin
from fastscore.sampling.run import initial, sample, states
from fastscore.sampling.state import State

__all__ = ["State", "annealed_langevin", "initial", "langevin", "sample", "states"]
