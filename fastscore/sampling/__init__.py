"""Samplers: short generators that hand a `State` to the caller after every level or step.

The networks that a score or a hook holds (by being it, or in its closure, its attributes or the
globals that it names) run in evaluation mode while they are called, without dropout and with the
running statistics of batch norms. Between two states, after an exception and
after a sampler was dropped half way they are in the mode that they were in. A score that calls
train() itself is obeyed.
"""

from fastscore.sampling.consistent import consistent_annealed
from fastscore.sampling.langevin import annealed_langevin, langevin
from fastscore.sampling.mala import mala
from fastscore.sampling.predictor_corrector import predictor_corrector
from fastscore.sampling.presets import PRESETS
from fastscore.sampling.probability_flow import probability_flow
from fastscore.sampling.run import State
from fastscore.sampling.sample import sample, states
from fastscore.sampling.start import initial, start_law, start_like

__all__ = [
    "PRESETS",
    "State",
    "annealed_langevin",
    "consistent_annealed",
    "initial",
    "langevin",
    "mala",
    "predictor_corrector",
    "probability_flow",
    "sample",
    "start_law",
    "start_like",
    "states",
]
