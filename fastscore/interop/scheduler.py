"""Annealed Langevin dynamics as a diffusers scheduler."""

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from fastscore import conversions, random, schedules
from fastscore.interop.networks import prediction_kind
from fastscore.interop.scheduler_config import (
    MARK,
    VE,
    VP,
    betas_of,
    completed,
    given_ladder,
    own_defaults,
    positive,
    whole_number,
    with_true_defaults,
)
from fastscore.messages import shown
from fastscore.ops import checks, langevin_step
from fastscore.sampling.run import noiseless_update
from fastscore.scalars import LEVELS, RUN
from fastscore.schedules.ladders import check_ladder
from fastscore.tensors import valued


class AnnealedLangevinScheduler(SchedulerMixin, ConfigMixin):
    """Annealed Langevin dynamics with the interface of diffusers' schedulers.

    Swap it into a pipeline that calls `step`.

        ε_i = ε σ_i²/σ_L²;    T times: x ← x + (ε_i/2) s + √ε_i z;    last: x ← x + σ_L² s

    The same as `sampling.annealed_langevin`, one network call at a time: `set_timesteps(n)` plans n
    calls, n = L T (+ 1 to denoise), and `step` takes them in order. States are x = x₀ + σ z.

    With a VE network (UNet2DModel with Fourier embedding) `timesteps` are the σ of the calls,
    prediction_type "score" fits, and the input is not scaled: any loop will do, e.g.
    DDPMPipeline(unet, scheduler). Loops that multiply their first draw by `init_noise_sigma` = σ_1
    start from N(0, σ_1² I), others, DDPMPipeline among them, from N(0, I): where σ_1 is large the
    missing variance takes some levels to come. With a VP network give its alphas_cumprod and
    prediction_type: `timesteps` are then its own, fractional ones, and the loop must pass inputs
    through `scale_model_input`, as pipelines for EulerDiscreteScheduler do.

    It is saved and loaded as diffusers' schedulers are (import this module before a pipeline with
    it is loaded). `from_config` takes the config of ScoreSdeVeScheduler and of every VP scheduler,
    whose ᾱ table, prediction and range of σ it keeps; and they take its own. With half-precision
    networks the state between the steps is float32; samples that were edited are taken as they are.

    Args:
        sigmas: ladder (L,), descending; or sigma_max and sigma_min, from which set_timesteps makes
            a geometric ladder that fits n.
        steps_per_level: T. step_size: ε at the smallest level; unless given technique 4's for the
            ladder. denoise: end noise-free.
        prediction_type: what the network predicts, "score", "noise" ("epsilon"), "denoiser"
            ("sample") or "v" ("v_prediction").
        alphas_cumprod: ᾱ of a VP network's timesteps, or None.
        seed: of the noise, a pure function of (seed, step, element); unless given, the first step
            draws one seed from its `generator`, or else from torch's default generator.
            first_sample: global number of the first sample, so that splits of a batch agree.

    Raises:
        ValueError: neither ladder nor ends, ends of another ladder, or any of them out of range.
    """

    order = 1
    sigmas: torch.Tensor
    timesteps: torch.Tensor | None
    num_inference_steps: int | None
    init_noise_sigma: float

    _compatibles = [*VP, *VE]

    @register_to_config
    def __init__(
        self,
        sigmas: torch.Tensor | list[float] | None = None,
        *,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        steps_per_level: int = 1,
        step_size: float | None = None,
        denoise: bool = True,
        prediction_type: str = "score",
        alphas_cumprod: torch.Tensor | list[float] | None = None,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> None:
        op = type(self).__name__
        ladder = given_ladder(op, sigmas, sigma_max, sigma_min)
        self._kind = prediction_kind(op, prediction_type)
        table = None
        if alphas_cumprod is not None:
            table = valued(op, "alphas_cumprod", alphas_cumprod).detach().cpu()
            # Refuses a ladder that the network does not know.
            schedules.timesteps_of(ladder[[0, -1]], table)

        self.register_to_config(**{
            "sigmas": None if sigmas is None else ladder.tolist(),
            "sigma_max": ladder[0].item() if sigmas is not None else float(sigma_max),
            "sigma_min": ladder[-1].item() if sigmas is not None else float(sigma_min),
            "steps_per_level": checks.integer(op, "steps_per_level", steps_per_level, 1, limit=RUN),
            "step_size": None if step_size is None else positive(op, "step_size", step_size),
            "denoise": bool(denoise),
            "alphas_cumprod": None if table is None else table.tolist(),
            "seed": None if seed is None else whole_number(op, "seed", seed),
            "first_sample": checks.integer(op, "first_sample", first_sample, 0, limit=2**62),
            MARK: True,
        })  # fmt: skip
        if table is not None:
            self.register_to_config(**betas_of(table))

        self._forget_false_defaults()

        # Of the state: pipelines multiply their first draw by it, DDPMPipeline does not.
        self.init_noise_sigma = ladder[0].item()
        self._table = table
        self.timesteps = None
        self.num_inference_steps = None
        self._state = None

    def _forget_false_defaults(self):
        """diffusers drops what a config calls a default when another class is made from it.

        These would be other values there.
        """
        if "_use_default_values" in self.config:
            true = own_defaults(type(self), self.config)
            self.register_to_config(_use_default_values=true)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler with the arguments of a config,
        `AnnealedLangevinScheduler.from_config(pipeline.scheduler.config)`, or others.

        Raises:
            ValueError: the config is of a scheduler whose networks are neither VE nor VP.
        """
        if isinstance(config, Mapping):
            kwargs = completed(cls, config, kwargs)
            config = with_true_defaults(cls, config)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def compatibles(self) -> list[type]:
        """The schedulers that can be made from this one's config for the same network."""
        names = VE if self._table is None else VP
        return [type(self), *(getattr(diffusers, name) for name in names)]

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Plan a run of num_inference_steps network calls (with given sigmas it may be left out),
        and start it.

        Raises:
            ValueError: no ladder fits that number of calls.
        """
        c = self.config
        self.sigmas = (
            check_ladder("set_timesteps", c.sigmas) if c.sigmas else self._fit(num_inference_steps)
        )
        levels = torch.arange(len(self.sigmas), device=self.sigmas.device).repeat_interleave(
            c.steps_per_level
        )
        if c.denoise:
            levels = torch.cat([levels, levels[-1:]])
        if num_inference_steps not in (None, len(levels)):
            raise ValueError(
                f"set_timesteps: num_inference_steps must be {len(levels)} for this ladder; got "
                f"{shown(num_inference_steps)}."
            )

        step_size = (
            schedules.technique4_step_size(self.sigmas, c.steps_per_level)
            if c.step_size is None
            else float(c.step_size)
        )
        self._ladder = self.sigmas.tolist()
        self._levels = levels.tolist()
        self._step_sizes = [step_size * (sigma / self._ladder[-1]) ** 2 for sigma in self._ladder]
        each = (
            self.sigmas if self._table is None else schedules.timesteps_of(self.sigmas, self._table)
        )
        self.timesteps = each[levels].to(device)
        self.num_inference_steps = len(levels)
        self._expected = each[levels].tolist()
        self._index = 0
        self._scaled = None
        self._seed = c.seed
        self._state = None

    def _fit(self, calls):
        c = self.config
        levels, rest = (
            divmod(calls - c.denoise, c.steps_per_level) if checks.whole(calls) else (0, 0)
        )
        if rest or not 2 <= levels <= LEVELS:
            form = f"{c.steps_per_level} L" + " + 1" * c.denoise
            raise ValueError(
                f"set_timesteps: num_inference_steps must be {form} with at least 2 levels L, at "
                f"most {LEVELS}; got {shown(calls)}."
            )

        return schedules.geometric(c.sigma_max, c.sigma_min, levels)

    def scale_model_input(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """The network's input at this step: the state, or √ᾱ times it for a VP network.

        At another timestep √ᾱ is that one's.

        `step` takes the answer to the input of its own timestep alone.
        """
        if self._table is None:
            return sample
        if timestep is not None and not self._is_turn(timestep):
            return (sample * self._root_of(float(timestep))).to(sample.dtype)
        self._check_turn("scale_model_input", timestep)
        self._scaled = self._index
        return (self._exact(sample) * self._root()).to(sample.dtype)

    def _root_of(self, timestep):
        """√ᾱ at a timestep of the network."""
        if not 0 <= timestep <= len(self._table) - 1:
            raise ValueError(
                f"scale_model_input: timestep must lie in 0..{len(self._table) - 1}; got "
                f"{timestep:.6g}."
            )
        log_sigma = schedules.sigmas_of(self._table.double()).log().numpy()
        return (
            float(1 + np.exp(2 * np.interp(timestep, np.arange(len(log_sigma)), log_sigma))) ** -0.5
        )

    def _exact(self, sample):
        """The state before it was rounded to half precision, wherever the sample is still what
        `step` returned."""
        if sample.dtype not in (torch.bfloat16, torch.float16):
            return sample
        if (
            self._state is None
            or self._state.shape != sample.shape
            or self._state.device != sample.device
        ):
            return sample.float()
        return torch.where(self._state.to(sample.dtype) == sample, self._state, sample.float())

    def _root(self):
        return (1 + self._ladder[self._levels[self._index]] ** 2) ** -0.5

    def _is_turn(self, timestep):
        """Whether the timestep is that of the next step.

        One on a GPU, which would be waited for, counts as such.
        """
        if self.timesteps is None or self._index >= self.num_inference_steps:
            return False
        unread = isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"
        return unread or float(timestep) == self._expected[self._index]

    def _check_turn(self, op, timestep):
        """Steps come in order: the network's answer belongs to the σ of this step."""
        if self.timesteps is None:
            raise ValueError(f"{op}: call set_timesteps first.")
        if self._index >= self.num_inference_steps:
            raise ValueError(
                f"{op}: all {self.num_inference_steps} steps are taken; call set_timesteps to "
                "start another run."
            )
        if timestep is not None and not self._is_turn(timestep):
            raise ValueError(
                f"{op}: step {self._index} is at timestep {self._expected[self._index]:.6g}; got "
                f"{float(timestep):.6g}."
            )

    @torch.no_grad()
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float | None,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Take the next step.

        Args:
            model_output: the network's answer at this step's timestep, shape of sample. sample: the
                state, (B, *).
            generator: from which the first step draws the seed of the run; one Generator, not a
                list.

        Returns:
            SchedulerOutput(prev_sample), or (prev_sample,), in the dtype of sample.

        Raises:
            ValueError: out of turn, or shapes differ.
        """
        self._check_turn("step", timestep)
        checks.check_float("step", "model_output", model_output)
        checks.check_like(
            "step", "model_output", model_output.to(sample.dtype), sample, of="sample"
        )
        state = self._exact(sample)
        score = self._score(model_output.to(state.dtype), state)
        if self.config.denoise and self._index == self.num_inference_steps - 1:
            x = noiseless_update(state, score, self._ladder[-1] ** 2)
        else:
            offset = self.config.first_sample * sample[:1].numel()
            step_size = self._step_sizes[self._levels[self._index]]
            x = langevin_step(
                state,
                score,
                step_size,
                seed=self._run_seed(generator),
                step=self._index,
                offset=offset,
            )

        self._index += 1
        self._state = x if x.dtype != sample.dtype else None
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _score(self, model_output, state):
        sigma = self._ladder[self._levels[self._index]]
        if self._table is None:
            return conversions.convert(model_output, state, sigma, kind=self._kind, to="score")
        if self._scaled != self._index:
            raise ValueError(
                "step: a VP network's input must come from scale_model_input, which was not called "
                "for this step."
            )

        root = self._root()
        return conversions.vp_to_ve(
            conversions.convert(
                model_output, state * root, sigma * root, root, kind=self._kind, to="score"
            ),
            root**2,
        )

    def _run_seed(self, generator):
        if self._seed is None and isinstance(generator, list | tuple):
            raise ValueError(
                "step: generator must be one torch.Generator, not a list; a sample's noise depends "
                "on its number anyway."
            )
        if self._seed is None:
            if generator is None:
                self._seed = random.draw_seed()
            else:
                key = {"generator": generator, "device": generator.device}
                self._seed = int(torch.randint(0, 2**63 - 1, (), **key).item())
        return self._seed

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x = x₀ + σ z, the state at the given timesteps of this run: (B,), taken from `timesteps`.

        Raises:
            ValueError: a timestep is none of this run's.
        """
        if self.timesteps is None:
            raise ValueError("add_noise: call set_timesteps first.")

        asked = torch.as_tensor(timesteps, dtype=torch.float32).reshape(-1).tolist()
        checks.check_float("add_noise", "original_samples", original_samples)
        checks.check_like("add_noise", "noise", noise, original_samples, of="original_samples")
        if len(asked) not in (1, len(original_samples)):
            raise ValueError(
                f"add_noise: timesteps must be one or one for each of the {len(original_samples)} "
                f"samples; got {len(asked)}."
            )

        of = dict(zip(self._expected, (self._ladder[level] for level in self._levels)))
        if any(t not in of for t in asked):
            raise ValueError(
                f"add_noise: timesteps must be of this run, {self._expected[0]:.6g} to "
                f"{self._expected[-1]:.6g}; got {asked}."
            )

        sigma = torch.tensor(
            [of[t] for t in asked],
            dtype=checks.compute_dtype(original_samples.dtype),
            device=original_samples.device,
        )
        noisy = original_samples + checks.expand(sigma, original_samples) * noise
        return noisy.to(original_samples.dtype)
