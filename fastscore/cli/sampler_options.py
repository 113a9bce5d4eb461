"""The samplers of `fastscore sample` and their options."""

import inspect
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fastscore import models, sampling
from fastscore.sampling.sample import default_law

SAMPLERS = ("annealed_langevin", "consistent_annealed", "predictor_corrector", "probability_flow")
DATA = "data"   # the law of starts like images with noise of σ_1


@dataclass(frozen=True)
class SamplerOptions:
    """A sampler of the command line and its options; what is None has the sampler's default.

    Args:
        sampler: annealed_langevin, consistent_annealed (one network call per level),
            predictor_corrector or probability_flow.
        steps_per_level: Langevin steps at each noise level, of annealed_langevin; 20 unless given,
            and as many as make 200 network calls for a UNet, which has more levels.
        step_size: ε at the smallest level, of annealed_langevin (0.2 σ_L² unless given) and
            consistent_annealed.
        step_lr: the same in the official configurations' unit, ε/2.
        denoise: take the last, noise-free step.
        temperature: scales the noise by its root; not of probability_flow. 1 unless given, and for
            a UNet and annealed_langevin that which leaves the noise of each level as large as its
            σ says.
        predictor: reverse_diffusion, ancestral, euler or none.
        corrector: langevin, annealed or none.
        corrector_steps: corrections at each level.
        snr: signal-to-noise ratio of a correction.
        method: of probability_flow, heun, euler or adaptive.
        initial_law: of the starts, uniform in [0, 1], gaussian, N(0, σ_1²), or data, N(m, d² +
            σ_1²) with the mean and the standard deviation of the training images, which a UNet
            knows. Unless given, data for a UNet; gaussian where σ_1 > 1.146, and for
            predictor_corrector and probability_flow; else uniform.
    """

    sampler: str = "annealed_langevin"
    steps_per_level: int | None = None
    step_size: float | None = None
    step_lr: float | None = None
    denoise: bool = True
    temperature: float | None = None
    predictor: str | None = None
    corrector: str | None = None
    corrector_steps: int | None = None
    snr: float | None = None
    method: str | None = None
    initial_law: str | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"sample: sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}."
            )
        takes = inspect.signature(getattr(sampling, self.sampler)).parameters.keys()
        foreign = sorted(self.given().keys() - takes - {"initial_law"})
        if foreign:
            raise ValueError(f"sample: {', '.join(foreign)} cannot be chosen for {self.sampler}.")
        if self.steps_per_level is not None and self.steps_per_level < 1:
            raise ValueError(
                f"sample: steps_per_level must be at least 1; got {self.steps_per_level}."
            )

    def given(self) -> dict[str, Any]:
        """The options of the sampler that are not None."""
        options = asdict(self)
        del options["sampler"]
        return {name: value for name, value in options.items() if value is not None}

    def arguments(self, sigmas: Tensor, net: nn.Module | None = None) -> dict[str, Any]:
        """The arguments of `sampling.states`, with the defaults of the command line for a network;
        its initial_law may be DATA, which stands for a start that is drawn by the caller.
        """
        options = self.given()
        if self.sampler == "annealed_langevin":
            steps = max(1, 200 // len(sigmas)) if isinstance(net, models.UNet) else 20
            options.setdefault("steps_per_level", steps)
            if "step_lr" not in options:
                options.setdefault("step_size", 0.2 * float(sigmas[-1]) ** 2)
                if isinstance(net, models.UNet) and "temperature" not in options:
                    options["temperature"] = _exact_temperature(sigmas, options)
        # By name, because it belongs to the job that goes on.
        law = default_law(self.sampler, float(sigmas[0]))
        options.setdefault("initial_law", DATA if isinstance(net, models.UNet) else law)
        return {"sampler": self.sampler, "sigmas": sigmas, **options}

    def states(self, sigmas: Tensor) -> int:
        """How many states a run on these levels has."""
        last = {"annealed_langevin": self.denoise, "probability_flow": self.denoise - 1}
        return len(sigmas) + last.get(self.sampler, 0)


def _exact_temperature(sigmas, options):
    """T of annealed Langevin dynamics at which a level ends with noise of variance σ_i².

    Of a level's start, V = σ_{i-1}², and of the noise that comes in, its n steps leave

        σ_i² = a²ⁿ σ_{i-1}² + (1 - a²ⁿ) T σ_i²/(1 - ε/4),    a = 1 - ε/2, ε in units of σ_L²

    where the data are a point. With T = 1 the state has more noise than the network is told, 13 %
    at four steps on 50 levels.
    """
    epsilon = options["step_size"] / float(sigmas[-1]) ** 2
    kept = (1 - epsilon / 2) ** (2 * options["steps_per_level"])
    ratio = float(sigmas[0] / sigmas[-1]) ** (2 / max(1, len(sigmas) - 1))
    if not 0 < epsilon < 4:
        return 1.0
    return min(1.0, max(0.0, (1 - kept * ratio) * (1 - epsilon / 4) / (1 - kept)))
