"""Annealed Langevin dynamics as a diffusers scheduler."""

from typing import NamedTuple

import torch

from fastscore import conversions, random, schedules
from fastscore.interop.networks import prediction_kind
from fastscore.ops import checks, langevin_step
from fastscore.sampling.state import shifted


class StepOutput(NamedTuple):
    """prev_sample: the state after the step."""

    prev_sample: torch.Tensor


class Config(dict):
    """A scheduler's arguments, by key or by attribute."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class AnnealedLangevinScheduler:
    """Annealed Langevin dynamics with the interface of diffusers' schedulers: swap it into a pipeline that calls `step`.

        ε_i = ε σ_i²/σ_L²;    T times: x ← x + (ε_i/2) s + √ε_i z;    last: x ← x + σ_L² s

    The same as `sampling.annealed_langevin`, one network call at a time: `set_timesteps(n)` plans n calls, n = L T (+ 1 to denoise), and
    `step` takes them in order. States are x = x₀ + σ z.

    With a VE network (UNet2DModel with Fourier embedding) `timesteps` are the σ of the calls, prediction_type "score" fits, and the input
    is not scaled: any loop will do, e.g. DDPMPipeline(unet, scheduler). With a VP network give its alphas_cumprod and prediction_type:
    `timesteps` are then its own, fractional ones, and the loop must pass inputs through `scale_model_input`, as pipelines for
    EulerDiscreteScheduler do.

    Args:
        sigmas: ladder (L,), descending; or sigma_max and sigma_min, from which set_timesteps makes a geometric ladder that fits n.
        steps_per_level: T. step_size: ε at the smallest level; unless given technique 4's for the ladder. denoise: end noise-free.
        prediction_type: what the network predicts, "score", "noise" ("epsilon"), "denoiser" ("sample") or "v" ("v_prediction").
        alphas_cumprod: ᾱ of a VP network's timesteps, or None.
        seed: of the noise, a pure function of (seed, step, element); unless given, the first step draws one seed from its `generator`, or
            else from torch's default generator. first_sample: global number of the first sample, so that splits of a batch agree.

    Raises:
        ValueError: not exactly one of ladder and ends, or any of them out of range.
    """

    order = 1

    def __init__(self, sigmas=None, *, sigma_max=None, sigma_min=None, steps_per_level=1, step_size=None, denoise=True,
                 prediction_type="score", alphas_cumprod=None, seed=None, first_sample=0):  # fmt: skip
        op = type(self).__name__
        if (sigmas is None) == (sigma_max is None) or (sigma_max is None) != (sigma_min is None):
            raise ValueError(f"{op}: give either sigmas, or sigma_max and sigma_min.")
        steps_per_level = checks.integer(op, "steps_per_level", steps_per_level, 1)
        first_sample = checks.integer(op, "first_sample", first_sample, 0)
        seed = checks.plain_int(seed) if checks.whole(seed) else seed
        self._kind = prediction_kind(op, prediction_type)
        ladder = schedules.check_ladder(op, sigmas) if sigmas is not None else schedules.geometric(sigma_max, sigma_min, 2)
        table = None if alphas_cumprod is None else torch.as_tensor(alphas_cumprod).detach().cpu()
        if table is not None:
            schedules.timesteps_of(ladder[[0, -1]], table)   # refuses a ladder that the network does not know
        self.config = Config(
            sigmas=None if sigmas is None else ladder.tolist(), sigma_max=sigma_max, sigma_min=sigma_min, steps_per_level=steps_per_level,
            step_size=step_size, denoise=bool(denoise), prediction_type=prediction_type,
            alphas_cumprod=None if table is None else table.tolist(), seed=seed, first_sample=first_sample,
        )  # fmt: skip
        self.init_noise_sigma = ladder[0].item()   # of the state: pipelines multiply their first draw by it, DDPMPipeline does not
        self._table, self.timesteps, self.num_inference_steps = table, None, None

    @classmethod
    def from_config(cls, config):
        """A scheduler with the arguments of another: `from_config(scheduler.config)`."""
        return cls(**config)

    def set_timesteps(self, num_inference_steps=None, device=None):
        """Plan a run of num_inference_steps network calls (with given sigmas it may be left out), and start it.

        Raises:
            ValueError: no ladder fits that number of calls.
        """
        c = self.config
        self.sigmas = schedules.check_ladder("set_timesteps", c.sigmas) if c.sigmas else self._fit(num_inference_steps)
        levels = torch.arange(len(self.sigmas)).repeat_interleave(c.steps_per_level)
        if c.denoise:
            levels = torch.cat([levels, levels[-1:]])
        if num_inference_steps not in (None, len(levels)):
            raise ValueError(f"set_timesteps: num_inference_steps must be {len(levels)} for this ladder; got {num_inference_steps!r}.")
        step_size = schedules.technique4_step_size(self.sigmas, c.steps_per_level) if c.step_size is None else float(c.step_size)
        self._ladder, self._levels = self.sigmas.tolist(), levels.tolist()
        self._step_sizes = [step_size * (sigma / self._ladder[-1]) ** 2 for sigma in self._ladder]
        each = self.sigmas if self._table is None else schedules.timesteps_of(self.sigmas, self._table)
        self.timesteps, self.num_inference_steps = each[levels].to(device), len(levels)
        self._expected = each[levels].tolist()
        self._index, self._scaled, self._seed = 0, None, c.seed

    def _fit(self, calls):
        c = self.config
        levels, rest = divmod(calls - c.denoise, c.steps_per_level) if checks.whole(calls) else (0, 0)
        if rest or levels < 2:
            form = f"{c.steps_per_level} L" + " + 1" * c.denoise
            raise ValueError(f"set_timesteps: num_inference_steps must be {form} with at least 2 levels L; got {calls!r}.")
        return schedules.geometric(c.sigma_max, c.sigma_min, levels)

    def scale_model_input(self, sample, timestep=None):
        """The network's input at this step: the state, or √ᾱ times it for a VP network."""
        if self._table is None:
            return sample
        self._check_turn("scale_model_input", timestep)
        self._scaled = self._index
        return sample * self._root()

    def _root(self):
        return (1 + self._ladder[self._levels[self._index]] ** 2) ** -0.5

    def _check_turn(self, op, timestep):
        """Steps come in order: the network's answer belongs to the σ of this step."""
        if self.timesteps is None:
            raise ValueError(f"{op}: call set_timesteps first.")
        if self._index >= self.num_inference_steps:
            raise ValueError(f"{op}: all {self.num_inference_steps} steps are taken; call set_timesteps to start another run.")
        readable = timestep is not None and not (isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu")
        if readable and float(timestep) != self._expected[self._index]:   # elsewhere a look would wait for the device
            raise ValueError(f"{op}: step {self._index} is at timestep {self._expected[self._index]:.6g}; got {float(timestep):.6g}.")

    @torch.no_grad()
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """Take the next step.

        Args:
            model_output: the network's answer at this step's timestep, shape of sample. sample: the state, (B, *).
            generator: from which the first step draws the seed of the run; one Generator, not a list.

        Returns:
            StepOutput(prev_sample), or (prev_sample,).

        Raises:
            ValueError: out of turn, or shapes differ.
        """
        self._check_turn("step", timestep)
        score = self._score(model_output, sample)
        level = self._levels[self._index]
        if self.config.denoise and self._index == self.num_inference_steps - 1:
            x = shifted(sample, score, self._ladder[-1] ** 2)
        else:
            offset = self.config.first_sample * sample[:1].numel()
            x = langevin_step(sample, score, self._step_sizes[level], seed=self._run_seed(generator), step=self._index, offset=offset)
        self._index += 1
        return StepOutput(x) if return_dict else (x,)

    def _score(self, model_output, sample):
        sigma = self._ladder[self._levels[self._index]]
        if self._table is None:
            checks.check_like("step", "model_output", model_output, sample, of="sample")
            return conversions.convert(model_output, sample, sigma, kind=self._kind, to="score")
        if self._scaled != self._index:
            raise ValueError("step: a VP network's input must come from scale_model_input, which was not called for this step.")
        root = self._root()
        return conversions.vp_to_ve(
            conversions.convert(model_output, sample * root, sigma * root, root, kind=self._kind, to="score"), root**2
        )

    def _run_seed(self, generator):
        if self._seed is None and isinstance(generator, list | tuple):
            raise ValueError("step: generator must be one torch.Generator, not a list; a sample's noise depends on its number anyway.")
        if self._seed is None:
            if generator is None:
                self._seed = random.draw_seed()
            else:
                self._seed = int(torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device).item())
        return self._seed

    def add_noise(self, original_samples, noise, timesteps):
        """x = x₀ + σ z, the state at the given timesteps of this run: (B,), taken from `timesteps`.

        Raises:
            ValueError: a timestep is none of this run's.
        """
        if self.timesteps is None:
            raise ValueError("add_noise: call set_timesteps first.")
        asked = torch.as_tensor(timesteps, dtype=torch.float32).reshape(-1).tolist()
        of = dict(zip(self._expected, (self._ladder[level] for level in self._levels)))
        if any(t not in of for t in asked):
            raise ValueError(f"add_noise: timesteps must be of this run, {self._expected[0]:.6g} to {self._expected[-1]:.6g}; got {asked}.")
        sigma = torch.tensor([of[t] for t in asked], dtype=checks.compute_dtype(original_samples.dtype), device=original_samples.device)
        return (original_samples + checks.expand(sigma, original_samples) * noise).to(original_samples.dtype)
