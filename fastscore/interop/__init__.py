"""Networks and pipelines of other packages: their networks serve as score(x, sigma), our sampler as a diffusers scheduler.

Nothing foreign is imported: adapters call what they are given.
"""

from fastscore.interop.networks import VeUNet, VpUNet, edm, k_diffusion, score_of_pipeline
from fastscore.interop.scheduler import AnnealedLangevinScheduler

__all__ = ["AnnealedLangevinScheduler", "VeUNet", "VpUNet", "edm", "k_diffusion", "score_of_pipeline"]
