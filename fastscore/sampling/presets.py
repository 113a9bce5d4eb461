"""The published sampling configurations of NCSN, NCSNv2 and consistent sampling, as arguments of
`fastscore.sample`."""

from dataclasses import dataclass, field
from typing import Any

from fastscore.schedules import geometric


@dataclass(frozen=True)
class Preset:
    """One published configuration.

    network: of `fastscore.models`. shape: of a sample, (C, H, W). ladder: σ_1, σ_L, L. ema: decay
    of the averaged weights that were sampled from, None where there were none. The rest are
    arguments of the sampler.

    >>> PRESETS["ncsnv2-cifar10"].calls
    1161
    """

    network: str
    shape: tuple[int, ...]
    ladder: tuple[float, float, int]
    step_lr: float
    steps_per_level: int | None = None  # None: consistent sampling, one call per level
    denoise: bool = True
    ema: float | None = 0.999
    sampler: str = field(default="annealed_langevin")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `fastscore.sample`: sample(net, shape=(64, *preset.shape),
        **preset.options)."""
        steps = {} if self.steps_per_level is None else {"steps_per_level": self.steps_per_level}
        # All of them began with uniform noise, whatever the ladder.
        start = {"sampler": self.sampler, "initial_law": "uniform"}
        return {
            **start,
            "sigmas": geometric(*self.ladder),
            "step_lr": self.step_lr,
            "denoise": self.denoise,
            **steps,
        }

    @property
    def calls(self) -> int:
        """Network calls per sample."""
        if self.steps_per_level is None:
            return self.ladder[2]
        return self.ladder[2] * self.steps_per_level + self.denoise


def _consistent(n, step_lr):
    """CIFAR-10's ladder, refined to n steps per level."""
    return Preset(
        "NCSNv2",
        (3, 32, 32),
        (50.0, 0.01, 231 * n + 1),
        step_lr,
        ema=0.9999,
        sampler="consistent_annealed",
    )


# Sources: configs/anneal.yml of ermongroup/ncsn; configs/*.yml of ermongroup/ncsnv2 (bedroom's are
# tower's too; church's ladder is that of 96 pixels); tests/training_sampling_fid.sh of
# AlexiaJM/AdversarialConsistentScoreMatching.
PRESETS = {
    "ncsn": Preset("NCSN", (3, 32, 32), (1.0, 0.01, 10), 2e-5, 100, denoise=False, ema=None),
    "ncsnv2-cifar10": Preset("NCSNv2", (3, 32, 32), (50.0, 0.01, 232), 6.2e-6, 5),
    "ncsnv2-celeba": Preset("NCSNv2", (3, 64, 64), (90.0, 0.01, 500), 3.3e-6, 5),
    "ncsnv2-church": Preset("NCSNv2Deeper", (3, 96, 96), (140.0, 0.01, 788), 4.9e-6, 4),
    "ncsnv2-bedroom": Preset("NCSNv2Deeper", (3, 128, 128), (190.0, 0.01, 1086), 1.8e-6, 3),
    "ncsnv2-ffhq": Preset("NCSNv2Deepest", (3, 256, 256), (348.0, 0.01, 2311), 0.9e-6, 3),
    "consistent-cifar10": _consistent(1, 5.6e-6),
    "consistent-cifar10-5": _consistent(5, 1.1e-6),
}
