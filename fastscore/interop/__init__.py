"""Networks and pipelines of other packages.

Their networks serve as score(x, sigma), our sampler as a diffusers scheduler.

Nothing foreign is imported: adapters call what they are given. Only the scheduler, a class of
diffusers, imports it when it is named.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from fastscore.interop.networks import VeUNet, VpUNet, edm, k_diffusion, score_of_pipeline

if TYPE_CHECKING:
    from fastscore.interop.scheduler import AnnealedLangevinScheduler

__all__ = [
    "AnnealedLangevinScheduler",
    "VeUNet",
    "VpUNet",
    "edm",
    "k_diffusion",
    "score_of_pipeline",
]


def __getattr__(name: str) -> Any:
    if name != "AnnealedLangevinScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError(
            "AnnealedLangevinScheduler is a scheduler of diffusers, which is not installed: pip "
            "install diffusers."
        )

    from fastscore.interop.scheduler import AnnealedLangevinScheduler

    return AnnealedLangevinScheduler
