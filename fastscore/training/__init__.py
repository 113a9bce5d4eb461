"""Training: a loop that is a generator, averages of weights, and what makes a run survive."""

from fastscore.averages import averaged as averaged
from fastscore.training.loop import Step as Step
from fastscore.training.loop import training_loop as training_loop
from fastscore.training.nonfinite import NonFinite as NonFinite
from fastscore.training.post_hoc import post_hoc as post_hoc
from fastscore.training.post_hoc import power_averaged as power_averaged

__all__ = ["NonFinite", "Step", "averaged", "post_hoc", "power_averaged", "training_loop"]
